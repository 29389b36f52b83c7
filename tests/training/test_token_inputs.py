"""Ids, masks and entropies of tokens, in the order of their log-probabilities."""

from __future__ import annotations

from array import array
from dataclasses import replace

import pytest
import torch
from conftest import make_example

from qpref.data.pack import pack
from qpref.policy.logprobs import pair_logprobs
from qpref.records import TokenizedExample, TokenLogProbs
from qpref.training.inputs import with_tokens

EXAMPLES = [
    replace(make_example(1, 3, 2), branches=(array("i", [5, 6, 7]), array("i", [8, 9]))),
    replace(make_example(2, 1, 3), branches=(array("i", [4]), array("i", [3, 2, 1]))),
]


def scores_of(examples: list[TokenizedExample], prompts: bool = False) -> TokenLogProbs:
    """Scores whose values are the ids themselves."""
    lengths = pack(examples, torch.device("cpu")).lengths
    values = pack(examples, torch.device("cpu")).score_token
    if prompts:
        lengths += tuple(len(each.prompt) - 1 for each in examples)
        values = torch.cat([values, *(torch.tensor(list(each.prompt[1:])) for each in examples)])
    return TokenLogProbs(values=values, lengths=lengths)


@pytest.mark.parametrize("prompts", [False, True])
def test_ids_and_masks_follow_the_values_of_each_side(prompts):
    pairs = pair_logprobs(with_tokens(scores_of(EXAMPLES, prompts), EXAMPLES, 2, prompts), prompts)
    assert pairs.chosen.tokens.tolist() == [5, 6, 7, 4]
    assert pairs.rejected.tokens.tolist() == [8, 9, 3, 2, 1]
    for side in (pairs.chosen, pairs.rejected, *([pairs.prompt] if prompts else ())):
        assert torch.equal(side.tokens, side.values)
        assert side.mask.dtype == torch.bool
        assert side.mask.shape == side.values.shape
        assert side.mask.all()
