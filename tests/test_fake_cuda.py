"""The CUDA path without a GPU: budgets of launches, waits and memory, and faults that the harness has to catch.

Fake CUDA changes torch for good, so it runs in processes of its own: all that the quick tests look at in one command.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", "-m", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def last_line(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.stdout, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    done = run("tests.fake_cuda.report")
    assert done.returncode == 0, done.stderr
    return last_line(done)


@pytest.fixture(scope="module")
def figures(report) -> dict[str, float]:
    return report["figures"]


def test_every_stage_of_a_run_keeps_to_its_device_for_families_and_settings(report, figures):
    assert report["matrix"] == {}
    assert figures["device_mismatches"] == 0


def test_the_matrix_has_each_family_with_each_setting_and_any_two_settings_in_all_ways(report):
    families = {family for family, _ in report["design"]}
    names = {name for _, settings in report["design"] for name in settings}
    for name in names:
        cases = {(family, name in settings) for family, settings in report["design"]}
        assert cases == set(itertools.product(families, (False, True)))
    for one, other in itertools.combinations(names, 2):
        assert len({(one in settings, other in settings) for _, settings in report["design"]}) == 4


def test_six_runs_of_a_family_have_any_two_settings_in_all_ways(report):
    runs, names = report["paired"], {name for _, settings in report["design"] for name in settings}
    assert len(runs) == 6
    for one, other in itertools.combinations(names, 2):
        assert len({(one in settings, other in settings) for settings in runs}) == 4


def test_startup_checks_take_no_more_memory_than_trainings_probe(figures):
    assert figures["startup_peak_gib_7b"] <= figures["probe_peak_gib_7b"]


@pytest.mark.parametrize("pair", ["1B, short first pair", "8B, short first pair, start adapter"])
def test_startup_checks_fit_where_training_fits_whatever_the_first_pair(report, pair):
    assert report["excess"][pair] <= 0


def test_heads_that_flash_attention_cannot_take_are_computed_by_segments(report):
    assert report["widths"] == {"20": "qpref_segments", "264": "qpref_segments", "80": "qpref_varlen_torch"}


def test_the_planner_is_within_two_percent_of_the_simulated_peak(figures):
    assert figures["planner_error_percent"] <= 2


def test_a_microbatch_rarely_waits_for_the_device(figures):
    assert figures["syncs_per_microbatch"] <= 3  # the step's own numbers; 9 with a copy for each of a batch's tensors


def test_a_step_launches_few_kernels(figures):
    assert figures["launches_per_step_1b"] <= 5_000


def test_a_token_keeps_little_until_the_backward_pass(figures):
    assert figures["bytes_per_token_8b"] <= 3.4 * 2**20


FAULTS = ["layout-on-cpu", "weight-on-cpu", "ends-in-int64", "layout-of-others", "strided-keys", "float32-by-16-bit",
          "float32-by-16-bit-unchecked", "gradient-in-16-bit"]  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(report, fault):
    assert report["planted"][fault]


@pytest.mark.soak
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "gemma3_text", "mixtral"])
def test_any_two_settings_keep_to_their_device_in_each_family(family):
    assert last_line(run("tests.fake_cuda.matrix", "--pairs", "--family", family)) == {}


@pytest.mark.soak
def test_startup_checks_fit_where_training_fits_for_all_shapes():
    assert max(last_line(run("tests.fake_cuda.checks_peak", "--all")).values()) <= 0


def test_products_are_summed_in_float32_and_managed_memory_is_waited_for():
    done = run("tests.fake_cuda.numerics")
    assert done.returncode == 0, done.stdout + done.stderr
