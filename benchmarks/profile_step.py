"""Profile a step's time by kind of operation: the evidence for the reasons under a table.

    python -m benchmarks.profile_step "DPO long"     each contestant of a race of the cpu suite, one after another

The third step is profiled; its seconds are those of the calling thread, the profiler's overhead included.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from collections.abc import Iterable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks import contestants, race
from benchmarks.contestants import Contestant, Job, Race
from benchmarks.shapes import make_base

PROFILED = 3
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "addmv", "dot")
COPIES = ("copy_", "cat", "fill_", "clone", "index", "index_put_", "gather", "embedding", "_to_copy", "zero_", "pad")


def kind(name: str) -> str:
    """Classify an operation by its name."""
    space, _, operation = name.partition("::")
    if space == "bitsandbytes":
        return "dequantization"
    if "scaled_dot_product" in name or "flash_attention" in name:
        return "fused attention"
    if space != "aten":
        return "Python, autograd"
    if operation.rstrip("_") in PRODUCTS:
        return "products"
    return "copies and casts" if operation in COPIES else "elementwise and the rest"


def seconds_by_kind(events: Iterable[Any]) -> Counter[str]:
    """Sum the self CPU seconds of a torch profile's key averages by kind."""
    found: Counter[str] = Counter()
    for event in events:
        found[kind(event.key)] += event.self_cpu_time_total / 1e6
    return found


class _Profiler:
    """Replacement for the race's gate that lets all steps through and profiles one."""

    def __init__(self, connection: Connection) -> None:
        from benchmarks.meter import meter_for

        self.meter, self.digest, self.loss = meter_for("cpu"), "", 0.0
        self._connection, self._begun = connection, 0
        self._profile: Any = None

    def wait(self) -> None:
        from torch.profiler import ProfilerActivity, profile

        if self._begun == PROFILED:
            self._profile.stop()
            self._connection.send(seconds_by_kind(self._profile.key_averages()))
            raise SystemExit(0)
        self._begun += 1
        if self._begun == PROFILED:
            self._profile = profile(activities=[ProfilerActivity.CPU])
            self._profile.start()


def _child(one: Race, contestant: Contestant, base: Path, folder: Path, connection: Connection) -> None:
    race.redirect_output(folder / "log")
    import torch

    from benchmarks.pairs import make_pairs

    torch.set_num_threads(race.THREADS)
    pairs = make_pairs(one.legs[0].workload, PROFILED + 2, one.shape.vocab_size)
    gate: Any = _Profiler(connection)
    race.side(contestant)(Job(contestant=contestant, base=base, pairs=pairs, device="cpu", folder=folder), gate)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("race", choices=[one.name for one in contestants.cpu_suite()])
    (one,) = [each for each in contestants.cpu_suite() if each.name == parser.parse_args().race]
    with tempfile.TemporaryDirectory(prefix="qpref-benchmark-") as scratch:
        race.set_environment(Path(scratch))
        base = Path(scratch) / "base"
        make_base(one.shape, base)
        for index, contestant in enumerate(one.contestants):
            (folder := Path(scratch) / str(index)).mkdir()
            here, there = race.processes("cpu").Pipe()
            child = race.processes("cpu").Process(target=_child, args=(one, contestant, base, folder, there))
            child.start()
            there.close()
            try:
                found = here.recv()
            except EOFError:
                raise SystemExit(f"{contestant.name} ended:\n{(folder / 'log').read_text()[-4000:]}") from None
            child.join()
            whole = sum(found.values())
            print(f"\n{contestant.name}: {whole:.2f} s")
            for name, seconds in found.most_common():
                print(f"  {seconds:6.2f} s  {seconds / whole:4.0%}  {name}", flush=True)


if __name__ == "__main__":
    main()
