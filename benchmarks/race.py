"""Run a race: each contestant in its own process, one step each in turn, so that a shared machine's noise affects all
alike."""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.contestants import Contestant, Job, Leg, Race

THREADS = 2
PRELOADED = ["torch", "bitsandbytes", "transformers", "peft", "datasets", "trl", "qpref", "benchmarks.qpref_side"]
STEP_TIMEOUT_SECONDS = 1800.0

Record = dict[str, Any]


def set_environment(cache: Path) -> None:
    """Set the environment variables and CPU affinity that every contestant's process inherits.

    `OMP_WAIT_POLICY=passive`: a waiting thread sleeps. A spinning one counts as busy, and with another job on the same
    cores the same steps took 2.4 to 6.6 times the CPU seconds.
    """
    os.environ |= {
        "OMP_NUM_THREADS": str(THREADS),
        "OMP_WAIT_POLICY": "passive",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(cache / "datasets"),
        "QPREF_CACHE": str(cache / "qpref"),
        "TRL_EXPERIMENTAL_SILENCE": "1",
    }
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])


def processes(device: str) -> Any:
    """Choose the start method: forked from a server that has imported everything; spawned on a GPU, which bitsandbytes
    touches at import."""
    if device == "cuda":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


@dataclass(slots=True)
class Runner:
    """One contestant's process.

    Attributes:
        failure: reason for leaving the race; None while it runs.
    """

    contestant: Contestant
    process: Any
    connection: Connection
    log: Path
    digest: str = ""
    failure: str | None = None

    def step(self) -> Record | None:
        """Let it take a step, and return its cost; None after a failure."""
        if self.failure is None:
            self.connection.send("go")
        return self.receive()

    def receive(self) -> Record | None:
        """Wait for its next message; None after a failure.

        Raises:
            SystemExit: it ended, or took too long.
        """
        if self.failure is not None:
            return None
        if not self.connection.poll(STEP_TIMEOUT_SECONDS):
            raise SystemExit(f"{self.contestant.name}: no step within {STEP_TIMEOUT_SECONDS:.0f} s")
        try:
            message: Record = self.connection.recv()
        except EOFError:
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-30:])
            raise SystemExit(f"{self.contestant.name} ended:\n{tail}") from None
        self.failure = message.get("failure")
        self.digest = message.get("digest", self.digest)
        return None if self.failure else message


def run_race(race: Race, base: Path, device: str) -> list[Record]:
    """Run all legs, and return a record for each contestant and leg, with every timed step.

    Raises:
        SystemExit: a contestant failed, or two trained on different token ids.
    """
    records = []
    with tempfile.TemporaryDirectory() as scratch, _runners(race, base, device, Path(scratch)) as runners:
        _refuse_different_ids(race, runners)
        for leg in race.legs:
            steps = _leg(leg, runners)
            records += [_record(race, leg, runner, taken) for runner, taken in zip(runners, steps, strict=True)]
    return records


def run_alone(race: Race, base: Path, device: str, turns: int) -> Iterator[Record]:
    """Run the contestants one after another, A B A B, each turn in a process of its own: one is in memory at a time.

    Yields a record of each turn and leg, with `turn` counted from 0, as soon as there is one. A contestant that fails
    has a record with its failure, and further turns.

    Raises:
        SystemExit: two trained on different token ids.
    """
    digests: dict[int, str] = {}
    for turn, contestant in product(range(turns), race.contestants):
        alone = replace(race, contestants=(contestant,))
        with tempfile.TemporaryDirectory() as scratch:
            records = _turn(alone, base, device, Path(scratch))
        for record in records:
            known = digests.setdefault(record["pairs_per_step"], record["digest"])
            if record["failure"] is None and known != record["digest"]:
                raise SystemExit(f"{race.name}: {contestant.name} trains on different token ids than the others")
            yield record | {"turn": turn}


def _turn(race: Race, base: Path, device: str, scratch: Path) -> list[Record]:
    """Load the race's only contestant and run all legs."""
    runner = _starter(race, race.contestants[0], base, device, scratch)
    try:
        runner.receive()
        return [_record(race, leg, runner, _leg(leg, [runner])[0]) for leg in race.legs]
    except SystemExit as error:
        runner.failure = str(error)
        return [_record(race, leg, runner, []) for leg in race.legs]
    finally:
        _end([runner])


