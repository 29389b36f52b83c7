"""Processes that die or are stopped at any moment: the run that is resumed ends as the run that never stopped.

The seeds are fixed; the moments depend on the machine all the same. Kills at chosen operations are in test_aimed_kills.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import Outcome, outcome, preference_rows, rows_of, write_jsonl
from forks import SIGNALS, ended, exit_code, forked, gate, signalled
from tally import STEPS, Tally

from qpref.data.load import load_rows
from qpref.errors import RunLockedError
from qpref.recipe.resolve import make_plan
from qpref.training import checkpoint, run
from qpref.training.prepare import prepare

SAVE_EVERY = 2
NUM_ROWS = 12 + 4 + 2
"""Of the data files: training rows, held-out rows, and one that is refused and one that is dropped."""
NUM_SIGNALS, SIGNALS_PER_RUN, KILLS_PER_RUN = 60, 4, 8
STARTS = 20
PATIENCE = 120
"""Seconds to wait for processes, on a busy machine."""


class Forks:
    """Starts runs of one recipe, whose model and data are loaded already, in processes of their own."""

    def __init__(self, plan, prepared) -> None:
        self._plan, self._prepared = plan, prepared
        self.seconds = 0.0
        """Time that a whole run takes."""

    def train(self, folder: Path, resume: bool, before=lambda: None) -> None:
        """Train or resume a run; `before` is called once it holds its folder's lock."""

        def loaded(plan, checked, world, kept):
            before()
            return self._prepared

        run.prepare = loaded  # of this process, which ends with the run
        run.train_plan(replace(self._plan, output=folder), resume=resume)

    def start(self, folder: Path, *, resume: bool = True, before=lambda: None) -> int:
        """Fork a process that trains, or resumes, a run; returns its id."""
        return forked(lambda: self.train(folder, resume, before))

    def finish(self, folder: Path) -> int:
        """Train or resume a run to its end; returns the exit code."""
        return exit_code(self.start(folder))


