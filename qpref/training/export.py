"""The end of a run: the best step's adapter in place of the last one's, and its export."""

from __future__ import annotations

import logging

from qpref import fsio, publish
from qpref.data.order import total_steps
from qpref.errors import PolicyError
from qpref.policy.adapter import TRAINED
from qpref.training import checkpoint, snapshot
from qpref.training.card import write_adapter_card
from qpref.training.folder import CARD, RunFolder
from qpref.training.prepare import Prepared
from qpref.training.result import write_result
from qpref.training.snapshot import Session
from qpref.training.state import TrainingState

log = logging.getLogger("qpref")


def take_best(prepared: Prepared, folder: RunFolder, state: TrainingState) -> None:
    """Restore the best step's adapter, where the recipe sets `best_by`, and log which one it is.

    Raises:
        CheckpointError: its checkpoint doesn't verify.
    """
    train, best = prepared.plan.recipe.train, state.best
    if train.best_by is None:
        return
    if best is None:
        log.warning("no held-out row whose checkpoint is left has a number for %s; the adapter is the last step's",
                    train.best_by)  # fmt: skip
        return
    if best.step != state.step:
        saved = checkpoint.read(checkpoint.path_of(folder.checkpoints, best.step))
        snapshot.restore_adapter(saved, prepared.policy)
        snapshot.restore_heldout(saved, state)
    total = total_steps(train, len(prepared.examples))
    early = f", which stopped early, after {state.step} of {total} steps" if state.step < total else ""
    log.info("the adapter is that of step %d of this run%s: %s %.4f is the best of its held-out rows",
             best.step, early, train.best_by, best.value)  # fmt: skip


def write_adapter(session: Session, folder: RunFolder, first_step: int) -> None:
    """Write the adapter in PEFT's format, with the tokenizer that it was trained with, and result.json, which has the
    manifest of both: a run is finished as soon as the adapter has its name."""
    prepared = session.prepared
    model = prepared.policy.model
    bad = [name for name, value in prepared.policy.trained_parameters().items() if not bool(value.isfinite().all())]
    if bad:
        raise PolicyError(f"the trained adapter is not finite in {bad[0]}; the last checkpoint may be")
    facts, section = session.description, prepared.plan.recipe.model
    settings = model.peft_config[TRAINED]
    settings.base_model_name_or_path = facts["base_name"]
    settings.revision = section.revision
    num_bytes = sum(value.nbytes for value in prepared.policy.trained_parameters().values())
    folder.refuse_replaced()
    with publish.staged_folder(folder.adapter) as staging, fsio.disk_errors(folder.adapter, num_bytes):
        model.save_pretrained(staging, selected_adapters=[TRAINED], save_embedding_layers=False)
        prepared.tokenizer.save_pretrained(staging)
        write_result(folder.result, session, first_step, publish.manifest(staging))
        write_adapter_card(staging / CARD, prepared.plan.recipe, folder, facts, settings.r)
        fsio.remove_tree(folder.adapter)  # a damaged one
