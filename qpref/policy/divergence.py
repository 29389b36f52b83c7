"""Kullback-Leibler divergence of next-token distributions over the whole vocabulary, without a [T, vocabulary]
matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qpref.policy.head import Head
from qpref.policy.vocabulary import MAX_ROWS, RunningKL, vocabulary_slices


@dataclass(frozen=True, slots=True, kw_only=True)
class NextTokens:
    """Next-token distributions at R positions, as the hidden states and the head that their logits are made of.

    Attributes:
        hidden: [R, width].
        low, b: [R, rank] and [vocabulary, rank] of an active adapter on the head; None without one.
    """

    head: Head
    hidden: Tensor
    low: Tensor | None = None
    b: Tensor | None = None

    @classmethod
    def of(cls, head: Head, hidden: Tensor) -> NextTokens:
        """Apply the head's adapter as it stands, on or off."""
        low, b = head.low_rank(hidden)
        return cls(head=head, hidden=hidden, low=low, b=b)

    @property
    def num_tokens(self) -> int:
        """Size of the vocabulary."""
        return self.head.num_tokens

    def rows(self, start: int, stop: int) -> NextTokens:
        """Select a range of the positions."""
        low = None if self.low is None else self.low[start:stop]
        return NextTokens(head=self.head, hidden=self.hidden[start:stop], low=low, b=self.b)

    def on(self, device: torch.device) -> NextTokens:
        """Move the positions to a device; the head stays where it is."""
        low = None if self.low is None else self.low.to(device)
        return NextTokens(head=self.head, hidden=self.hidden.to(device), low=low, b=self.b)

    def logits(self, start: int, stop: int) -> Tensor:
        """[R, stop - start] float64 logits of a vocabulary slice."""
        return self.head.logits(self.hidden, start, stop, self.low, self.b).double()


@torch.no_grad()
def token_kl(policy: NextTokens, reference: NextTokens) -> Tensor:
    """Compute KL(policy || reference) of the next token at each position: [R] float64 nats, exact.

    Both sides must have the same vocabulary.
    """
    assert policy.num_tokens == reference.num_tokens
    count = len(policy.hidden)
    starts = range(0, count, MAX_ROWS)
    parts = [_kl(policy.rows(at, at + MAX_ROWS), reference.rows(at, at + MAX_ROWS)) for at in starts]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.float64)


def _kl(policy: NextTokens, reference: NextTokens) -> Tensor:
    count, device = len(policy.hidden), policy.hidden.device
    divergence = RunningKL(count, device)
    with torch.autocast(device.type, enabled=False):
        for start, stop in vocabulary_slices(policy.num_tokens, count, device):
            divergence.add(policy.logits(start, stop), reference.logits(start, stop))
    return divergence.nats.clamp_min(0.0)
