"""Preference pairs from a row's prompt and its two sides; a side is a response or a whole conversation."""

from __future__ import annotations

import math

from qpref.data.columns import Turns, number_in, tools_in, with_system
from qpref.data.messages import check_prompt, check_response, turns_of
from qpref.data.row_values import BadRowError
from qpref.records import PreferencePair, Row


def pair_of_sides(row: Row, prompt: Turns | None) -> PreferencePair:
    """Build the pair of the columns `chosen` and `rejected`.

    Args:
        prompt: the prompt that both respond to; None where they are whole conversations, which start with it.
    """
    chosen = turns_of(row.values["chosen"], "chosen", "assistant")
    rejected = turns_of(row.values["rejected"], "rejected", "assistant")
    if prompt is None or (chosen[0].role != "assistant" and rejected[0].role != "assistant"):
        return split_conversations(row, chosen, rejected, prompt)
    return build_pair(row, prompt, chosen, rejected)


def split_conversations(row: Row, chosen: Turns, rejected: Turns, prompt_column: Turns | None) -> PreferencePair:
    """Split two whole conversations into the prompt, which is the turns that they share, and one response each.

    Args:
        prompt_column: the row's own prompt, if it has one; the shared turns must contain it.
    """
    shared, most = 0, min(len(chosen), len(rejected)) - 1
    while shared < most and chosen[shared] == rejected[shared]:
        shared += 1
    if shared == 0:
        reason = "share no first turn" if most else "are no whole conversations, and there is no prompt"
        raise BadRowError("different_prompts", f"chosen and rejected {reason}")
    if any(turns[shared].role != "assistant" for turns in (chosen, rejected)):
        message = f"chosen and rejected part at turn {shared + 1}, before the assistant's turn"
        raise BadRowError("different_prompts", f"{message}; the prompt has to be the same")
    prompt = chosen[:shared]
    if prompt_column is not None and not _is_start_or_question(prompt_column, prompt):
        raise BadRowError("different_prompts", "chosen and rejected are conversations that don't start with the prompt")
    prompt = prompt if prompt[0].role == "system" else with_system(row.values, prompt)
    return build_pair(row, prompt, chosen[shared:], rejected[shared:])


def _is_start_or_question(column: Turns, conversation: Turns) -> bool:
    """Return whether a prompt column is the start of the conversation, or its first or last user turn."""
    if column == conversation[: len(column)]:
        return True
    questions = [message.content.strip() for message in conversation if message.role == "user"]
    return bool(questions) and column[-1].content.strip() in (questions[0], questions[-1]) and len(column) <= 2


def pair_of_values(row: Row, prompt: Turns, chosen: object, rejected: object) -> PreferencePair:
    """Build a pair from the raw values of its two responses."""
    return build_pair(row, prompt, turns_of(chosen, "chosen", "assistant"), turns_of(rejected, "rejected", "assistant"))


def build_pair(row: Row, prompt: Turns, chosen: Turns, rejected: Turns) -> PreferencePair:
    """Check the turns of a pair and build its record, with the row's tools, weight and margin."""
    check_prompt(prompt)
    check_response(chosen, "chosen")
    check_response(rejected, "rejected")
    return PreferencePair(
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        tools=tools_in(row.values),
        weight=number_in(row.values, "weight", 1.0, at_least=0.0),
        margin=number_in(row.values, "margin", 0.0, at_least=-math.inf),
        source=row.source,
    )
