"""qpref's own training loop on a model with real sizes, each step inside a context manager that measures it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.contestants import QPREF, Job
from benchmarks.gpu.context import Context
from benchmarks.meter import meter_for
from benchmarks.pairs import WORKLOADS, Workload, make_pairs

PAIRS = 4
STEP = Workload(name="four equal pairs", prompt=180, response=300, prompt_spread=0, response_spread=0)
"""3,116 tokens in one micro-batch."""
CONTESTANT = replace(QPREF, pairs_per_step=PAIRS)
TILES = (2**21, 2**24)


class _FinishedError(Exception):
    """The requested steps are done."""


class _Steps:
    """Replacement for the race's gate: enters the next context manager before each step, and leaves it after."""

    def __init__(self, context: Context, around: Iterable[AbstractContextManager[Any]]) -> None:
        self.meter, self.digest, self.loss = meter_for(context.device.name), "", 0.0
        self._around = iter(around)
        self._open: AbstractContextManager[Any] | None = None

    def wait(self) -> None:
        if self._open is not None:
            self._open.__exit__(None, None, None)
        self._open = next(self._around, None)
        if self._open is None:
            raise _FinishedError
        self._open.__enter__()


def workload(context: Context) -> Workload:
    return context.pick(STEP, WORKLOADS["tiny"])


def run(context: Context, shape: str, around: list[AbstractContextManager[Any]]) -> None:
    """Train one step of four pairs inside each of the context managers, in order."""
    from benchmarks.qpref_side import train

    base = context.base(context.shape(shape))
    pairs = make_pairs(workload(context), PAIRS * (len(around) + 1), context.shape(shape).vocab_size)
    folder = context.folder(f"steps-{time.monotonic_ns()}")
    gate: Any = _Steps(context, around)
    with suppress(_FinishedError):
        train(Job(contestant=CONTESTANT, base=base, pairs=pairs, device=context.device.name, folder=folder), gate)


def load(context: Context, base: Path) -> Any:
    """Load a policy on an NF4 base."""
    from qpref.policy.load import load_policy
    from qpref.policy.source import resolve_base
    from qpref.recipe.resolve import make_plan

    (rows := context.scratch / "empty.jsonl").touch()
    model = {"base": str(base), "device": context.device.name, "dtype": context.device.dtypes[0]}
    plan = make_plan({"model": model, "data": {"train": str(rows)}, "loss": {"name": "dpo"}, "sinks": []})
    return load_policy(plan.recipe, resolve_base(plan.recipe.model))


@contextmanager
def tiles(context: Context, elements: int) -> Iterator[None]:
    """Set the number of logits that exist at a time."""
    from qpref.policy import vocabulary

    before = vocabulary.TILE_ELEMENTS[context.device.name]
    vocabulary.TILE_ELEMENTS[context.device.name] = context.pick(elements, elements >> 14)
    try:
        yield
    finally:
        vocabulary.TILE_ELEMENTS[context.device.name] = before


@contextmanager
def timed(context: Context, found: list[float]) -> Iterator[None]:
    """Append the step's seconds, the device's work included."""
    context.device.synchronize()
    before = time.perf_counter()
    yield
    context.device.synchronize()
    found.append(time.perf_counter() - before)


@contextmanager
def counted_waits(context: Context, found: list[Any]) -> Iterator[None]:
    """Append the step's waits, a Counter of file:line."""
    context.device.synchronize()
    with context.device.waits() as counted:
        yield
    found.append(counted)


@contextmanager
def profiled(context: Context, key: Any, found: dict[Any, Any]) -> Iterator[None]:
    """Keep the step's torch profile under a key."""
    from torch.profiler import profile

    context.device.synchronize()
    with profile(activities=context.device.activities()) as seen:
        yield
        context.device.synchronize()
    found[key] = seen


@contextmanager
def nested(*around: AbstractContextManager[Any]) -> Iterator[None]:
    with ExitStack() as stack:
        for each in around:
            stack.enter_context(each)
        yield
