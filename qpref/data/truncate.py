"""What becomes of a pair that is longer than the recipe allows: refused, left out, or cut on both sides by one rule."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from qpref.recipe import DataSection
from qpref.records import Finding, TokenizedExample


def fit_length(example: TokenizedExample, data: DataSection) -> TokenizedExample | Finding | None:
    """The example within `max_prompt_length` and `max_length`; None where the recipe drops it.

    Truncating cuts the prompt on the left, then each response on the right; a response keeps at least one token, since
    `max_prompt_length` is below `max_length`. A pair whose two sides become the same is refused.
    """
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
        return _refused(example, "too_long", message)
    prompt = example.prompt[-data.max_prompt_length :]
    room = data.max_length - len(prompt)
    branches = tuple(branch[:room] for branch in example.branches)
    if example.label is None and branches[0] == branches[1]:
        return _refused(example, "identical", f"chosen and rejected are the same in their first {room} tokens")
    truncated = tuple(len(branch) > room for branch in example.branches)
    return replace(example, prompt=prompt, branches=branches, truncated=truncated)


def _refused(example: TokenizedExample, code: Literal["too_long", "identical"], message: str) -> Finding:
    return Finding(code=code, severity="error", message=message, source=example.source)
