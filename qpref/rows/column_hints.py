"""Advice about rows of no known format: the columns that they have, and the recipe's keys that would fit.

Names are guessed here for a message alone; no row is ever read by a guess.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import takewhile

from qpref.rows.values import named

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
SERIES = (tuple("12345678"), tuple("01234567"), tuple("abcdefgh"), ("left", "right"), ("first", "second"))
"""Words in which the names of several responses' columns differ, in order."""
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
    responses = response_columns(values)
    if len(responses) > 2:
        return f"{found}; write the {len(responses)} responses as one list: responses, with ranks or scores"
    if responses:
        columns = {"first": responses[0], "second": responses[1], "winner": verdict_column(values) or "..."}
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


def response_columns(values: Mapping[str, object]) -> list[str]:
    """List the columns of texts whose names differ in a word of SERIES alone, such as output_1 and output_2.

    Empty where no names do, or those of more than one kind, such as prompt_1, prompt_2, output_1 and output_2.
    """
    by_words = {words(name): name for name in _text_columns(values) if _side(words(name)) is None}
    found = []
    for name in by_words:
        for at, series in ((at, series) for at, word in enumerate(name) for series in SERIES if word == series[0]):
            names = ((*name[:at], word, *name[at + 1 :]) for word in series)
            found.append([by_words[other] for other in takewhile(by_words.__contains__, names)])
    found = [names for names in found if len(names) > 1]
    if len(found) > 1:
        found = [names for names in found if not ABOUT_A_RESPONSE.intersection(words(names[0]))]
    return found[0] if len(found) == 1 else []


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
