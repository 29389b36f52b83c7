"""Readers: file formats, and other sources of rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qpref.records import Finding, Row


@dataclass(frozen=True, slots=True, kw_only=True)
class ReaderContext:
    """The recipe that a reader with options is called for.

    Attributes:
        options: of the source's table `reader`, parsed.
        folder: the recipe's folder, at which relative paths in a name or an option start.
    """

    options: Any
    folder: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Reader:
    """A file format, or another source of rows.

    A file is read by the reader whose name is its suffix (`csv` reads `x.csv`, `jsonl.gz` reads `x.jsonl.gz`), unless
    the recipe names a reader. For each line `read` yields a row, or a finding where the line can't be parsed. It is
    called more than once and must yield the same rows each time. A warning with line 0 is about the whole source.

    Attributes:
        read: path -> rows; with `options`, path and `ReaderContext` -> rows. A row's source needn't be that path: one
            location may hold several files or sheets, each with a path of its own.
        takes: first argument of `read`: "file"; "folder", which includes files; or "name", the text after the reader's
            name and a colon, as in `hf:org/name`.
        options: the model of the other keys of `[data.reader]`; None for a reader that needs neither options nor the
            recipe's folder.
    """

    name: str
    summary: str
    read: Callable[..., Iterator[Row | Finding]]
    takes: Literal["file", "folder", "name"] = "file"
    options: type[Any] | None = None
