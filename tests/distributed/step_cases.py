"""Steps of one process and of several on one tiny NF4 model, computed in each process of a world."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from conftest import load_worn, make_example
from torch import Tensor

from qpref.data.deal import deal
from qpref.data.mismatch import with_mismatched
from qpref.distributed.world import ALONE, World
from qpref.hooks.manager import LOSS, PluginHost
from qpref.policy.policy import Policy
from qpref.policy.reference import ReferenceStore
from qpref.recipe.resolve import make_plan
from qpref.records import TokenizedExample
from qpref.training import loop, optim, step
from qpref.training.gradient_sum import sum_gradients
from qpref.training.loop import Trainer
from qpref.training.metrics import Averages
from qpref.training.objective import Objective
from qpref.training.scoring import Scorer
from qpref.training.state import TrainingState
from qpref.training.whole_batch import WholeBatch

CPU = torch.device("cpu")
ALL = 100_000
"""Tokens per micro-batch that hold any step."""

Losses = tuple[dict[str, Any], ...]
MIXTURES: tuple[Losses, ...] = (
    ({"name": "dpo"}, {"name": "sft", "weight": 0.3}),
    ({"name": "aot"}, {"name": "sft", "weight": 0.3}),
    ({"name": "kto"}, {"name": "apo_zero_unpaired", "weight": 2.0}),
    ({"name": "bco_pair", "baseline": "step"}, {"name": "cpo", "weight": 0.5}),
)
DPO, KTO, AOT = ({"name": "dpo"},), ({"name": "kto"},), ({"name": "aot"},)
BASELINE: Losses = ({"name": "bco_pair", "baseline": "step"},)
ROW_LOSSES = ("dpo", "kto")
ONE_OF_EACH_PATH: tuple[Losses, ...] = (DPO, KTO, AOT, BASELINE)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A step to compute.

    Attributes:
        tokens: per micro-batch.
        first: of the examples.
        size: examples of the step.
        shared: each prompt is computed once.
        recomputed: layers whose activations are.
        tolerance: of the gradient, relative to its largest number.
    """

    losses: Losses
    tokens: int = ALL
    first: int = 0
    size: int = 9
    shared: bool = True
    recomputed: int = 0
    dropout: float = 0.0
    tolerance: float = 1e-6

    @property
    def name(self) -> str:
        losses = "+".join(":".join(str(value) for value in loss.values()) for loss in self.losses)
        return f"{losses}/{self.tokens}/{self.first}/{self.size}/{self.shared}/{self.recomputed}/{self.dropout}"


def cases_for(size: int) -> Iterator[Case]:
    """Every loss in any number of processes; every setting in two, and the steps of fewer examples than processes."""
    every = [({"name": name},) for name in sorted(PluginHost().names(LOSS))]
    for losses in (*every, BASELINE, *MIXTURES):
        yield Case(losses=losses, tokens=90)
    for losses in ONE_OF_EACH_PATH:
        yield Case(losses=losses, size=1)
        yield Case(losses=losses, size=3, tokens=1)
    if size > 2:
        return
    for losses in (
        DPO,
        AOT,
    ):  # 29, 21, 30 and 24 tokens: two micro-batches of nearly the same size, which are dealt whole
        yield Case(losses=losses, tokens=55, first=5, size=4, dropout=0.1, tolerance=0)
    for losses in (*ONE_OF_EACH_PATH, *MIXTURES):
        yield Case(losses=losses)
    for losses in ONE_OF_EACH_PATH:
        yield Case(losses=losses, tokens=1)
        yield Case(losses=losses, tokens=90, shared=False)
        yield Case(losses=losses, tokens=90, recomputed=2)
        yield Case(losses=losses, tokens=90, dropout=0.1)


def pairs() -> list[TokenizedExample]:
    """Pairs of different lengths, weights and scores; the first three share a prompt, the fourth is the longest."""
    lengths = [
        (20, 6, 9),
        (20, 14, 3),
        (20, 1, 7),
        (90, 30, 40),
        *((5 + 3 * n, 6 + n % 4, 9 - n % 3) for n in range(5)),
    ]
    examples = [make_example(line, *each) for line, each in enumerate(lengths)]
    return [
        replace(
            each,
            prompt=examples[0].prompt if line < 3 else each.prompt,
            weight=0.25 + 0.25 * line,
            columns={"score_chosen": 1.5**line, "score_rejected": 0.25},
        )
        for line, each in enumerate(examples)
    ]


def lists() -> list[TokenizedExample]:
    """The same as lists of two responses and, every other one, of three, of which two tie."""
    examples = []
    for line, each in enumerate(pairs()):
        branches = (*each.branches, each.branches[1][::-1])[: 2 + line % 2]
        ranked = {"ranks": (1, 2, 2)[: len(branches)], "scores": (1.5**line, 0.25, 0.25)[: len(branches)]}
        examples.append(replace(each, branches=branches, truncated=(False,) * len(branches), **ranked))
    return examples


