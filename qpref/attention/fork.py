"""A packed stream as rows, for layers whose state runs along a row: prompts first, then branches from their ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qpref.records import Group
from qpref.staging import to_device

MIN_BRANCH = 2
"""Tokens of a branch's row, at least: a call with one token is a decoding step, which has no gradient."""
LEAST_FILLED = 0.5
"""Length of a branch, at least, as a share of the longest in its call; padding is computed and dropped."""

_Span = tuple[int, range]
"""Number of a group, and a span of stream indices."""


@dataclass(frozen=True, slots=True, eq=False)
class Fork:
    """A stream as rows.

    Attributes:
        prompts: [rows, length] int64 for each call, stream indices of prompts, all of one length; empty where an
            earlier pass has computed them.
        branches: likewise of branches; padding on the right repeats a row's last token.
        origins: [rows] int64 for each call of branches, the row of each one's prompt among the rows of all prompts.
        order: [T] int64, index of each of the stream's tokens among those of all rows.
    """

    prompts: tuple[Tensor, ...]
    branches: tuple[Tensor, ...]
    origins: tuple[Tensor, ...]
    order: Tensor

    @classmethod
    def of(cls, groups: Sequence[Group], device: torch.device, *, continued: bool = False) -> Fork:
        """Lay out a stream; one that continues holds branches alone, whose prompts an earlier pass has computed."""
        prompts = _calls([(number, range(group.prompt)) for number, group in enumerate(groups)], 1.0)
        branches = _calls(_branches(groups, continued), LEAST_FILLED)
        rows = [number for call in prompts for number, _ in call]
        row_of = dict(zip(rows, range(len(rows)), strict=True))
        prompts = [] if continued else [[(n, _moved(span, groups[n].start)) for n, span in call] for call in prompts]
        origins = [torch.tensor([row_of[number] for number, _ in call]) for call in branches]
        indices = [_indices(call, 1) for call in prompts] + [_indices(call, MIN_BRANCH) for call in branches]
        parts = to_device([*indices, *origins, _order(prompts + branches, indices)], device)
        first, second = len(prompts), len(indices)
        return cls(tuple(parts[:first]), tuple(parts[first:second]), tuple(parts[second:-1]), parts[-1])


def _branches(groups: Sequence[Group], continued: bool) -> list[_Span]:
    """List the branches that have tokens."""
    spans, start = [], 0
    for number, group in enumerate(groups):
        start += 0 if continued else group.prompt
        for length in group.branches:
            if length:
                spans.append((number, range(start, start + length)))
            start += length
    return spans


def _moved(span: range, start: int) -> range:
    return range(start + span.start, start + span.stop)


def _calls(spans: Sequence[_Span], least: float) -> list[list[_Span]]:
    """Distribute spans over calls, the longest first; none is shorter than a share of the longest in its call."""
    calls: list[list[_Span]] = []
    for number, span in sorted(spans, key=lambda each: -len(each[1])):
        if calls and len(span) >= least * len(calls[-1][0][1]):
            calls[-1].append((number, span))
        else:
            calls.append([(number, span)])
    return calls


def _indices(call: Sequence[_Span], shortest: int) -> Tensor:
    """[rows, length] stream indices of the spans, padded to the longest."""
    columns = torch.arange(max(shortest, len(call[0][1])))
    return torch.stack([span.start + columns.clamp(max=len(span) - 1) for _, span in call])


def _order(calls: Sequence[Sequence[_Span]], indices: Sequence[Tensor]) -> Tensor:
    order = torch.empty(sum(len(span) for call in calls for _, span in call), dtype=torch.int64)
    offset = 0
    for call, rows in zip(calls, indices, strict=True):
        for _, span in call:
            order[span.start : span.stop] = offset + torch.arange(len(span))
            offset += rows.shape[1]
    return order
