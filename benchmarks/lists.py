"""Four ranked responses to a prompt as six pairs, and as one list.

    python -m benchmarks.lists [--prompt 167] [--response 300] [--turns 3]

The shape of SmolLM2-135M with random weights in NF4, rank 16, bf16. All contestants train the same policy on six pairs
a step by qpref's own loop, on examples that it tokenizes from the same rows: one list of four responses; the six pairs
of that row in one micro-batch, or each in a micro-batch of its own; and six pairs of six prompts in one micro-batch, as
in a shuffled file. The reference's log-probabilities are computed before, once for each response either way.
Contestants take turns of one step; the first turn isn't counted. CPU seconds are those of all threads of the process.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import torch

from benchmarks import machine
from benchmarks.meter import CpuMeter
from benchmarks.pairs import text
from benchmarks.shapes import FIRST_WORD, SHAPES, Shape, make_base
from qpref.data.load import load_rows
from qpref.data.pack import pack
from qpref.policy.reference import ReferenceStore
from qpref.recipe.resolve import make_plan
from qpref.records import TokenizedExample
from qpref.training import optim
from qpref.training.loop import Trainer
from qpref.training.metrics import Recorder
from qpref.training.prepare import Prepared, prepare
from qpref.training.state import TrainingState

RESULTS = Path(__file__).parent / "results"
NUM_RESPONSES = 4
NUM_PAIRS = NUM_RESPONSES * (NUM_RESPONSES - 1) // 2
UNLIMITED = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Contestant:
    """One way to train on six pairs in a step.

    Attributes:
        loss: name of the loss.
        rows: prompts that the pairs belong to.
        budget: tokens per micro-batch; 1 gives every example a micro-batch of its own.
    """

    name: str
    loss: str
    rows: int = 1
    budget: int = UNLIMITED


CONTESTANTS = (
    Contestant(name="one list", loss="plackett_luce"),
    Contestant(name="its six pairs, one micro-batch", loss="dpo"),
    Contestant(name="its six pairs, a micro-batch each", loss="dpo", budget=1),
    Contestant(name="six pairs of six prompts, one micro-batch", loss="dpo", rows=NUM_PAIRS),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", type=int, default=167, help="tokens of a prompt")
    parser.add_argument("--response", type=int, default=300, help="tokens of a response")
    parser.add_argument("--turns", type=int, default=3, help="counted steps of each contestant")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the table")
    options = parser.parse_args()
    measured = measure(SHAPES["135M"], options.prompt, options.response, options.turns)
    now = datetime.now(UTC)
    lines = [
        f"# Four responses as six pairs and as one list, {now:%Y-%m-%d}",
        "",
        f"`python -m benchmarks.lists --prompt {options.prompt} --response {options.response} --turns {options.turns}`",
        "",
        "{cpu}, {cores} cores, {threads} threads".format(**machine.describe(torch.get_num_threads()))
        + f", torch {torch.__version__}; medians of {options.turns} turns, load {os.getloadavg()[0]:.0f} at the end.",
        "",
        *table(measured),
    ]
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / f"{now:%Y-%m-%d}-lists.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def measure(shape: Shape, prompt: int, response: int, turns: int) -> dict[str, dict[str, float]]:
    """Train all contestants in turns.

    Args:
        prompt, response: lengths in tokens.

    Returns:
        Contestant's name -> tokens fed in a step, median cpu_seconds and wall_seconds of a step, and largest peak_bytes
        above the level before the step.
    """
    with tempfile.TemporaryDirectory(prefix="qpref-lists-") as scratch:
        trainers = _trainers(shape, prompt, response, Path(scratch))
        steps: dict[str, list[dict[str, float]]] = {name: [] for name in trainers}
        for turn in range(turns + 1):
            for name, trainer in trainers.items():
                meter = CpuMeter()
                meter.note_loaded()
                meter.start()
                trainer.step()
                trainer.state.step += 1
                if turn:
                    steps[name].append(meter.stop())
    return {name: _summary(steps[name], trainer) for name, trainer in trainers.items()}


def _summary(steps: Sequence[Mapping[str, float]], trainer: Trainer) -> dict[str, float]:
    return {
        "tokens": trainer.state.tokens / trainer.state.step,
        "peak_bytes": max(step["peak_bytes"] for step in steps),
    } | {key: statistics.median(step[key] for step in steps) for key in ("cpu_seconds", "wall_seconds")}


def table(measured: Mapping[str, Mapping[str, float]]) -> Iterator[str]:
    """Write a row for each contestant; the ratio is its CPU seconds over those of the first one."""
    yield "| six pairs as | pairs / CPU s | pairs / s | the list is faster by | peak MiB of a step |"
    yield "|---|---|---|---|---|"
    first = next(iter(measured.values()))["cpu_seconds"]
    for name, found in measured.items():
        cpu, wall = found["cpu_seconds"], found["wall_seconds"]
        speeds = f"{NUM_PAIRS / cpu:.3f} | {NUM_PAIRS / wall:.3f} | {cpu / first:.2f}"
        yield f"| {name} | {speeds} | {found['peak_bytes'] / 2**20:.0f} |"


def write_rows(path: Path, shape: Shape, prompt: int, response: int) -> None:
    """Write six prompts with four ranked responses each, as JSON Lines."""
    rng = random.Random(0)

    def words(count: int) -> str:
        return text(rng.randrange(FIRST_WORD, shape.vocab_size) for _ in range(count))

    with path.open("w") as file:
        for _ in range(NUM_PAIRS):
            ranked = [words(response - 1) for _ in range(NUM_RESPONSES)]
            file.write(json.dumps({"prompt": words(prompt), "ranked": ranked}) + "\n")


def _trainers(shape: Shape, prompt: int, response: int, scratch: Path) -> dict[str, Trainer]:
    base, rows = make_base(shape, scratch / "base"), scratch / "ranked.jsonl"
    write_rows(rows, shape, prompt, response)
    by_loss: dict[str, Prepared] = {}
    for contestant in CONTESTANTS:
        if contestant.loss not in by_loss:
            plan = make_plan(_recipe(base, rows, contestant.loss), (), scratch / contestant.loss)
            by_loss[contestant.loss] = prepare(plan, load_rows(plan))
    policy = by_loss[CONTESTANTS[0].loss].policy
    references = ReferenceStore()
    for example in by_loss["plackett_luce"].examples:
        references.logprobs(policy, pack([example], policy.device))
    computed = references.num_computed
    trainers = {}
    for contestant in CONTESTANTS:
        own = by_loss[contestant.loss]
        examples = _step_of(own.examples, contestant)
        for example in examples:
            references.logprobs(policy, pack([example], policy.device))
        train = own.plan.recipe.train.model_copy(
            update={"batch_size": len(examples), "tokens_per_microbatch": contestant.budget}
        )
        trainers[contestant.name] = Trainer(
            train=train,
            policy=policy,
            objective=own.objective,
            references=references,
            optimizer=optim.make_optimizer(train, policy.trained_parameters().values(), policy.device),
            scaler=torch.amp.GradScaler(policy.device.type, enabled=False),
            examples=examples,
            heldout=[],
            state=TrainingState(),
            recorder=cast(Recorder, None),  # single steps write no row
            save=lambda: None,
            should_stop=lambda: False,
        )
    assert references.num_computed == computed, "a pair's response is none of the lists'"
    return trainers


def _step_of(examples: Sequence[TokenizedExample], contestant: Contestant) -> list[TokenizedExample]:
    """Take the examples of one step: those of the first row, or one of each row."""
    lines = sorted({example.source.line for example in examples})
    of_rows = [[example for example in examples if example.source.line == line] for line in lines]
    return of_rows[0] if contestant.rows == 1 else [row[number] for number, row in enumerate(of_rows)]


def _recipe(base: Path, rows: Path, loss: str) -> dict[str, Any]:
    return {
        "model": {"base": str(base), "dtype": "bf16", "device": "cpu"},
        "adapter": {"rank": 16, "alpha": 32},
        "data": {"train": str(rows), "cache": False},
        "loss": {"name": loss},
        "reference": {"cache": False},
        "train": {"learning_rate": 1e-4, "batch_size": 1, "epochs": 1000, "gradient_checkpointing": False},
        "sinks": [],
    }


if __name__ == "__main__":
    main()
