"""Prepare a run: data, tokenizer, policy and losses, with every check that can run before training."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qpref import fsio, locks
from qpref.data import token_cache
from qpref.data.check import CheckedData
from qpref.data.data_report import DataReport
from qpref.data.load import fingerprint, tokenize_rows
from qpref.data.masking import Masking
from qpref.data.mismatch import with_mismatched
from qpref.data.order import refuse_empty_steps, step_order, total_steps
from qpref.data.tokenize import PairTokenizer
from qpref.distributed.world import ALONE, World
from qpref.errors import PolicyError
from qpref.memory.limit import enforced_limit
from qpref.policy.device import announce
from qpref.policy.kept_base import KeptBase
from qpref.policy.load import choose_device, load_policy
from qpref.policy.policy import Policy
from qpref.policy.source import BaseFolder, cached_sha256, resolve_base
from qpref.policy.start_base import warn_of_other_tokenizer
from qpref.policy.tokenizer import load_tokenizer, stop_tokens
from qpref.recipe.plan import Plan
from qpref.recipe.sections import Recipe
from qpref.records import TokenizedExample
from qpref.training import invariants
from qpref.training.base_sharing import sharing
from qpref.training.folder import EXPORT_AGAIN, RunFolder
from qpref.training.model_limits import refuse_beyond_limits
from qpref.training.objective import Objective


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """The parts of a run that has passed its checks.

    Attributes:
        world: the processes of the run.
        base: the base model's folder.
        memory_limit: bytes that the run may fill, measured before the model was loaded.
        fingerprints: digests of what a resumed run must share with its checkpoint, by name.
    """

    plan: Plan
    world: World
    base: BaseFolder
    tokenizer: Any
    policy: Policy
    objective: Objective
    examples: list[TokenizedExample]
    heldout: list[TokenizedExample]
    report: DataReport
    memory_limit: int
    fingerprints: dict[str, str]

    @property
    def reference_name(self) -> str | None:
        """The reference in words; None where the losses need none."""
        if not self.objective.needs_reference:
            return None
        start = self.plan.recipe.adapter.start
        return (
            "the base, with its adapter off"
            if self.reference_is_base
            else f"a frozen copy of the start adapter, {start}"
        )

    @property
    def reference_is_base(self) -> bool:
        """True where the reference is the base and not a start adapter's frozen copy."""
        adapter = self.plan.recipe.adapter
        return adapter.start is None or adapter.reference == "base"

    @property
    def starts_at_reference(self) -> bool:
        """True where policy and reference agree before training."""
        return self.plan.recipe.adapter.start is None or not self.reference_is_base

    @property
    def all_examples(self) -> list[TokenizedExample]:
        """Training examples, then held-out ones."""
        return [*self.examples, *self.heldout]

    def first_step_examples(self) -> list[TokenizedExample]:
        """Return the examples of the first optimizer step."""
        train = self.plan.recipe.train
        positions = step_order(len(self.examples), train.batch_size, train.seed, 0)
        return [self.examples[position] for position in positions]


def prepare(plan: Plan, checked: CheckedData, world: World = ALONE, kept: KeptBase | None = None) -> Prepared:
    """Tokenize the checked rows and load the policy.

    Args:
        kept: the base of several runs of this process, see `load_policy`.

    Raises:
        QprefError: of the kind that fits.
    """
    recipe = plan.recipe
    with _in_turn(world, recipe.model.base, "reads the base"):
        base = resolve_base(recipe.model)
    tokenizer = load_tokenizer(recipe.model, base)
    pairs = PairTokenizer.of(tokenizer, recipe.data.template, stop_tokens(base), Masking.of(recipe.data))
    folder = token_cache.folder_of(pairs) if recipe.data.cache else None
    with _in_turn(world, str(folder) if folder else None, "tokenizes the data"):
        examples = tokenize_rows(checked.train, pairs, recipe.data, recipe.train.seed)
        heldout = tokenize_rows(checked.heldout, pairs, recipe.data, recipe.train.seed) if checked.heldout else []
    objective = Objective.of(plan.losses, _class_counts(examples))
    if objective.needs_mismatched:
        examples, heldout = _with_partners(recipe, examples, heldout)
    refuse_empty_steps(recipe, len(examples))
    objective.refuse_bad_schedule(total_steps(recipe.train, len(examples)))
    invariants.check_first_row(pairs, examples[0])
    device = choose_device(recipe.model.device)
    announce(device, recipe.model.device)
    limit = enforced_limit(recipe, device, 0 if kept is None else kept.num_bytes_on(device))
    _refuse_damaged_start(recipe.adapter.start)
    if recipe.adapter.start is not None:
        warn_of_other_tokenizer(Path(recipe.adapter.start), tokenizer)
    policy = load_policy(recipe, base, sharing(recipe, base, world, examples, limit), kept)
    refuse_beyond_limits(policy, [*examples, *heldout])
    invariants.check_layout(policy, examples[0])
    invariants.check_company(policy, [*examples, *heldout])
    policy.finish_passes()
    return Prepared(
        plan=plan,
        world=world,
        base=base,
        tokenizer=tokenizer,
        policy=policy,
        objective=objective,
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
            **plan.file_digests,
        },
    )


def _in_turn(world: World, key: str | None, work: str) -> AbstractContextManager[None]:
    """Context in which one process of a machine after the other works: the first fills a cache, the others read it.

    Args:
        key: of the cached work; None for what isn't cached, which all processes do at once.
        work: for a message to those that wait.
    """
    if world.size == 1 or key is None:
        return nullcontext()
    name = hashlib.blake2b(key.encode(), digest_size=16).hexdigest()
    return locks.in_turn(fsio.cache_folder() / "turns" / name, work)


def _with_partners(
    recipe: Recipe, examples: list[TokenizedExample], heldout: list[TokenizedExample]
) -> tuple[list[TokenizedExample], list[TokenizedExample]]:
    """Give every example a mismatched partner: training examples among themselves, held-out ones among all.

    A held-out file may have one prompt alone, so its partners come from all examples.
    """
    seed, longest = recipe.train.seed, recipe.data.max_length
    partnered = with_mismatched([*heldout, *examples], seed, longest)[: len(heldout)]
    return with_mismatched(examples, seed, longest), partnered


def _class_counts(examples: Sequence[TokenizedExample]) -> tuple[int, int]:
    """Count desirable and undesirable examples."""
    labels = [example.label for example in examples]
    return labels.count(True), labels.count(False)


def _refuse_damaged_start(start: str | None) -> None:
    """Refuse to start from a run's adapter that isn't as that run wrote it."""
    if start is None or Path(start).name != "adapter":
        return
    folder = RunFolder(Path(start).parent)
    if folder.run_json.is_file() and (damage := folder.adapter_damage()):
        raise PolicyError(f"[adapter] start: {damage}", EXPORT_AGAIN)


def start_digest(start: str | None) -> str:
    """Hash a start adapter: its tensors, and the settings that scale them and name their layers; empty for none."""
    if start is None:
        return ""
    settings = (Path(start) / "adapter_config.json").read_bytes()
    return f"{cached_sha256(Path(start) / 'adapter_model.safetensors')} {hashlib.sha256(settings).hexdigest()}"
