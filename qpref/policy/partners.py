"""Scores of examples and of their mismatched partners, with each prompt computed once for both.

The examples' own stream has a gradient; the partners, which have none, continue its prompts in a second pass over
their own tokens alone. Both passes are the same under the policy and under the reference.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qpref.attention.layout import Layout
from qpref.attention.prompts import ContinuedPrompts, KeptPrompts, spans
from qpref.policy.logprobs import completion_logprobs, decode, score_hidden
from qpref.policy.policy import Policy
from qpref.policy.rope import group_length, split_groups
from qpref.records import PackedBatch, TokenLogProbs
from qpref.staging import to_device


def logprobs_with_partners(
    policy: Policy, batch: PackedBatch, partners: PackedBatch, *, extras: frozenset[str] = frozenset()
) -> tuple[TokenLogProbs, TokenLogProbs]:
    """Score the responses of two batches with the same prompts, the second without a graph.

    Where prompts aren't shared, or an example and
    its partner have other rotary positions, each batch is scored on its own.

    Args:
        extras: fields to compute of the first batch beside its values, names of EXTRAS.
    """
    assert [each.prompt for each in batch.examples] == [each.prompt for each in partners.examples]
    if policy.rope_lengths is not None:
        batch, partners = (split_groups(each, policy.rope_lengths) for each in (batch, partners))
    if not policy.shares_prompts or not _turn_alike(policy, batch, partners):
        scores = completion_logprobs(policy, batch, extras=extras)
        with torch.no_grad():
            return scores, completion_logprobs(policy, partners)
    kept_at, _ = spans(batch.groups)
    kept = KeptPrompts(*to_device([torch.tensor(kept_at)], policy.device))
    with policy.autocast():
        draws = policy.draws(lambda: batch.token_keys[None])
        hidden = decode(policy, batch.input_ids, batch.position_ids, draws, Layout(batch.groups, kept))
    with torch.no_grad():
        continued = _continued_hidden(policy, hidden.detach(), batch, partners, kept)
        others, _ = score_hidden(policy, partners, continued)
        del continued
    values, found = score_hidden(policy, batch, hidden[batch.score_at], extras=extras)
    return (
        TokenLogProbs(values=values, lengths=batch.lengths, **found),
        TokenLogProbs(values=others, lengths=partners.lengths),
    )


def _turn_alike(policy: Policy, batch: PackedBatch, partners: PackedBatch) -> bool:
    """Return whether the prompts of one batch have the rotary positions that the other's branches need."""
    if policy.rope_lengths is None:
        return True
    class_of = policy.rope_lengths.class_of
    own, others = ([class_of(group_length(group)) for group in each.groups] for each in (batch, partners))
    return own == others


def _continued_hidden(
    policy: Policy, hidden: Tensor, batch: PackedBatch, partners: PackedBatch, kept: KeptPrompts
) -> Tensor:
    """[S, width] hidden states that predict the partners' tokens, in their order.

    Args:
        hidden: [T, width] of the first batch's stream, which the kept prompts are of.
    """
    in_prompts, in_branches = spans(partners.groups)
    order, predicts = [0] * partners.num_tokens, [0] * partners.num_tokens
    for number, index in enumerate([*in_prompts, *in_branches]):
        order[index] = number
    for number, index in enumerate([*_prompt_ends(partners), *in_branches]):
        predicts[index] = number
    lists = (_prompt_ends(batch), order, in_branches, predicts)
    tensors = to_device([torch.tensor(each, dtype=torch.int64) for each in lists], policy.device)
    ends, stream_order, own, row_of = tensors
    continued = ContinuedPrompts(stream_order, own, kept.take())
    pieces = [hidden.index_select(0, ends)]
    if in_branches:  # else every partner is one token, which its prompt predicts
        layout = Layout(partners.groups, continued)
        with policy.autocast():
            draws = policy.draws(lambda: partners.token_keys[own][None])
            pieces.append(decode(policy, partners.input_ids[own], partners.position_ids[own], draws, layout))
    return torch.cat(pieces)[row_of[partners.score_at]]


def _prompt_ends(batch: PackedBatch) -> list[int]:
    return [group.start + group.prompt - 1 for group in batch.groups]
