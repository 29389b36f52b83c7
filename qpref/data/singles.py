"""Single completions from preference pairs, for losses that take no pairs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from qpref.records import PreferencePair, UnpairedExample


def singles_of(records: Sequence[PreferencePair | UnpairedExample]) -> Iterator[UnpairedExample]:
    """Split the records of one row into single completions.

    Ranked responses: only those that are always preferred, or never, once each. A response that beats some and loses
    to others is neither desirable nor undesirable.
    """
    pairs = [record for record in records if isinstance(record, PreferencePair)]
    lost, won = ({repr(getattr(pair, side)) for pair in pairs} for side in ("rejected", "chosen"))
    seen: set[str] = set()
    numbers = {True: 0, False: 0}
    for record in records:
        for single in unpair(record) if isinstance(record, PreferencePair) else (record,):
            text = repr(single.completion)
            if len(pairs) > 1 and (text in seen or text in (lost if single.label else won)):
                continue
            seen.add(text)
            yield replace(single, number=numbers[single.label])
            numbers[single.label] += 1


def unpair(pair: PreferencePair) -> tuple[UnpairedExample, UnpairedExample]:
    """Split a pair into two completions, the desirable one first; its margin is dropped."""
    desirable, undesirable = (
        UnpairedExample(
            prompt=pair.prompt,
            completion=completion,
            label=label,
            tools=pair.tools,
            weight=pair.weight,
            number=pair.number,
            columns=pair.columns,
            source=pair.source,
        )
        for completion, label in ((pair.chosen, True), (pair.rejected, False))
    )
    return desirable, undesirable
