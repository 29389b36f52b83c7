"""Log-probabilities of tokens, scored against the output head.

The head runs on the scored positions alone, a slice of the vocabulary at a time, so no [T, vocabulary] matrix ever
exists. Each scored token's log-probability depends on one row of hidden states, so its whole gradient is one row too:
the forward pass computes that row while it has the slice's logits, and the backward pass is a multiplication. That is
two matrix products with the vocabulary where recomputing a tile would take three. Only an adapter on the head itself
needs the slices again in the backward pass, for the gradient of its B matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qpref.attention.determinism import distinct_indices
from qpref.errors import PolicyError
from qpref.policy import vocabulary
from qpref.policy.head import Head
from qpref.policy.matmul import float32_matmul, product
from qpref.policy.passes import Pass, Wishes
from qpref.policy.vocabulary import RunningLogSumExp, vocabulary_slices
from qpref.records import EXTRAS


def score_tokens(
    head: Head, hidden: Tensor, tokens: Tensor, extras: frozenset[str] = frozenset()
) -> tuple[Tensor, dict[str, Tensor]]:
    """Score tokens by the hidden states [S, width] that predict them, with the head's adapter on or off as it stands.

    Args:
        extras: further numbers of each position, names of EXTRAS; others are ignored.

    Returns:
        [S] float32 nats of each token, and the extras by name, each [S] without gradient.

    Raises:
        PolicyError: the head doesn't read the decoder's hidden states.
    """
    if hidden.shape[-1] != head.weight.shape[1]:
        raise PolicyError(
            f"the decoder's hidden states have {hidden.shape[-1]} numbers and the output head reads "
            f"{head.weight.shape[1]}: this model has layers between them, which qpref doesn't train",
            "train another model",
        )
    values, *found = _ScoreTokens.apply(  # type: ignore[no-untyped-call]
        hidden, tokens, head, extras, *head.low_rank(hidden)
    )
    return values, {name: each for name, each in zip(EXTRAS, found, strict=True) if name in extras}


def join_scores(head: Head, wishes: Wishes) -> None:
    """Score the tokens of other processes, for their `score_tokens`, under a head whose rows are shared."""
    nothing = head.weight.new_empty(0, head.weight.shape[1])
    with torch.no_grad():
        _score_shared(nothing, nothing.new_empty(0, dtype=torch.int64), head, wishes)


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
        entropy: [R] nats.
        normalizer: [R, 1] log-sum-exp of the logits.
    """

    values: Tensor
    hidden_grad: Tensor
    low_grad: Tensor
    squares: Tensor
    entropy: Tensor
    normalizer: Tensor


