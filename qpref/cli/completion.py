"""Words that a shell completes: names of losses, readers, cards, shapes and settings. They import nothing heavy.

The shells' scripts are click's own: `eval "$(_QPREF_COMPLETE=bash_source qpref)"`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import click
from click.shell_completion import CompletionItem

Completer = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]


def _completer(words: Callable[[], Iterable[str]]) -> Completer:
    """Make the `shell_complete` function of an option or argument from the words that it may have."""

    def complete(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(word) for word in words() if word.lower().startswith(incomplete.lower())]

    return complete


def _plugins(kind: str) -> Callable[[], Iterable[str]]:
    def names() -> Iterable[str]:
        from qpref.hooks.manager import installed_offers

        return sorted({offer.name for offer in installed_offers() if offer.kind == kind})

    return names


def _entry_points() -> Iterable[str]:
    from qpref.hooks.manager import installed_offers

    return sorted({offer.entry_point for offer in installed_offers()})


def _shapes() -> Iterable[str]:
    from qpref.memory.known_shapes import KNOWN_SHAPES

    return sorted(KNOWN_SHAPES)


def _cards() -> Iterable[str]:
    from qpref.memory.cards import CARDS

    return sorted(card.title for card in CARDS)


def _formats() -> Iterable[str]:
    from typing import get_args

    from qpref.recipe.data_section import RowFormat

    return get_args(RowFormat)


def _settings() -> Iterable[str]:
    """Yield `table.key=` of the core's tables, and the losses that `loss.name` may be."""
    from qpref.recipe.sections import Recipe

    for table, field in Recipe.model_fields.items():
        yield from (f"{table}.{key}=" for key in getattr(field.annotation, "model_fields", ()))
    yield from (f"loss.name={name}" for name in _plugins("loss")())


def files(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Let the shell complete files, for an argument that may be something else too."""
    return [CompletionItem(incomplete, type="file")]


losses = _completer(_plugins("loss"))
rewards = _completer(_plugins("reward"))
plugins = _completer(_entry_points)
readers = _completer(_plugins("read"))
shapes = _completer(_shapes)
cards = _completer(_cards)
row_formats = _completer(_formats)
settings = _completer(_settings)
