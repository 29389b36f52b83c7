"""Segments of a packed stream, each one attention of its own, and blocks of a segment's queries. Needs no torch.

A segment is a prompt, which attends to itself, or a branch, which attends to its prompt and itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from qpref.records import Group

QUERY_BLOCK = 224
"""Queries of a block, at most."""
KEPT_KEYS = 2048
"""A segment with more keys has its softmax recomputed in the backward pass."""
CACHED_MASKS = 64
"""Causal masks of branches that are kept from call to call (see `sdpa`)."""


@dataclass(frozen=True, slots=True)
class Block:
    """A run of a segment's queries and the keys that they may see.

    Attributes:
        queries: their positions in the stream.
        own: index of the first query's own key among the segment's keys; the other queries' follow.
        keys: the range of the segment's keys that any of them sees.
    """

    queries: slice
    own: int
    keys: slice


@dataclass(frozen=True, slots=True)
class Segment:
    """Queries that attend to the same sequence of keys, the last of them to all.

    Attributes:
        spans: positions of the keys in the stream: the prompt's, and for a branch its own after them.
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
        """True where the softmax is kept for the backward pass, false where it is recomputed."""
        return self.num_keys <= KEPT_KEYS

    def blocks(self, window: int | None) -> Iterator[Block]:
        """Cut the queries into blocks of about equal length; each query sees `window` keys up to its own, or all."""
        start, stop = self.queries.start, self.queries.stop
        offset = self.num_keys - stop
        for first, end in _cuts(start, stop):
            own = offset + first
            oldest = 0 if window is None else max(0, own - window + 1)
            yield Block(slice(first, end), own, slice(oldest, offset + end))


def segments(groups: Iterable[Group]) -> Iterator[Segment]:
    """Iterate over a stream's segments in its order."""
    for group in groups:
        prompt = slice(group.start, group.start + group.prompt)
        yield Segment((prompt,))
        start = prompt.stop
        for length in group.branches:
            if length:
                yield Segment((prompt, slice(start, start + length)))
            start += length


def kept_scores(before: int, own: int) -> int:
    """Count the query-key pairs with a kept softmax in a segment of `own` queries with `before` keys before them."""
    if before + own > KEPT_KEYS:
        return 0
    return sum((end - first) * (before + end) for first, end in _cuts(0, own))


def _cuts(start: int, stop: int) -> Iterator[tuple[int, int]]:
    num_blocks = -(-(stop - start) // QUERY_BLOCK)
    size = -(-(stop - start) // num_blocks) if num_blocks else 1
    return ((first, min(first + size, stop)) for first in range(start, stop, size))
