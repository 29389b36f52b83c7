"""A run of several processes that is killed or stopped goes on, with as many processes or with others."""

from __future__ import annotations

import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from conftest import outcome, rows_of
from safetensors.torch import load_file
from teams import Trainings, errors, small_recipe

JOB = {"TORCHELASTIC_RUN_ID": "a job", "TORCHELASTIC_RESTART_COUNT": "0"}
RESTARTED = JOB | {"TORCHELASTIC_RESTART_COUNT": "1"}


@pytest.fixture(scope="module")
def trainings(make_base, tmp_path_factory) -> Trainings:
    folder = tmp_path_factory.mktemp("teams")
    return Trainings(folder, small_recipe(folder, make_base()))


@pytest.fixture(scope="module")
def unbroken(trainings, tmp_path_factory):
    """A run of two processes that nothing has stopped, and the seconds that it took."""
    folder, started = tmp_path_factory.mktemp("unbroken") / "run", time.monotonic()
    outcomes = trainings.start(2, folder).outcomes()
    assert [each.code for each in outcomes] == [0, 0], [each.output for each in outcomes]
    return folder, time.monotonic() - started


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def assert_same_up_to_rounding(folder: Path, other: Path) -> None:
    """The adapter, and every step's row once."""
    torch.testing.assert_close(adapter(folder), adapter(other), atol=1e-5, rtol=1e-3)
    rows, expected = rows_of(folder), rows_of(other)
    assert [(row["step"], row["split"], row["tokens"]) for row in rows] == [
        (row["step"], row["split"], row["tokens"]) for row in expected
    ]


def wait_for_step(folder: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while not (folder / "checkpoints" / f"step-{step:06}").is_dir():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_killed_run_resumes_to_the_bit_with_as_many_processes(trainings, unbroken, tmp_path):
    folder = tmp_path / "run"
    team = trainings.start(2, folder)
    wait_for_step(folder, 2)
    team.send(1, signal.SIGKILL)
    outcomes = team.outcomes()
    assert [each.code for each in outcomes] == [13, -signal.SIGKILL]
    assert "rank 1 died at" in "".join(errors(outcomes))
    assert trainings.start(2, folder, resume=True).codes() == [0, 0]
    assert outcome(folder) == outcome(unbroken[0])


def test_a_signal_to_one_process_stops_all_after_the_same_step_and_others_resume(trainings, unbroken, tmp_path):
    folder = tmp_path / "run"
    team = trainings.start(2, folder)
    wait_for_step(folder, 2)
    team.send(1, signal.SIGTERM)
    outcomes = team.outcomes()
    assert [each.code for each in outcomes] == [143, 143]
    assert len(errors(outcomes)) == 1
    stopped = max(int(path.name[5:]) for path in (folder / "checkpoints").iterdir())
    assert rows_of(folder)[-1]["step"] == stopped
    team = trainings.start(1, folder, resume=True)
    wait_for_step(folder, stopped // 2 * 2 + 2)
    team.send(0, signal.SIGTERM)
    assert team.codes()[0] in (0, 143)
    outcomes = trainings.start(3, folder, resume=True).outcomes()
    assert [each.code for each in outcomes] == [0, 0, 0], [each.output for each in outcomes]
    assert_same_up_to_rounding(folder, unbroken[0])


def test_restarted_processes_resume_the_run_that_they_began(trainings, unbroken, tmp_path):
    folder = tmp_path / "run"
    team = trainings.start(2, folder, variables=JOB)
    wait_for_step(folder, 2)
    team.send(0, signal.SIGKILL)
    team.outcomes()
    assert trainings.start(2, folder, variables=RESTARTED).codes() == [0, 0]
    assert outcome(folder).adapter == outcome(unbroken[0]).adapter
    assert rows_of(folder) == rows_of(unbroken[0])


def test_restarted_processes_leave_the_run_of_another_job_alone(trainings, unbroken, tmp_path):
    folder = shutil.copytree(unbroken[0], tmp_path / "run")
    outcomes = trainings.start(2, folder, variables=RESTARTED).outcomes()
    assert [each.code for each in outcomes] == [2, 2]
    assert errors(outcomes) == [f"error: {folder}: holds a run"]
    assert outcome(folder) == outcome(unbroken[0])


@pytest.mark.parametrize("resume", [False, True])
def test_the_run_folder_is_rank_0s_alone(trainings, unbroken, tmp_path, resume):
    folder = tmp_path / "run"
    if resume:
        shutil.copytree(unbroken[0], folder)
        shutil.rmtree(folder / "adapter")

    def elsewhere(rank, plan, prepared):
        from dataclasses import replace

        return replace(plan, output=tmp_path / "another host" / "run" if rank else folder), prepared

    outcomes = trainings.start(2, folder, resume=resume, change=elsewhere).outcomes()
    assert [each.code for each in outcomes] == [0, 0], [each.output for each in outcomes]
    assert outcome(folder) == outcome(unbroken[0])
    assert not (tmp_path / "another host").exists()


@pytest.mark.soak
def test_a_run_killed_at_twenty_random_instants_ends_as_if_it_never_was(make_base, tmp_path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("killed")
    trainings = Trainings(folder, small_recipe(folder, make_base(), epochs=8, save_every=3))  # 24 steps
    started = time.monotonic()
    assert trainings.start(2, tmp_path / "unbroken").codes() == [0, 0]
    seconds, draw = time.monotonic() - started, random.Random(18)
    kills = number = 0
    while kills < 20:
        run, same = tmp_path / f"run-{number}", number % 2 == 0
        number += 1
        for _ in range(5):
            size = 2 if same else draw.choice([1, 2, 4])
            team = trainings.start(size, run, resume=run.is_dir())
            moment = time.monotonic() + draw.uniform(0, seconds)
            while time.monotonic() < moment and not team.is_done():
                time.sleep(0.01)
            if not team.is_done():
                rank = draw.randrange(size)
                team.send(rank, signal.SIGKILL)
                codes = team.codes()
                assert codes[rank] in (-signal.SIGKILL, 0)
                assert set(codes) <= {0, 13, -signal.SIGKILL}, errors(team.outcomes())
                kills += 1
        assert trainings.start(2, run, resume=run.is_dir()).codes() == [0, 0]
        assert_same_up_to_rounding(run, tmp_path / "unbroken")
        if same:
            assert outcome(run) == outcome(tmp_path / "unbroken")
