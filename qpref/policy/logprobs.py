"""Per-token log-probabilities of the responses in a packed batch, and the hidden states that predict them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from qpref.attention.layout import Layout, laid_out
from qpref.policy.policy import Policy
from qpref.policy.rope import split_groups, stream_lengths
from qpref.policy.token_scores import score_tokens
from qpref.records import PackedBatch, PairLogProbs, TokenLogProbs
from qpref.staging import to_device


def completion_logprobs(
    policy: Policy, batch: PackedBatch, *, prompts: bool = False, squares: bool = False
) -> TokenLogProbs:
    """Score every response token of the batch under the policy as it stands (adapters on or off).

    Float32 nats whatever the model computes in. Sequence `i * K + k` of the result is branch k of example i.

    Args:
        prompts: score the prompts as well, each but its first token; they follow all branches.
        squares: compute `log_sum_squares` too.
    """
    tokens, lengths = batch.score_token, batch.lengths
    if prompts:
        rest = torch.tensor([token for example in batch.examples for token in example.prompt[1:]], dtype=tokens.dtype)
        tokens = torch.cat([tokens, *to_device([rest], tokens.device)])
        lengths += tuple(len(example.prompt) - 1 for example in batch.examples)
    hidden = completion_hidden(policy, batch, prompts=prompts)
    values, log_sums = score_tokens(policy.head, hidden, tokens, squares=squares)
    return TokenLogProbs(values=values, lengths=lengths, log_sum_squares=log_sums if squares else None)


def completion_hidden(policy: Policy, batch: PackedBatch, *, prompts: bool = False) -> Tensor:
    """[S, width] hidden states that predict the response tokens, in the batch's order."""
    with policy.autocast():
        compute = _shared_hidden if policy.shares_prompts else _row_hidden
        return compute(policy, batch, prompts)


def _shared_hidden(policy: Policy, batch: PackedBatch, prompts: bool) -> Tensor:
    """[S, width] from one stream with each prompt once, or once for each class of lengths of its responses."""
    if policy.rope_lengths is not None:
        batch = split_groups(batch, policy.rope_lengths)
    hidden = decode(policy, batch.input_ids, batch.position_ids, Layout(batch.groups))
    if not prompts:
        return hidden[batch.score_at]
    groups = [batch.groups[number] for number in batch.group_of]
    in_prompts = [index for group in groups for index in range(group.start, group.start + group.prompt - 1)]
    indices = to_device([torch.tensor(in_prompts, dtype=torch.int64)], policy.device)
    return hidden[torch.cat([batch.score_at, *indices])]


def decode(policy: Policy, input_ids: Tensor, position_ids: Tensor, layout: Layout) -> Tensor:
    """Run the decoder over one stream of T tokens.

    Returns:
        [T, width] hidden states.
    """
    lengths = None
    if policy.rope_lengths is not None:
        are_computed = layout.prompts is not None and layout.prompts.are_computed
        lengths = stream_lengths(layout.groups, prompts=not are_computed)
    with laid_out(layout):
        return policy.hidden_states(input_ids=input_ids[None], position_ids=position_ids[None], lengths=lengths)[0]


def _row_hidden(policy: Policy, batch: PackedBatch, prompts: bool) -> Tensor:
    """[S, width] from one row for each branch, padded on the right, under the model's own attention."""
    rows = [torch.tensor([*example.prompt, *branch[:-1]]) for example in batch.examples for branch in example.branches]
    if policy.isolates_rows:
        hidden = [_padded_hidden(policy, [row], policy.device)[0] for row in rows]
    else:
        hidden = list(_padded_hidden(policy, rows, policy.device))
    pieces = [hidden[row][len(rows[row]) - length : len(rows[row])] for row, length in enumerate(batch.lengths)]
    if prompts:
        branches = len(batch.lengths) // len(batch.examples)
        pieces += [hidden[index * branches][: len(example.prompt) - 1] for index, example in enumerate(batch.examples)]
    return torch.cat(pieces)


def _padded_hidden(policy: Policy, rows: Sequence[Tensor], device: torch.device) -> Tensor:
    """[B, longest, width] from rows that lack the last token of their sequences."""
    ids = nn.utils.rnn.pad_sequence(list(rows), batch_first=True).to(device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    mask = torch.arange(ids.shape[1], device=device) < lengths[:, None]
    return policy.hidden_states(input_ids=ids, attention_mask=mask.long(), lengths=[[len(row) + 1] for row in rows])


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

    squares = scores.log_sum_squares
    return TokenLogProbs(
        values=part(scores.values),
        lengths=scores.lengths[selected],
        log_sum_squares=None if squares is None else part(squares),
    )
