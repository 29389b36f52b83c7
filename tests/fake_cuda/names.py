"""Every name of qpref that the harness uses, and the few that it replaces: when code moves, only this file follows."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
from transformers import GenerationMixin

from qpref.attention import sdpa, varlen
from qpref.attention.determinism import deterministic
from qpref.data.mismatch import with_mismatched
from qpref.data.pack import num_fed_tokens, pack, split_by_tokens
from qpref.distributed.world import ALONE
from qpref.evaluation.generate import Sampling, answer_all
from qpref.evaluation.scores import Reference, kl_positions, score_pairs, score_reference
from qpref.hooks.torch_state import TorchState
from qpref.memory import tune
from qpref.memory.costs import peak_memory
from qpref.memory.forecast import run_forecast
from qpref.memory.stream import Stream
from qpref.merging.base import TrainedBase
from qpref.merging.compared_models import AsStored, AsTrained
from qpref.merging.conversions import Conversions
from qpref.merging.replay import ScoredRow, replay
from qpref.merging.replayed_pairs import Contrast, Replayed
from qpref.merging.request import Tolerance
from qpref.merging.verdict import Judge
from qpref.policy import adapter_folder, fused, head
from qpref.policy import load as loading
from qpref.policy.adapter_names import LayerNames
from qpref.policy.delta import AdaptableLayers, LoraDelta, LowRank
from qpref.policy.divergence import NextTokens, token_kl
from qpref.policy.float32 import compute_in_float32
from qpref.policy.load import DTYPES, load_plain, load_policy
from qpref.policy.matmul import float32_mm
from qpref.policy.reference import ReferenceStore, as_reference, row_keys
from qpref.policy.reference_cache import CheckRows
from qpref.recipe.resolve import make_plan
from qpref.recipe.sections import TrainSection
from qpref.records import Source, TokenizedExample
from qpref.training import invariants, optim, reference_pass, scoring, snapshot
from qpref.training.checkpoint import Checkpoint
from qpref.training.heldout import heldout_means
from qpref.training.invariants import check_layout, check_start, first_batch
from qpref.training.loop import Trainer
from qpref.training.objective import Objective
from qpref.training.reference_check import check_cache, measured_rounding
from qpref.training.snapshot import Session
from qpref.training.state import TrainingState
from tests.fake_cuda import efficient

__all__ = [
    "DTYPES", "AdaptableLayers", "AsStored", "AsTrained", "CheckRows", "Checkpoint", "Contrast", "Conversions", "Judge",
    "ALONE", "LayerNames", "LoraDelta", "LowRank",
    "NextTokens", "Objective", "Reference", "ReferenceStore", "Replayed", "Sampling", "ScoredRow", "Session", "Source",
    "Stream", "TokenizedExample", "Tolerance", "TorchState", "TrainSection", "TrainedBase", "Trainer", "TrainingState",
    "as_reference", "check_cache", "check_layout", "check_start", "compute_in_float32", "deterministic", "first_batch",
    "float32_mm", "head", "heldout_means", "kl_positions", "load_plain", "load_policy", "make_plan",
    "measured_rounding", "num_fed_tokens", "optim", "pack", "peak_memory", "reference_pass", "replay",
    "row_keys", "run_forecast", "score_pairs", "score_reference", "scoring", "snapshot", "split_by_tokens",
    "token_kl", "tune", "use_stand_ins", "varlen", "with_mismatched",
]  # fmt: skip

PACKAGES = ("qpref", "qpref_", "bitsandbytes", "transformers", "peft", "torch.optim", "torch.amp", "torch.nn.utils",
            "torch.nn.attention")  # fmt: skip
"""Modules whose lines a launch or a synchronization is booked on, by the start of their names; the innermost counts."""


def use_stand_ins(make_base: Any, start_tensors: Any) -> None:
    """Replace what needs real weights or real values.

    Args:
        make_base: what to call for the base model, with the recipe's [model] section.
        start_tensors: what to call for the tensors of a start adapter.
    """
    loading.load_base = lambda section, *others: make_base(section)  # type: ignore[assignment]
    adapter_folder.read_tensors = lambda folder: start_tensors()  # type: ignore[assignment]
    sdpa.scaled_dot_product_attention = efficient.attention
    torch.nn.functional.scaled_dot_product_attention = efficient.attention  # transformers', where rows are padded
    # Fake values say nothing, so what is judged by them passes: a loss's starting value, a step that is not finite.
    invariants.math = SimpleNamespace(**{**vars(math), "isclose": lambda *a, **k: True})  # type: ignore[assignment]
    fused.difference = lambda *a, **k: (0.0, 0.0)  # type: ignore[assignment]
    Objective.refuse_not_finite = lambda self, *faults: None  # type: ignore[method-assign,assignment]


def probe(policy: Any, examples: Any) -> Any:
    """Training's own trial of a forward and backward pass over some examples."""
    return tune._try(policy, examples)


def answers(policy: Any, prompts: list[list[int]], sampling: Sampling) -> list[tuple[str, bool]]:
    """Answers to one batch of prompts that are tokenized already, by a tokenizer that knows no text."""
    tokenizer = SimpleNamespace(stop_tokens=(2,), tokenizer=SimpleNamespace(decode=lambda ids, **options: str(ids)))
    # Whether every answer has ended is a value, so fake tensors would go on for ever.
    steps = iter([True] * sampling.max_new_tokens)
    GenerationMixin._has_unfinished_sequences = lambda self, *state, **options: next(steps, False)
    policy.share_prompts(False)
    return answer_all(policy, tokenizer, prompts, sampling)  # type: ignore[arg-type]
