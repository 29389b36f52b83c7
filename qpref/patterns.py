"""Regular expressions of others: refused where a match could take for ever.

An adapter names layers by patterns, a tokenizer splits text by them. A repeat inside a repeat, as in `(a+)+`, tries a
number of ways that doubles with each character, and neither of the two libraries can be stopped.
"""

from __future__ import annotations

import re
from re import _constants, _parser  # type: ignore[attr-defined]
from typing import Any

MAX_LENGTH = 20_000
FEW = 16
"""A repeat of at most this many times counts as no repeat."""
MAX_REPEATS = 4
"""Most unbounded repeats one after the other: k of them take up to n^k / k! steps on n characters."""
_PROPERTY = re.compile(r"\\[pP]\{\^?\w+\}|\\[pP]\w|\\h|\\H|\[:\^?\w+:\]")
_PART = re.compile(r"\\.|\[\^?\]?|.", re.DOTALL)
_REPEATS = frozenset({_constants.MAX_REPEAT, _constants.MIN_REPEAT})


def why_slow(pattern: str, of_tokenizer: bool = False) -> str | None:
    """Explain why a pattern can take too long, or cannot be parsed; None for a quick one.

    Args:
        of_tokenizer: it has Oniguruma's syntax, whose Unicode properties (`\\p{L}`) and classes inside classes Python
            lacks; each stands for one character.
    """
    if len(pattern) > MAX_LENGTH:
        return f"it is longer than {MAX_LENGTH} characters"
    try:
        tree = _parser.parse(_PROPERTY.sub(r"\\w", _without_classes(pattern)) if of_tokenizer else pattern)
    except (re.error, OverflowError) as error:
        return f"it is no regular expression: {error}"
    except RecursionError:
        return "it is nested too deeply"
    return _why_slow(tree)


def _without_classes(pattern: str) -> str:
    """Replace each character class, which may hold other classes, by one that Python parses."""
    kept: list[str] = []
    depth = 0
    for part in _PART.findall(pattern):
        is_open = part.startswith("[")
        if is_open and depth == 0:
            kept.append(r"\w")
        elif depth == 0:
            kept.append(part)
        depth = depth + 1 if is_open else depth - 1 if part == "]" and depth else depth
    return "".join(kept)


def _why_slow(tree: Any) -> str | None:
    for repeat in _repeats(tree):
        if _varies(repeat):
            return "a repeat inside a repeat, or a choice in one, can be matched in too many ways"
    longest = _most_in_a_row(tree)
    return f"{longest} repeats one after the other can be matched in too many ways" if longest > MAX_REPEATS else None


def _repeats(tree: Any) -> list[Any]:
    """Collect what is repeated without a small bound, anywhere in a parsed pattern."""
    found = []
    for operator, argument in tree:
        if operator in _REPEATS and argument[1] > FEW:
            found.append(argument[2])
        for inner in _inner(argument):
            found += _repeats(inner)
    return found


def _varies(tree: Any) -> bool:
    """Return whether a repeated part can match in several lengths or ways."""
    for operator, argument in tree:
        if operator is _constants.BRANCH or (operator in _REPEATS and argument[0] != argument[1]):
            return True
        if any(map(_varies, _inner(argument))):
            return True
    return False


def _most_in_a_row(tree: Any) -> int:
    """Count the unbounded repeats of the longest way through a pattern."""
    total = 0
    for operator, argument in tree:
        total += operator in _REPEATS and argument[1] > FEW
        total += max(map(_most_in_a_row, _inner(argument)), default=0)
    return total


def _inner(argument: Any) -> list[Any]:
    """List the patterns inside an operator's argument."""
    if isinstance(argument, _parser.SubPattern):
        return [argument]
    if isinstance(argument, list | tuple):
        return [inner for each in argument for inner in _inner(each)]
    return []
