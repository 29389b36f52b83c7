"""A hint for rows that have two responses and a verdict, but no columns that say which response is preferred."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

_COUNTERPARTS = {
    **{"a": "b", "0": "1", "1": "2", "left": "right", "first": "second", "one": "two"},
    **{"A": "B", "Left": "Right", "First": "Second"},
}
_RESPONSES = (
    *("response", "answer", "output", "completion", "reply", "text", "summary", "conversation", "candidate"),
    *("generation", "option", "message"),
)
_VERDICTS = (
    *("winner", "label", "prefer", "better", "best", "choice", "verdict", "comparison", "judg", "vote", "decision"),
    *("chosen", "rank"),
)
_PARTS = re.compile(r"[A-Za-z]+|\d+|[^A-Za-z\d]+")


def contest_hint(columns: Iterable[str]) -> str | None:
    """Return the `[data] contest` that columns such as output_1, output_2 and label suggest; None for any others."""
    names = list(columns)
    pair = next(_pairs(names), None)
    if pair is None:
        return None
    first, second = pair
    winner = next((name for name in names if name not in pair and _has(name, _VERDICTS)), "...")
    return (
        f'say who won: [data] contest = {{ first = "{first}", second = "{second}", winner = "{winner}", '
        "first_wins = [...], second_wins = [...] }"
    )


def _pairs(names: list[str]) -> Iterator[tuple[str, str]]:
    """Yield columns of two responses: their names differ in one part, such as a and b."""
    for name in names:
        parts = _PARTS.findall(name)
        for index, part in enumerate(parts):
            if part in _COUNTERPARTS:
                other = "".join([*parts[:index], _COUNTERPARTS[part], *parts[index + 1 :]])
                rest = "".join(parts[:index] + parts[index + 1 :])
                if other in names and (not rest or _has(rest, _RESPONSES)) and not _has(rest, _VERDICTS):
                    yield name, other


def _has(name: str, words: tuple[str, ...]) -> bool:
    return any(word in name.lower() for word in words)
