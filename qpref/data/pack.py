"""Pack examples into one stream without padding.

A *group* is one prompt and its branches. The prompt's tokens are there once; each branch continues the prompt, in
position ids too, and attends only to the prompt and to itself. A branch's first token is predicted from the hidden
state at the prompt's end, which all branches share. Its last token predicts nothing, so it is not an input.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qpref.records import Group, PackedBatch, TokenizedExample


def num_fed_tokens(example: TokenizedExample, shared: bool = True) -> int:
    """Count the input tokens of an example: with the prompt once, or once per branch."""
    prompts = 1 if shared else len(example.branches)
    return prompts * len(example.prompt) + sum(len(branch) - 1 for branch in example.branches)


def pack(examples: Sequence[TokenizedExample], device: torch.device) -> PackedBatch:
    """Pack examples in their order; all must have the same number of branches."""
    ids: list[int] = []
    positions: list[int] = []
    score_at: list[int] = []
    score_token: list[int] = []
    groups: list[Group] = []
    for example in examples:
        start, prompt = len(ids), len(example.prompt)
        ids.extend(example.prompt)
        positions.extend(range(prompt))
        for branch in example.branches:
            fed = len(branch) - 1
            score_at.append(start + prompt - 1)
            score_at.extend(range(len(ids), len(ids) + fed))
            score_token.extend(branch)
            ids.extend(branch[:-1])
            positions.extend(range(prompt, prompt + fed))
        groups.append(Group(start=start, prompt=prompt, branches=tuple(len(branch) - 1 for branch in example.branches)))
    return PackedBatch(
        input_ids=torch.tensor(ids, device=device),
        position_ids=torch.tensor(positions, device=device),
        groups=tuple(groups),
        score_at=torch.tensor(score_at, device=device),
        score_token=torch.tensor(score_token, device=device),
        lengths=tuple(len(branch) for example in examples for branch in example.branches),
        weight=torch.tensor([example.weight for example in examples], device=device),
        margin=torch.tensor([example.margin for example in examples], device=device),
        examples=tuple(examples),
    )


def split_by_tokens(
    examples: Sequence[TokenizedExample], budget: int, shared: bool = True
) -> list[list[TokenizedExample]]:
    """Distribute examples over micro-batches of at most `budget` input tokens, by first-fit decreasing.

    An example over the budget gets a micro-batch of its own. The result depends only on the examples, their order and
    the budget.
    """
    order = sorted(range(len(examples)), key=lambda index: -num_fed_tokens(examples[index], shared))
    bins: list[tuple[int, list[TokenizedExample]]] = []
    for index in order:
        cost = num_fed_tokens(examples[index], shared)
        for number, (used, members) in enumerate(bins):
            if used + cost <= budget:
                members.append(examples[index])
                bins[number] = (used + cost, members)
                break
        else:
            bins.append((cost, [examples[index]]))
    return [members for _, members in bins]
