"""What a million rows leave behind: 32 bytes each, in arrays, whose sorting finds equal ones.

Texts are known by their 64-bit hashes. Among a million rows, two different ones have the same hash with a probability
of 3 in 100 million.
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
    """Pairs as edges from the preferred response to the other, each known by prompt and text; with their places."""

    def __init__(self) -> None:
        self._columns = tuple(array("q") for _ in range(4))

    def add(self, prompt: int, better: int, worse: int, place: int) -> None:
        for column, value in zip(self._columns, (prompt, better, worse, place), strict=True):
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
    def place(self) -> Hashes:
        return np.frombuffer(self._columns[3], dtype=np.int64)


def edge_keys(tail: Hashes, head: Hashes) -> Hashes:
    """One hash for each edge; the same edge the other way round has another."""
    mixed = tail.view(np.uint64) * _ODD
    mixed ^= mixed >> np.uint64(29)
    mixed += head.view(np.uint64)
    mixed *= _ODD
    return mixed.view(np.int64)


def repeats(keys: Hashes, places: Hashes) -> Iterator[tuple[int, int]]:
    """(place, first place) of each row whose key an earlier row has; once for each place, in order."""
    order = np.argsort(keys, kind="stable")
    ranked = keys[order]
    starts = np.ones(len(keys), dtype=bool)
    starts[1:] = ranked[1:] != ranked[:-1]
    if starts.all():
        return
    first = np.maximum.accumulate(np.where(starts, np.arange(len(keys), dtype=np.int32), 0))
    again = np.flatnonzero(places[order] != places[order[first]])
    later, earlier = order[again], order[first[again]]
    yield from _by_place(places, later, earlier)


def partners(keys: Hashes, wanted: Hashes, places: Hashes) -> Iterator[tuple[int, int]]:
    """(place, place of a partner) of each row whose wanted key is the key of another; once for each place, in order."""
    candidates = np.flatnonzero(among(wanted, keys))
    if not len(candidates):
        return
    having = np.flatnonzero(among(keys, wanted[candidates]))
    having = having[np.argsort(keys[having], kind="stable")]
    partner = having[np.searchsorted(keys[having], wanted[candidates])]
    yield from _by_place(places, candidates, partner)


def among(values: Hashes, pool: Hashes) -> Mask:
    """Which values are in the pool; np.isin says the same and takes three times the memory."""
    if not len(pool):
        return np.zeros(len(values), dtype=bool)
    ranked = np.sort(pool)
    found: Mask = ranked[np.minimum(np.searchsorted(ranked, values), len(pool) - 1)] == values
    return found


def _by_place(places: Hashes, rows: NDArray[np.int64], others: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    own, index = np.unique(places[rows], return_index=True)
    for place, other in zip(own, others[index], strict=True):
        yield int(place), int(places[other])


def on_cycles(better: Hashes, worse: Hashes, prompt: Hashes) -> Iterator[list[int]]:
    """The edges of each strongly connected part of more than two responses: A over B, B over C, C over A.

    What no edge leads to, or from, is on no cycle, and is cut off until little is left; rankings end that way after
    half as many rounds as a prompt has responses.
    """
    rows = np.flatnonzero(better != worse)
    while len(rows):
        kept = rows[among(better[rows], worse[rows]) & among(worse[rows], better[rows])]
        few_fell = len(rows) - len(kept) <= len(rows) // 20
        rows = kept
        if few_fell:
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
    """The strongly connected part of each node, by number (Kosaraju's two walks, without recursion)."""
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
