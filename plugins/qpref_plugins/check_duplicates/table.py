"""Preferences as arrays of 64-bit hashes, 32 bytes per row; sorting finds the equal ones.

Among a million rows, two different texts have the same hash with a probability of 3 in 100 million.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.int64]
Mask = NDArray[np.bool_]

_ODD = np.uint64(0x9E3779B97F4A7C15)


class Edges:
    """Pairs as edges from the preferred response to the other; nodes are hashes of prompt and response."""

    def __init__(self) -> None:
        self._columns = tuple(array("q") for _ in range(4))

    def add(self, prompt: int, better: int, worse: int, location: int) -> None:
        for column, value in zip(self._columns, (prompt, better, worse, location), strict=True):
            column.append(value)

    @property
    def prompt(self) -> Hashes:
        return np.frombuffer(self._columns[0], dtype=np.int64)

    @property
    def better(self) -> Hashes:
        return np.frombuffer(self._columns[1], dtype=np.int64)

    @property
    def worse(self) -> Hashes:
        return np.frombuffer(self._columns[2], dtype=np.int64)

    @property
    def location(self) -> Hashes:
        return np.frombuffer(self._columns[3], dtype=np.int64)


def edge_keys(tail: Hashes, head: Hashes) -> Hashes:
    """Hash each edge; the reversed edge has a different hash."""
    mixed = tail.view(np.uint64) * _ODD
    mixed ^= mixed >> np.uint64(29)
    mixed += head.view(np.uint64)
    mixed *= _ODD
    return mixed.view(np.int64)


def repeats(keys: Hashes, locations: Hashes) -> Iterator[tuple[int, int]]:
    """Yield (location, location of the first) of each row whose key an earlier row has; once per location, in order."""
    order = np.argsort(keys, kind="stable")
    ranked = keys[order]
    starts = np.ones(len(keys), dtype=bool)
    starts[1:] = ranked[1:] != ranked[:-1]
    if starts.all():
        return
    first = np.maximum.accumulate(np.where(starts, np.arange(len(keys), dtype=np.int32), 0))
    repeated = np.flatnonzero(locations[order] != locations[order[first]])
    later, earlier = order[repeated], order[first[repeated]]
    yield from _by_location(locations, later, earlier)


def partners(keys: Hashes, wanted: Hashes, locations: Hashes) -> Iterator[tuple[int, int]]:
    """Yield (location, location of a row with the wanted key) of each row that has one; once per location, in order."""
    candidates = np.flatnonzero(among(wanted, keys))
    if not len(candidates):
        return
    having = np.flatnonzero(among(keys, wanted[candidates]))
    having = having[np.argsort(keys[having], kind="stable")]
    partner = having[np.searchsorted(keys[having], wanted[candidates])]
    yield from _by_location(locations, candidates, partner)


def among(values: Hashes, pool: Hashes) -> Mask:
    """Return a mask of the values that are in the pool: np.isin in a third of its memory."""
    if not len(pool):
        return np.zeros(len(values), dtype=bool)
    ranked = np.sort(pool)
    found: Mask = ranked[np.minimum(np.searchsorted(ranked, values), len(pool) - 1)] == values
    return found


def _by_location(locations: Hashes, rows: NDArray[np.int64], others: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    own, index = np.unique(locations[rows], return_index=True)
    for location, other in zip(own, others[index], strict=True):
        yield int(location), int(locations[other])


def on_cycles(better: Hashes, worse: Hashes, prompt: Hashes) -> Iterator[list[int]]:
    """Yield the edges of each strongly connected component of more than two responses: A over B, B over C, C over A.

    A response without incoming or without outgoing edges is on no cycle; such responses are removed in rounds until few
    go. For rankings that takes half as many rounds as a prompt has responses.
    """
    rows = np.flatnonzero(better != worse)
    while len(rows):
        kept = rows[among(better[rows], worse[rows]) & among(worse[rows], better[rows])]
        few_removed = len(rows) - len(kept) <= len(rows) // 20
        rows = kept
        if few_removed:
            break
    rows = rows[np.argsort(prompt[rows], kind="stable")]
    for group in np.split(rows, np.flatnonzero(np.diff(prompt[rows])) + 1):
        if len(group) < 3:
            continue
        part = strong_parts(list(zip(better[group].tolist(), worse[group].tolist(), strict=True)))
        num_responses = Counter(part.values())
        members: dict[int, list[int]] = {}
        for row in group.tolist():
            number = part[int(better[row])]
            if number == part[int(worse[row])] and num_responses[number] > 2:
                members.setdefault(number, []).append(row)
        yield from members.values()


def strong_parts(edges: list[tuple[int, int]]) -> dict[int, int]:
    """Number the strongly connected component of each node (Kosaraju's two passes, without recursion)."""
    onward: dict[int, list[int]] = {}
    back: dict[int, list[int]] = {}
    for tail, head in edges:
        onward.setdefault(tail, []).append(head)
        onward.setdefault(head, [])
        back.setdefault(head, []).append(tail)
        back.setdefault(tail, [])
    finished: list[int] = []
    seen: set[int] = set()
    for root in onward:
        if root in seen:
            continue
        seen.add(root)
        walk = [(root, iter(onward[root]))]
        while walk:
            node, heads = walk[-1]
            step = next((head for head in heads if head not in seen), None)
            if step is None:
                finished.append(node)
                walk.pop()
            else:
                seen.add(step)
                walk.append((step, iter(onward[step])))
    part: dict[int, int] = {}
    for root in reversed(finished):
        number, reach = len(part), [root]
        while reach:
            node = reach.pop()
            if node not in part:
                part[node] = number
                reach += back[node]
    return part
