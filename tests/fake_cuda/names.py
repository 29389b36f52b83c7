"""Every name of qpref that the harness uses, and the few that it replaces: when code moves, only this file follows."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

from qpref.attention import varlen
from qpref.data.pack import pack, split_by_tokens
from qpref.memory import tune
from qpref.memory.costs import peak_memory
from qpref.memory.forecast import run_forecast
from qpref.memory.setup import Setup
from qpref.memory.shape import model_shape
from qpref.memory.stream import Stream
from qpref.policy import fused
from qpref.policy import load as loading
from qpref.policy.divergence import NextTokens, token_kl
from qpref.policy.load import DTYPES, load_policy
from qpref.policy.reference import ReferenceStore
from qpref.recipe.resolve import make_plan
from qpref.records import Source, TokenizedExample
from qpref.training import invariants, optim, reference_pass, scoring
from qpref.training.heldout import heldout_means
from qpref.training.invariants import check_layout, check_start, first_batch
from qpref.training.loop import Trainer
from qpref.training.objective import Objective
from qpref.training.state import TrainingState

__all__ = [
    "DTYPES", "NextTokens", "Objective", "ReferenceStore", "Setup", "Source", "Stream", "TokenizedExample", "Trainer",
    "TrainingState", "check_layout", "check_start", "first_batch", "heldout_means", "load_policy", "make_plan",
    "model_shape",
    "optim", "pack", "peak_memory", "reference_pass", "run_forecast", "scoring", "split_by_tokens", "token_kl", "tune",
    "use_stand_ins", "varlen",
]  # fmt: skip

PACKAGES = ("qpref", "qpref_", "bitsandbytes", "transformers", "peft", "torch.optim", "torch.amp", "torch.nn.utils",
            "torch.nn.attention")  # fmt: skip
"""Modules whose lines a launch or a synchronization is booked on, by the start of their names; the innermost counts."""


def use_stand_ins(make_base: Any) -> None:
    """Replace what needs real weights or real values.

    Args:
        make_base: what to call for the base model, with the recipe's [model] section.
    """
    loading.load_base = lambda section, base, device: make_base(section)  # type: ignore[assignment]
    # Fake values say nothing, so what is judged by them passes: a loss's starting value, a step that is not finite.
    invariants.math = SimpleNamespace(**{**vars(math), "isclose": lambda *a, **k: True})  # type: ignore[assignment]
    fused.difference = lambda *a, **k: (0.0, 0.0)  # type: ignore[assignment]
    Objective.refuse_not_finite = lambda self, *faults: None  # type: ignore[method-assign,assignment]


def probe(policy: Any, examples: Any) -> Any:
    """Training's own trial of a forward and backward pass over some examples."""
    return tune._try(policy, examples)
