"""Compare a merged model with the trained policy, by margins, log-probabilities and KL in float32."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qpref.merge.replay import Hidden
from qpref.merge.replayed_pairs import Replayed
from qpref.merge.request import Flip, Tolerance, Verdict

TILE_POSITIONS = 1024
"""Response tokens whose logits are in memory at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judge:
    """Compares merged models with the trained policy, on the same pairs.

    Attributes:
        trained: the trained policy's hidden states and head.
        before, after: [contrasts] margins under the policy before and after training, nats.
        logprobs: [rows] log-probability of each response under the trained policy, nats.
    """

    replayed: Replayed
    trained: Hidden
    before: Tensor
    after: Tensor
    logprobs: Tensor
    tolerance: Tolerance
    device: torch.device

    @classmethod
    def of(
        cls, replayed: Replayed, reference: Hidden, trained: Hidden, tolerance: Tolerance, device: torch.device
    ) -> Judge:
        logprobs = response_logprobs(replayed, trained, device)
        return cls(
            replayed=replayed,
            trained=trained,
            before=margins(replayed, response_logprobs(replayed, reference, device)),
            after=margins(replayed, logprobs),
            logprobs=logprobs,
            tolerance=tolerance,
            device=device,
        )

    @property
    def learned(self) -> float:
        """Mean absolute change of the margins in training, nats."""
        return float((self.after - self.before).abs().mean())

    @property
    def allowed(self) -> float:
        """The largest mean margin error that passes, nats."""
        return self.tolerance.in_nats(self.learned)

    def judge(self, merged: Hidden) -> Verdict:
        """Judge a merged model by its hidden states for the same rows."""
        logprobs, kl = self._compare(merged)
        merged_margins = margins(self.replayed, logprobs)
        errors = (merged_margins - self.after).abs()
        return Verdict(
            pairs=len(self.replayed.contrasts),
            origin=self.replayed.origin,
            data_changed=self.replayed.data_changed,
            tokens=len(kl),
            learned=self.learned,
            margin_error=float(errors.mean()),
            largest_margin_error=float(errors.max()),
            worst=self.replayed.contrasts[int(errors.argmax())].location,
            logprob_error=float((logprobs - self.logprobs).abs().mean()),
            kl=float(kl.mean()),
            largest_kl=float(kl.max()),
            flips=self._flips(merged_margins),
            allowed=self.allowed,
        )

    def _compare(self, merged: Hidden) -> tuple[Tensor, Tensor]:
        """Compute [rows] log-probability of each response, and [S] KL(trained || merged) at each response token."""
        values, divergences = [], []
        for positions, tokens in _tiles(self.replayed, self.device):
            merged_sum, trained_sum = _LogSumExp(tokens), _LogSumExp(tokens)
            # Of the logit difference trained - merged, under the trained policy's distribution so far.
            expectation = torch.zeros_like(merged_sum.total)
            for columns in merged.columns():
                merged_logits = merged.logits(positions, columns, self.device)
                trained_logits = self.trained.logits(positions, columns, self.device)
                previous = trained_sum.total
                merged_sum.add(merged_logits, columns)
                trained_sum.add(trained_logits, columns)
                probabilities = (trained_logits - trained_sum.total[:, None]).exp()
                in_slice = (probabilities * (trained_logits - merged_logits)).sum(1)
                expectation = expectation * (previous - trained_sum.total).exp() + in_slice
            values.append(merged_sum.logprobs.cpu())
            divergences.append((expectation - trained_sum.total + merged_sum.total).cpu())
        return _per_row_sums(self.replayed, values), torch.cat(divergences)

    def _flips(self, merged_margins: Tensor) -> tuple[Flip, ...]:
        """List the flipped preferences, the largest margins first.

        A pair's preference is the sign of its margin; a completion's, the sign of its margin's change in training.
        """
        flips = []
        rows = zip(
            self.replayed.contrasts,
            self.before.tolist(),
            self.after.tolist(),
            merged_margins.tolist(),
            strict=True,
        )
        for contrast, before, trained, merged in rows:
            threshold = 0.0 if len(contrast.rows) > 1 else before
            if (trained > threshold) != (merged > threshold):
                flips.append(Flip(location=contrast.location, trained=trained, merged=merged))
        return tuple(sorted(flips, key=lambda flip: -abs(flip.trained)))


class _LogSumExp:
    """Running log-sum-exp of the logits at some positions, slice by slice, and the logits of their target tokens.

    In float64: the differences of interest are far below float32's resolution of the sum.
    """

    def __init__(self, tokens: Tensor) -> None:
        self._tokens = tokens
        self._target = torch.zeros(len(tokens), dtype=torch.float64, device=tokens.device)
        self.total = torch.full_like(self._target, -torch.inf)

    def add(self, logits: Tensor, columns: slice) -> None:
        offsets = self._tokens - columns.start
        inside = (offsets >= 0) & (offsets < logits.shape[1])
        self._target[inside] = logits[inside].gather(1, offsets[inside, None])[:, 0]
        self.total = torch.logaddexp(self.total, logits.logsumexp(1))

    @property
    def logprobs(self) -> Tensor:
        return self._target - self.total


def response_logprobs(replayed: Replayed, hidden: Hidden, device: torch.device) -> Tensor:
    """Compute [rows] log-probability of each response, nats."""
    values = []
    for positions, tokens in _tiles(replayed, device):
        log_sum = _LogSumExp(tokens)
        for columns in hidden.columns():
            log_sum.add(hidden.logits(positions, columns, device), columns)
        values.append(log_sum.logprobs.cpu())
    return _per_row_sums(replayed, values)


def _tiles(replayed: Replayed, device: torch.device) -> Iterator[tuple[slice, Tensor]]:
    """Yield slices of `TILE_POSITIONS` response positions, and the [positions] tokens to predict there."""
    tokens = torch.tensor([token for row in replayed.rows for token in row.response])
    for start in range(0, len(tokens), TILE_POSITIONS):
        positions = slice(start, start + TILE_POSITIONS)
        yield positions, tokens[positions].to(device)


def _per_row_sums(replayed: Replayed, values: Sequence[Tensor]) -> Tensor:
    lengths = [len(row.response) for row in replayed.rows]
    return torch.stack([piece.sum() for piece in torch.cat(list(values)).split(lengths)])


def margins(replayed: Replayed, logprobs: Tensor) -> Tensor:
    """Compute [contrasts] margins from [rows] log-probabilities."""
    pieces = logprobs.split([len(contrast.rows) for contrast in replayed.contrasts])
    signs = [torch.tensor(contrast.sign, dtype=logprobs.dtype) for contrast in replayed.contrasts]
    return torch.stack([(piece * sign).sum() for piece, sign in zip(pieces, signs, strict=True)])