class _ScoreTokens(torch.autograd.Function):
    """hidden [S, width], tokens [S] -> log-probability of each token [S], float32; without gradient, in the order of
    EXTRAS and empty unless requested, log of the sum of squared probabilities [S] and entropy [S]. The head's adapter
    adds low [S, rank] @ b^T [rank, vocabulary] to the logits."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        tokens: Tensor,
        head: Head,
        extras: frozenset[str] = frozenset(),
        low: Tensor | None = None,
        b: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        needs_grad = any(ctx.needs_input_grad)
        wishes = Wishes(needs_grad, "log_sum_squares" in extras, "entropy" in extras, len(tokens))
        if head.rows is None:
            groups = _Rows(hidden, low, b, tokens).split()
            parts = [_sum_rows(rows, head, wishes).scores() for rows in groups]
        else:
            assert head.passes is not None
            parts = _score_shared(hidden, tokens, head, head.passes.begin(Pass.SCORES, wishes))
        if needs_grad:
            hidden_grad = torch.cat([part.hidden_grad for part in parts]).to(hidden.dtype)
            for_adapter: tuple[Tensor | None, ...] = ()
            if low is not None:
                low_grad = torch.cat([part.low_grad for part in parts])
                for_adapter = (low_grad, hidden, low, b, tokens, torch.cat([part.normalizer for part in parts]))
            ctx.save_for_backward(hidden_grad, *for_adapter)
            ctx.head = head
        squares, entropy = (torch.cat([getattr(part, name) for part in parts]) for name in ("squares", "entropy"))
        ctx.mark_non_differentiable(squares, entropy)
        return torch.cat([part.values for part in parts]), squares, entropy

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


@dataclass(frozen=True, slots=True)
class _Sums:
    """Sums over the slices of a vocabulary, or of a process's part of one, for R rows.

    Attributes:
        target: [R, 1] logits of the rows' tokens; 0 for a token of another process.
        normalizer: [R, 1] log-sum-exp of the logits.
        square_normalizer: [R, 1] likewise of twice the logits; None unless requested.
        expected_logit: [R, 1] mean of the logits under their softmax; None unless requested.
        grads: None unless requested.
    """

    target: Tensor
    normalizer: Tensor
    square_normalizer: Tensor | None
    expected_logit: Tensor | None
    grads: _TokenGrads | None

    def scores(self) -> _Scored:
        """Finish the scores of rows that have seen the whole vocabulary."""
        empty, squares, expected = self.target.new_empty(0), self.square_normalizer, self.expected_logit
        hidden_grad, low_grad = (empty, empty) if self.grads is None else self.grads.result(self.target)
        return _Scored(
            values=(self.target - self.normalizer).squeeze(1),
            hidden_grad=hidden_grad,
            low_grad=low_grad,
            squares=empty if squares is None else (squares - 2 * self.normalizer).squeeze(1),
            entropy=empty if expected is None else (self.normalizer - expected).squeeze(1),
            normalizer=self.normalizer,
        )


def _sum_rows(rows: _Rows, head: Head, wishes: Wishes) -> _Sums:
    """Compute the rows' sums, and those of their gradients, in one pass over slices of the vocabulary."""
    tokens, hidden = rows.tokens, rows.hidden
    sum_dtype = torch.promote_types(head.weight.dtype, torch.float32)
    target = torch.zeros(len(tokens), 1, dtype=sum_dtype, device=hidden.device)
    normalizer, square_normalizer = RunningLogSumExp(target), RunningLogSumExp(target)
    expected = torch.zeros_like(target) if wishes.needs_entropy else None
    grads = _TokenGrads(head, rows, target) if wishes.needs_grad else None
    with torch.autocast(hidden.device.type, enabled=False):
        for start, stop in vocabulary_slices(len(head.weight), len(tokens), hidden.device):
            logits = head.logits(hidden, start, stop, rows.low, rows.b)
            column, inside = rows.columns(start, stop)
            target = torch.where(inside, logits.gather(1, column), target)
            part = logits.softmax(1)
            # The largest share is at least one of the slice's, so its logarithm loses nothing; torch's exp is slow.
            of_slice = logits.amax(1, keepdim=True) - part.amax(1, keepdim=True).log_()
            rescale = normalizer.add(of_slice)
            share = (of_slice - normalizer.total).exp_()
            if expected is not None:
                expected = expected * rescale + _row_products(part, logits) * share
            if grads is not None:
                grads.rescale(rescale)
                grads.add(start, stop, head.product_grad(part, logits), share)
            if wishes.needs_squares:
                square_normalizer.add((2 * logits).logsumexp(1, keepdim=True))
    return _Sums(target, normalizer.total, square_normalizer.total if wishes.needs_squares else None, expected, grads)


def _row_products(one: Tensor, other: Tensor) -> Tensor:
    """[R, 1] sum of the products of each row's numbers, in halves: half a float32 tile takes no more memory than the
    16-bit copy that the gradient takes afterwards."""
    halves = zip(one.chunk(2, 1), other.chunk(2, 1), strict=True)
    return torch.stack([(left * right).sum(1, keepdim=True) for left, right in halves]).sum(0)


