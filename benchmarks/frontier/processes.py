"""Several points at a time, each in a process with its share of the cores.

A step of a small model on a CPU is mostly work that one core does, such as dequantizing.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

import torch

from benchmarks.frontier.points import Point, Work


def in_processes(work: Work, points: Sequence[Point], count: int) -> Iterator[tuple[Point, dict[str, Any]]]:
    """Work on points in `count` processes, and yield each with its result as soon as it is there.

    Args:
        work: a method or function that can be pickled, since the processes aren't forks.

    Raises:
        BaseException: what the first point that failed has raised, once the others are done.
    """
    failures = []
    threads = max(1, torch.get_num_threads() // count)
    with ProcessPoolExecutor(
        count, multiprocessing.get_context("spawn"), initializer=torch.set_num_threads, initargs=(threads,)
    ) as pool:
        for done in as_completed([pool.submit(_work_on, work, point) for point in points]):
            if failure := done.exception():
                failures.append(failure)
            else:
                yield from done.result()
    if failures:
        raise failures[0]


def _work_on(work: Work, point: Point) -> list[tuple[Point, dict[str, Any]]]:
    return list(work([point]))
