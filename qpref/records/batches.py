"""Tokenized examples, and how a micro-batch is packed into one stream."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from qpref.records.rows import Source

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizedExample:
    """Token ids of a prompt and its branches: chosen and rejected, a list's responses best first, or one completion.

    A completion has its mismatched partner as second branch where the loss needs one. The ids are arrays of C ints: a
    list of Python ints takes nine times the memory.

    Attributes:
        truncated: for each branch, True if its end, and so its stop token, was cut off.
        prompt_cut: True if earlier turns, or the start of the last one, were cut off.
        masks: for each branch one byte a token, 1 for a token that counts and 0 for one that the row or the recipe
            masks; empty where all tokens count.
        scores_masked: True if masked tokens are scored all the same, for a loss that reads the mask.
        label: True for a desirable completion; None for a pair or a list.
        ranks, scores: of each branch of a list, as in `RankedList`; empty for others.
        number: index within its row, as in `PreferencePair` and `UnpairedExample`.
        columns: numbers of the row that the losses read, by column.
    """

    prompt: array[int]
    branches: tuple[array[int], ...]
    truncated: tuple[bool, ...]
    prompt_cut: bool = False
    masks: tuple[bytes, ...] = ()
    scores_masked: bool = False
    weight: float
    margin: float
    label: bool | None = None
    ranks: tuple[int, ...] = ()
    scores: tuple[float, ...] = ()
    number: int = 0
    columns: Mapping[str, float] = field(default_factory=dict)
    source: Source

    @property
    def scored(self) -> tuple[Sequence[int], ...]:
        """Indices of the tokens of each branch that have a log-probability: all, or those that count."""
        if not self.masks or self.scores_masked:
            return tuple(range(len(branch)) for branch in self.branches)
        return tuple([index for index, counts in enumerate(mask) if counts] for mask in self.masks)

    @property
    def num_scored(self) -> tuple[int, ...]:
        """Numbers of scored tokens of each branch."""
        return tuple(map(len, self.scored))


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Position of one prompt and its branches in a packed stream.

    Attributes:
        start: stream index of the prompt's first token.
        prompt: number of prompt tokens, at least 1.
        branches: number of input tokens of each branch: its length minus 1, so 0 for a response of one token.
    """

    start: int
    prompt: int
    branches: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedBatch:
    """A micro-batch packed into one stream: N examples with B branches in all, T input tokens, S scored tokens.

    Attributes:
        input_ids: [T] int64.
        position_ids: [T] int64, from 0 at each prompt's start.
        token_keys: [T] int64, a hash of each token's text and position, on which dropout depends.
        groups: position of each distinct prompt, in the order of its first example; its branches are those of all
            examples with that prompt, in their order.
        group_of: [N] index of each example's group.
        score_at: [S] int64, stream index of the hidden state that predicts the token; in the order of `examples`.
        score_token: [S] int64, the predicted token.
        lengths: [B] scored tokens of each branch, in the order of `score_at`: all branches of the first example, then
            those of the second.
        weight, margin: [N] float32.
        columns: [N] float32, numbers of the rows that the losses read, by column.
        examples: the packed examples.
    """

    input_ids: Tensor
    position_ids: Tensor
    token_keys: Tensor
    groups: tuple[Group, ...]
    group_of: tuple[int, ...]
    score_at: Tensor
    score_token: Tensor
    lengths: tuple[int, ...]
    weight: Tensor
    margin: Tensor
    columns: Mapping[str, Tensor]
    examples: tuple[TokenizedExample, ...]

    @property
    def num_tokens(self) -> int:
        return self.input_ids.numel()
