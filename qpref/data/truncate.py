"""What becomes of a row that is longer than the recipe allows: refused, left out, or cut on both sides by one rule.

A conversation stays one when it is cut: whole turns go, the oldest first, and of the last user's turn its beginning.
The chat template then renders what is left, so all headers, the system turn and the tools stay.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import replace

from qpref.data.example_rows import ExampleRow, RefusedRowError
from qpref.recipe.data_section import DataSection
from qpref.records import Finding, TokenizedExample


def prompt_limit(data: DataSection) -> int | None:
    """The length that prompts are cut to; None where the recipe wants none cut."""
    return data.max_prompt_length if data.on_overflow == "truncate" else None


def shorten_prompt(
    row: ExampleRow, limit: int, num_tokens: Callable[[ExampleRow], int], token_starts: Callable[[str], Sequence[int]]
) -> ExampleRow:
    """The row with as much of its prompt as has at most `limit` tokens.

    Turns before the last user's go, the oldest first and up to the next user's, then the beginning of that last turn.
    The system turn and the end of the prompt stay.

    Args:
        num_tokens: of a row's prompt.
        token_starts: the characters at which a text's tokens start.

    Raises:
        RefusedRowError: what has to stay is longer.
    """
    num_system = next((place for place, turn in enumerate(row.prompt) if turn.role != "system"), len(row.prompt))
    system, turns = row.prompt[:num_system], row.prompt[num_system:]
    asked = [place for place, turn in enumerate(turns) if turn.role == "user"]
    if not asked:
        raise RefusedRowError("too_long", f"the prompt has no user turn to cut to {limit} tokens")

    def from_turn(place: int) -> ExampleRow:
        return replace(row, prompt=system + turns[place:])

    fits = bisect_left(asked, True, key=lambda place: num_tokens(from_turn(place)) <= limit)
    if fits < len(asked):
        return from_turn(asked[fits])
    last, *after = turns[asked[-1] :]
    starts = token_starts(last.content)
    cut = excess = num_tokens(from_turn(asked[-1])) - limit
    while cut < len(starts):
        shorter = replace(row, prompt=(*system, replace(last, content=last.content[starts[cut] :]), *after))
        excess = num_tokens(shorter) - limit
        if excess <= 0:
            return shorter
        cut += excess
    raise RefusedRowError("too_long", f"what a cut leaves of the prompt is over max_prompt_length {limit}")


def fit_length(example: TokenizedExample, data: DataSection) -> TokenizedExample | Finding | None:
    """The example within `max_prompt_length` and `max_length`; None where the recipe drops it.

    Truncating cuts each response on the right, to what the prompt leaves of `max_length`: at least one token, since
    `max_prompt_length`, to which the prompt has been cut, is below it. A pair whose two sides become the same is
    dropped, with a warning.
    """
    if example.label is None and example.branches[0] == example.branches[1]:
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
    assert len(example.prompt) <= data.max_prompt_length  # the tokenizer cuts prompts to `prompt_limit`
    room = data.max_length - len(example.prompt)
    branches = tuple(branch[:room] for branch in example.branches)
    if example.label is None and branches[0] == branches[1]:
        message = f"dropped: cut to their first {room} tokens, chosen and rejected are the same"
        return Finding(code="identical", severity="warning", message=message, source=example.source)
    truncated = tuple(len(branch) > room for branch in example.branches)
    return replace(example, branches=branches, truncated=truncated)
