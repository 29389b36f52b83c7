"""Options that a loss is checked with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from qpref.hooks.types import Loss
from qpref.testing.calls import Built


def options_tables(record: Loss) -> list[Mapping[str, object]]:
    """List the options to check a loss with: its defaults, if every option has one, and its variants."""
    complete = not any(field.is_required() for field in record.options.model_fields.values())
    return [*([{}] if complete or not record.variants else []), *record.variants]


def built_with_each(record: Loss) -> Iterator[Built]:
    """Yield the loss under each of the options that it is checked with, but for those that it refuses itself.

    For what options may switch off: an unused column is a mistake where no options make use of it.
    """
    for table in options_tables(record):
        try:
            options: Any = record.options.model_validate(table)
        except ValueError:
            continue
        yield Built(record, options)
