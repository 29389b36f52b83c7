"""The output head, and log-probabilities of tokens scored against it.

The head runs on the scored positions alone, a slice of the vocabulary at a time, so no [T, vocabulary] matrix ever
exists. Each scored token's log-probability depends on one row of hidden states, so its whole gradient is one row too:
the forward pass computes that row while it has the slice's logits, and the backward pass is a multiplication. That is
two matrix products with the vocabulary where recomputing a tile would take three. Only an adapter on the head itself
needs the slices again in the backward pass, for the gradient of its B matrix.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qpref.attention.determinism import distinct_indices
from qpref.errors import PolicyError
from qpref.policy import vocabulary
from qpref.policy.architecture import causal_model
from qpref.policy.matmul import float32_matmul
from qpref.policy.vocabulary import RunningLogSumExp, vocabulary_slices

SCALES = {"logit_scale": "*", "logits_scaling": "/", "lm_head_multiplier": "*", "output_multiplier": "*"}
"""Settings that scale logits, each with what most families do with it."""
CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


@dataclass(frozen=True, slots=True)
class Head:
    """A frozen output head and the transforms that the model applies to its logits.

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

        A multimodal model may ignore settings of its text part (Aya Vision's ignores the factor), so of these only
        those count that its own code reads.

        Raises:
            PolicyError: the head isn't a plain linear layer.
        """
        module, config = model.get_output_embeddings(), model.config.get_text_config()
        plain = getattr(module, "base_layer", module)
        if type(plain) is not nn.Linear:
            raise PolicyError(f"the output head is a {type(plain).__name__}; qpref needs a plain linear layer")
        source = _forward_source(model)
        read = [name for name in (*SCALES, *CAPS) if name in source] if config is not model.config else [*SCALES, *CAPS]
        cap = next(filter(None, (getattr(config, name, None) for name in CAPS if name in read)), None)
        scale = _scale(source, {name: getattr(config, name, None) for name in SCALES if name in read})
        return cls(plain.weight, plain.bias, scale, cap, None if plain is module else module)

    @property
    def num_tokens(self) -> int:
        """Size of the vocabulary."""
        return int(self.weight.shape[0])

    def low_rank(self, hidden: Tensor) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Apply the first half of the head's adapter: [rows, rank] float32 scale * dropout(hidden) A^T, and its B
        [vocabulary, rank]; None for both where there is no adapter or it is off."""
        if self.adapted is None or self.adapted.disable_adapters:
            return None, None
        (name,) = self.adapted.active_adapters
        a, b = self.adapted.lora_A[name].weight, self.adapted.lora_B[name].weight
        return self.adapted.lora_dropout[name](hidden).to(a.dtype) @ a.t() * self.adapted.scaling[name], b

    def logits(
        self, hidden: Tensor, start: int, stop: int, low: Tensor | None = None, b: Tensor | None = None
    ) -> Tensor:
        """Compute the [rows, stop - start] logits of a vocabulary slice, accumulated and returned in float32."""
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

    def product_grad(self, grad: Tensor, logits: Tensor) -> Tensor:
        """Turn the gradient of the logits into that of hidden @ weight^T, in place, by the chain rule."""
        if self.softcap is not None:
            grad *= 1 - (logits / self.softcap).square()
        return grad if self.scale == 1.0 else grad.mul_(self.scale)


def score_tokens(head: Head, hidden: Tensor, tokens: Tensor, *, squares: bool = False) -> tuple[Tensor, Tensor]:
    """Score tokens by the hidden states [S, width] that predict them, with the head's adapter on or off as it stands.

    Returns:
        [S] float32 nats of each token, and [S] the log of the sum of squared probabilities, empty unless `squares`.

    Raises:
        PolicyError: the head doesn't read the decoder's hidden states.
    """
    if hidden.shape[-1] != head.weight.shape[1]:
        raise PolicyError(
            f"the decoder's hidden states have {hidden.shape[-1]} numbers and the output head reads "
            f"{head.weight.shape[1]}: this model has layers between them, which qpref doesn't train",
            "train another model",
        )
    scored: tuple[Tensor, Tensor] = _ScoreTokens.apply(  # type: ignore[no-untyped-call]
        hidden, tokens, head, squares, *head.low_rank(hidden)
    )
    return scored


@dataclass(frozen=True, slots=True)
class _Rows:
    """Scored positions: hidden [R, width]; the head's adapter's low [R, rank] and b [vocabulary, rank], or None for
    both; tokens [R]."""

    hidden: Tensor
    low: Tensor | None
    b: Tensor | None
    tokens: Tensor

    def split(self) -> list[_Rows]:
        size = vocabulary.MAX_ROWS
        lows = [None] * len(self.tokens) if self.low is None else self.low.split(size)
        parts = zip(self.hidden.split(size), lows, self.tokens.split(size), strict=False)
        return [_Rows(hidden, low, self.b, tokens) for hidden, low, tokens in parts]

    def columns(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Locate each row's token in a vocabulary slice: [R, 1] its column, and whether the slice has it.

        The column of a token elsewhere is clamped into the slice: selecting rows instead would make a GPU's host wait.
        """
        column = self.tokens[:, None] - start
        return column.clamp(0, stop - start - 1), (column >= 0) & (column < stop - start)


@dataclass(frozen=True, slots=True)
class _Scored:
    """Scores of R rows; tensors that weren't requested are empty.

    Attributes:
        values: [R] log-probabilities.
        hidden_grad: [R, width] gradient of each value by its hidden state.
        low_grad: [R, rank] gradient of each value by its adapter's low.
        squares: [R] log of the sum of squared probabilities.
        normalizer: [R, 1] log-sum-exp of the logits.
    """

    values: Tensor
    hidden_grad: Tensor
    low_grad: Tensor
    squares: Tensor
    normalizer: Tensor


class _ScoreTokens(torch.autograd.Function):
    """hidden [S, width], tokens [S] -> log-probability of each token [S], float32, and log of the sum of squared
    probabilities [S] without gradient (empty unless requested). The head's adapter adds low [S, rank] @ b^T
    [rank, vocabulary] to the logits."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        tokens: Tensor,
        head: Head,
        needs_squares: bool = False,
        low: Tensor | None = None,
        b: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        needs_grad = any(ctx.needs_input_grad)
        parts = [_score_rows(rows, head, needs_grad, needs_squares) for rows in _Rows(hidden, low, b, tokens).split()]
        if needs_grad:
            hidden_grad = torch.cat([part.hidden_grad for part in parts]).to(hidden.dtype)
            for_adapter: tuple[Tensor | None, ...] = ()
            if low is not None:
                low_grad = torch.cat([part.low_grad for part in parts])
                for_adapter = (low_grad, hidden, low, b, tokens, torch.cat([part.normalizer for part in parts]))
            ctx.save_for_backward(hidden_grad, *for_adapter)
            ctx.head = head
        squares = torch.cat([part.squares for part in parts])
        ctx.mark_non_differentiable(squares)
        return torch.cat([part.values for part in parts]), squares

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden_grad, *for_adapter = ctx.saved_tensors
        incoming = gradients[0][:, None]
        low_result = b_result = None
        if for_adapter:
            low_grad, hidden, low, b, tokens, normalizer = for_adapter
            low_result = incoming * low_grad
            b_result = _grad_of_b(_Rows(hidden, low, b, tokens), ctx.head, normalizer, incoming)
        return (incoming * hidden_grad).to(hidden_grad.dtype), None, None, None, low_result, b_result


def _score_rows(rows: _Rows, head: Head, needs_grad: bool, needs_squares: bool) -> _Scored:
    """Score rows and compute their gradients in one pass over slices of the vocabulary."""
    tokens, hidden = rows.tokens, rows.hidden
    sum_dtype = torch.promote_types(head.weight.dtype, torch.float32)
    target = torch.zeros(len(tokens), 1, dtype=sum_dtype, device=hidden.device)
    normalizer, square_normalizer = RunningLogSumExp(target), RunningLogSumExp(target)
    grads = _TokenGrads(head, rows, target) if needs_grad else None
    with torch.autocast(hidden.device.type, enabled=False):
        for start, stop in vocabulary_slices(head.num_tokens, len(tokens), hidden.device):
            logits = head.logits(hidden, start, stop, rows.low, rows.b)
            column, inside = rows.columns(start, stop)
            target = torch.where(inside, logits.gather(1, column), target)
            part = logits.softmax(1)
            # The largest share is at least one of the slice's, so its logarithm loses nothing; torch's exp is slow.
            of_slice = logits.amax(1, keepdim=True) - part.amax(1, keepdim=True).log_()
            rescale = normalizer.add(of_slice)
            if grads is not None:
                grads.rescale(rescale)
                share = (of_slice - normalizer.total).exp_()
                grads.add(start, stop, head.product_grad(part, logits), share)
            if needs_squares:
                square_normalizer.add((2 * logits).logsumexp(1, keepdim=True))
    empty = target.new_empty(0)
    hidden_grad, low_grad = grads.result(target) if grads is not None else (empty, empty)
    return _Scored(
        values=(target - normalizer.total).squeeze(1),
        hidden_grad=hidden_grad,
        low_grad=low_grad,
        squares=(square_normalizer.total - 2 * normalizer.total).squeeze(1) if needs_squares else empty,
        normalizer=normalizer.total,
    )


class _TokenGrads:
    """Gradients of R tokens' log-probabilities, summed over slices: (onehot - softmax) @ weight by the hidden states,
    and (onehot - softmax) @ b by the adapter's low."""

    def __init__(self, head: Head, rows: _Rows, like: Tensor) -> None:
        self._head, self._tokens = head, rows.tokens
        self._factors = [head.weight] if rows.b is None else [head.weight, rows.b]
        self._expected = [like.new_zeros(len(rows.tokens), factor.shape[1]) for factor in self._factors]

    def rescale(self, factor: Tensor) -> None:
        for expected in self._expected:
            expected.mul_(factor)

    def add(self, start: int, stop: int, softmax_grad: Tensor, share: Tensor) -> None:
        """Include a slice's softmax, which is a `share` [R, 1] of that of all slices so far."""
        for factor, expected in zip(self._factors, self._expected, strict=True):
            expected.add_(_grad_product(softmax_grad, factor[start:stop]) * share)

    def result(self, target: Tensor) -> tuple[Tensor, Tensor]:
        """Finish the gradients with the tokens' own logits [R, 1]; those by low are empty without an adapter."""
        grad = self._head.product_grad(torch.ones_like(target), target)
        parts = zip(self._factors, self._expected, strict=True)
        grads = [grad * factor[self._tokens] - expected for factor, expected in parts]
        return grads[0], grads[1] if len(grads) > 1 else grads[0].new_empty(0)


def _grad_of_b(rows: _Rows, head: Head, normalizer: Tensor, incoming: Tensor) -> Tensor:
    """[vocabulary, rank] gradient of the adapter's B: (onehot - softmax)^T @ low, each row times its incoming gradient
    [S, 1]. The slices of logits are recomputed."""
    assert rows.b is not None
    size = vocabulary.MAX_ROWS
    total = torch.zeros_like(rows.b)
    with torch.autocast(incoming.device.type, enabled=False):
        for part, norm, factor in zip(rows.split(), normalizer.split(size), incoming.split(size), strict=True):
            assert part.low is not None
            for start, stop in vocabulary_slices(head.num_tokens, len(part.tokens), incoming.device):
                logits = head.logits(part.hidden, start, stop, part.low, part.b)
                column, inside = part.columns(start, stop)
                grad = (logits - norm).exp_().neg_()
                with distinct_indices():
                    grad.scatter_add_(1, column, inside.to(grad.dtype))
                grad = head.product_grad(grad, logits).mul_(factor)
                total[start:stop] += grad.t().to(total.dtype) @ part.low.to(total.dtype)
    return total


def _grad_product(left: Tensor, right: Tensor) -> Tensor:
    """Multiply for gradients: in the right factor's 16-bit dtype on a CPU, accumulated in float32 on a GPU."""
    return left.to(right.dtype) @ right if right.device.type == "cpu" else float32_matmul(left, right)


def _forward_source(model: Any) -> str:
    """Read the code that computes a model's logits; empty where there is none to read."""
    try:
        return inspect.getsource(type(causal_model(model)).forward)
    except (OSError, TypeError):
        return ""


def _scale(source: str, settings: Mapping[str, float | None]) -> float:
    """Compute the factor on a model's logits. Granite divides by a setting that HyperCLOVA X multiplies with, so the
    model's own code says which it is."""
    scale = 1.0
    for name, setting in settings.items():
        if setting is not None:
            found = re.search(rf"([*/])=? *[\w.()]*\b{name}\b", source)
            scale *= float(setting) if (found[1] if found else SCALES[name]) == "*" else 1 / float(setting)
    return scale
