"""The Kullback-Leibler divergence of next-token distributions, over the whole vocabulary, without a [T, vocabulary]
matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qpref.policy.logprobs import MAX_ROWS, Head, slices


@dataclass(frozen=True, slots=True, kw_only=True)
class NextTokens:
    """Next-token distributions at R positions, as what makes their logits.

    Attributes:
        hidden: [R, width].
        low, b: [R, rank] and [vocabulary, rank] of an adapter on the head that was on; None for none.
    """

    head: Head
    hidden: Tensor
    low: Tensor | None = None
    b: Tensor | None = None

    @classmethod
    def of(cls, head: Head, hidden: Tensor) -> NextTokens:
        """As the head's adapter stands at the moment."""
        low, b = head.low_rank(hidden)
        return cls(head=head, hidden=hidden, low=low, b=b)

    @property
    def num_tokens(self) -> int:
        """Size of the vocabulary."""
        return int(self.head.weight.shape[0])

    def rows(self, start: int, stop: int) -> NextTokens:
        low = None if self.low is None else self.low[start:stop]
        return NextTokens(head=self.head, hidden=self.hidden[start:stop], low=low, b=self.b)

    def on(self, device: torch.device) -> NextTokens:
        """The same with its positions on a device; the head stays where it is."""
        low = None if self.low is None else self.low.to(device)
        return NextTokens(head=self.head, hidden=self.hidden.to(device), low=low, b=self.b)

    def logits(self, start: int, stop: int) -> Tensor:
        return self.head.logits(self.hidden, start, stop, self.low, self.b).double()


@torch.no_grad()
def token_kl(policy: NextTokens, reference: NextTokens) -> Tensor:
    """[R] float64 nats: KL(policy || reference) of the next token at each position, exact.

    Both have to have the same vocabulary.
    """
    assert policy.num_tokens == reference.num_tokens
    count = len(policy.hidden)
    starts = range(0, count, MAX_ROWS)
    parts = [_kl(policy.rows(at, at + MAX_ROWS), reference.rows(at, at + MAX_ROWS)) for at in starts]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.float64)


def _kl(policy: NextTokens, reference: NextTokens) -> Tensor:
    """One pass over slices of the vocabulary: sum of p (l_p - l_r), with l the logits, less the difference of their
    log-sum-exps. The sum is rescaled as slices come in, as a softmax's."""
    count, device = len(policy.hidden), policy.hidden.device
    norm, reference_norm = (torch.full((count, 1), -torch.inf, dtype=torch.float64, device=device) for _ in range(2))
    apart = torch.zeros(count, 1, dtype=torch.float64, device=device)
    with torch.autocast(device.type, enabled=False):
        for start, stop in slices(policy.head, count):
            ours, theirs = policy.logits(start, stop), reference.logits(start, stop)
            joined = torch.logaddexp(norm, ours.logsumexp(1, keepdim=True))
            apart = apart * (norm - joined).exp() + ((ours - joined).exp() * (ours - theirs)).sum(1, keepdim=True)
            norm = joined
            reference_norm = torch.logaddexp(reference_norm, theirs.logsumexp(1, keepdim=True))
    return (apart - norm + reference_norm).squeeze(1).clamp_min(0.0)
