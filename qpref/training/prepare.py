"""From a plan to all that a run needs, with everything refused that can be before a weight is trained."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qpref.data.check import CheckedData
from qpref.data.data_report import DataReport
from qpref.data.load import fingerprint, tokenize_rows
from qpref.data.mismatch import with_mismatched
from qpref.data.order import refuse_empty_steps, total_steps
from qpref.data.tokenize import PairTokenizer
from qpref.memory.limit import memory_limit
from qpref.policy.load import choose_device, load_policy
from qpref.policy.policy import Policy
from qpref.policy.source import BaseFolder, cached_sha256, resolve_base
from qpref.policy.tokenizer import load_tokenizer, stop_tokens
from qpref.recipe.resolve import Plan
from qpref.records import TokenizedExample
from qpref.training import invariants
from qpref.training.objective import Objective


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """What a run has once everything that can be refused has been.

    Attributes:
        memory_limit: bytes that the run may fill, as they were before the model was loaded.
    """

    plan: Plan
    base: BaseFolder
    tokenizer: Any
    policy: Policy
    loss: Objective
    examples: list[TokenizedExample]
    heldout: list[TokenizedExample]
    report: DataReport
    memory_limit: int
    fingerprints: dict[str, str]


def prepare(plan: Plan, checked: CheckedData) -> Prepared:
    """Tokenize the checked rows and load the policy.

    Raises:
        QprefError: of the kind that fits.
    """
    recipe = plan.recipe
    base = resolve_base(recipe.model)
    tokenizer = load_tokenizer(recipe.model, base)
    pairs = PairTokenizer.of(tokenizer, recipe.data.template, stop_tokens(base))
    seed = recipe.train.seed
    examples = tokenize_rows(checked.train, pairs, recipe.data, seed)
    heldout = tokenize_rows(checked.heldout, pairs, recipe.data, seed) if checked.heldout else []
    loss = Objective.of(plan.losses, _class_counts(examples))
    if "mismatched" in loss.needs:
        longest = recipe.data.max_length
        # A held-out file may have one prompt alone, so its partners come from all examples.
        heldout = with_mismatched([*heldout, *examples], seed, longest)[: len(heldout)]
        examples = with_mismatched(examples, seed, longest)
    refuse_empty_steps(recipe, len(examples))
    loss.refuse_bad_schedule(total_steps(recipe.train, len(examples)))
    invariants.check_first_row(pairs, examples[0])
    limit = memory_limit(recipe, choose_device(recipe.model.device))
    policy = load_policy(recipe, base)
    invariants.check_layout(policy, examples[0])
    return Prepared(
        plan=plan,
        base=base,
        tokenizer=tokenizer,
        policy=policy,
        loss=loss,
        examples=examples,
        heldout=heldout,
        report=checked.report,
        memory_limit=limit,
        fingerprints={
            "recipe": plan.fingerprint,
            "base model": json.dumps(base.weights, sort_keys=True),
            "training data": fingerprint(examples),
            "held-out data": fingerprint(heldout),
            "start adapter": start_digest(recipe.adapter.start),
        },
    )


def _class_counts(examples: Sequence[TokenizedExample]) -> tuple[int, int]:
    """Desirable and undesirable examples."""
    labels = [example.label for example in examples]
    return labels.count(True), labels.count(False)


def start_digest(start: str | None) -> str:
    """Of what a start adapter does: its tensors, and the settings that scale and place them."""
    if start is None:
        return ""
    settings = (Path(start) / "adapter_config.json").read_bytes()
    return f"{cached_sha256(Path(start) / 'adapter_model.safetensors')} {hashlib.sha256(settings).hexdigest()}"
