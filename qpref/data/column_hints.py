"""Advice about rows of no known format: the columns that they have, and the recipe's keys that would fit.

Names are guessed here for a message alone; no row is ever read by a guess.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

from qpref.data.row_values import named

CHOSEN = {"chosen", "accepted", "preferred", "prefer", "good", "better", "best", "win", "winning", "positive", "pos",
          "selected", "w"}  # fmt: skip
REJECTED = {"rejected", "dispreferred", "bad", "worse", "worst", "lose", "losing", "negative", "neg", "unselected",
            "l"}  # fmt: skip
"""Words in the names of columns that hold the better and the worse response."""
NEGATIONS = {"non", "not", "un", "less"}
PROMPTS = ("prompt", "question", "query", "user_prompt", "instruction", "instructions", "input", "problem", "task",
           "user", "post", "request", "context", "conversation", "dialogue", "dialog")  # fmt: skip
RESPONSES = {"completion", "response", "output", "answer", "generation", "reply"}
VERDICTS = ("winner", "verdict", "preference", "preferred", "better", "choice", "gold_label", "overall_preference",
            "better_response_id", "label", "labels")  # fmt: skip
"""Names of columns that say which of two responses won, the surest first."""
TWINS = (("0", "1"), ("1", "2"), ("2", "3"), ("a", "b"), ("b", "c"), ("left", "right"), ("first", "second"), ("x", "y"))
"""Words in which the names of two responses' columns differ; those of three responses make two such pairs."""
ABOUT_A_RESPONSE = {"score", "scores", "rating", "rank", "model", "source", "policy", "id", "name", "reason",
                    "rationale", "reward"}  # fmt: skip
MAX_NAME = 24
"""Longest column name that advice repeats: a message stays short enough to read."""


def advice(values: Mapping[str, object], missing: Sequence[str] = ("prompt", "chosen", "rejected")) -> str:
    """List a row's columns and what would read them.

    Args:
        missing: qpref's columns that the row lacks.
    """
    names = (name if value is not None else f"{name[:13]} (null)" for name, value in values.items())
    found = f"it has {named(names, 8) or 'no column'}"
    if (twins := two_responses(values)) is not None:
        columns = {"first": twins[0], "second": twins[1], "winner": verdict_column(values) or "..."}
        return f"{found}; say who won: [data.contest] {_toml(columns)}, first_wins = [...], second_wins = [...]"
    if columns := fitting_columns(values, missing):
        return f"{found}; [data] columns = {{ {_toml(columns)} }} would fit"
    if is_supervised(values):
        return f"{found}: one response without a label, as for supervised fine-tuning"
    if missing == ["prompt"] and {"chosen", "rejected"} <= values.keys():
        return f"{found}; write what both respond to in a column prompt"
    return f'{found}; if a column has another name, map it: [data] columns = {{ {missing[0]} = "..." }}'


def _toml(columns: Mapping[str, str]) -> str:
    return ", ".join(f"{name} = {json.dumps(theirs, ensure_ascii=False)}" for name, theirs in columns.items())


def fitting_columns(values: Mapping[str, object], missing: Iterable[str]) -> dict[str, str]:
    """Guess which of a row's columns stand for the missing ones, by their names; no guess where several could."""
    names = _text_columns(values)
    guesses = {}
    for side in ("chosen", "rejected"):
        fitting = [name for name in names if _side(words(name)) == side]
        if len(fitting) == 1:
            guesses[side] = fitting[0]
    prompts = {name.lower(): name for name in names}
    if prompt := next((prompts[name] for name in PROMPTS if name in prompts), None):
        guesses["prompt"] = prompt
    return {name: guesses[name] for name in missing if name in guesses}


def _side(found: Sequence[str]) -> str | None:
    """Return which side the words of a column's name speak of, or None."""
    is_chosen, is_rejected = bool(CHOSEN.intersection(found)), bool(REJECTED.intersection(found))
    if is_chosen == is_rejected or ABOUT_A_RESPONSE.intersection(found):
        return None
    return "rejected" if is_rejected or NEGATIONS.intersection(found) else "chosen"


def two_responses(values: Mapping[str, object]) -> tuple[str, str] | None:
    """Return the two columns of texts whose names differ in one of TWINS, such as output_1 and output_2.

    None where several columns, or three responses, are named like this.
    """
    by_words = {words(name): name for name in _text_columns(values) if _side(words(name)) is None}
    pairs = []
    for found, name in by_words.items():
        for first, second in TWINS:
            twins = [by_words.get(other) for other in _replaced(found, first, second)]
            pairs += [(name, twin) for twin in twins if twin is not None]
    if len(pairs) > 1:
        pairs = [pair for pair in pairs if not ABOUT_A_RESPONSE.intersection(words(pair[0]))]
    return pairs[0] if len(pairs) == 1 else None


def _replaced(found: tuple[str, ...], first: str, second: str) -> list[tuple[str, ...]]:
    """List a name's words with one occurrence of `first` replaced by `second`."""
    return [(*found[:at], second, *found[at + 1 :]) for at, word in enumerate(found) if word == first]


def verdict_column(values: Mapping[str, object]) -> str | None:
    """Return the column whose name says that it holds the verdict on two responses."""
    names = {name.lower(): name for name, value in values.items() if value is not None and len(name) <= MAX_NAME}
    return next((names[name] for name in VERDICTS if name in names), None)


def is_supervised(values: Mapping[str, object]) -> bool:
    """Return whether a row is a conversation, or has one response, without a word on which response is better."""
    names = {name.lower() for name, value in values.items() if value is not None}
    has_response = bool(names & {"messages", "conversations", *RESPONSES})
    return has_response and not names & {"chosen", "rejected", "label", "kto_tag"}


@lru_cache(maxsize=1024)
def words(name: str) -> tuple[str, ...]:
    """Split a column's name into words and numbers, in lower case: outputA, output_a and "Output A" are the same."""
    return tuple(re.findall(r"[a-z]+|\d+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()))


def _text_columns(values: Mapping[str, object]) -> list[str]:
    """List the columns with a short name and a text, an object or a list."""
    return [
        name
        for name, value in values.items()
        if isinstance(value, str | list | dict) and value and len(name) <= MAX_NAME and name.isprintable()
    ]
