"""Row -> preference pair, for the formats whose columns hold the better and the worse response."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from qpref.data.columns import HUMAN, instruction, need, prompt_column, text_in, with_system
from qpref.data.messages import dialogue_of, turns_of
from qpref.data.pair_records import pair_of_sides, pair_of_values, split_conversations
from qpref.data.row_values import BadRowError, kind_of
from qpref.records import PreferencePair, Row

Pairs = list[PreferencePair]


def pair_format(values: Mapping[str, object], has: set[str]) -> str:
    sides = values.get("chosen"), values.get("rejected")
    if all(isinstance(side, str) and side.startswith(HUMAN) for side in sides):
        return "hh"
    if "prompt" in has:
        return "pair"
    if "conversations" in has:
        return "sharegpt"
    if "instruction" in has:
        return "alpaca"
    is_whole = all(isinstance(side, list) or (isinstance(side, str) and side[:1] == "[") for side in sides)
    return "whole" if is_whole else "pair"


def _pair(row: Row) -> Pairs:
    need(row.values, "prompt", "chosen", "rejected")
    return [pair_of_sides(row, prompt_column(row.values))]


def _whole(row: Row) -> Pairs:
    need(row.values, "chosen", "rejected")
    return [pair_of_sides(row, None)]


def _sharegpt(row: Row) -> Pairs:
    need(row.values, "conversations", "chosen", "rejected")
    prompt = with_system(row.values, turns_of(row.values["conversations"], "conversations", "user"))
    return [pair_of_sides(row, prompt)]


def _alpaca(row: Row) -> Pairs:
    prompt, output = instruction(row.values), row.values.get("output")
    if row.values.get("chosen") is not None or row.values.get("rejected") is not None:
        need(row.values, "chosen", "rejected")
        return [pair_of_sides(row, prompt)]
    if not isinstance(output, list) or len(output) != 2:
        found = f"{len(output)} of them" if isinstance(output, list) else kind_of(output)
        raise BadRowError("not_a_pair", f"output: expected two responses, the better one first, found {found}")
    return [pair_of_values(row, prompt, output[0], output[1])]


def _hh(row: Row) -> Pairs:
    need(row.values, "chosen", "rejected")
    sides = [text_in(row.values, side) for side in ("chosen", "rejected")]
    chosen, rejected = (dialogue_of(text, side) for text, side in zip(sides, ("chosen", "rejected"), strict=True))
    prompt = None if row.values.get("prompt") is None else prompt_column(row.values)
    return [split_conversations(row, chosen, rejected, prompt)]


def _openai(row: Row) -> Pairs:
    need(row.values, "input", "preferred_output", "non_preferred_output")
    request = row.values["input"]
    if not isinstance(request, dict):
        raise BadRowError("not_a_pair", f"input: expected an object with messages, found {kind_of(request)}")
    prompt = turns_of(request.get("messages"), "input.messages", "user")
    with_tools = Row(values={"tools": request.get("tools")} | dict(row.values), source=row.source)
    return [pair_of_values(with_tools, prompt, row.values["preferred_output"], row.values["non_preferred_output"])]


PAIR_FORMATS: Mapping[str, Callable[[Row], Pairs]] = {
    "pair": _pair,
    "whole": _whole,
    "hh": _hh,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "openai": _openai,
}
"""Format name -> function from a row to its pairs.

Raises:
    BadRowError: the row isn't in this format.
"""
