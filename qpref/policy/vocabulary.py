"""Sums over a vocabulary whose logits exist a slice at a time: log-sum-exp and Kullback-Leibler divergence.

Running sums are rescaled as slices arrive (Milakov and Gimelshein 2018, "Online normalizer calculation for softmax",
algorithm 3).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

TILE_ELEMENTS = {"cpu": 2**21, "cuda": 2**24}
"""Logits that exist at a time, by device: 8 and 64 MiB in float32. A slice costs a GPU about 30 launches, whatever its
size; a CPU's caches hold the smaller one."""
MAX_ROWS = 1024
"""Positions whose logits exist at a time."""
SHARED_ROWS = 8192
"""Positions of all processes that are scored at a time where they share the head: each has the states and gradients of
all of these. Fewer would mean more messages."""


def vocabulary_slices(num_tokens: int, num_rows: int, device: torch.device) -> Iterator[tuple[int, int]]:
    """Cut a vocabulary into slices (start, stop), of which `num_rows` rows have at most `TILE_ELEMENTS` logits."""
    size = max(1, TILE_ELEMENTS[device.type] // max(1, num_rows))
    return ((start, min(start + size, num_tokens)) for start in range(0, num_tokens, size))


class RunningLogSumExp:
    """The log-sum-exp of each row's logits over the slices added so far.

    Attributes:
        total: in the shape and dtype of `like`.
    """

    def __init__(self, like: Tensor) -> None:
        self.total = torch.full_like(like, -torch.inf)

    def add(self, of_slice: Tensor) -> Tensor:
        """Include a slice by its own log-sum-exp, and return the factor that rescales sums over the slices before it:
        exp(old total - new total)."""
        before, self.total = self.total, torch.logaddexp(self.total, of_slice)
        return (before - self.total).exp_()


class RunningKL:
    """KL(p || q) of each of R rows in float64 nats: sum p (l_p - l_q) - lse_p + lse_q, with l the logits.

    Attributes:
        p, q: both sides' log-sum-exp [R].
    """

    def __init__(self, num_rows: int, device: torch.device) -> None:
        self._difference = torch.zeros(num_rows, dtype=torch.float64, device=device)
        self.p, self.q = RunningLogSumExp(self._difference), RunningLogSumExp(self._difference)

    def add(self, p_logits: Tensor, q_logits: Tensor) -> None:
        """Include a slice of both sides' logits, [R, slice] float64."""
        rescale = self.p.add(p_logits.logsumexp(1))
        self.q.add(q_logits.logsumexp(1))
        in_slice = ((p_logits - self.p.total[:, None]).exp() * (p_logits - q_logits)).sum(1)
        self._difference = self._difference * rescale + in_slice

    @property
    def nats(self) -> Tensor:
        """[R] the divergence; rounding may leave a value just below 0."""
        return self._difference - self.p.total + self.q.total
