"""The CUDA path without a GPU: budgets of launches, waits and memory, and faults that the harness has to catch.

Each command is a process of its own: fake CUDA changes torch for good.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", "-m", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def figures() -> dict[str, float]:
    done = run("tests.fake_cuda", "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_every_stage_of_a_run_keeps_to_its_device(figures):
    assert figures["device_mismatches"] == 0


def test_startup_checks_take_no_more_memory_than_trainings_probe(figures):
    assert figures["startup_peak_gib_7b"] <= figures["probe_peak_gib_7b"]


def test_the_planner_is_within_two_percent_of_the_simulated_peak(figures):
    assert figures["planner_error_percent"] <= 2


def test_a_microbatch_rarely_waits_for_the_device(figures):
    assert figures["syncs_per_microbatch"] <= 3  # the step's own numbers; 9 with a copy for each of a batch's tensors


def test_a_step_launches_few_kernels(figures):
    assert figures["launches_per_step_1b"] <= 5_300  # 9,708 with small tiles and a boolean index


def test_products_are_summed_in_float32_and_managed_memory_is_waited_for():
    done = run("tests.fake_cuda.numerics")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("fault", ["layout-on-cpu", "weight-on-cpu"])
def test_a_tensor_on_the_wrong_device_is_caught(fault):
    done = run("tests.fake_cuda.planted", fault)
    assert done.returncode > 0
    assert "FAIL" in done.stderr
