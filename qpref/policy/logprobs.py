"""Per-token log-probabilities of all responses in a packed batch.

The output head runs on the scored positions alone, a slice of the vocabulary at a time, so no [T, vocabulary] matrix
ever exists. Each scored token's log-probability depends on one row of hidden states, so its whole gradient is one row
too: the forward pass computes that row while it has the slice's logits, and the backward pass is a multiplication. That
is two matrix products with the vocabulary where recomputing a tile would take three. Only an adapter on the head itself
needs the slices again in the backward pass, for the gradient of its B matrix.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qpref.attention.register import LAYOUT
from qpref.errors import PolicyError
from qpref.policy.matmul import float32_matmul
from qpref.records import PackedBatch, TokenLogProbs

if TYPE_CHECKING:
    from qpref.policy.load import Policy

TILE_ELEMENTS = 2**21
"""Logits that exist at a time: 8 MiB in float32."""
MAX_ROWS = 1024


@dataclass(frozen=True, slots=True)
class Head:
    """A frozen output head and what the model does to its logits.

    Attributes:
        weight: [vocabulary, width].
        bias: [vocabulary], or None.
        scale: factor on the logits.
        softcap: logits become softcap * tanh(logits / softcap); None for no cap.
        adapted: PEFT's LoRA layer around it; None for a head without an adapter.
    """

    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None
    adapted: Any = None

    @classmethod
    def of(cls, model: Any) -> Head:
        """Read the head of a causal language model. The first batch of a run compares it with the model's own logits.

        Raises:
            PolicyError: the head isn't a plain linear layer.
        """
        module, config = model.get_output_embeddings(), model.config.get_text_config()
        plain = getattr(module, "base_layer", module)
        if type(plain) is not nn.Linear:
            raise PolicyError(f"the output head is a {type(plain).__name__}; qpref needs a plain linear layer")
        scale = float(getattr(config, "logit_scale", None) or 1.0)
        scale /= float(getattr(config, "logits_scaling", None) or 1.0)
        # RecurrentGemma's word is the second one.
        caps = [getattr(config, name, None) for name in ("final_logit_softcapping", "logits_soft_cap")]
        return cls(plain.weight, plain.bias, scale, caps[0] or caps[1], None if plain is module else module)

    def low_rank(self, hidden: Tensor) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """[rows, rank] float32 what the head's adapter makes of hidden states, and its B [vocabulary, rank]; nothing
        where there is none or it is off."""
        if self.adapted is None or self.adapted.disable_adapters:
            return None, None
        (name,) = self.adapted.active_adapters
        a, b = self.adapted.lora_A[name].weight, self.adapted.lora_B[name].weight
        return self.adapted.lora_dropout[name](hidden).to(a.dtype) @ a.t() * self.adapted.scaling[name], b

    def logits(
        self, hidden: Tensor, start: int, stop: int, low: Tensor | None = None, b: Tensor | None = None
    ) -> Tensor:
        """[rows, stop - start] logits of a slice of the vocabulary, accumulated and returned in float32."""
        logits = float32_matmul(hidden, self.weight[start:stop].t())
        if low is not None and b is not None:
            logits.addmm_(low.to(logits.dtype), b[start:stop].t().to(logits.dtype))
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


@dataclass(frozen=True, slots=True)
class _Rows:
    """Some scored positions: hidden [R, width], the head's adapter's low [R, rank] and b [vocabulary, rank] or neither,
    tokens [R]."""

    hidden: Tensor
    low: Tensor | None
    b: Tensor | None
    tokens: Tensor

    def split(self) -> list[_Rows]:
        lows = [None] * len(self.tokens) if self.low is None else self.low.split(MAX_ROWS)
        parts = zip(self.hidden.split(MAX_ROWS), lows, self.tokens.split(MAX_ROWS), strict=False)
        return [_Rows(hidden, low, self.b, tokens) for hidden, low, tokens in parts]


@dataclass(frozen=True, slots=True)
class _Scored:
    """Of R rows: values [R] log-probabilities; slope [R, width] and low_grad [R, rank] their gradients, empty unless
    asked for; squares [R] log of the sum of squared probabilities, empty unless asked for; normalizer [R, 1] the
    logits' log-sum-exp."""

    values: Tensor
    slope: Tensor
    low_grad: Tensor
    squares: Tensor
    normalizer: Tensor