@pytest.fixture(scope="module")
def forks(make_base, tmp_path_factory) -> Forks:
    folder = tmp_path_factory.mktemp("forks")
    bad = [{"prompt": "Why?", "chosen": "", "rejected": "No."}, {"prompt": "?" * 300, "chosen": "a", "rejected": "b"}]
    recipe = {
        "model": {"base": str(make_base()), "quantization": "none", "dtype": "float32"},
        "adapter": {"rank": 4, "alpha": 8, "dropout": 0.1},
        "data": {
            "train": str(write_jsonl(folder / "train.jsonl", preference_rows(12) + bad)),
            "heldout": str(write_jsonl(folder / "heldout.jsonl", preference_rows(4, start=100))),
            "max_length": 256,
            "max_prompt_length": 128,
            "on_overflow": "drop",
            "skip_bad": 0.1,
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
    folder = tmp_path_factory.mktemp("unbroken")
    for name in ("first", "second"):  # the first one reads libraries from the disk
        started = time.monotonic()
        assert forks.finish(folder / name) == 0
        forks.seconds = time.monotonic() - started
    assert len(list((folder / "second/checkpoints").iterdir())) == 2  # of 3: one was rotated out
    return outcome(folder / "second")


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


def check_finished(folder: Path, unbroken: Outcome, tally: Tally) -> None:
    """Compare a finished run with the one that never stopped, and count what is lost."""
    tally.compare_rows(rows_of(folder), unbroken.rows)
    tally.compare_inputs(folder, NUM_ROWS)
    tally["runs"] += 1
    assert outcome(folder) == unbroken


@pytest.mark.parametrize("num_kills", [80, pytest.param(1000, marks=pytest.mark.soak)])
def test_a_run_killed_at_any_moments_ends_as_if_it_never_stopped(forks, unbroken, tmp_path, tally, num_kills):
    moments = random.Random(num_kills)
    while tally["SIGKILLs at random moments"] < num_kills:
        folder = tmp_path / f"run-{tally['runs']}"
        for _ in range(KILLS_PER_RUN):
            code = signalled(forks.start(folder), signal.SIGKILL, moments.uniform(0, forks.seconds))
            if code == 0:
                break
            assert code == -signal.SIGKILL
            tally["SIGKILLs at random moments"] += 1
            tally[STEPS] += max(0, last_step(folder) - newest_step(folder) - SAVE_EVERY)
        assert forks.finish(folder) == 0
        check_finished(folder, unbroken, tally)


def test_a_run_stopped_by_signals_at_any_moments_ends_as_if_it_never_stopped(forks, unbroken, tmp_path, tally):
    moments = random.Random(NUM_SIGNALS)
    while tally["signals"] < NUM_SIGNALS:
        folder = tmp_path / f"run-{tally['runs']}"
        for _ in range(SIGNALS_PER_RUN):
            number = SIGNALS[tally["signals"] % 3]
            child = forks.start(folder)
            if ended([child], 1, moments.uniform(0, forks.seconds)):
                assert exit_code(child) == 0
                break
            os.kill(child, number)
            seen = last_step(folder)
            code = exit_code(child)
            tally["signals"] += 1
            assert code in (0, 128 + number, -number)  # done, saved and stopped, or not training yet
            if code == 128 + number:
                tally["signals that saved and stopped a run"] += 1
                tally[STEPS] += last_step(folder) - newest_step(folder)
                assert not tally.losses()
                assert newest_step(folder) <= seen + 2  # the step under way, and one whose row wasn't written yet
        assert forks.finish(folder) == 0
        check_finished(folder, unbroken, tally)
    assert tally["signals that saved and stopped a run"] > 0


@pytest.mark.parametrize("num_interrupts", [6, pytest.param(60, marks=pytest.mark.soak)])
def test_a_second_interrupt_ends_a_run_before_its_step_and_its_save(
    forks, unbroken, tmp_path, tally, monkeypatch, num_interrupts
):
    """The step under way never ends: only the second interrupt can."""
    for number in range(num_interrupts):
        folder, step = tmp_path / f"run-{number}", 1 + number % 5
        monkeypatch.setattr(run.Trainer, "step", interrupted_at(step, run.Trainer.step))
        assert exit_code(forks.start(folder)) == 130
        monkeypatch.undo()
        assert newest_step(folder) == step // SAVE_EVERY * SAVE_EVERY
        tally["second interrupts"] += 1
        assert forks.finish(folder) == 0
        check_finished(folder, unbroken, tally)


def interrupted_at(step: int, real):
    """A step that sends its own process two interrupts, and would then take for ever."""

    def interrupted(trainer):
        if trainer.state.step == step:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(PATIENCE)
        return real(trainer)

    return interrupted


@pytest.mark.parametrize("num_rounds", [2, pytest.param(25, marks=pytest.mark.soak)])
def test_of_twenty_simultaneous_starts_one_trains_and_its_death_frees_the_folder(
    forks, unbroken, tmp_path, tally, num_rounds
):
    for number in range(num_rounds):
        folder = tmp_path / f"run-{number}"
        with gate() as (wait, open_gate):
            children = [start_and_report(forks, folder, tmp_path, wait) for _ in range(STARTS)]
            refused = ended(children, STARTS - 1, PATIENCE)
            (trains,) = set(children) - set(refused)
            if number % 2:
                os.kill(trains, signal.SIGKILL)
            open_gate()
            assert exit_code(trains) == (-signal.SIGKILL if number % 2 else 0)
        assert [exit_code(child) for child in refused] == [RunLockedError.exit_code] * (STARTS - 1)
        host = re.escape(os.uname().nodename)
        for child in refused:
            message, seconds = json.loads((tmp_path / f"{child}.json").read_text())
            assert re.search(rf"another process is writing this run \(pid {trains} on {host}\)", message)
            assert seconds < 1  # of CPU time
        tally["starts beside a running one"] += STARTS - 1
        assert forks.finish(folder) == 0
        check_finished(folder, unbroken, tally)


def start_and_report(forks: Forks, folder: Path, reports: Path, wait) -> int:
    """Start a run that trains once `wait` returns; a refused one writes its error and its CPU seconds to a file."""

    def work() -> None:
        try:
            forks.train(folder, resume=True, before=wait)
        except RunLockedError as error:
            (reports / f"{os.getpid()}.json").write_text(json.dumps([str(error), time.process_time()]))
            raise

    return forked(work)


@pytest.mark.parametrize("num_processes", [3, pytest.param(10, marks=pytest.mark.soak)])
def test_every_process_trains_the_same_bits(forks, unbroken, tmp_path, tally, num_processes):
    for number in range(num_processes):
        assert forks.finish(tmp_path / f"run-{number}") == 0
        check_finished(tmp_path / f"run-{number}", unbroken, tally)
