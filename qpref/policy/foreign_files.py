"""Files of models, tokenizers and adapters, which come from others: read and checked before a library sees them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qpref import opening
from qpref.errors import PolicyError, QprefError

MAX_DEPTH = 64
"""Deepest nesting of a file that a library walks through recursively."""
MAX_MESSAGE = 300
"""Longest part of a library's message that is quoted."""


def read_object(path: Path, lacks: str = "") -> dict[str, Any]:
    """Read a file that holds one JSON object; links are followed, since the hub's cache is made of them.

    Args:
        lacks: what the folder lacks without this file, for the message: "no adapter in PEFT's format".

    Raises:
        PolicyError: it isn't a regular file, cannot be read, holds something else, or is nested too deeply.
    """
    start = f"{path}: {lacks}: " if lacks else f"{path}: "
    try:
        values = opening.read_object(path, follow=True)
    except FileNotFoundError:
        raise PolicyError(f"{start}no such file") from None
    except OSError as error:
        raise PolicyError(f"{start}cannot be read: {error.strerror}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise PolicyError(f"{start}not JSON: {_short(error)}") from None
    except ValueError as error:
        raise PolicyError(f"{start}not a JSON object: {_short(error)}") from None
    if opening.is_nested(values, MAX_DEPTH):
        raise PolicyError(f"{start}nested more than {MAX_DEPTH} deep")
    return values


def refuse_other_kinds(folder: Path) -> None:
    """Refuse a folder that has a FIFO, socket or device, at which a library would wait for ever.

    Raises:
        PolicyError: it has; or it cannot be listed.
    """
    try:
        for path in folder.iterdir():
            kind = opening.kind_of(path, follow=True)
            if kind not in (None, "a folder"):
                raise PolicyError(f"{path}: it is {kind}, not a regular file")
    except OSError as error:
        raise PolicyError(f"{folder}: cannot be read: {error.strerror}") from None


@contextmanager
def read_by_library(origin: object, problem: str) -> Iterator[None]:
    """Turn whatever a library raises over a file of others into one sentence.

    Such a file can set any value, and the libraries check few of them before use: any type of error follows, from Rust
    a panic too, which is no Exception.

    Args:
        origin: of the file, for the message.
        problem: what the library can't do.

    Raises:
        PolicyError: the library raised an error.
    """
    try:
        yield
    except QprefError:
        raise
    except MemoryError:
        raise PolicyError(f"{origin}: {problem}: it takes more memory than there is") from None
    except Exception as error:
        raise PolicyError(f"{origin}: {problem}: {_short(error)}") from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise PolicyError(f"{origin}: {problem}: {_short(error)}") from None


def check_types(path: Path, values: Mapping[str, Any], expected: Mapping[str, tuple[str, Any]]) -> None:
    """Check values of a JSON object; a key that is missing or null is none.

    Args:
        expected: key -> what it should be in words, and a function that accepts it.

    Raises:
        PolicyError: a value is something else; the message names the key.
    """
    for key, (words, accepts) in expected.items():
        value = values.get(key)
        if value is not None and not accepts(value):
            raise PolicyError(f"{path}: {key}: expected {words}, got {_shown(value)}")


def _shown(value: object) -> str:
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**20 else "a number of over 20 digits"
    return text if len(text) <= 60 else f"{text[:60]}..."


def _short(error: BaseException) -> str:
    """The start of an error's message on one line, or its type where it has none."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    text = " ".join(str(error).split())[:MAX_MESSAGE] or type(error).__name__
    return f"it lacks {text}" if isinstance(error, KeyError) else text
