"""Rows as they are read, and the examples that are made of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Spans = tuple[tuple[int, int], ...]
"""Parts of a text: the first character of each, from 0, and the first one after it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Location of a row: path and line, from 1. In a JSON array or a table, the row number; 0 is the whole source."""

    path: str
    line: int

    def __str__(self) -> str:
        return f"{self.path}:{self.line}" if self.line else self.path


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A row as its reader parsed it: column names to JSON values."""

    values: Mapping[str, object]
    source: Source


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """A problem of one row or of a whole source (line 0). An error refuses the row, or all rows of the source."""

    code: str
    severity: Literal["error", "warning"]
    message: str
    source: Source


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """A turn of a conversation.

    Attributes:
        extra: other keys that chat templates read: name, tool_calls, tool_call_id, reasoning_content. Their texts are
            checked like `content`, and tool calls have one form: `{"type": "function", "function": {"name": ...,
            "arguments": {...}}}`, arguments that are no object as the text that they are.
        masked: parts of `content` that don't count where it is a response; a prompt never counts. They make no
            difference to whether two messages are the same text.
    """

    role: str
    content: str
    extra: Mapping[str, object] = field(default_factory=dict)
    masked: Spans = field(default=(), compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferencePair:
    """A prompt with its preferred and its rejected response.

    Attributes:
        tools: JSON schemas of the functions that the assistant may call, for the chat template.
        weight: factor on this pair's loss (applied by the training loop, a loss never sees it).
        margin: how much better `chosen` has to be, in units of the implicit reward (nats times beta).
        number: index of the pair within its row; k ranked responses make up to k (k - 1) / 2 pairs.
        positions: of chosen and rejected in the row's lists of responses; 0 where a column holds one response.
        columns: numbers of the row that the losses read, by column.
        scores: the row's scores of chosen and rejected, higher is better; None for a row without scores.
    """

    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    tools: tuple[Mapping[str, object], ...] = ()
    weight: float = 1.0
    margin: float = 0.0
    number: int = 0
    positions: tuple[int, int] = field(default=(0, 0), compare=False)
    columns: Mapping[str, float] = field(default_factory=dict)
    scores: tuple[float, float] | None = field(default=None, compare=False)
    source: Source


@dataclass(frozen=True, slots=True, kw_only=True)
class RankedList:
    """A prompt with at least two ranked responses, the best first.

    Attributes:
        ranks: of each response, from 1; equal for a tie, as in 1, 2, 2, 4. At least two differ.
        scores: of each response, higher is better; empty for a row without scores.
        tools: JSON schemas of the functions that the assistant may call, for the chat template.
        weight: factor on this list's loss (applied by the training loop, a loss never sees it).
        margin: how much better a response has to be than a worse one, as in `PreferencePair`.
        number: index of the list within its row.
        columns: numbers of the row that the losses read, by column; one number for the whole list.
    """

    prompt: tuple[Message, ...]
    responses: tuple[tuple[Message, ...], ...]
    ranks: tuple[int, ...]
    scores: tuple[float, ...] = ()
    tools: tuple[Mapping[str, object], ...] = ()
    weight: float = 1.0
    margin: float = 0.0
    number: int = 0
    columns: Mapping[str, float] = field(default_factory=dict)
    source: Source


@dataclass(frozen=True, slots=True, kw_only=True)
class UnpairedExample:
    """A prompt with one labelled response.

    Attributes:
        label: True for a desirable response.
        tools: JSON schemas of the functions that the assistant may call, for the chat template.
        weight: factor on this example's loss (applied by the training loop, a loss never sees it).
        number: index within its row; the two halves of a pair have the same number.
        columns: numbers of the row that the losses read, by column.
    """

    prompt: tuple[Message, ...]
    completion: tuple[Message, ...]
    label: bool
    tools: tuple[Mapping[str, object], ...] = ()
    weight: float = 1.0
    number: int = 0
    columns: Mapping[str, float] = field(default_factory=dict)
    source: Source