class _ScoreTokens(torch.autograd.Function):
    """hidden [S, width], tokens [S] -> log-probability of each token [S], float32, and log of the sum of squared
    probabilities [S] without gradient (empty unless asked for). The head's adapter adds low [S, rank] @ b^T
    [rank, vocabulary] to the logits."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        tokens: Tensor,
        head: Head,
        wants_squares: bool = False,
        low: Tensor | None = None,
        b: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        wants_grad = any(ctx.needs_input_grad)
        parts = [_score_rows(rows, head, wants_grad, wants_squares) for rows in _Rows(hidden, low, b, tokens).split()]
        if wants_grad:
            slopes = torch.cat([part.slope for part in parts]).to(hidden.dtype)
            of_head: tuple[Tensor | None, ...] = ()
            if low is not None:
                low_grads = torch.cat([part.low_grad for part in parts])
                of_head = (low_grads, hidden, low, b, tokens, torch.cat([part.normalizer for part in parts]))
            ctx.save_for_backward(slopes, *of_head)
            ctx.head = head
        squares = torch.cat([part.squares for part in parts])
        ctx.mark_non_differentiable(squares)
        return torch.cat([part.values for part in parts]), squares

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        slopes, *of_head = ctx.saved_tensors
        above = gradients[0][:, None]
        low_grad = b_grad = None
        if of_head:
            low_grads, hidden, low, b, tokens, normalizer = of_head
            low_grad = above * low_grads
            b_grad = _grad_of_b(_Rows(hidden, low, b, tokens), ctx.head, normalizer, above)
        return (above * slopes).to(slopes.dtype), None, None, None, low_grad, b_grad


def _score_rows(rows: _Rows, head: Head, wants_grad: bool, wants_squares: bool) -> _Scored:
    """One pass over slices of the vocabulary, with the log-sum-exp and the slope's softmax part rescaled as slices come
    in (Milakov and Gimelshein 2018, "Online normalizer calculation for softmax", algorithm 3).

    The slope is (onehot - softmax) @ weight, and the adapter's (onehot - softmax) @ b.
    """
    weight, tokens, hidden = head.weight, rows.tokens, rows.hidden
    numbers = torch.arange(len(tokens), device=tokens.device)
    wide = torch.promote_types(weight.dtype, torch.float32)
    target = torch.empty(len(tokens), 1, dtype=wide, device=hidden.device)
    normalizer = torch.full_like(target, -torch.inf)
    factors = [weight] if rows.b is None else [weight, rows.b]
    expected = [target.new_zeros(len(tokens), factor.shape[1]) for factor in factors] if wants_grad else []
    chosen = [torch.zeros_like(part) for part in expected]
    square_normalizer = torch.full_like(target, -torch.inf)
    with torch.autocast(hidden.device.type, enabled=False):
        for start, stop in slices(head, len(tokens)):
            logits = head.logits(rows.hidden, start, stop, rows.low, rows.b)
            inside = numbers[(tokens >= start) & (tokens < stop)]
            places = tokens[inside, None] - start
            target[inside] = logits[inside].gather(1, places)
            part = logits.softmax(1)
            # The largest share is at least one of the slice's, so its logarithm loses nothing; torch's exp is slow.
            part_normalizer = logits.amax(1, keepdim=True) - part.amax(1, keepdim=True).log_()
            joined = torch.logaddexp(normalizer, part_normalizer)
            if wants_grad:
                change = head.chain(part, logits)
                share = (part_normalizer - joined).exp_()
                rest = (normalizer - joined).exp_()
                at_target = head.chain(torch.ones_like(target[inside]), target[inside])
                for factor, mean, own in zip(factors, expected, chosen, strict=True):
                    mean.mul_(rest).add_(_low_product(change, factor[start:stop]) * share)
                    own[inside] = at_target * factor[tokens[inside]]
            normalizer = joined
            if wants_squares:
                square_normalizer = torch.logaddexp(square_normalizer, (2 * logits).logsumexp(1, keepdim=True))
    slopes = [own - mean for own, mean in zip(chosen, expected, strict=True)]
    nothing = target.new_empty(0)
    return _Scored(
        values=(target - normalizer).squeeze(1),
        slope=slopes[0] if slopes else nothing,
        low_grad=slopes[1] if len(slopes) > 1 else nothing,
        squares=(square_normalizer - 2 * normalizer).squeeze(1) if wants_squares else nothing,
        normalizer=normalizer,
    )


def _grad_of_b(everything: _Rows, head: Head, normalizer: Tensor, above: Tensor) -> Tensor:
    """[vocabulary, rank] gradient of the adapter's B: (onehot - softmax)^T @ low, each row times what comes from
    `above` [S, 1]. The slices of logits are computed once more."""
    assert everything.b is not None
    total = torch.zeros_like(everything.b)
    pieces = zip(everything.split(), normalizer.split(MAX_ROWS), above.split(MAX_ROWS), strict=True)
    with torch.autocast(above.device.type, enabled=False):
        for rows, norm, factor in pieces:
            assert rows.low is not None
            numbers = torch.arange(len(rows.tokens), device=above.device)
            for start, stop in slices(head, len(rows.tokens)):
                logits = head.logits(rows.hidden, start, stop, rows.low, rows.b)
                inside = numbers[(rows.tokens >= start) & (rows.tokens < stop)]
                change = (logits - norm).exp_().neg_()
                change[inside, rows.tokens[inside] - start] += 1
                change = head.chain(change, logits).mul_(factor)
                total[start:stop] += change.t().to(total.dtype) @ rows.low.to(total.dtype)
    return total


def slices(head: Head, num_rows: int) -> Iterator[tuple[int, int]]:
    """Slices of the vocabulary whose logits exist at a time."""
    width = max(1, TILE_ELEMENTS // num_rows)
    size = head.weight.shape[0]
    return ((start, min(start + width, size)) for start in range(0, size, width))


def _low_product(left: Tensor, right: Tensor) -> Tensor:
    """A product for gradients: in the right factor's 16-bit type on a CPU, accumulated in float32 on a GPU."""
    return left.to(right.dtype) @ right if right.device.type == "cpu" else float32_matmul(left, right)


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
    hidden = completion_hidden(policy, batch, prompts=prompts)
    values, log_sums = score_tokens(policy.head, hidden, tokens, squares=squares)
    return TokenLogProbs(values=values, lengths=lengths, log_sum_squares=log_sums if squares else None)


def completion_hidden(policy: Policy, batch: PackedBatch, *, prompts: bool = False) -> Tensor:
    """[S, width] the hidden state that predicts each response token, in the batch's order."""
    with policy.autocast():
        compute = _shared_hidden if policy.shares_prompts else _row_hidden
        return compute(policy, batch, prompts)


def score_tokens(head: Head, hidden: Tensor, tokens: Tensor, *, squares: bool = False) -> tuple[Tensor, Tensor]:
    """[S] log-probability of each token by the hidden state that predicts it, the head's adapter as it stands, and
    the log of the sum of squared probabilities (empty unless asked for)."""
    scored: tuple[Tensor, Tensor] = _ScoreTokens.apply(  # type: ignore[no-untyped-call]
        hidden, tokens, head, squares, *head.low_rank(hidden)
    )
    return scored


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
