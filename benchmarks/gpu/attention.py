"""Shared-prompt attention on the device against its definition in float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.context import Context
from benchmarks.gpu.device import DTYPES, relative_error, seconds

STATES = ("result", "query grad", "key grad", "value grad")
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
LAYOUTS: dict[str, tuple[tuple[int, tuple[int, ...]], ...]] = {
    "few queries, many keys": ((700, (3, 20)), (33, (70, 129))),
    "two pairs": ((180, (150, 140)), (33, (20, 29))),
    "four branches": ((40, (10, 20, 0, 30)),),
    "lengths of 1": ((1, (0, 1)), (1, (1, 0)), (5, (1, 7))),
}
"""Prompt and branches of each example, in input tokens: a response of one token has none."""
WINDOW = 48
SINK = 20.0
"""Logit of a strong attention sink above the others."""


def kernels(context: Context) -> None:
    """Compare every path of shared-prompt attention with float64, by its relative error and the plain path's.

    A path passes with up to twice the plain path's error, or one step of its dtype; the plain path with two steps. With
    a strong sink the gradients of queries and keys are what is left of two nearly equal numbers, and any 16-bit kernel
    is far off: those errors are reported without a verdict.
    """
    from qpref.attention.register import SEGMENTS, register, sharing_paths

    register()
    widths, repeats = context.pick((64, 80, 128, 256), (80,)), context.pick((1, 4, 7), (4,))
    for dtype, width, repeat in itertools.product(context.device.dtypes, widths, repeats):
        eps = torch.finfo(DTYPES[dtype]).eps
        layouts = list(LAYOUTS)[context.pick(0, 1) :]  # the first is the largest
        cases = [_case(context, DTYPES[dtype], width, repeat, name, 0.0) for name in layouts]
        sinks = [_case(context, DTYPES[dtype], width, repeat, name, SINK) for name in layouts[:2]]
        paths = sharing_paths(torch.device(context.device.name), DTYPES[dtype])
        limits = dict.fromkeys(STATES, 2 * eps)
        for path in reversed(paths):  # the plain one first
            row = {"path": path, "dtype": dtype, "width": width, "queries_per_key": repeat}
            try:
                found = worst_errors(partial(_path, path), cases)
                sunk = worst_errors(partial(_path, path), sinks)
                row |= _repeatability(context, path, next(case for case in cases if case.name == "two pairs"))
            except RuntimeError as error:  # a kernel that refuses a width says so; the others are still to be tried
                context.report(**row, ok=False, error=str(error)[:500])
                continue
            if path == SEGMENTS:
                limits = {name: max(eps, 2 * error) for name, (error, _) in found.items()}
            context.report(
                **row,
                ok=all(error <= (2 * eps if path == SEGMENTS else limits[name]) for name, (error, _) in found.items()),
                errors={name: error for name, (error, _) in found.items()},
                at={name: where for name, (_, where) in found.items()},
                with_a_sink={name: error for name, (error, _) in sunk.items()},
            )


@dataclass(frozen=True, slots=True)
class Case:
    """Attributes:
    states: queries [1, heads, T, width], keys and values [1, 2, T, width].
    direction: gradient of the result.
    exact: window -> result and gradients in float64.
    """

    name: str
    states: list[Tensor]
    direction: Tensor
    groups: tuple[Any, ...]
    exact: dict[int | None, list[Tensor]]


def _case(context: Context, dtype: torch.dtype, width: int, repeat: int, layout: str, sink: float) -> Case:
    """Make random states of a layout; with a sink, all queries look at the first key of their prompt."""
    from qpref.records import Group

    groups, start = [], 0
    for prompt, branches in LAYOUTS[layout]:
        groups.append(Group(start=start, prompt=prompt, branches=branches))
        start += prompt + sum(branches)
    generator = torch.Generator().manual_seed(width + repeat)
    states = [torch.randn(1, heads, start, width, generator=generator) for heads in (2 * repeat, 2, 2)]
    for group in groups if sink else ():
        states[0][..., 0] = sink  # times the key's below, over sqrt(width)
        states[1][:, :, group.start, 0] = width**0.5
    direction = torch.randn(1, start, 2 * repeat, width, generator=generator)
    *moved, direction = (each.to(context.device.name, dtype) for each in (*states, direction))
    exact = {
        window: _with_gradients(exact_attention(groups, window), [each.double() for each in moved], direction.double())
        for window in (None, WINDOW)
    }
    return Case(layout, moved, direction, tuple(groups), exact)


def worst_errors(
    attend_with: Callable[[Sequence[Any], int | None], Attend], cases: Iterable[Case]
) -> dict[str, tuple[float, str]]:
    """Return, for the result and each gradient, the largest relative error and its case."""
    found: dict[str, tuple[float, str]] = dict.fromkeys(STATES, (0.0, ""))
    for case in cases:
        for window, exact in case.exact.items():
            tried = _with_gradients(attend_with(case.groups, window), case.states, case.direction)
            for name, one, other in zip(STATES, tried, exact, strict=True):
                found[name] = max(found[name], (relative_error(one, other), f"{case.name}, window {window}"))
    return found


def _path(path: str, groups: Sequence[Any], window: int | None) -> Attend:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    from qpref.attention.layout import Layout, laid_out

    module = SimpleNamespace(config=SimpleNamespace(layer_types=None), is_causal=True, layer_idx=0, training=True)

    def attend(*states: Tensor) -> Tensor:
        with laid_out(Layout(tuple(groups))):
            attended: Tensor = ALL_ATTENTION_FUNCTIONS[path](module, *states, None, sliding_window=window)[0]
        return attended

    return attend


def exact_attention(groups: Sequence[Any], window: int | None) -> Attend:
    """Compute attention by its definition, with a [T, T] mask."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        repeat = query.shape[1] // key.shape[1]
        scores = query @ key.repeat_interleave(repeat, 1).mT / query.shape[-1] ** 0.5
        mask = attended(groups, window).to(query.device)
        return (scores.masked_fill(~mask, -torch.inf).softmax(-1) @ value.repeat_interleave(repeat, 1)).transpose(1, 2)

    return attend


