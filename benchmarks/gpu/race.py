"""The race: qpref, TRL best tuned and Unsloth on chat-like pairs, A B A B, one of them in memory at a time."""

from __future__ import annotations

from dataclasses import replace

from benchmarks import machine, race
from benchmarks.contestants import gpu_race
from benchmarks.gpu.context import Context
from benchmarks.pairs import WORKLOADS

TURNS = 2


def race_1b(context: Context) -> None:
    _race(context, "1B")


def race_8b(context: Context) -> None:
    _race(context, "8B")


def _race(context: Context, name: str) -> None:
    """Report the device's peaks, then each turn; the table joins a contestant's turns."""
    shape = context.shape(name)
    one = gpu_race(shape, context.pick(WORKLOADS["chat-like"], WORKLOADS["tiny"]))
    if context.rehearse:
        one = replace(one, legs=tuple(replace(leg, timed=1, warmup=1) for leg in one.legs))
    context.report(peaks=machine.kept_peaks(context.scratch / "peaks.json", context.device.name))
    for record in race.run_alone(one, context.base(shape), context.device.name, TURNS):
        # Without Unsloth there is nothing else that may fail.
        context.report(record=record, ok=record["failure"] is None)
