"""Rows over the recipe's maximum lengths: refuse them, drop them, or truncate prompt and responses.

A truncated conversation stays a valid one: whole turns go, the oldest first, then the start of the last user turn. The
chat template renders the rest, so that headers, the system turn and the tools stay.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import replace

from qpref.data.example_rows import ExampleRow, RefusedRowError
from qpref.recipe.data_section import DataSection
from qpref.records import Finding, TokenizedExample


def prompt_limit(data: DataSection) -> int | None:
    """Return the length that prompts are truncated to; None where the recipe doesn't truncate."""
    return data.max_prompt_length if data.on_overflow == "truncate" else None


def shorten_prompt(
    row: ExampleRow, limit: int, num_tokens: Callable[[ExampleRow], int], token_starts: Callable[[str], Sequence[int]]
) -> ExampleRow:
    """Truncate the row's prompt to at most `limit` tokens.

    Turns before the last user turn go, the oldest first and up to a user turn; then the start of the last user turn.
    The system turn and everything after the last user turn stay.

    Args:
        num_tokens: counts the tokens of a row's prompt.
        token_starts: returns the character offsets of a text's tokens.

    Raises:
        RefusedRowError: the parts that have to stay are longer.
    """
    num_system = next((index for index, turn in enumerate(row.prompt) if turn.role != "system"), len(row.prompt))
    system, turns = row.prompt[:num_system], row.prompt[num_system:]
    user_turns = [index for index, turn in enumerate(turns) if turn.role == "user"]
    if not user_turns:
        raise RefusedRowError("too_long", f"the prompt has no user turn to truncate to {limit} tokens")

    def from_turn(index: int) -> ExampleRow:
        return replace(row, prompt=system + turns[index:])

    fits = bisect_left(user_turns, True, key=lambda index: num_tokens(from_turn(index)) <= limit)
    if fits < len(user_turns):
        return from_turn(user_turns[fits])
    last, *after = turns[user_turns[-1] :]
    starts = token_starts(last.content)
    cut = excess = num_tokens(from_turn(user_turns[-1])) - limit
    while cut < len(starts):
        shorter = replace(row, prompt=(*system, replace(last, content=last.content[starts[cut] :]), *after))
        excess = num_tokens(shorter) - limit
        if excess <= 0:
            return shorter
        cut += excess
    raise RefusedRowError("too_long", f"the prompt is over max_prompt_length {limit} even after truncation")


def fit_length(example: TokenizedExample, data: DataSection) -> TokenizedExample | Finding | None:
    """Fit the example into `max_prompt_length` and `max_length`; returns None where the recipe drops it.

    Truncation cuts each response on the right to `max_length` minus the prompt: at least one token, since
    `max_prompt_length`, to which the prompt has been truncated, is below it. A pair whose two sides become the same is
    dropped with a warning, and so is a list of which two responses of different ranks do.
    """
    if _prefers_itself(example):
        message = "dropped: chosen and rejected are the same tokens"
        return Finding(code="identical", severity="warning", message=message, source=example.source)
    length = len(example.prompt) + max(map(len, example.branches))
    if len(example.prompt) <= data.max_prompt_length and length <= data.max_length:
        return example
    if data.on_overflow == "drop":
        return None
    if data.on_overflow == "error":
        if len(example.prompt) > data.max_prompt_length:
            message = f"the prompt has {len(example.prompt)} tokens, over max_prompt_length {data.max_prompt_length}"
        else:
            message = f"prompt and response have {length} tokens, over max_length {data.max_length}"
        return Finding(code="too_long", severity="error", message=message, source=example.source)
    assert len(example.prompt) <= data.max_prompt_length  # the tokenizer truncates prompts to `prompt_limit`
    max_tokens = data.max_length - len(example.prompt)
    branches = tuple(branch[:max_tokens] for branch in example.branches)
    if _prefers_itself(replace(example, branches=branches)):
        message = f"dropped: cut to their first {max_tokens} tokens, chosen and rejected are the same"
        return Finding(code="identical", severity="warning", message=message, source=example.source)
    truncated = tuple(len(branch) > max_tokens for branch in example.branches)
    masks = tuple(mask[:max_tokens] for mask in example.masks)
    if not all(map(any, masks)):
        message = f"dropped: cut to their first {max_tokens} tokens, a response has only masked ones"
        return Finding(code="masked", severity="warning", message=message, source=example.source)
    return replace(example, branches=branches, truncated=truncated, masks=masks)


def _prefers_itself(example: TokenizedExample) -> bool:
    """Return whether the two sides of a pair, or two responses of a list that don't tie, are the same tokens."""
    if example.label is not None:
        return False
    ranks: dict[bytes, set[int]] = {}
    for branch, rank in zip(example.branches, example.ranks or (1, 2), strict=True):
        ranks.setdefault(branch.tobytes(), set()).add(rank)
    return any(len(own) > 1 for own in ranks.values())
