"""Failures of a tokenizer on a row, named with the row and the tokenizer.

Its patterns come with the model. One that splits most texts at once can reach Oniguruma's limit of 10 million steps on
another text, which is a panic of Rust's and no Exception, or need minutes for a text that stays below the limit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from qpref.data.example_rows import ExampleRow
from qpref.errors import PolicyError
from qpref.hooks.hang_watch import watch

PANIC = "PanicException"
"""Type of a panic of Rust's; each library that is built with PyO3 has one of its own, which cannot be imported."""
HINT = "leave the row out, or name another tokenizer in [model] tokenizer"


class TokenizerError(Exception):
    """A tokenizer's failure on some texts."""


@contextmanager
def tokenizing() -> Iterator[None]:
    """Turn whatever a tokenizer raises into a TokenizerError.

    Raises:
        TokenizerError: with the tokenizer's own words.
    """
    try:
        yield
    except MemoryError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != PANIC:
            raise
        raise TokenizerError(" ".join(str(error).split()) or type(error).__name__) from None


@contextmanager
def on_rows(tokenizer: str, rows: Sequence[ExampleRow]) -> Iterator[None]:
    """Name the rows on which a tokenizer fails, or doesn't return.

    Raises:
        PolicyError: it failed.
    """
    first, last = rows[0].source, rows[-1].source
    place = str(first) if first == last else f"{first} to {last}"
    watch.enter(f"the tokenizer of {tokenizer}, on {place},")
    try:
        yield
    except TokenizerError as error:
        raise PolicyError(f"{place}: the tokenizer of {tokenizer} fails on it: {error}", HINT) from None
    finally:
        watch.leave()