def _score_shared(hidden: Tensor, tokens: Tensor, head: Head, wishes: Wishes) -> list[_Scored]:
    """Score rows under a head that processes share: so many of each at a time that all together are `SHARED_ROWS`."""
    assert head.rows is not None
    size = max(1, vocabulary.SHARED_ROWS // head.rows.world.size)
    starts = range(0, max(1, wishes.num_rows), size)
    windows = [(hidden[start : start + size], tokens[start : start + size]) for start in starts]
    return [_score_window(*window, head, wishes) for window in windows]


def _score_window(hidden: Tensor, tokens: Tensor, head: Head, wishes: Wishes) -> _Scored:
    """Score rows of all processes, each of which computes everybody's against its own tokens."""
    assert head.rows is not None
    gathered, mine = head.rows.gathered(hidden)
    columns = head.rows.gathered(tokens)[0] - head.rows.start
    world, groups = head.rows.world, _Rows(gathered, None, None, columns).split()
    sums = [_sum_rows(rows, head, wishes) for rows in groups]

    def total_of(normalizers: list[Tensor]) -> Tensor:
        return torch.stack(world.gather(torch.cat(normalizers).squeeze(1), "the normalizers")).logsumexp(0)[:, None]

    total = total_of([each.normalizer for each in sums])
    totals = total.split([len(each.target) for each in sums])
    added = [torch.cat([each.target for each in sums])]
    if wishes.needs_entropy:
        added.append(torch.cat([_logit_part(each, norm) for each, norm in zip(sums, totals, strict=True)]))
    if wishes.needs_grad:
        added.append(torch.cat([_grad_part(each, norm) for each, norm in zip(sums, totals, strict=True)]))
    world.add(added, "the scores of shared rows")
    squares = total.new_empty(0)
    if wishes.needs_squares:
        both = total_of([each.square_normalizer for each in sums if each.square_normalizer is not None]) - 2 * total
        squares = both[mine].squeeze(1)
    return _Scored(
        values=(added[0] - total)[mine].squeeze(1),
        hidden_grad=added[-1][mine],
        low_grad=total.new_empty(0),
        squares=squares,
        entropy=(total - added[1])[mine].squeeze(1) if wishes.needs_entropy else total.new_empty(0),
        normalizer=total[mine],
    )


def _logit_part(sums: _Sums, total: Tensor) -> Tensor:
    """[R, 1] part of the expected logits that a process's own tokens make, given the whole normalizers [R, 1]."""
    assert sums.expected_logit is not None
    return sums.expected_logit * (sums.normalizer - total).exp()


def _grad_part(sums: _Sums, total: Tensor) -> Tensor:
    """[R, width] part of the gradients that a process's own tokens make, given the whole normalizers [R, 1]."""
    assert sums.grads is not None
    return sums.grads.part(sums.target, (sums.normalizer - total).exp())


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

    def part(self, target: Tensor, share: Tensor) -> Tensor:
        """Finish the part of the gradients by hidden states that a process's tokens make: a row's token may be another
        process's, and these tokens have a `share` [R, 1] of the whole softmax."""
        weight, expected = self._factors[0], self._expected[0] * share
        inside = ((self._tokens >= 0) & (self._tokens < len(weight)))[:, None]
        if not len(weight):
            return -expected
        grad = self._head.product_grad(torch.ones_like(target), target)
        return torch.where(inside, grad * weight[self._tokens.clamp(0, len(weight) - 1)], 0) - expected


def _grad_of_b(rows: _Rows, head: Head, normalizer: Tensor, incoming: Tensor) -> Tensor:
    """[vocabulary, rank] gradient of the adapter's B: (onehot - softmax)^T @ low, each row times its incoming gradient
    [S, 1]. The slices of logits are recomputed."""
    assert rows.b is not None
    size = vocabulary.MAX_ROWS
    total = torch.zeros_like(rows.b)
    with torch.autocast(incoming.device.type, enabled=False):
        for part, norm, factor in zip(rows.split(), normalizer.split(size), incoming.split(size), strict=True):
            assert part.low is not None
            for start, stop in vocabulary_slices(len(head.weight), len(part.tokens), incoming.device):
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
    return product(left.to(right.dtype), right) if right.device.type == "cpu" else float32_matmul(left, right)
