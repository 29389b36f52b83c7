"""Time: the device's peaks, and a step's seconds by class of kernel, with U, the share of the limit."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any

import torch

from benchmarks import machine, predict
from benchmarks.contestants import Leg, Race
from benchmarks.gpu import steps
from benchmarks.gpu.context import Context
from benchmarks.gpu.device import Interval, seconds
from benchmarks.limit import least_seconds

CLASSES = (
    ("attention", "flash|fmha|attention|attn"),
    ("dequantizing", "dequant"),
    ("products", "gemm|gemv|cutlass|cublas|nvjet|xmma|splitk|matmul|::mm$|::addmm|::bmm"),
    ("optimizer", "adam|multi_tensor|foreach"),
    ("copies", "memcpy|memset|copy|cat|gather|scatter|index|fill|embedding|_to$"),
    ("reductions", "reduce|softmax|logsumexp|logaddexp|norm|::sum|::mean"),
    ("elementwise", "elementwise|vectorized|unrolled|triton"),
)
"""Class -> pattern of the names of its kernels; the first that matches. A CPU's operations are named like aten::mm."""
WARMUP, TIMED = 2, 3


def peaks(context: Context) -> None:
    """Measure the fastest products of bf16 matrices, and copies."""
    context.report(**_peaks(context))


def _peaks(context: Context) -> dict[str, Any]:
    return machine.kept_peaks(context.scratch / "peaks.json", context.device.name)


def heads(context: Context) -> None:
    """Time the head alone, forward and backward, at both sizes of the vocabulary's slices."""
    from qpref.policy.head import Head
    from qpref.policy.token_scores import score_tokens

    for name in ("1B", "8B"):
        shape, rows = context.shape(name), context.pick(2400, 20)
        weight = torch.randn(shape.vocab_size, shape.hidden_size, dtype=torch.bfloat16, device=context.device.name)
        hidden = torch.randn(rows, shape.hidden_size, dtype=torch.bfloat16, device=context.device.name)
        tokens = torch.randint(shape.vocab_size, (rows,), device=context.device.name)
        head, leaf = Head(weight, None, 1.0, None), hidden.requires_grad_()

        def score(head: Head = head, leaf: torch.Tensor = leaf, tokens: torch.Tensor = tokens) -> None:
            score_tokens(head, leaf, tokens)[0].sum().backward()

        least = 2 * 2 * shape.vocab_size * shape.hidden_size * rows / _peaks(context)["flops_per_second"]
        for tile in steps.TILES:
            with steps.tiles(context, tile):
                score()
                found = min(seconds(context.device, score) for _ in range(5))
            context.report(shape=name, tile=tile, rows=rows, seconds=found, least_seconds=least)


def steps_1b(context: Context) -> None:
    _steps(context, "1B")


def steps_8b(context: Context) -> None:
    _steps(context, "8B")


def _steps(context: Context, name: str) -> None:
    """Time steps of four pairs, and profile one, at both sizes of the vocabulary's slices, on one loaded model."""
    walls: dict[int, list[float]] = {tile: [] for tile in steps.TILES}
    profiles: dict[int, Any] = {}
    around: list[Any] = []
    for tile in steps.TILES:
        around += [_warm(context, tile) for _ in range(WARMUP)]
        around += [_timed(context, tile, walls[tile]) for _ in range(TIMED)]
        around.append(_profiled(context, tile, profiles))
    steps.run(context, name, around)
    for tile, profile in profiles.items():
        context.report(shape=name, tile=tile, **_figures(context, name, walls[tile], profile))


def _warm(context: Context, tile: int) -> Any:
    return steps.nested(steps.tiles(context, tile))


def _timed(context: Context, tile: int, found: list[float]) -> Any:
    return steps.nested(steps.tiles(context, tile), steps.timed(context, found))


def _profiled(context: Context, tile: int, found: dict[int, Any]) -> Any:
    return steps.nested(steps.tiles(context, tile), steps.profiled(context, tile, found))


def _figures(context: Context, name: str, walls: Sequence[float], profile: Any) -> dict[str, Any]:
    work = context.device.work(profile)
    busy, wall = busy_seconds(work), median(walls)
    return {
        "wall_seconds": list(walls),
        "busy_seconds": busy,
        "busy_share": busy / wall,
        "launches": len(work),
        "seconds_by_class": by_class(work),
        "unclassified": _longest(each for each in work if class_of(each[0]) == "other"),
        "longest_kernels": _longest(work),
        "seconds_by_function": context.device.totals(profile),
        "U": _least(context, name) / wall,
        "memory": context.device.memory(),
    }


def busy_seconds(work: Iterable[Interval]) -> float:
    """Sum the time in which at least one operation ran."""
    busy, until = 0.0, float("-inf")
    for _, start, end in sorted(work, key=lambda each: each[1]):
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    return busy


def class_of(name: str) -> str:
    return next((kind for kind, pattern in CLASSES if re.search(pattern, name, re.IGNORECASE)), "other")


def by_class(work: Iterable[Interval]) -> dict[str, float]:
    """Sum the seconds of each class, in the order of `CLASSES`."""
    found = dict.fromkeys([*(kind for kind, _ in CLASSES), "other"], 0.0)
    for name, start, end in work:
        found[class_of(name)] += end - start
    return found


def _longest(work: Iterable[Interval]) -> dict[str, float]:
    """Sum the seconds of the ten most expensive names, shortened."""
    found: Counter[str] = Counter()
    for name, start, end in work:
        found[name[:120]] += end - start
    return dict(found.most_common(10))


def _least(context: Context, name: str) -> float:
    """Bound a step's seconds from below by its products and the device's peaks."""
    shape, contestant = context.shape(name), steps.CONTESTANT
    leg = Leg(workload=steps.workload(context), timed=1, warmup=1)
    race = Race(name=name, shape=shape, contestants=(contestant,), legs=(leg,))
    predicted, measured = predict.predictions(race, leg, contestant, [1]), _peaks(context)
    return least_seconds(
        predicted["flops"][0], predicted["moved_bytes"][0], measured["flops_per_second"], measured["bytes_per_second"]
    )
