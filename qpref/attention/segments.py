"""How a packed stream falls into segments that attend as one, and those into blocks. Needs no torch.

A segment is a prompt, which attends to itself, or a branch, which attends to its prompt and itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from qpref.records import Group

QUERY_BLOCK = 224
"""Queries of a block, at most."""
KEPT_KEYS = 2048
"""A segment with more keys has its softmax computed again in the backward pass."""


@dataclass(frozen=True, slots=True)
class Block:
    """Some queries of a segment and the keys they may see.

    Attributes:
        queries: their places in the stream.
        own: where the first of them stands among the segment's keys; each query after it one further.
        keys: the segment's keys that any of them sees.
    """

    queries: slice
    own: int
    keys: slice


@dataclass(frozen=True, slots=True)
class Segment:
    """Queries that attend to the same run of keys, the last of them to all.

    Attributes:
        spans: the keys' places in the stream: the prompt, and for a branch its own.
    """

    spans: tuple[slice, ...]

    @property
    def queries(self) -> slice:
        return self.spans[-1]

    @property
    def num_keys(self) -> int:
        return sum(span.stop - span.start for span in self.spans)

    @property
    def keeps(self) -> bool:
        """Whether its softmax is kept for the backward pass."""
        return self.num_keys <= KEPT_KEYS

    def blocks(self, window: int | None) -> Iterator[Block]:
        """Its queries in blocks of about equal length, where each sees `window` keys up to its own, or all."""
        start, stop = self.queries.start, self.queries.stop
        offset = self.num_keys - stop
        for first, end in _cuts(start, stop):
            own = offset + first
            oldest = 0 if window is None else max(0, own - window + 1)
            yield Block(slice(first, end), own, slice(oldest, offset + end))


def segments(groups: Iterable[Group]) -> Iterator[Segment]:
    """All of a stream, in its order."""
    for group in groups:
        prompt = slice(group.start, group.start + group.prompt)
        yield Segment((prompt,))
        start = prompt.stop
        for length in group.branches:
            if length:
                yield Segment((prompt, slice(start, start + length)))
            start += length


def kept_scores(before: int, own: int) -> int:
    """Query-key pairs whose softmax is kept of a segment of `own` queries with `before` keys before them."""
    if before + own > KEPT_KEYS:
        return 0
    return sum((end - first) * (before + end) for first, end in _cuts(0, own))


def _cuts(start: int, stop: int) -> Iterator[tuple[int, int]]:
    num_blocks = -(-(stop - start) // QUERY_BLOCK)
    size = -(-(stop - start) // num_blocks) if num_blocks else 1
    return ((first, min(first + size, stop)) for first in range(start, stop, size))
