"""Values of a row: checks of their texts, and how a message names them."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterable, Mapping

from qpref.hooks.characters import odd_characters

MAX_DEPTH = 64
_SURROGATE = re.compile("[\ud800-\udfff]")
_REFUSED = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")
_ESCAPES = {"\a": "a", "\b": "b", "\v": "v", "\f": "f"}
_LETTERS = re.compile(r"[a-z]{2,}")


class BadRowError(ValueError):
    """A row that cannot become a record; becomes a finding at the row's location."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def check_text(text: str, where: str) -> None:
    """Refuse control characters, except tab, newline and carriage return, and half surrogate pairs."""
    if not (odd := odd_characters(text)) or _REFUSED.search(odd) is None:
        return
    found = _SURROGATE.search(text) or _REFUSED.search(text)
    assert found is not None
    at = found.start()
    if _SURROGATE.match(found[0]):
        message = f"{where}: half of a surrogate pair at character {at + 1}, which isn't valid Unicode"
        raise BadRowError("control_character", message)
    fix = _lost_backslash(text, at) or "remove it"
    message = f"{where}: the control character U+{ord(found[0]):04X} at character {at + 1}; {fix}"
    raise BadRowError("control_character", message)


def _lost_backslash(text: str, at: int) -> str:
    """Name the word that a control character was made of, such as `\\frac`; empty where no word follows it."""
    letter, rest = _ESCAPES.get(text[at]), _LETTERS.match(text, at + 1)
    if letter is None or rest is None:
        return ""
    word = f"\\{letter}{rest[0][:20]}"
    return f"'{word}' lost its backslash to the escape '\\{letter}': JSON writes it '\\{word}'"


def check_texts_within(value: object, where: str, depth: int = 0) -> None:
    """Apply `check_text` to all keys and texts of a JSON value, and refuse values that JSON cannot express."""
    if depth > MAX_DEPTH:
        raise BadRowError("not_a_message", f"{where}: nested deeper than {MAX_DEPTH} levels")
    if isinstance(value, str):
        check_text(value, where)
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            check_text(str(key), where)
            check_texts_within(inner, where, depth + 1)
    elif isinstance(value, list):
        for inner in value:
            check_texts_within(inner, where, depth + 1)
    elif not isinstance(value, int | float | None) or (isinstance(value, float) and not math.isfinite(value)):
        raise BadRowError("not_a_message", f"{where}: {shown(value)} is not JSON")


def json_value(text: str) -> object:
    """Parse a JSON text; None where it is invalid."""
    try:
        value: object = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value


def kind_of(value: object) -> str:
    """Describe the type of a JSON value for a message."""
    if isinstance(value, dict):
        return f"an object with the keys {named(value)}" if value else "an empty object"
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    names = {str: "a text", bool: "true or false", int: "a number", float: "a number", type(None): "null"}
    return names.get(type(value), type(value).__name__)


def named(names: Iterable[object], limit: int = 12) -> str:
    """List the first names of columns or keys on one line, shortened and with control characters escaped."""
    first = [str(name)[:20] for name in itertools.islice(names, limit)]
    return ", ".join(name if name.isprintable() else ascii(name) for name in first)


def shown(value: object) -> str:
    """Show a value in a message: itself if short, else its type."""
    if isinstance(value, str):
        return ascii(value[:40]) if not value.isprintable() else repr(value[:40])
    if value is None or isinstance(value, float) or (isinstance(value, int) and abs(value) < 10**15):
        return repr(value)
    if isinstance(value, int):
        return f"a number of about {int(value.bit_length() * math.log10(2)) + 1} digits"
    return kind_of(value)