def attended(groups: Sequence[Any], window: int | None) -> Tensor:
    """[T, T], true where a query may see a key: its own segment up to itself, and its prompt."""
    position, segment, prompt = [], [], []
    for index, group in enumerate(groups):
        for branch, length in enumerate((group.prompt, *group.branches)):
            before = group.prompt if branch else 0
            position += range(before, before + length)
            segment += [(index, branch)] * length
            prompt += [(index, 0)] * length
    codes = {each: code for code, each in enumerate(dict.fromkeys([*segment, *prompt]))}
    at, own, shared = (torch.tensor(each) for each in (position, *([codes[x] for x in y] for y in (segment, prompt))))
    same = (own[:, None] == own[None]) | (shared[:, None] == own[None])
    distance = at[:, None] - at[None]
    return same & (distance >= 0) & (distance < (window or len(at)))


def _with_gradients(attend: Attend, states: Sequence[Tensor], direction: Tensor) -> list[Tensor]:
    leaves = [each.detach().requires_grad_() for each in states]
    result = attend(*leaves)
    return [result.detach(), *torch.autograd.grad(result, leaves, direction)]


def _repeatability(context: Context, path: str, case: Case) -> dict[str, Any]:
    """Run a path twice on the same states, as torch chooses and under its deterministic algorithms."""
    states, direction = case.states, case.direction
    attend, found = _path(path, case.groups, None), {}
    for name, wanted in (("by default", False), ("deterministic", True)):
        torch.use_deterministic_algorithms(wanted, warn_only=True)
        try:
            first, second = (_with_gradients(attend, states, direction) for _ in range(2))
            cost = seconds(context.device, lambda: _with_gradients(attend, states, direction))
        finally:
            torch.use_deterministic_algorithms(False)
        equal = all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
        found[name] = {"repeats": equal, "seconds": cost}
    return {"repeatability": found}
