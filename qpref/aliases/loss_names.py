"""Names of losses in other tools -> TRL's trainer and loss type.

Each installed loss declares the TRL configurations that equal it (`TrlCase`), so TRL's names lead to its own.
"""

from __future__ import annotations

from typing import NamedTuple


class TrlLoss(NamedTuple):
    """A loss in TRL's words: the class name of its trainer, and `loss_type` of the trainer's config."""

    trainer: str
    loss_type: str


LOSS_NAMES = {
    "sigmoid": TrlLoss("DPOTrainer", "sigmoid"),
    "cdpo": TrlLoss("DPOTrainer", "sigmoid"),
    "conservative_dpo": TrlLoss("DPOTrainer", "sigmoid"),
    "kto_pair": TrlLoss("KTOTrainer", "kto"),
    "slic": TrlLoss("DPOTrainer", "hinge"),
    "bco": TrlLoss("DPOTrainer", "bco_pair"),
    "sppo": TrlLoss("DPOTrainer", "sppo_hard"),
    "aot_pair": TrlLoss("DPOTrainer", "aot_unpaired"),
    "nll": TrlLoss("DPOTrainer", "sft"),
}
"""Names that are no loss here; those that are the same in TRL and here need no entry."""

DEFAULT_LOSS_TYPES = {"DPOTrainer": "sigmoid", "KTOTrainer": "kto", "CPOTrainer": "sigmoid", "ORPOTrainer": "orpo"}
"""Loss type of a trainer's config that names none; ORPO's config has no loss types."""
