"""The prompts and answers in a file of `qpref generate --json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from qpref.report.cells import MAX_LABEL, MAX_ROWS, cell, cell_text, label_of
from qpref.report.text import bounded


@dataclass(frozen=True, slots=True)
class Sample:
    """A prompt and its answers.

    Attributes:
        answers: author and text of each, the base first.
        about: other fields, as labels and texts.
    """

    prompt: str
    answers: list[tuple[str, str]]
    about: list[tuple[str, str]]


def samples_of(value: Any) -> tuple[list[Sample], int]:
    """Find the samples in `qpref generate --json` output: an array of objects with a prompt, or one such object.

    Returns:
        The first MAX_ROWS samples, and the number of the others.
    """
    if isinstance(value, dict):
        lists = [part for part in value.values() if isinstance(part, list)]
        value = next((part for part in lists if any(_is_sample(item) for item in part)), [value])
    found = [item for item in value if _is_sample(item)] if isinstance(value, list) else []
    return [_sample(item) for item in found[:MAX_ROWS]], max(0, len(found) - MAX_ROWS)


def _is_sample(item: Any) -> bool:
    return isinstance(item, dict) and "prompt" in item


def _sample(item: Mapping[str, Any]) -> Sample:
    answers: list[tuple[str, str]] = []
    about: list[tuple[str, str]] = []
    for name, value in islice(item.items(), MAX_ROWS):
        if name == "prompt":
            continue
        if (text := _message_text(value)) is not None:
            answers.append((label_of(name), text))
        elif isinstance(value, dict):
            answers += [(str(author), text) for author, part in value.items() if (text := _answer(part)) is not None]
        elif isinstance(value, list) and not any(isinstance(part, dict | str) for part in value):
            about.append((label_of(name), cell_text(cell(value))))
        elif isinstance(value, list):
            answers += [
                (_author(part, f"{label_of(name)} {number}"), text)
                for number, part in enumerate(value, 1)
                if (text := _answer(part)) is not None
            ]
        else:
            about.append((label_of(name), cell_text(value)))
    answers.sort(key=lambda answer: answer[0] != "base")
    answers = [(bounded(author, MAX_LABEL), text) for author, text in answers[:MAX_ROWS]]
    return Sample(_message_text(item["prompt"]) or cell_text(item["prompt"]), answers, about[:MAX_ROWS])


def _message_text(value: Any) -> str | None:
    """Join messages into one text; a text stays; None for anything else."""
    if isinstance(value, str):
        return bounded(value)
    if isinstance(value, list) and value and all(isinstance(turn, dict) and "content" in turn for turn in value):
        if len(value) == 1:
            return cell_text(value[0]["content"])
        turns = [f"{cell_text(turn.get('role'))}: {cell_text(turn['content'])}" for turn in value[:MAX_ROWS]]
        return bounded("\n".join(turns))
    return None


def _answer(part: Any) -> str | None:
    if not isinstance(part, dict):
        return _message_text(part)
    for name in ("text", "answer", "completion", "response", "content"):
        if (text := _message_text(part.get(name))) is not None:
            return text
    return None


def _author(part: Any, otherwise: str) -> str:
    if isinstance(part, dict):
        for name in ("name", "model", "who", "label"):
            if isinstance(part.get(name), str):
                return str(part[name])
    return otherwise
