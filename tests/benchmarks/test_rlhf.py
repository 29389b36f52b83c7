"""DPO beside RLHF: curves and intervals against closed forms, arms that are kept and continued, and the page."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from tiny_models import TinyModel

from benchmarks.rlhf import curves, results, table
from benchmarks.rlhf.__main__ import make_jobs
from benchmarks.rlhf.curves import Point, first_crossing
from benchmarks.rlhf.meter import Meter, models_in_memory
from benchmarks.rlhf.settings import ARMS, BASE, LEARNED, OFFLINE, PAIRS, QUICK, ROUNDS, TRUE


def curve(*points: tuple[float, float, float], openings: int = 4) -> list[Point]:
    """A curve whose openings are all alike, from (CPU seconds, reward, KL)."""
    return [
        Point(cpu_seconds=seconds, rewards=np.full(openings, reward), kls=np.full(openings, kl))
        for seconds, reward, kl in points
    ]


def test_a_crossing_is_interpolated_between_the_points_around_it():
    xs, ys = np.array([0.0, 2.0, 6.0]), np.array([1.0, 5.0, 3.0])
    assert first_crossing(xs, ys, 1.0) == 3.0
    assert first_crossing(xs, ys, 2.0) == 5.0
    assert first_crossing(xs, ys, 5.0) == 5.0 - 2.0 * 3 / 4
    assert math.isnan(first_crossing(xs, ys, 6.1))


def test_the_first_crossing_counts_where_a_curve_falls_back():
    xs, ys = np.array([0.0, 4.0, 1.0, 4.0]), np.array([0.0, 40.0, 50.0, 60.0])
    assert first_crossing(xs, ys, 2.0) == 20.0


def test_reward_at_kl_and_at_seconds_and_seconds_to_reward_read_their_own_axes():
    run = curve((0, 0.0, 0.0), (100, 0.4, 2.0), (200, 0.8, 10.0))
    assert curves.estimate([run], curves.reward_at_kl, 6.0).value == pytest.approx(0.6)
    assert curves.estimate([run], curves.reward_at_seconds, 50.0).value == pytest.approx(0.2)
    assert curves.estimate([run], curves.seconds_to_reward, 0.6).value == pytest.approx(150.0)


def test_a_reward_that_isnt_reached_has_no_seconds():
    found = curves.estimate([curve((0, 0.0, 0.0), (100, 0.4, 2.0))], curves.seconds_to_reward, 0.5)
    assert math.isnan(found.value)
    assert math.isnan(found.low)
    assert table.written(found, ".0f") == "not reached"


def test_the_interval_is_that_of_the_mean_over_openings():
    """A mean of 400 independent numbers with a deviation of 1 has a 95 % interval of plus and minus 1.96 / 20."""
    rewards = np.random.default_rng(1).normal(size=400)
    rewards = (rewards - rewards.mean()) / rewards.std()
    run = [Point(cpu_seconds=seconds, rewards=rewards, kls=np.zeros(400)) for seconds in (0.0, 10.0)]
    found = curves.estimate([run, run], curves.reward_at_seconds, 10.0)
    assert found.value == pytest.approx(0.0, abs=1e-9)
    assert (found.high - found.low) / 2 == pytest.approx(1.96 / 20, rel=0.1)
    low, high = curves.mean_interval(rewards)
    assert (high - low) / 2 == pytest.approx(1.96 / 20, rel=0.1)


def test_the_range_of_seeds_is_written_with_those_that_didnt_reach():
    runs = [curve((0, 0.0, 0.0), (100, end, 1.0)) for end in (0.5, 1.0, 0.25)]
    found = curves.estimate(runs, curves.seconds_to_reward, 0.5)
    assert found.seeds[:2] == (100.0, 50.0)
    assert math.isnan(found.seeds[2])
    assert table.written(found, ".0f") == "75; seeds 50 to 100, 1 not reached"


def test_targets_are_ones_that_every_run_reaches():
    runs = [curve((0, 0.1, 0.0), (100, 0.5, 4.0)), curve((0, 0.1, 0.0), (300, 0.9, 9.0))]
    assert curves.common_kl(runs) == pytest.approx(3.6)
    assert curves.common_seconds(runs) == 100
    assert curves.half_of_the_gain(runs) == pytest.approx(0.5)


@pytest.fixture
def jobs(tmp_path):
    return make_jobs(tmp_path, QUICK, list(ARMS), 2, "base")


def test_the_pairs_come_before_the_arms_that_read_them(jobs):
    assert [job.arm for job in jobs] == [BASE, PAIRS, *ARMS, PAIRS, *ARMS]
    assert {job.arm for job in jobs if job.pairs} == {OFFLINE, LEARNED}
    assert len({job.folder for job in jobs}) == len(jobs)


def test_the_two_methods_have_the_same_optimum(jobs):
    """exp(4 * reward / 0.1), DPO's under Bradley-Terry of scale 4, is exp(reward / 0.025), RLOO's."""
    by_arm = {job.arm: job for job in jobs}
    assert by_arm[TRUE].beta_of_the_reward == pytest.approx(0.025)
    assert by_arm[LEARNED].beta_of_the_reward == by_arm[LEARNED].sizes.beta == 0.1


def train(folder: Path) -> None:
    """A stub of an arm: two checkpoints."""
    job = json.loads((folder / "job.json").read_text())
    saved = [{"step": step, "cpu_seconds": 10.0 * step, "labels": 8, "adapter": f"{step}"} for step in (1, 2)]
    arm = {"job": job, "cpu_seconds": 20.0, "labels": 8, "models": {"LlamaForCausalLM": 1}, "settings": 12}
    arm |= {"library_bytes": 2**29, "peak_bytes": 2**30, "saved": saved}
    (folder / "arm.json").write_text(json.dumps(arm))


def measure(folder: Path) -> None:
    """A stub of the measures: the first checkpoint has a KL of 2, the second of 4."""
    at = (0,) if folder.name == BASE else (1, 2)
    rows = [{"rewards": [0.2 * one] * 3, "kls": [2.0 * one] * 3} for one in at]
    (folder / "measured.json").write_text(json.dumps(rows))


def test_a_killed_command_continues_with_what_is_missing(jobs):
    done = []

    def killed(folder: Path) -> None:
        if folder.name == TRUE:
            raise KeyboardInterrupt
        measure(folder)

    def counted(folder: Path) -> None:
        done.append(folder.name)
        train(folder)

    for job in jobs[:4]:
        results.finish(job, counted, killed)
    with pytest.raises(KeyboardInterrupt):
        results.finish(jobs[4], counted, killed)
    assert done == [PAIRS, OFFLINE, ROUNDS, TRUE]
    did = [results.finish(job, counted, measure) for job in jobs[:6]]
    assert did == [False, False, False, False, True, True]
    assert done == [PAIRS, OFFLINE, ROUNDS, TRUE, LEARNED]


def test_results_of_other_settings_are_refused(jobs):
    results.finish(jobs[2], train, measure)
    other = replace(jobs[2], sizes=replace(QUICK, beta=0.2))
    with pytest.raises(SystemExit, match="other settings"):
        results.finish(other, train, measure)
    assert json.loads((Path(other.folder) / "job.json").read_text()) == asdict(jobs[2])


def test_the_page_charges_the_shared_pairs_to_the_arms_that_read_them(jobs):
    for job in jobs:
        results.finish(job, train, measure)
    groups = results.by_arm(jobs)
    drawn = results.all_curves(groups)
    assert [one.cpu_seconds for one in drawn[OFFLINE][0]] == [0.0, 30.0, 40.0]
    assert [one.cpu_seconds for one in drawn[TRUE][0]] == [0.0, 10.0, 20.0]
    trained = {name: groups[name] for name in ARMS}
    page = table.page(["# Head"], trained, drawn, 20.0)
    assert "| offline DPO | 1: policy | 1,024 | 512 | 40 | 20 | 8 | 12 |" in page
    assert "| RLHF, true reward | 1: policy | 1,024 | 512 | 20 | - | 8 | 12 |" in page
    assert page.count("| RLHF, learned reward |") == 2 + 2 * 2
    again = results.curves_from_json(json.loads(json.dumps(results.curves_to_json(drawn))))
    assert table.effect(again) == table.effect(drawn)


def test_roles_name_the_models():
    assert table.models({"LlamaForCausalLM": 1}) == "1: policy"
    assert table.models({"LlamaForCausalLM": 1, "LlamaForSequenceClassification": 1}) == "2: policy + reward"
    assert table.models({"LlamaForCausalLM": 2}) == "2: 2 policy"


def test_models_are_counted_whole_and_the_most_at_once_are_kept():
    there_before = TinyModel(model_type="llama").make()
    meter = Meter()
    model = TinyModel(model_type="llama").make()
    other = TinyModel(model_type="qwen2").make()
    del there_before
    meter.count_models()
    both = {"LlamaForCausalLM": 1, "Qwen2ForCausalLM": 1}
    assert meter.models == both
    del other
    meter.count_models()
    assert meter.models == both
    assert model in models_in_memory()