def examples_for(objective: Objective) -> list[TokenizedExample]:
    if objective.is_listed:
        return lists()
    if objective.is_paired:
        return pairs()
    singles = [
        replace(each, branches=each.branches[:1], truncated=(False,), label=line % 3 != 0)
        for line, each in enumerate(pairs())
    ]
    return with_mismatched(singles, 0, 256) if objective.needs_mismatched else singles


@dataclass
class Bench:
    """A policy away from its start, and trainers on it.

    Attributes:
        start: the adapter's values.
    """

    base: Path
    policy: Policy
    start: dict[str, Tensor]

    @classmethod
    def of(cls, base: str, dropout: float = 0.0) -> Bench:
        torch.set_num_threads(1)
        policy = load_worn(
            {
                "model": {"base": base, "quantization": "nf4", "dtype": "float32"},
                "adapter": {"rank": 4, "alpha": 8, "dropout": dropout},
            }
        )
        start = {name: value.detach().clone() for name, value in policy.trained_parameters().items()}
        for name, value in start.items():
            if "lora_B" in name:
                value.neg_()  # of these two signs, the one under which KTO's divergence is not clamped to 0
        return cls(Path(base), policy, start)

    def trainer(self, losses: Losses, world: World, **train: Any) -> Trainer:
        settings = {"batch_size": 9, "gradient_checkpointing": False} | train
        recipe = {
            "model": {"base": str(self.base), "quantization": "nf4", "dtype": "float32"},
            "data": {"train": "none.jsonl"},
            "loss": list(losses) if len(losses) > 1 else losses[0],
            "train": settings,
            "sinks": [],
        }
        plan = make_plan(recipe, (), self.base / "run")
        objective = Objective.of(plan.losses, (5, 3))
        examples = examples_for(objective)
        with torch.no_grad():
            for name, value in self.policy.trained_parameters().items():
                value.copy_(self.start[name])
        return Trainer(
            train=plan.recipe.train,
            policy=self.policy,
            objective=objective,
            references=ReferenceStore() if objective.needs_reference else None,
            optimizer=optim.make_optimizer(plan.recipe.train, self.policy.trained_parameters().values(), CPU),
            scaler=torch.amp.GradScaler("cpu", enabled=False),
            examples=examples,
            heldout=examples,
            state=TrainingState(),
            recorder=None,  # type: ignore[arg-type] - nothing is recorded
            save=lambda: None,
            should_stop=lambda: False,
            world=world,
        )

    def step(self, case: Case, world: World) -> dict[str, Any]:
        """A case's gradient as one vector, its metrics, and the state of losses and the reference's rows afterwards."""
        trainer = self.trainer(case.losses, world, tokens_per_microbatch=case.tokens)
        self.policy.share_prompts(case.shared)
        self.policy.recompute_layers(case.recomputed)
        self.policy.model.train()
        self.policy.seed_dropout(0, 0)
        result = trainer.compute_gradient(trainer.examples[case.first : case.first + case.size])
        trainer.state.averages.settle(world)
        gradient = torch.cat([value.grad.reshape(-1) for value in self.policy.trained_parameters().values()])
        trainer.optimizer.zero_grad(set_to_none=True)
        return {
            "gradient": gradient,
            "means": trainer.state.averages.means(),
            "counts": trainer.state.averages.counts,
            "tokens": trainer.state.tokens,
            "state": {name: value.tolist() for name, value in result.state.items()},
            "rows": {} if trainer.references is None else trainer.references.rows,
        }

    def rows(self, losses: Losses, world: World) -> list[dict[str, Any]]:
        """The metric rows of 24 steps of three examples each, with loss scaling, and how they ended."""
        trainer = self.trainer(
            losses, world, tokens_per_microbatch=60, batch_size=3, epochs=8, log_every=4, eval_every=8,
            learning_rate=1e-4,
        )  # fmt: skip
        self.policy.share_prompts(True)
        self.policy.recompute_layers(0)
        rows: list[dict[str, Any]] = []
        trainer.recorder = SimpleNamespace(  # type: ignore[assignment]
            write=lambda row: rows.append({"step": row.step, "split": row.split, "tokens": row.tokens, **row.values})
        )
        trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=5)
        assert trainer.run()
        return [*rows, {"step": trainer.state.step, "split": "scale", "value": trainer.scaler.get_scale()}]


def digest(tensors: Sequence[Tensor]) -> str:
    return hashlib.sha256(b"".join(each.contiguous().numpy().tobytes() for each in tensors)).hexdigest()


def compare(world: World, base: str) -> dict[str, Any]:
    """All that this module compares, of one start of the processes."""
    benches = {dropout: Bench.of(base, dropout) for dropout in (0.0, 0.1)}
    return {
        "steps": compare_steps(world, benches),
        "rows": compare_rows(world, benches[0.1]),
        "mistakes": compare_mistakes(world, benches[0.0]),
        "sum": sum_of_few(world),
    }


