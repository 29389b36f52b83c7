"""Per-token log-probabilities of all responses in a packed batch.

The output head runs on the scored positions alone, a slice of the vocabulary at a time, so no [T, vocabulary] matrix
ever exists. Each scored token's log-probability depends on one row of hidden states, so its whole gradient is one row
too: the forward pass computes that row while it has the slice's logits, and the backward pass is a multiplication. That
is two matrix products with the vocabulary where recomputing a tile would take three.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qpref.errors import PolicyError
from qpref.policy.attention import LAYOUT
from qpref.records import PackedBatch, PairLogProbs, TokenLogProbs

if TYPE_CHECKING:
    from qpref.policy.load import Policy

TILE_ELEMENTS = 2**22
"""Logits that exist at a time: 16 MiB in float32."""
MAX_ROWS = 1024


@dataclass(frozen=True, slots=True)
class Head:
    """A frozen output head and what the model does to its logits.

    Attributes:
        weight: [vocabulary, width].
        bias: [vocabulary], or None.
        scale: factor on the logits.
        softcap: logits become softcap * tanh(logits / softcap); None for no cap.
    """

    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None

    @classmethod
    def of(cls, model: Any) -> Head:
        """Read the head of a causal language model. The first batch of a run compares it with the model's own logits.

        Raises:
            PolicyError: the head isn't a plain linear layer.
        """
        module, config = model.get_output_embeddings(), model.config.get_text_config()
        if type(module) is not nn.Linear:
            raise PolicyError(f"the output head is a {type(module).__name__}; qpref needs a plain linear layer")
        scale = float(getattr(config, "logit_scale", None) or 1.0)
        scale /= float(getattr(config, "logits_scaling", None) or 1.0)
        # RecurrentGemma's word is the second one.
        caps = [getattr(config, name, None) for name in ("final_logit_softcapping", "logits_soft_cap")]
        return cls(module.weight, module.bias, scale, caps[0] or caps[1])

    def logits(self, hidden: Tensor, start: int, stop: int) -> Tensor:
        """[rows, stop - start] logits of a slice of the vocabulary, accumulated and returned in float32."""
        logits = _product(hidden, self.weight[start:stop].t())
        if self.bias is not None:
            logits += self.bias[start:stop]
        if self.scale != 1.0:
            logits *= self.scale
        if self.softcap is not None:
            logits = logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits

    def chain(self, change: Tensor, logits: Tensor) -> Tensor:
        """d value / d (hidden @ weight) from d value / d logits, in place."""
        if self.softcap is not None:
            change *= 1 - (logits / self.softcap).square()
        return change if self.scale == 1.0 else change.mul_(self.scale)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """A matrix product accumulated and returned in float32 (float64 for float64), whatever 16-bit type comes in."""
    if right.dtype in (torch.float32, torch.float64):
        return left.to(right.dtype) @ right
    if right.device.type == "cuda":
        return torch.mm(left.to(right.dtype), right, out_dtype=torch.float32)
    with _bf16_products(right.dtype == torch.bfloat16 == left.dtype):
        return left.float() @ right.float()


@contextmanager
def _bf16_products(exact: bool) -> Iterator[None]:
    """Let a CPU with bf16 units multiply float32 matrices on them, where both hold bf16 numbers and so lose nothing."""
    matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # missing in torch's own stubs
    before = matmul.fp32_precision
    if exact:
        matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


class _ScoreTokens(torch.autograd.Function):
    """hidden [S, width], tokens [S] -> log-probability of each token [S], float32, and log of the sum of squared
    probabilities [S] without gradient (empty unless asked for)."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, tokens: Tensor, head: Head, wants_squares: bool = False
    ) -> tuple[Tensor, Tensor]:
        wants_slope = ctx.needs_input_grad[0]
        scored = [
            _score_rows(part, wanted, head, wants_slope, wants_squares)
            for part, wanted in zip(hidden.split(MAX_ROWS), tokens.split(MAX_ROWS), strict=True)
        ]
        values, slopes, squares = zip(*scored, strict=True)
        if wants_slope:
            ctx.save_for_backward(torch.cat(slopes).to(hidden.dtype))
        joined = torch.cat(squares)
        ctx.mark_non_differentiable(joined)
        return torch.cat(values), joined

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (slopes,) = ctx.saved_tensors
        return (gradients[0][:, None] * slopes).to(slopes.dtype), None, None, None


