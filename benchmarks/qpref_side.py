"""qpref as a contestant: its own training loop, paused between steps."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from benchmarks.adapter import RANK, RATE, start_adapter
from benchmarks.contestants import Contestant, Job
from benchmarks.meter import Gate
from benchmarks.pairs import Pair, Single, as_singles, digest
from qpref.attention.register import SEGMENTS
from qpref.data.order import step_order, steps_per_epoch
from qpref.data.pack import pack
from qpref.policy.load import load_policy
from qpref.policy.policy import Policy
from qpref.policy.reference import ReferenceStore
from qpref.policy.source import resolve_base
from qpref.recipe.resolve import make_plan
from qpref.records import MetricRow, Source, TokenizedExample
from qpref.training import optim
from qpref.training.loop import Trainer
from qpref.training.objective import Objective
from qpref.training.state import TrainingState

T = TypeVar("T")


def _adapt_as_peft_does(policy: Policy) -> None:
    from peft.tuners.lora.bnb import Linear4bit

    from qpref.policy.lora import FusedLinear4bit

    for module in policy.model.modules():
        if isinstance(module, FusedLinear4bit):
            module.__class__ = Linear4bit


SWITCHES: dict[str, Callable[[Policy], None]] = {
    "prompt sharing": lambda policy: policy.share_prompts(False),
    "attention in blocks": lambda policy: policy.use_attention(SEGMENTS),
    "fused LoRA": _adapt_as_peft_does,
}
"""Switches that turn a technique off in a loaded policy; a new one also needs a row in
`benchmarks.contestants.ABLATIONS`."""


def train(job: Job, gate: Gate) -> None:
    """Train on the pairs in their order, passing the gate before each step."""
    contestant = job.contestant
    plan = make_plan(_recipe(job), (), job.folder / "run")
    train_section = plan.recipe.train
    policy = load_policy(plan.recipe, resolve_base(plan.recipe.model))
    start_adapter(policy.trained_parameters())
    for technique in contestant.without:
        SWITCHES[technique](policy)
    gate.meter.note_loaded()
    ordered = _examples(contestant, job.pairs)
    gate.digest = digest(_ids(example) for example in ordered)
    references = ReferenceStore()
    if not contestant.live_reference:
        for example in ordered:
            references.logprobs(policy, pack([example], policy.device))
    trainer = Trainer(
        train=train_section,
        policy=policy,
        objective=Objective.of(plan.losses, _class_counts(ordered)),
        references=references,
        optimizer=optim.make_optimizer(train_section, policy.trained_parameters().values(), policy.device),
        scaler=torch.amp.GradScaler(policy.device.type, enabled=False),
        examples=before_shuffle(ordered, train_section.batch_size, train_section.seed),
        heldout=[],
        state=TrainingState(),
        recorder=_LossRecorder(gate),  # the loop calls nothing but `write`
        save=lambda: None,
        should_stop=_Pause(gate),
    )
    gate.wait()
    trainer.run()


def _recipe(job: Job) -> dict[str, Any]:
    contestant, empty = job.contestant, job.folder / "empty.jsonl"
    empty.touch()
    return {
        "model": {"base": str(job.base), "dtype": "bf16", "device": job.device},
        "adapter": {"rank": RANK, "alpha": 2 * RANK},
        "data": {"train": str(empty)},
        "loss": {"name": contestant.loss, "beta": 0.1},
        "train": {
            "learning_rate": RATE,
            "schedule": "constant",
            "warmup_ratio": 0.0,
            "batch_size": contestant.pairs_per_step * (2 if contestant.loss == "kto" else 1),
            "tokens_per_microbatch": contestant.tokens_per_microbatch,
            "gradient_checkpointing": contestant.checkpointing,
        },
        "sinks": [],
    }


def _examples(contestant: Contestant, pairs: Sequence[Pair]) -> list[TokenizedExample]:
    """Make the examples in training order."""
    rows: Sequence[Pair | Single] = pairs if contestant.loss == "dpo" else as_singles(pairs)
    return [_example(row, number) for number, row in enumerate(rows, 1)]


def _example(row: Pair | Single, number: int) -> TokenizedExample:
    """Make the example that qpref's tokenizing produces for a row."""
    branches = (row.chosen, row.rejected) if isinstance(row, Pair) else (row.completion, row.mismatched)
    return TokenizedExample(
        prompt=array("i", row.prompt),
        branches=tuple(array("i", branch) for branch in branches),
        truncated=(False, False),
        weight=1.0,
        margin=0.0,
        label=None if isinstance(row, Pair) else row.desirable,
        source=Source(path="benchmark", line=number),
    )


def _ids(example: TokenizedExample) -> list[array[int]]:
    return [example.prompt, *example.branches]


def _class_counts(examples: Sequence[TokenizedExample]) -> tuple[int, int]:
    labels = [example.label for example in examples]
    return labels.count(True), labels.count(False)


def before_shuffle(ordered: Sequence[T], batch_size: int, seed: int) -> list[T]:
    """Invert a run's shuffle: permute rows so that training visits them in the given order."""
    steps = steps_per_epoch(len(ordered), batch_size)
    shuffled = [index for step in range(steps) for index in step_order(len(ordered), batch_size, seed, step)]
    permuted = list(ordered)
    for index, row in zip(shuffled, ordered, strict=True):
        permuted[index] = row
    return permuted


class _LossRecorder:
    """Replacement for the loop's recorder that passes the training loss to the gate."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    def write(self, row: MetricRow) -> None:
        self._gate.loss = row.values["loss"]


class _Pause:
    """Replacement for the loop's stop check, called between steps: waits at the gate, and never stops."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    def __call__(self) -> bool:
        self._gate.wait()
        return False
