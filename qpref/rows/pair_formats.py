"""Row -> preference pair, for the formats whose columns hold the better and the worse response."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from qpref.records import PreferencePair, Row
from qpref.rows.column_hints import advice
from qpref.rows.columns import (
    Turns,
    any_prompt,
    has_prompt,
    instruction,
    is_dialogue,
    need,
    prompt_column,
    questions_in,
    text_in,
    with_system,
)
from qpref.rows.messages import dialogue_of, turns_of
from qpref.rows.pair_records import (
    build_pair,
    conversation_in,
    is_whole,
    numbered,
    pair_of_turns,
    pairs_of_sides,
    responses_of,
    split_conversations,
    with_shared_tools,
)
from qpref.rows.turn_notation import is_assistant
from qpref.rows.values import BadRowError, kind_of, shown

Pairs = list[PreferencePair]


def pair_format(values: Mapping[str, object], has: set[str]) -> str:
    """Return the format of a row with `chosen` or `rejected`.

    Args:
        has: names of its columns that aren't null.
    """
    sides = [values.get("chosen"), values.get("rejected")]
    if all(isinstance(side, str) and is_dialogue(side) for side in sides):
        return "hh"
    if "chosen" not in has and has & {"messages", "conversations", "response"}:
        return "swift"
    for column, name in (("prompt", "pair"), ("conversations", "sharegpt"), ("instruction", "alpaca")):
        if column in has:
            return name
    if all(_is_conversation(side) for side in sides):
        return "whole"
    if "messages" in has:
        return "messages"
    is_listed = all(isinstance(side, list) or (isinstance(side, str) and side[:1] == "[") for side in sides)
    return "whole" if is_listed and not questions_in(values) else "pair"


def _is_conversation(side: object) -> bool:
    """Return whether a side is a whole conversation and not a response, by its first message."""
    if (inner := conversation_in(side)) is not None:
        return not inner[0] or _is_conversation(inner[0])
    if not isinstance(side, list) or not side:
        return False
    first = side[0]
    if isinstance(first, list):
        return _is_conversation(first)
    return isinstance(first, dict) and (len(side) > 1 or not is_assistant(first))


def _pair(row: Row) -> Pairs:
    need(row.values, *(() if has_prompt(row.values) else ("prompt",)), "chosen", "rejected")
    row = with_shared_tools(row, "prompt")
    return pairs_of_sides(row, any_prompt(row.values))


def _whole(row: Row) -> Pairs:
    need(row.values, "chosen", "rejected")
    return pairs_of_sides(row, None)


def _sharegpt(row: Row) -> Pairs:
    need(row.values, "conversations", "chosen", "rejected")
    return pairs_of_sides(row, prompt_column(row.values, "conversations"))


def _messages(row: Row) -> Pairs:
    """Read `messages` as the prompt; a last turn that repeats the chosen response is left out."""
    need(row.values, "messages", "chosen", "rejected")
    prompt, chosen = prompt_column(row.values, "messages"), responses_of(row.values["chosen"], "chosen")
    repeats_chosen = prompt[-1].role == "assistant" and chosen == [prompt[-1:]]
    return pairs_of_sides(row, prompt[:-1] if repeats_chosen else prompt)


def _swift(row: Row) -> Pairs:
    """Read the last turn of `messages`, or `response`, as the chosen response."""
    need(row.values, "rejected")
    row = with_shared_tools(row, "rejected")
    name = next((name for name in ("messages", "conversations") if row.values.get(name) is not None), None)
    rejected = responses_of(row.values["rejected"], "rejected")
    if name is None:
        need(row.values, "response")
        chosen = turns_of(row.values["response"], "response", "assistant")
        return numbered(pair_of_turns(row, any_prompt(row.values), chosen, worse) for worse in rejected)
    whole = turns_of(row.values[name], name, "user")
    if len(whole) == 1 or whole[-1].role != "assistant":
        last = f"{name}: the last turn is the {whole[-1].role}'s"
        raise BadRowError("not_a_pair", f"{last}; end with the chosen response, or put it in a column chosen")
    prompt = with_system(row.values, whole[:-1])
    return numbered(
        pair_of_turns(row, None, whole, worse) if is_whole(worse) else build_pair(row, prompt, whole[-1:], worse)
        for worse in rejected
    )


def has_candidates(values: Mapping[str, object]) -> bool:
    """Return whether the last message is one of Amazon Nova's, with candidates in place of a content."""
    messages = values.get("messages")
    last = messages[-1] if isinstance(messages, list) and messages else None
    return isinstance(last, dict) and isinstance(last.get("candidates"), list)


