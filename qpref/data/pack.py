"""Pack examples into one stream without padding.

A *group* is one prompt and its branches. The prompt's tokens are there once; each branch continues the prompt, in
position ids too, and attends only to the prompt and to itself. A branch's first token is predicted from the hidden
state at the prompt's end, which all branches share. Its last token predicts nothing, so it is not an input.

Examples with the same prompt, such as the two completions of a pair or the pairs of a ranking, share one group.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch

from qpref.dropout import text_key, token_keys
from qpref.records import Group, PackedBatch, TokenizedExample
from qpref.staging import to_device


def num_fed_tokens(example: TokenizedExample, shared: bool = True) -> int:
    """Count the input tokens of an example on its own: with the prompt once, or once per branch.

    The sum over a batch is an upper bound of its stream, in which examples may share a prompt. It is what budgets and
    the metric `tokens` count, so that neither depends on which examples happen to be packed together.
    """
    prompts = 1 if shared else len(example.branches)
    return prompts * len(example.prompt) + sum(len(branch) - 1 for branch in example.branches)


def pack(examples: Sequence[TokenizedExample], device: torch.device) -> PackedBatch:
    """Pack examples; all must have the same number of branches.

    Scores, weights and margins are in the examples' order, and the stream is in the order of their distinct prompts.
    """
    ids: list[int] = []
    positions: list[int] = []
    texts: list[int] = []
    lengths: list[int] = []
    groups: list[Group] = []
    group_of = [0] * len(examples)
    score_at: list[list[int]] = [[] for _ in examples]
    for number, members in enumerate(by_prompt(examples)):
        prompt = examples[members[0]].prompt
        start, fed = len(ids), []
        ids.extend(prompt)
        texts.append(text_key(prompt))
        positions.extend(range(len(prompt)))
        for member in members:
            group_of[member] = number
            for branch, scored in zip(examples[member].branches, examples[member].scored, strict=True):
                fed.append(len(branch) - 1)
                predicts = [start + len(prompt) - 1, *range(len(ids), len(ids) + fed[-1])]
                score_at[member] += [predicts[index] for index in scored]
                ids.extend(branch[:-1])
                texts.append(text_key(prompt, branch))
                positions.extend(range(len(prompt), len(prompt) + fed[-1]))
        lengths += [len(prompt), *fed]
        groups.append(Group(start=start, prompt=len(prompt), branches=tuple(fed)))
    position_ids = torch.tensor(positions)
    host = {
        "input_ids": torch.tensor(ids),
        "position_ids": position_ids,
        "token_keys": token_keys(texts, lengths, position_ids),
        "score_at": torch.tensor([index for each in score_at for index in each]),
        "score_token": torch.tensor([token for each in examples for token in _scored_tokens(each)]),
        "weight": torch.tensor([example.weight for example in examples]),
        "margin": torch.tensor([example.margin for example in examples]),
    }
    columns = host_columns(examples)
    copied = to_device([*host.values(), *columns.values()], device)
    return PackedBatch(
        **dict(zip(host, copied, strict=False)),
        columns=dict(zip(columns, copied[len(host) :], strict=True)),
        groups=tuple(groups),
        group_of=tuple(group_of),
        lengths=tuple(count for example in examples for count in example.num_scored),
        examples=tuple(examples),
    )


def host_columns(examples: Sequence[TokenizedExample]) -> dict[str, torch.Tensor]:
    """Return [N] float32 numbers of the examples' rows by column, on the CPU."""
    return {name: torch.tensor([each.columns[name] for each in examples]) for name in examples[0].columns}


def _scored_tokens(example: TokenizedExample) -> Iterator[int]:
    for branch, scored in zip(example.branches, example.scored, strict=True):
        yield from (branch[index] for index in scored)


def by_prompt(examples: Sequence[TokenizedExample]) -> Iterable[list[int]]:
    """Collect the indices of the examples of each distinct prompt, in the order of their first."""
    members: dict[bytes, list[int]] = {}
    for index, example in enumerate(examples):
        members.setdefault(example.prompt.tobytes(), []).append(index)
    return members.values()


def longest_first(examples: Sequence[TokenizedExample], shared: bool = True) -> list[int]:
    """Order examples from the longest to the shortest, but keep those with the same prompt together: they share it."""
    costs = [num_fed_tokens(example, shared) for example in examples]
    together = by_prompt(examples) if shared else [[index] for index in range(len(examples))]
    ordered = [sorted(members, key=lambda index: -costs[index]) for members in together]
    ordered.sort(key=lambda members: -costs[members[0]])
    return [index for members in ordered for index in members]


def split_by_tokens(
    examples: Sequence[TokenizedExample], budget: int, shared: bool = True
) -> list[list[TokenizedExample]]:
    """Distribute examples over micro-batches of at most `budget` input tokens, by first-fit decreasing.

    An example over the budget gets a micro-batch of its own. The result depends only on the examples, their order and
    the budget.
    """
    return [[examples[index] for index in members] for members in split_indices(examples, budget, shared)]


def split_indices(examples: Sequence[TokenizedExample], budget: int, shared: bool = True) -> list[list[int]]:
    """Return the same micro-batches as `split_by_tokens`, by index."""
    bins: list[tuple[int, list[int]]] = []
    for index in longest_first(examples, shared):
        cost = num_fed_tokens(examples[index], shared)
        for number, (used, members) in enumerate(bins):
            if used + cost <= budget:
                members.append(index)
                bins[number] = (used + cost, members)
                break
        else:
            bins.append((cost, [index]))
    return [members for _, members in bins]
