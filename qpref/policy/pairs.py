"""Scores of a packed batch, taken apart into what a loss sees."""

from __future__ import annotations

import torch
from torch import Tensor

from qpref.records import PairLogProbs, TokenLogProbs


def sequences(scores: TokenLogProbs, chosen: slice) -> TokenLogProbs:
    """Some of the sequences, such as every second one."""
    lengths = scores.lengths[chosen]

    def part(values: Tensor) -> Tensor:
        pieces = values.split(list(scores.lengths))[chosen]
        return torch.cat(pieces) if pieces else values[:0]

    squares = scores.log_sum_squares
    return TokenLogProbs(
        values=part(scores.values), lengths=lengths, log_sum_squares=None if squares is None else part(squares)
    )


def pair_logprobs(scores: TokenLogProbs, prompts: bool = False) -> PairLogProbs:
    """The scores of a batch of pairs, sorted by side; with `prompts`, the last third are those of the prompts."""
    branches = len(scores.lengths) * 2 // 3 if prompts else len(scores.lengths)
    return PairLogProbs(
        chosen=sequences(scores, slice(0, branches, 2)),
        rejected=sequences(scores, slice(1, branches, 2)),
        prompt=sequences(scores, slice(branches, None)) if prompts else None,
    )
