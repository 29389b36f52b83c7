"""Compare a merged model with the trained policy, by margins, log-probabilities and KL in float32."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qpref.merging.replay import Hidden
from qpref.merging.replayed_pairs import Replayed
from qpref.merging.request import Flip, Tolerance, Verdict
from qpref.policy.vocabulary import RunningKL, RunningLogSumExp

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
            divergence, token_logits = RunningKL(len(tokens), self.device), _TokenLogits(tokens)
            for columns in merged.columns():
                ours = merged.logits(positions, columns, self.device)
                divergence.add(self.trained.logits(positions, columns, self.device), ours)
                token_logits.add(ours, columns)
            values.append((token_logits.values - divergence.q.total).cpu())
            divergences.append(divergence.nats.cpu())
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


class _TokenLogits:
    """[positions] float64 logits of the tokens that are predicted there, gathered slice by slice.

    Float64, since the differences of interest are far smaller than a float32 step of the logits' sum.
    """

    def __init__(self, tokens: Tensor) -> None:
        self._tokens = tokens
        self.values = torch.zeros(len(tokens), dtype=torch.float64, device=tokens.device)

    def add(self, logits: Tensor, columns: slice) -> None:
        indices = self._tokens - columns.start
        inside = (indices >= 0) & (indices < logits.shape[1])
        self.values[inside] = logits[inside].gather(1, indices[inside, None])[:, 0]


def response_logprobs(replayed: Replayed, hidden: Hidden, device: torch.device) -> Tensor:
    """Compute [rows] log-probability of each response, nats."""
    values = []
    for positions, tokens in _tiles(replayed, device):
        token_logits = _TokenLogits(tokens)
        normalizer = RunningLogSumExp(token_logits.values)
        for columns in hidden.columns():
            logits = hidden.logits(positions, columns, device)
            token_logits.add(logits, columns)
            normalizer.add(logits.logsumexp(1))
        values.append((token_logits.values - normalizer.total).cpu())
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
