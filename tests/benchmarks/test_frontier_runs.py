"""The frontier's runs from sampling to measures, with a tiny base in place of the real one."""

from __future__ import annotations

import json
import math

import pytest

from benchmarks.frontier import runs, task
from benchmarks.frontier.points import Point, finish
from benchmarks.frontier.table import summaries

WORDS = ("good", "bad", "warm", "sad", "happy", "ugly", "kind", "lost")


@pytest.fixture
def bench(make_base, tmp_path, monkeypatch):
    monkeypatch.setattr(task, "MODEL", {"base": str(make_base()), "quantization": "nf4", "dtype": "float32"})
    monkeypatch.setattr(runs, "openings", lambda: (["The day", "The night"], ["The week", "The year", "The hour"]))
    sampled = runs.sample_base(tmp_path)
    assert runs.sample_base(tmp_path) == sampled  # read again
    # A tiny random model writes no words, so the texts of its training responses are replaced.
    train = [
        task.Continuations(
            opening=one.opening,
            prompt=one.prompt,
            tokens=one.tokens,
            texts=tuple(f" was {word}." for word in WORDS),
            ended=(True,) * 8,
            rewards=(1.0, -1.0) * 4,
        )
        for one in sampled.train
    ]
    bench = runs.Bench(folder=tmp_path, sampled=runs.Sampled(train=train, heldout=train[:1]))
    bench.write_pairs(0)
    return bench


def test_points_are_trained_and_measured_in_one_process(bench, monkeypatch):
    monkeypatch.setattr(
        runs, "recipe", lambda *given, **train: task.recipe(*given, **train | {"batch_size": 2, "log_every": 1})
    )
    points = [Point(method=method, value=value, seed=0) for method, value in (("dpo", 0.2), ("kto", 1.0))]
    results = finish(points, bench.settings, bench.folder / "points", bench.train_and_measure)
    first, second = summaries(results)
    assert [one["steps"] for one in results.values()] == [2, 4]
    assert len(results[points[0]]["rewards"]) == 3
    assert len(results[points[0]]["rewards"][0]) == runs.HELDOUT_K
    assert first.chosen - first.rejected > 0
    assert first.cpu_seconds > 0
    assert first.peak_bytes > 2**20
    assert first.kl.value != second.kl.value != 0
    assert not math.isnan(second.kl.low)


def test_each_adapter_is_measured_as_its_own_run(bench, monkeypatch):
    monkeypatch.setattr(runs, "recipe", lambda *given, **train: task.recipe(*given, **train | {"batch_size": 2}))
    point = Point(method="dpo", value=0.2, seed=0)
    ((_, result),) = bench.train_and_measure([point])
    alone = runs.measure(task.load(str(bench.folder / "runs" / point.name)), runs.openings()[1], 4, runs.MEASURE_SEED)
    assert json.loads(json.dumps(result["rewards"])) == alone.rewards
    assert result["log_ratios"][0] == pytest.approx(alone.log_ratios[0], abs=1e-4)