def _nova(row: Row) -> Pairs:
    """Pair every preferred candidate of the last message with every other one."""
    messages = row.values.get("messages")
    if not isinstance(messages, list) or not has_candidates(row.values):
        raise BadRowError("not_a_pair", f"messages: the last one has no list of candidates; {advice(row.values)}")
    sides: dict[str, list[Turns]] = {"preferred": [], "non-preferred": []}
    for number, candidate in enumerate(messages[-1]["candidates"], start=1):
        where = f"candidate {number}"
        label = candidate.get("preferenceLabel") if isinstance(candidate, dict) else None
        if not isinstance(label, str) or label not in sides:
            raise BadRowError("bad_label", f"{where}: preferenceLabel {shown(label)}; known: {', '.join(sides)}")
        sides[label].append(turns_of(candidate, where, "assistant"))
    prompt = with_system(row.values, turns_of(messages[:-1], "messages", "user"))
    chosen, rejected = sides.values()
    if not chosen or not rejected:
        message = f"candidates: {len(chosen)} preferred and {len(rejected)} non-preferred; a pair needs one of each"
        raise BadRowError("not_a_pair", message)
    return numbered(build_pair(row, prompt, better, worse) for better in chosen for worse in rejected)


def _alpaca(row: Row) -> Pairs:
    prompt, output = instruction(row.values), row.values.get("output")
    if row.values.get("chosen") is not None or row.values.get("rejected") is not None:
        need(row.values, "chosen", "rejected")
        return pairs_of_sides(row, prompt)
    if not isinstance(output, list) or len(output) != 2:
        found = f"{len(output)} of them" if isinstance(output, list) else kind_of(output)
        raise BadRowError("not_a_pair", f"output: expected two responses, the better one first, found {found}")
    better, worse = (turns_of(one, side, "assistant") for one, side in zip(output, ("chosen", "rejected"), strict=True))
    return [build_pair(row, prompt, better, worse)]


def _hh(row: Row) -> Pairs:
    need(row.values, "chosen", "rejected")
    chosen, rejected = (dialogue_of(text_in(row.values, side), side) for side in ("chosen", "rejected"))
    prompt = None if row.values.get("prompt") is None else prompt_column(row.values)
    return [split_conversations(row, chosen, rejected, prompt)]


def _openai(row: Row) -> Pairs:
    need(row.values, "input", "preferred_output", "non_preferred_output")
    request = row.values["input"]
    request = {"messages": request} if isinstance(request, list) else request
    if conversation_in(request) is None:
        raise BadRowError("not_a_pair", f"input: expected an object with messages, found {kind_of(request)}")
    sides = {"chosen": row.values["preferred_output"], "rejected": row.values["non_preferred_output"]}
    row = with_shared_tools(Row(values={**row.values, "input": request, **sides}, source=row.source), "input")
    return pairs_of_sides(row, with_system(row.values, turns_of(row.values["input"], "input.messages", "user")))


PAIR_FORMATS: Mapping[str, Callable[[Row], Pairs]] = {
    "pair": _pair,
    "whole": _whole,
    "hh": _hh,
    "sharegpt": _sharegpt,
    "messages": _messages,
    "swift": _swift,
    "nova": _nova,
    "alpaca": _alpaca,
    "openai": _openai,
}
"""Format name -> function from a row to its pairs.

Raises:
    BadRowError: the row isn't in this format.
"""