def _score_rows(
    hidden: Tensor, tokens: Tensor, head: Head, wants_slope: bool, wants_squares: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """[rows] log-probabilities, [rows, width] their slope: (onehot - softmax) @ weight, and [rows] log sum p^2.

    One pass over slices of the vocabulary, with the log-sum-exp and the slope's softmax part rescaled as slices come in
    (Milakov and Gimelshein 2018, "Online normalizer calculation for softmax", algorithm 3).
    """
    weight, rows = head.weight, torch.arange(len(tokens), device=tokens.device)
    wide = torch.promote_types(weight.dtype, torch.float32)
    target = torch.empty(len(tokens), 1, dtype=wide, device=hidden.device)
    normalizer = torch.full_like(target, -torch.inf)
    expected = torch.zeros(hidden.shape if wants_slope else (), dtype=wide, device=hidden.device)
    chosen = torch.zeros_like(expected)
    square_normalizer = torch.full_like(target, -torch.inf)
    width = max(1, TILE_ELEMENTS // len(tokens))
    with torch.autocast(hidden.device.type, enabled=False):
        for start in range(0, weight.shape[0], width):
            stop = min(start + width, weight.shape[0])
            logits = head.logits(hidden, start, stop)
            inside = rows[(tokens >= start) & (tokens < stop)]
            places = tokens[inside, None] - start
            target[inside] = logits[inside].gather(1, places)
            part = logits.log_softmax(1)
            part_normalizer = logits[:, :1] - part[:, :1]
            joined = torch.logaddexp(normalizer, part_normalizer)
            if wants_slope:
                change = head.chain(part.exp_(), logits)
                share = (part_normalizer - joined).exp_()
                expected.mul_((normalizer - joined).exp_()).add_(_low_product(change, weight[start:stop]) * share)
                at_target = head.chain(torch.ones_like(target[inside]), target[inside])
                chosen[inside] = at_target * weight[tokens[inside]]
            normalizer = joined
            if wants_squares:
                square_normalizer = torch.logaddexp(square_normalizer, (2 * logits).logsumexp(1, keepdim=True))
    squares = (square_normalizer - 2 * normalizer).squeeze(1) if wants_squares else target.new_empty(0)
    return (target - normalizer).squeeze(1), chosen - expected, squares


def _low_product(left: Tensor, right: Tensor) -> Tensor:
    """A product for gradients: in the right factor's 16-bit type on a CPU, accumulated in float32 on a GPU."""
    return left.to(right.dtype) @ right if right.device.type == "cpu" else _product(left, right)


def completion_logprobs(
    policy: Policy, batch: PackedBatch, *, prompts: bool = False, squares: bool = False
) -> TokenLogProbs:
    """Score every response token of the batch under the policy as it stands (adapters on or off).

    Float32 nats whatever the model computes in. Sequence `i * K + k` of the result is branch k of example i.

    Args:
        prompts: score the prompts as well, each but its first token; they follow all branches.
        squares: give `log_sum_squares` too.
    """
    tokens, lengths = batch.score_token, batch.lengths
    if prompts:
        rest = [token for example in batch.examples for token in example.prompt[1:]]
        tokens = torch.cat([tokens, torch.tensor(rest, dtype=tokens.dtype, device=tokens.device)])
        lengths += tuple(len(example.prompt) - 1 for example in batch.examples)
    with policy.autocast():
        compute = _shared_hidden if policy.shares_prompts else _row_hidden
        hidden = compute(policy, batch, prompts)
    values, log_sums = _ScoreTokens.apply(hidden, tokens, policy.head, squares)  # type: ignore[no-untyped-call]
    return TokenLogProbs(values=values, lengths=lengths, log_sum_squares=log_sums if squares else None)


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


def _shared_hidden(policy: Policy, batch: PackedBatch, prompts: bool) -> Tensor:
    """[S, width] from one stream with each prompt once."""
    output = policy.decoder(
        input_ids=batch.input_ids[None],
        position_ids=batch.position_ids[None],
        use_cache=False,
        **{LAYOUT: batch.groups},
    )
    hidden: Tensor = output.last_hidden_state[0]
    if not prompts:
        return hidden[batch.score_at]
    inside = [place for group in batch.groups for place in range(group.start, group.start + group.prompt - 1)]
    return hidden[torch.cat([batch.score_at, batch.score_at.new_tensor(inside)])]


def _row_hidden(policy: Policy, batch: PackedBatch, prompts: bool) -> Tensor:
    """[S, width] from one row for each branch, padded on the right, under the model's own attention."""
    rows = [torch.tensor([*example.prompt, *branch[:-1]]) for example in batch.examples for branch in example.branches]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(batch.input_ids.device)
    lengths = torch.tensor([len(row) for row in rows], device=ids.device)
    mask = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
    hidden = policy.decoder(input_ids=ids, attention_mask=mask.long(), use_cache=False).last_hidden_state
    pieces = [hidden[row, len(rows[row]) - length : len(rows[row])] for row, length in enumerate(batch.lengths)]
    if prompts:
        branches = len(batch.lengths) // len(batch.examples)
        pieces += [hidden[place * branches, : len(example.prompt) - 1] for place, example in enumerate(batch.examples)]
    return torch.cat(pieces)