def compare_steps(world: World, benches: dict[float, Bench]) -> list[dict[str, Any]]:
    """Compute every case in all processes together; one of them, in turn, computes it alone too and compares."""
    found = []
    for number, case in enumerate(cases_for(world.size)):
        bench = benches[case.dropout]
        ours = bench.step(case, world)
        rows = [ours["rows"][key] for key in sorted(ours["rows"])]
        facts = repr(
            [digest([ours["gradient"]]), digest(rows), ours["means"], ours["counts"], ours["tokens"], ours["state"]]
        )
        each = world.exchange(facts, "a case")
        if number % world.size == world.rank:
            alone = bench.step(case, ALONE)
            largest = alone["gradient"].abs().max().item()
            found.append(
                {
                    "case": case.name,
                    "tolerance": case.tolerance,
                    "largest": largest,
                    "difference": (ours["gradient"] - alone["gradient"]).abs().max().item() / largest,
                    "means": [ours["means"], alone["means"]],
                    "counts": [ours["counts"], alone["counts"]],
                    "tokens": [ours["tokens"], alone["tokens"]],
                    "same everywhere": all(others == facts for others in each),
                    "same rows": ours["rows"].keys() == alone["rows"].keys()
                    and all(torch.allclose(ours["rows"][key], row, atol=1e-5) for key, row in alone["rows"].items()),
                }
            )
    return found


def compare_rows(world: World, bench: Bench) -> dict[str, list[list[dict[str, Any]]]]:
    """The rows of 24 steps, of all processes together and of this one alone, by loss."""
    found = {}
    for number, name in enumerate(ROW_LOSSES):
        ours = bench.rows(({"name": name},), world)
        if number % world.size == world.rank:
            found[name] = [ours, bench.rows(({"name": name},), ALONE)]
    return found


def compare_mistakes(world: World, bench: Bench) -> dict[str, float]:
    """How far a step with a mistake is from that of one process, in its gradient or its metrics; rank 0 compares."""
    found = {}
    for name, (losses, mistake) in MISTAKES.items():
        case = Case(losses=losses, tokens=90)
        with mistake():
            ours = bench.step(case, world)
        if not world.is_first:
            continue
        alone = bench.step(case, ALONE)
        gradient = (ours["gradient"] - alone["gradient"]).abs().max() / alone["gradient"].abs().max()
        means = [abs(ours["means"].get(name, 0.0) - value) for name, value in alone["means"].items()]
        found[name] = max(means) if "metrics" in name else gradient.item()
    return found


def _mean_of_each_process() -> Any:
    return mock.patch.object(
        step, "_backward", lambda whole, *rest: BACKWARD(replace(whole, examples=whole.members(whole.share)), *rest)
    )


def _dealt(change: Callable[[list[list[int]]], object]) -> Any:
    def mistaken(*call: Any) -> list[list[int]]:
        shares = deal(*call)
        if len(shares) > 1:
            change(shares)
        return shares

    return mock.patch.object(loop, "deal", mistaken)


def _own_scores_alone() -> Any:
    return mock.patch.object(
        WholeBatch, "_collect", lambda whole, world, *rest: COLLECT(whole, replace(world, devices=None), *rest)
    )


def _own_metrics_alone() -> Any:
    return mock.patch.object(Averages, "settle", lambda averages, world=ALONE: SETTLE(averages))


def _lost_weights() -> Any:
    def pack(scorer: Scorer, examples: Sequence[TokenizedExample]) -> Any:
        batch = PACK(scorer, examples)
        is_shared = torch.tensor([batch.group_of.count(group) > 1 for group in batch.group_of])
        return replace(batch, weight=batch.weight.masked_fill(is_shared, 1.0))

    return mock.patch.object(Scorer, "pack", pack)


BACKWARD, COLLECT, SETTLE, PACK = step._backward, WholeBatch._collect, Averages.settle, Scorer.pack
MISTAKES: dict[str, tuple[Losses, Callable[[], Any]]] = {
    "mean of each process": (DPO, _mean_of_each_process),
    "an example dealt twice": (DPO, lambda: _dealt(lambda shares: shares[1].append(shares[0][0]))),
    "an example dealt never": (DPO, lambda: _dealt(lambda shares: shares[0].pop())),
    "KL of each process": (KTO, _own_scores_alone),
    "sort of each process": (AOT, _own_scores_alone),
    "metrics of each process": (DPO, _own_metrics_alone),
    "weights of shared prompts lost": (DPO, _lost_weights),
}


def sum_of_few(world: World) -> list[Any]:
    """The sums of gradients that all, one and none of the processes have, and of their faults."""
    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(3)]
    parameters[0].grad = torch.full((2,), float(world.rank + 1))
    if world.rank == world.size - 1:
        parameters[1].grad = torch.tensor([3.0, torch.inf])
    faults = sum_gradients(world, parameters, torch.tensor([False, world.rank == 1]))
    return [[None if each.grad is None else each.grad.tolist() for each in parameters], faults.tolist()]
