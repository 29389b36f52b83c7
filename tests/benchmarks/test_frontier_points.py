"""The frontier's points: what is trained, what is reused, and what the table and the picture show."""

from __future__ import annotations

import json
import os
from dataclasses import asdict

import pytest
import torch

from benchmarks.frontier.picture import draw
from benchmarks.frontier.points import METHODS, QUICK_METHODS, Point, finish, make_points
from benchmarks.frontier.processes import in_processes
from benchmarks.frontier.table import from_json, pooled, spread, summaries, table
from qpref.evaluation.statistics import Estimate

POINTS = make_points(("dpo", "ipo"), 2, quick=True)


def result_of(point):
    """A result whose means are known: reward 0.1 times the seed's number, KL the dial's value."""
    return {
        "rewards": [[0.1 * (point.seed + 1)] * 2] * 3,
        "log_ratios": [[point.value, point.value]] * 3,
        "lengths": [[7, 9]] * 3,
        "ended": [[True, False]] * 3,
        "chosen": 1.0,
        "rejected": -2.0,
        "steps": 4,
        "cpu_seconds": 0.5,
        "wall_seconds": 0.25,
        "peak_bytes": 2**30,
    }


class Trainer:
    """A trainer that notes what it was given, and may be killed after some points."""

    def __init__(self, killed_after=None):
        self.given, self.killed_after = [], killed_after

    def __call__(self, points):
        self.given = list(points)
        for number, point in enumerate(points):
            if number == self.killed_after:
                raise KeyboardInterrupt
            yield point, result_of(point)


def settings(point):
    return {"loss": point.loss, "seed": point.seed, "pairs": "a"}


def test_points_are_all_combinations_seed_by_seed():
    points = make_points(list(METHODS), 3, quick=False)
    assert len(points) == len(set(points)) == len({point.name for point in points}) == 8 * 3 * 3
    assert [point.seed for point in points] == sorted(point.seed for point in points)
    assert all(len(set(method.values)) == 3 for method in METHODS.values())
    assert len(make_points(QUICK_METHODS, 1, quick=True)) == 6


@pytest.mark.parametrize("method", METHODS)
def test_each_point_has_a_recipe_that_resolves(method, tmp_path):
    from benchmarks.frontier.runs import _recipe
    from qpref.recipe.resolve import make_plan

    for point in make_points([method], 1, quick=False):
        plan = make_plan(_recipe(point), (), tmp_path)
        assert plan.document["loss"]["name"] == method
        assert plan.document["loss"][point.dial] == point.value


def test_a_killed_experiment_continues_after_its_last_finished_point(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        finish(POINTS, settings, tmp_path, Trainer(killed_after=3))
    second = Trainer()
    results = finish(POINTS, settings, tmp_path, second)
    assert second.given == POINTS[3:]
    assert results == {point: result_of(point) for point in POINTS}
    third = Trainer()
    assert finish(POINTS, settings, tmp_path, third) == results
    assert third.given == []


def test_points_that_nobody_works_on_are_left_out(tmp_path):
    finish(POINTS[:3], settings, tmp_path, Trainer())
    assert list(finish(POINTS, settings, tmp_path, lambda points: iter(()))) == POINTS[:3]


def note_process(points):
    for point in points:
        yield point, {"process": os.getpid(), "threads": torch.get_num_threads()}


def refuse_first(points):
    for point in points:
        if point == POINTS[0]:
            raise SystemExit(f"{point.name}: refused")
        yield point, result_of(point)


def test_points_are_shared_out_to_processes_with_a_share_of_the_cores():
    results = dict(in_processes(note_process, POINTS, 2))
    assert results.keys() == set(POINTS)
    assert os.getpid() not in {result["process"] for result in results.values()}
    assert {result["threads"] for result in results.values()} == {max(1, torch.get_num_threads() // 2)}


def test_a_point_that_fails_ends_the_experiment_after_the_others(tmp_path):
    with pytest.raises(SystemExit, match="refused"):
        finish(POINTS, settings, tmp_path, lambda points: in_processes(refuse_first, points, 2))
    assert list(finish(POINTS, settings, tmp_path, lambda points: iter(()))) == POINTS[1:]


def test_a_point_of_other_settings_is_trained_again(tmp_path):
    finish(POINTS, settings, tmp_path, Trainer())
    changed = Trainer()
    finish(POINTS, lambda point: settings(point) | {"pairs": "ab"[point.seed]}, tmp_path, changed)
    assert changed.given == [point for point in POINTS if point.seed == 1]


def test_table_pools_the_seeds_of_a_setting():
    results = {point: result_of(point) for point in POINTS}
    found = summaries(results)
    assert [from_json(json.loads(json.dumps(asdict(one)))) for one in found] == found
    rows = table(found)[2:]
    assert len(rows) == 4
    assert rows[0].startswith(
        "| dpo | beta 0.05 | 0.150 (0.150 to 0.150) | 0.05 (0.05 to 0.05) | +1.0 | -2.0 | 8.0 | 0.50"
    )
    assert rows[0].endswith("| 0.50 | 1,024 MiB |")
    assert spread(results)[2] == "| dpo | beta 0.05 | 0.10, 0.20 | 0.05, 0.05 |"
    assert spread({point: result for point, result in results.items() if not point.seed}) == []


def test_interval_is_over_openings():
    runs = [result_of(Point(method="dpo", value=1.0, seed=0)) for _ in range(2)]
    runs[0]["rewards"] = runs[1]["rewards"] = [[1.0, 1.0], [0.0, 0.0], [0.5, 0.5]]
    found = pooled(runs, "rewards")
    assert (found.value, found.low, found.high) == (0.5, 0.0, 1.0)


def test_picture_has_a_line_for_each_method(tmp_path):
    results = {point: result_of(point) for point in POINTS}
    files = [tmp_path / f"{number}.svg" for number in range(2)]
    for file in files:
        draw(results, Estimate(value=0.05, low=0.0, high=0.1, pairs=3), file)
    text = files[0].read_text()
    assert all(f">{label}<" in text for label in ("dpo", "ipo", "base, KL 0", "0.05"))
    assert ">kto<" not in text
    assert text == files[1].read_text()
