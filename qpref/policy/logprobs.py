"""Per-token log-probabilities of the responses in a packed batch, and the hidden states that predict them."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn

from qpref.attention.layout import Layout, laid_out
from qpref.dropout import Draws, drawing, text_key, token_keys
from qpref.policy.policy import Policy
from qpref.policy.rope import split_groups, stream_lengths
from qpref.policy.token_scores import score_tokens
from qpref.records import PackedBatch, PairLogProbs, TokenLogProbs
from qpref.staging import to_device


def completion_logprobs(
    policy: Policy, batch: PackedBatch, *, prompts: bool = False, extras: frozenset[str] = frozenset()
) -> TokenLogProbs:
    """Score every response token of the batch under the policy as it stands (adapters on or off).

    Float32 nats whatever the model computes in. The sequences of the result are the branches of each example in turn.

    Args:
        prompts: score the prompts as well, each but its first token; they follow all branches.
        extras: fields to compute beside the values, names of EXTRAS.
    """
    lengths = batch.lengths
    if prompts:
        lengths += tuple(len(example.prompt) - 1 for example in batch.examples)
    hidden = completion_hidden(policy, batch, prompts=prompts)
    values, found = score_hidden(policy, batch, hidden, prompts=prompts, extras=extras)
    return TokenLogProbs(values=values, lengths=lengths, **found)


def score_hidden(
    policy: Policy,
    batch: PackedBatch,
    hidden: Tensor,
    *,
    prompts: bool = False,
    extras: frozenset[str] = frozenset(),
) -> tuple[Tensor, dict[str, Tensor]]:
    """Score a batch's tokens by the hidden states [S, width] that predict them, as `score_tokens` does."""
    tokens = batch.score_token
    if prompts:
        rest = torch.tensor([token for example in batch.examples for token in example.prompt[1:]], dtype=tokens.dtype)
        tokens = torch.cat([tokens, *to_device([rest], tokens.device)])
    with drawing(policy.draws(lambda: batch.token_keys[_predicting(batch, prompts)][None])):
        return score_tokens(policy.head, hidden, tokens, extras)


def completion_hidden(policy: Policy, batch: PackedBatch, *, prompts: bool = False) -> Tensor:
    """[S, width] hidden states that predict the response tokens, in the batch's order."""
    with policy.autocast():
        compute = _shared_hidden if policy.shares_prompts else _row_hidden
        return compute(policy, batch, prompts)


def _shared_hidden(policy: Policy, batch: PackedBatch, prompts: bool) -> Tensor:
    """[S, width] from one stream with each prompt once, or once for each class of lengths of its responses."""
    if policy.rope_lengths is not None:
        batch = split_groups(batch, policy.rope_lengths)
    draws = policy.draws(lambda: batch.token_keys[None])
    return decode(policy, batch.input_ids, batch.position_ids, draws, Layout(batch.groups))[_predicting(batch, prompts)]


def _predicting(batch: PackedBatch, prompts: bool) -> Tensor:
    """[S] stream indices of the tokens that predict the responses' tokens and, on request, the prompts'."""
    if not prompts:
        return batch.score_at
    groups = [batch.groups[number] for number in batch.group_of]
    in_prompts = [index for group in groups for index in range(group.start, group.start + group.prompt - 1)]
    indices = to_device([torch.tensor(in_prompts, dtype=torch.int64)], batch.score_at.device)
    return torch.cat([batch.score_at, *indices])


def decode(policy: Policy, input_ids: Tensor, position_ids: Tensor, draws: Draws, layout: Layout) -> Tensor:
    """Run the decoder over one stream of T tokens.

    Returns:
        [T, width] hidden states.
    """
    lengths = None
    if policy.rope_lengths is not None:
        are_computed = layout.prompts is not None and layout.prompts.are_computed
        lengths = stream_lengths(layout.groups, prompts=not are_computed)
    with laid_out(layout):
        return policy.hidden_states(
            input_ids=input_ids[None], position_ids=position_ids[None], lengths=lengths, draws=draws
        )[0]


def _row_hidden(policy: Policy, batch: PackedBatch, prompts: bool) -> Tensor:
    """[S, width] from one row for each branch, padded on the right, under the model's own attention."""
    rows = [_Row(example.prompt, branch) for example in batch.examples for branch in example.branches]
    if policy.isolates_rows:
        hidden = [_padded_hidden(policy, [row])[0] for row in rows]
    else:
        hidden = list(_padded_hidden(policy, rows))
    ends = [len(row.prompt) + len(row.branch) - 1 for row in rows]
    scored = [each for example in batch.examples for each in example.scored]
    pieces = [
        _selected(hidden[row][end - len(rows[row].branch) : end], indices)
        for row, (end, indices) in enumerate(zip(ends, scored, strict=True))
    ]
    if prompts:
        first = accumulate((len(example.branches) for example in batch.examples), initial=0)
        pieces += [hidden[row][: len(example.prompt) - 1] for row, example in zip(first, batch.examples, strict=False)]
    return torch.cat(pieces)


def _selected(hidden: Tensor, indices: Sequence[int]) -> Tensor:
    """Select rows by index, without a copy where that is all of them."""
    if len(indices) == len(hidden):
        return hidden
    return hidden[to_device([torch.tensor(indices, dtype=torch.int64)], hidden.device)[0]]


@dataclass(frozen=True, slots=True)
class _Row:
    """A prompt and a response, whose last token predicts nothing, so that it isn't an input."""

    prompt: array[int]
    branch: array[int]

    @property
    def ids(self) -> Tensor:
        return torch.tensor([*self.prompt, *self.branch[:-1]])

    @property
    def keys(self) -> Tensor:
        texts = text_key(self.prompt), text_key(self.prompt, self.branch)
        lengths = len(self.prompt), len(self.branch) - 1
        return token_keys(texts, lengths, torch.arange(sum(lengths)))


def _padded_hidden(policy: Policy, rows: Sequence[_Row]) -> Tensor:
    """[B, longest, width] of rows, padded on the right."""

    def padded(tensors: list[Tensor]) -> Tensor:
        return nn.utils.rnn.pad_sequence(tensors, batch_first=True).to(policy.device)

    ids = [row.ids for row in rows]
    lengths = torch.tensor([len(each) for each in ids], device=policy.device)
    mask = torch.arange(max(map(len, ids)), device=policy.device) < lengths[:, None]
    return policy.hidden_states(
        input_ids=padded(ids),
        attention_mask=mask.long(),
        lengths=[[len(each) + 1] for each in ids],
        draws=policy.draws(lambda: padded([row.keys for row in rows])),
    )


def pair_logprobs(scores: TokenLogProbs, prompts: bool = False) -> PairLogProbs:
    """Split the scores of a batch of pairs by side; with `prompts`, the last third of them are the prompts'."""
    branches = len(scores.lengths) * 2 // 3 if prompts else len(scores.lengths)
    return PairLogProbs(
        chosen=select_sequences(scores, slice(0, branches, 2)),
        rejected=select_sequences(scores, slice(1, branches, 2)),
        prompt=select_sequences(scores, slice(branches, None)) if prompts else None,
    )


def select_sequences(scores: TokenLogProbs, selected: slice) -> TokenLogProbs:
    """Select sequences by index, for example every second one."""
    lengths = list(scores.lengths)

    def part(values: Tensor) -> Tensor:
        pieces = values.split(lengths)[selected]
        return torch.cat(pieces) if pieces else values[:0]

    by_token = {name: part(values) for name, values in scores.by_token().items()}
    return TokenLogProbs(lengths=scores.lengths[selected], **by_token)
