"""Ranked lists from the preference pairs of a row, for losses that take lists."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from qpref.records import Message, PreferencePair, RankedList

Turns = tuple[Message, ...]


def lists_of(pairs: Sequence[PreferencePair]) -> Iterator[RankedList]:
    """Join the pairs of one row into a list for each prompt: k ranked responses are one list again, not their pairs.

    A response ranks below those that are preferred to it; responses of one score, between which there is no pair, tie.
    A single pair is a list of two.
    """
    by_prompt: dict[str, list[PreferencePair]] = {}
    for pair in pairs:
        by_prompt.setdefault(repr(pair.prompt), []).append(pair)
    for number, members in enumerate(by_prompt.values()):
        yield _list_of(members, number)


def _list_of(pairs: Sequence[PreferencePair], number: int) -> RankedList:
    same = next((pair for pair in pairs if pair.chosen == pair.rejected), None)
    if same is not None:
        pairs = [same]  # it refuses or drops the whole row later, as it would as a pair
    turns: dict[str, Turns] = {}
    above: dict[str, set[str]] = {}
    scores: dict[str, float] = {}
    for pair in pairs:
        better, worse = ("chosen", "rejected") if same is not None else (repr(pair.chosen), repr(pair.rejected))
        turns |= {better: pair.chosen, worse: pair.rejected}
        above.setdefault(better, set())
        above.setdefault(worse, set()).add(better)
        scores |= dict(zip((better, worse), pair.scores or (), strict=False))
    best_first = sorted(turns, key=lambda key: len(above[key]))
    first = pairs[0]
    return RankedList(
        prompt=first.prompt,
        responses=tuple(turns[key] for key in best_first),
        ranks=tuple(1 + len(above[key]) for key in best_first),
        scores=tuple(scores[key] for key in best_first if key in scores),
        tools=first.tools,
        weight=first.weight,
        margin=first.margin,
        number=number,
        columns=first.columns,
        source=first.source,
    )
