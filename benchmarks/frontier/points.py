"""The experiment's points, and the files of those that are finished.

The values of each method's dial were set before anything was trained. A beta that ties a policy to its reference by a
response's log-ratio, a sum over about a dozen tokens, goes from far below where the loss saturates to far above. The
other dials span the range of their methods' papers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qpref import fsio


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A loss with its dial.

    Attributes:
        dial: the option that trades reward for distance from the reference.
        values: from the loosest tie to the tightest.
        train: changes of the recipe's table `[train]`.
    """

    dial: str = "beta"
    values: tuple[float, ...] = (0.05, 0.2, 1.0)
    train: Mapping[str, Any] = field(default_factory=dict)


METHODS: Mapping[str, Method] = {
    "dpo": Method(),
    "ipo": Method(values=(0.1, 0.5, 2.0)),
    # Two completions of each pair, so that a step has as many as the others'.
    "kto": Method(train={"batch_size": 16}),
    "orpo": Method(values=(0.1, 0.5, 2.0)),
    "simpo": Method(values=(2.0, 5.0, 10.0)),
    "rpo": Method(),
    "apo_zero": Method(),
    "dpop": Method(),
}
QUICK_METHODS = ("dpo", "ipo", "kto")


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One run: a method at one value of its dial, under one seed."""

    method: str
    value: float
    seed: int

    @property
    def dial(self) -> str:
        return METHODS[self.method].dial

    @property
    def name(self) -> str:
        """Name of its folder and file."""
        return f"{self.method}-{self.dial}-{self.value:g}-seed-{self.seed}"

    @property
    def loss(self) -> dict[str, Any]:
        """The recipe's loss table."""
        return {"name": self.method, self.dial: self.value}


def make_points(methods: Sequence[str], seeds: int, quick: bool) -> list[Point]:
    """List the points, seed by seed.

    Args:
        seeds: number of them, from 0.
        quick: leave out the middle value of each dial.
    """
    return [
        Point(method=method, value=value, seed=seed)
        for seed in range(seeds)
        for method in methods
        for value in METHODS[method].values[:: 2 if quick else 1]
    ]


Results = dict[Point, dict[str, Any]]
Work = Callable[[Sequence[Point]], Iterator[tuple[Point, dict[str, Any]]]]


def finish(
    points: Sequence[Point], settings: Callable[[Point], Mapping[str, Any]], folder: Path, work: Work
) -> Results:
    """Read the results of finished points, and work on the others; each is written as soon as it is there.

    Args:
        settings: JSON values that decide a point's result; a file with others is worked on again.
        folder: of the files, one for each point.
        work: yields points with their results, JSON values, in any order; one that it leaves out has no result.
    """
    fsio.make_folder(folder)
    found = {point: result for point in points if (result := _read(point, settings(point), folder)) is not None}
    for point, result in work([point for point in points if point not in found]):
        content = json.dumps({"settings": settings(point), "result": result}, indent=1)
        fsio.write_lines(_file(point, folder), [content])
        found[point] = result
    return {point: found[point] for point in points if point in found}


def _file(point: Point, folder: Path) -> Path:
    return folder / f"{point.name}.json"


def _read(point: Point, settings: Mapping[str, Any], folder: Path) -> dict[str, Any] | None:
    file = _file(point, folder)
    if not file.is_file():
        return None
    content = json.loads(file.read_text())
    return dict(content["result"]) if content["settings"] == json.loads(json.dumps(settings)) else None


def by_setting(results: Mapping[Point, dict[str, Any]]) -> dict[tuple[str, str, float], list[dict[str, Any]]]:
    """Group results by method, dial and value, the seeds of each in a list."""
    groups: dict[tuple[str, str, float], list[dict[str, Any]]] = {}
    for point, result in results.items():
        groups.setdefault((point.method, point.dial, point.value), []).append(result)
    return groups


def methods_of(points: Iterable[Point]) -> list[str]:
    """List the methods, each once."""
    return list(dict.fromkeys(point.method for point in points))