def merged_turns(records: Sequence[Record]) -> list[Record]:
    """Join the turns of each contestant and leg to one record, in the order of the contestants."""
    found: dict[tuple[str, str], Record] = {}
    for record in records:
        key = record["workload"], record["contestant"]
        if key not in found:
            found[key] = record | {"predicted": dict(record["predicted"])}
            continue
        whole = found[key]
        whole["warmup"], whole["steps"] = whole["warmup"] + record["warmup"], whole["steps"] + record["steps"]
        for name, values in record["predicted"].items():
            whole["predicted"][name] = whole["predicted"][name] + values
        whole["failure"] = whole["failure"] or record["failure"]
    return list(found.values())


@contextmanager
def _runners(race: Race, base: Path, device: str, scratch: Path) -> Iterator[list[Runner]]:
    """Start all contestants, each waiting for its first step."""
    runners: list[Runner] = []
    try:
        for index, contestant in enumerate(race.contestants):
            runners.append(_starter(race, contestant, base, device, scratch / str(index)))
        for runner in runners:
            runner.receive()
        yield runners
    finally:
        _end(runners)


def _starter(race: Race, contestant: Contestant, base: Path, device: str, folder: Path) -> Runner:
    """Start a contestant's process, which loads and then waits."""
    folder.mkdir(exist_ok=True)
    here, there = multiprocessing.Pipe()
    process = processes(device).Process(
        target=_child, args=(race, contestant, base, device, folder, there), daemon=True
    )
    process.start()
    there.close()
    return Runner(contestant, process, here, folder / "log")


def _end(runners: Sequence[Runner]) -> None:
    for runner in runners:
        runner.connection.close()
    for runner in runners:
        runner.process.join(20)
        runner.process.kill()
        runner.process.join()


def _child(race: Race, contestant: Contestant, base: Path, device: str, folder: Path, connection: Connection) -> None:
    redirect_output(folder / "log")
    import torch

    from benchmarks.meter import Gate, meter_for
    from benchmarks.pairs import make_pairs
    from qpref.errors import DeviceMemoryError

    torch.set_num_threads(THREADS)
    pairs = [
        pair
        for leg in race.legs
        for pair in make_pairs(leg.workload, _num_pairs(leg, contestant), race.shape.vocab_size)
    ]
    spare = make_pairs(race.legs[-1].workload, contestant.pairs_per_step, race.shape.vocab_size, seed=8)
    gate = Gate(meter_for(device), connection)
    try:
        side(contestant)(Job(contestant=contestant, base=base, pairs=pairs + spare, device=device, folder=folder), gate)
    except (torch.OutOfMemoryError, DeviceMemoryError):
        connection.send({"failure": "out of memory"})


def redirect_output(path: Path) -> None:
    """Redirect this process's stdout and stderr to a file."""
    log = path.open("w")
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    sys.stdout = sys.stderr = log


def _num_pairs(leg: Leg, contestant: Contestant) -> int:
    return (leg.warmup + leg.timed) * contestant.pairs_per_step


def side(contestant: Contestant) -> Callable[..., None]:
    """Import the train function of this contestant's side."""
    if contestant.side == "qpref":
        from benchmarks.qpref_side import train
    elif contestant.side == "trl":
        from benchmarks.trl_side import train
    else:
        from benchmarks.unsloth_side import train
    return train


def _refuse_different_ids(race: Race, runners: Sequence[Runner]) -> None:
    seen: dict[int, str] = {}
    for runner in runners:
        if runner.failure is None:
            known = seen.setdefault(runner.contestant.pairs_per_step, runner.digest)
            if known != runner.digest:
                raise SystemExit(f"{race.name}: {runner.contestant.name} trains on different token ids than the others")


def _leg(leg: Leg, runners: Sequence[Runner]) -> list[list[Record]]:
    """Let the runners step in turn, and return each one's steps."""
    taken: list[list[Record]] = [[] for _ in runners]
    for _ in range(leg.warmup + leg.timed):
        for runner, steps in zip(runners, taken, strict=True):
            step = runner.step()
            if step is not None:
                steps.append(step)
    return taken


def _record(race: Race, leg: Leg, runner: Runner, steps: list[Record]) -> Record:
    from benchmarks.predict import predictions

    timed = steps[leg.warmup :]
    return {
        "race": race.name,
        "workload": leg.workload.name,
        "contestant": runner.contestant.name,
        "side": runner.contestant.side,
        "shape": race.shape.name,
        "pairs_per_step": runner.contestant.pairs_per_step,
        "digest": runner.digest,
        "failure": runner.failure,
        "warmup": steps[: leg.warmup],
        "steps": timed,
        "predicted": predictions(race, leg, runner.contestant, range(leg.warmup, leg.warmup + len(timed))),
    }
