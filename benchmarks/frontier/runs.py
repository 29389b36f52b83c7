"""Training and measuring of points, over one base in memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.frontier.measures import measure, pair_changes
from benchmarks.frontier.openings import openings
from benchmarks.frontier.points import METHODS, Point
from benchmarks.frontier.task import (
    MODEL,
    NEW_TOKENS,
    PAIRS_PER_OPENING,
    SCALE,
    Continuations,
    Model,
    Pair,
    continue_openings,
    draw_pairs,
    load_with_adapter,
    put_adapter,
    recipe,
)
from benchmarks.meter import CpuMeter
from qpref import fsio
from qpref.recipe.resolve import make_plan
from qpref.records import MetricRow
from qpref.sweep.points import Point as SweepPoint
from qpref.sweep.training import train_points

TRAIN_K, HELDOUT_K = 8, 4
"""Responses to each opening: of the base for pairs, and of each policy that is measured."""
TRAIN_SEED, BASE_SEED, MEASURE_SEED = 0, 1, 2
LEARNING_RATE = 1e-3
TASK = {
    "base": MODEL["base"],
    "new_tokens": NEW_TOKENS,
    "responses": [TRAIN_K, HELDOUT_K],
    "seeds": [TRAIN_SEED, BASE_SEED, MEASURE_SEED],
    "openings": hashlib.sha256(json.dumps(openings()).encode()).hexdigest(),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """The base's responses: to the openings to train on, and to those held out."""

    train: list[Continuations]
    heldout: list[Continuations]

    def pairs(self, seed: int) -> list[Pair]:
        """Draw the training pairs of a seed."""
        return draw_pairs(self.train, SCALE, seed)

    @property
    def heldout_pairs(self) -> list[Pair]:
        return draw_pairs(self.heldout, SCALE, 0)


def sample_base(folder: Path) -> Sampled:
    """Sample the base's responses, or read those of an earlier call."""
    file = folder / "sampled.json"
    content = json.loads(file.read_text()) if file.is_file() else {}
    if content.get("task") != TASK:
        model, (train, heldout) = load_with_adapter(), openings()
        parts = {
            "train": continue_openings(model, train, TRAIN_K, TRAIN_SEED),
            "heldout": continue_openings(model, heldout, HELDOUT_K, BASE_SEED),
        }
        content = {"task": TASK, **{name: [asdict(one) for one in part] for name, part in parts.items()}}
        fsio.make_folder(folder)
        fsio.write_lines(file, [json.dumps(content)])
        content = json.loads(file.read_text())
    return Sampled(**{name: [_read(one) for one in content[name]] for name in ("train", "heldout")})


def _read(values: Mapping[str, Any]) -> Continuations:
    lists = {name: tuple(value) for name, value in values.items() if name not in ("opening", "tokens")}
    return Continuations(opening=values["opening"], tokens=tuple(map(tuple, values["tokens"])), **lists)


@dataclass(slots=True)
class Cost:
    """Cost of a run from its first step's end to its last one's, per step."""

    meter: CpuMeter = field(default_factory=CpuMeter)
    steps: int = 0
    found: dict[str, float] = field(default_factory=dict)

    def note(self, row: MetricRow) -> None:
        """Start at the first row, and keep the cost at each later one."""
        if row.split != "train":
            return
        if not self.steps:
            self.meter.start()
        else:
            taken, num = self.meter.stop(), row.step - self.steps
            seconds = {name: taken[name] / num for name in ("cpu_seconds", "wall_seconds")}
            self.found = seconds | {"peak_bytes": taken["peak_bytes"]}
        self.steps = self.steps or row.step


@dataclass(slots=True)
class Bench:
    """The folder of an experiment, and the base's responses.

    Attributes:
        model: what measures each adapter; loaded before the first run, so that all runs share the memory with it.
    """

    folder: Path
    sampled: Sampled

    def settings(self, point: Point) -> dict[str, Any]:
        """List what decides a point's result, as JSON values."""
        rows = [pair.row() for pair in self.sampled.pairs(point.seed)]
        pairs = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
        return {"task": TASK, "scale": SCALE, "most_pairs": PAIRS_PER_OPENING, "pairs": pairs, "recipe": _recipe(point)}

    def write_pairs(self, seed: int) -> None:
        """Write the training file of a seed, which all of its runs read."""
        fsio.write_lines(self._rows(seed), (json.dumps(pair.row()) for pair in self.sampled.pairs(seed)))

    def train_and_measure(self, points: Sequence[Point]) -> Iterator[tuple[Point, dict[str, Any]]]:
        """Train points one after the other on the files of their seeds, and yield each with its result."""
        if not points:
            return
        model, costs = load_with_adapter(), {point.name: Cost() for point in points}
        named = {point.name: point for point in points}
        planned = [self._planned(point, costs[point.name]) for point in points]
        for ended in train_points(planned, resume=False, overwrite=True):
            if ended.error is not None:
                raise SystemExit(f"{ended.point.name}: {ended.error}")
            point, run = named[ended.point.name], self.folder / "runs" / ended.point.name
            yield point, self._result(model, run, costs[point.name])

    def _rows(self, seed: int) -> Path:
        return self.folder / f"pairs-{seed}.jsonl"

    def _planned(self, point: Point, cost: Cost) -> SweepPoint:
        document = _recipe(point)
        document["data"]["train"] = str(self._rows(point.seed).absolute())
        plan = make_plan(document, (), self.folder / "runs" / point.name)
        return SweepPoint(name=point.name, overrides=(), plan=replace(plan, printing="nothing", on_metrics=cost.note))

    def _result(self, model: Model, run: Path, cost: Cost) -> dict[str, Any]:
        put_adapter(model, run / "adapter")
        chosen, rejected = pair_changes(model, self.sampled.heldout_pairs)
        steps = json.loads((run / "result.json").read_text())["steps"]
        return {
            **asdict(measure(model, openings()[1], HELDOUT_K, MEASURE_SEED)),
            "chosen": chosen,
            "rejected": rejected,
            "steps": steps,
            **cost.found,
        }


def _recipe(point: Point) -> dict[str, Any]:
    changes = {"learning_rate": LEARNING_RATE, **METHODS[point.method].train}
    return recipe(point.loss, point.seed, **changes)
