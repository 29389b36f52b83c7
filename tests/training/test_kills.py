"""Processes that die at any moment: the run that is resumed ends as the run that never stopped.

The children are forked from a process that has loaded the model, so that a kill costs the steps alone. The seeds are
fixed; the moments depend on the machine all the same.
"""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import Outcome, outcome, preference_rows, write_jsonl

from qpref.data.load import load_rows
from qpref.errors import QprefError
from qpref.recipe.resolve import make_plan
from qpref.training import checkpoint, run
from qpref.training.prepare import prepare

STEPS, SAVE_EVERY = 6, 2
KILLS_PER_RUN = 8
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
BUG = 99


class Forks:
    """Starts runs of one recipe in processes of their own."""

    def __init__(self, plan, prepared) -> None:
        self._plan, self._prepared = plan, prepared
        self.seconds = 0.0

    def start(self, folder: Path, *, resume: bool = True) -> int:
        """Fork a process that trains, or resumes, a run; returns its id."""
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # pytest's handlers are not the child's
        child = os.fork()
        if child:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            return child
        code = BUG
        try:
            logging.disable()
            for number in SIGNALS:
                signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            run.prepare = lambda plan, checked, world: self._prepared
            run.train_plan(replace(self._plan, output=folder), resume=resume)
            code = 0
        except QprefError as error:
            code = error.exit_code
        finally:
            os._exit(code)

    def finish(self, folder: Path) -> int:
        """Train or resume a run to its end; returns the exit code."""
        return exit_code(self.start(folder))


def exit_code(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def signalled(child: int, number: int, after: float) -> int:
    """Send a process, which may be done by then, a signal after some seconds; returns its exit code."""
    time.sleep(after)
    os.kill(child, number)  # a child that has ended stays until it is waited for
    return exit_code(child)


@pytest.fixture(scope="module")
def forks(make_base, tmp_path_factory) -> Forks:
    folder = tmp_path_factory.mktemp("forks")
    recipe = {
        "model": {"base": str(make_base()), "quantization": "none", "dtype": "float32"},
        "adapter": {"rank": 4, "alpha": 8, "dropout": 0.1},
        "data": {
            "train": str(write_jsonl(folder / "train.jsonl", preference_rows(12))),
            "heldout": str(write_jsonl(folder / "heldout.jsonl", preference_rows(4, start=100))),
        },
        "checks": {"too_short": "off"},
        "loss": {"name": "dpo", "beta": 0.1},
        "train": {
            "learning_rate": 1e-3,
            "batch_size": 4,
            "epochs": 2,
            "log_every": 1,
            "eval_every": 3,
            "save_every": SAVE_EVERY,
            "tokens_per_microbatch": 250,
            "gradient_checkpointing": False,
        },
        "sinks": [],
    }
    plan = make_plan(recipe, output=folder / "none")
    return Forks(plan, prepare(plan, load_rows(plan)))


@pytest.fixture(scope="module")
def unbroken(forks, tmp_path_factory) -> Outcome:
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    started = time.monotonic()
    assert forks.finish(folder) == 0
    forks.seconds = time.monotonic() - started
    return outcome(folder)


def newest_step(folder: Path) -> int:
    """The step of the newest checkpoint that verifies; 0 where there is none."""
    saved = checkpoint.load_newest(folder / "checkpoints", {})
    return 0 if saved is None else saved.step


def last_step(folder: Path) -> int:
    """The last step that metrics.jsonl has a whole row of."""
    path = folder / "metrics.jsonl"
    text = path.read_text() if path.is_file() else ""
    rows = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return max((row["step"] for row in rows), default=0)


@pytest.mark.parametrize("num_kills", [8, pytest.param(1000, marks=pytest.mark.soak)])
def test_a_run_killed_at_any_moments_ends_as_if_it_never_stopped(forks, unbroken, tmp_path, num_kills):
    moments = random.Random(num_kills)
    killed = number = 0
    while killed < num_kills:
        folder = tmp_path / f"run-{number}"
        number += 1
        for _ in range(min(KILLS_PER_RUN, num_kills - killed)):
            code = signalled(forks.start(folder), signal.SIGKILL, moments.uniform(0, forks.seconds))
            assert code in (0, -signal.SIGKILL)
            killed += code != 0
            assert last_step(folder) - newest_step(folder) <= SAVE_EVERY
        assert forks.finish(folder) == 0
        assert outcome(folder) == unbroken


@pytest.mark.parametrize("num_signals", [6, pytest.param(60, marks=pytest.mark.soak)])
def test_a_run_stopped_by_signals_at_any_moments_ends_as_if_it_never_stopped(forks, unbroken, tmp_path, num_signals):
    moments = random.Random(num_signals)
    saved = 0
    for index in range(num_signals):
        folder, number = tmp_path / f"run-{index}", SIGNALS[index % 3]
        code = signalled(forks.start(folder), number, moments.uniform(0, forks.seconds))
        assert code in (0, 128 + number, -number)  # done, saved and stopped, or not training yet
        if code == 128 + number:
            saved += 1
            assert last_step(folder) == newest_step(folder) > 0
        assert forks.finish(folder) == 0
        assert outcome(folder) == unbroken
    assert saved >= num_signals // 4


@pytest.mark.parametrize("num_rounds", [1, pytest.param(25, marks=pytest.mark.soak)])
def test_of_twenty_simultaneous_starts_one_trains(forks, unbroken, tmp_path, num_rounds):
    for number in range(num_rounds):
        folder = tmp_path / f"run-{number}"
        codes = sorted(map(exit_code, [forks.start(folder, resume=False) for _ in range(20)]))
        assert codes[0] == 0
        assert set(codes[1:]) <= {2, 7}  # a late one finds the finished run, and refuses to train over it
        assert outcome(folder) == unbroken


@pytest.mark.parametrize("num_processes", [2, pytest.param(10, marks=pytest.mark.soak)])
def test_every_process_trains_the_same_bits(forks, unbroken, tmp_path, num_processes):
    for number in range(num_processes):
        assert forks.finish(tmp_path / f"run-{number}") == 0
        assert outcome(tmp_path / f"run-{number}") == unbroken
