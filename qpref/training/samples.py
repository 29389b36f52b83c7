"""Held-out examples as a table of texts, for metric sinks that show some."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qpref.hooks.types import Table
from qpref.records import TokenizedExample


def sample_table(examples: Sequence[TokenizedExample], tokenizer: Any) -> Table:
    """Return the texts that the model sees, special tokens included: prompt, chosen and rejected of pairs; prompt,
    first and last response of lists; prompt, completion and label of single completions."""
    if not examples:
        return Table()
    sides = ("first", "last") if examples[0].ranks else ("chosen", "rejected")
    columns = ("prompt", *(sides if examples[0].label is None else ("completion", "desirable")))
    return Table(columns=columns, rows=tuple(_texts(example, tokenizer) for example in examples))


def _texts(example: TokenizedExample, tokenizer: Any) -> tuple[str, ...]:
    decoded = [tokenizer.decode(list(ids)) for ids in (example.prompt, example.branches[0], example.branches[-1])]
    return tuple(decoded) if example.label is None else (*decoded[:2], str(example.label).lower())
