"""How far a merged model is from the policy that was trained, by log-probabilities in float32."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qpref.merge.replay import Hidden
from qpref.merge.request import Flip, Tolerance, Verdict
from qpref.merge.rows import Replayed


@dataclass(frozen=True, slots=True, kw_only=True)
class Judge:
    """Holds merged models to the policy that was trained.

    Attributes:
        trained: what the policy makes of the rows after training.
        before, after: [contrasts] margins under the policy before and after training.
        logprobs: [rows] of each response under the trained policy.
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
        """The verdict on what a merged model makes of the same rows."""
        logprobs, kl = self._compare(merged)
        found = margins(self.replayed, logprobs)
        errors = (found - self.after).abs()
        return Verdict(
            pairs=len(self.replayed.contrasts),
            origin=self.replayed.origin,
            tokens=len(kl),
            learned=self.learned,
            margin_error=float(errors.mean()),
            largest_margin_error=float(errors.max()),
            worst=self.replayed.contrasts[int(errors.argmax())].place,
            logprob_error=float((logprobs - self.logprobs).abs().mean()),
            kl=float(kl.mean()),
            largest_kl=float(kl.max()),
            flips=self._flips(found),
            allowed=self.allowed,
        )

    def _compare(self, merged: Hidden) -> tuple[Tensor, Tensor]:
        """[rows] log-probability of each response; [S] KL(trained || merged) at each of their tokens."""
        values, divergences = [], []
        for tile, target in _tiles(self.replayed, merged, self.device):
            trained, mine = self.trained.logprobs(tile, self.device), merged.logprobs(tile, self.device)
            values.append(mine.gather(1, target)[:, 0].double().cpu())
            divergences.append((trained.exp() * (trained - mine)).sum(1).double().cpu())
        return _sums(self.replayed, values), torch.cat(divergences)

    def _flips(self, found: Tensor) -> tuple[Flip, ...]:
        """A pair's preference is its margin's sign; a single completion's is whether training has raised it."""
        flips = []
        rows = zip(self.replayed.contrasts, self.before.tolist(), self.after.tolist(), found.tolist(), strict=True)
        for contrast, before, trained, merged in rows:
            zero = 0.0 if len(contrast.rows) > 1 else before
            if (trained > zero) != (merged > zero):
                flips.append(Flip(place=contrast.place, trained=trained, merged=merged))
        return tuple(sorted(flips, key=lambda flip: -abs(flip.trained)))


def response_logprobs(replayed: Replayed, hidden: Hidden, device: torch.device) -> Tensor:
    """[rows] log-probability of each response, float64 sums of float32 values."""
    tiles = _tiles(replayed, hidden, device)
    values = [hidden.logprobs(tile, device).gather(1, target)[:, 0].double().cpu() for tile, target in tiles]
    return _sums(replayed, values)


def _tiles(replayed: Replayed, hidden: Hidden, device: torch.device) -> Iterator[tuple[slice, Tensor]]:
    """Some positions at a time, and [positions, 1] the tokens that are predicted there."""
    tokens = torch.tensor([token for row in replayed.rows for token in row.response])
    return ((tile, tokens[tile, None].to(device)) for tile in hidden.tiles())


def _sums(replayed: Replayed, values: Sequence[Tensor]) -> Tensor:
    lengths = [len(row.response) for row in replayed.rows]
    return torch.stack([piece.sum() for piece in torch.cat(list(values)).split(lengths)])


def margins(replayed: Replayed, logprobs: Tensor) -> Tensor:
    """[contrasts] of the rows' log-probabilities."""
    pieces = logprobs.split([len(contrast.rows) for contrast in replayed.contrasts])
    signs = [torch.tensor(contrast.sign, dtype=logprobs.dtype) for contrast in replayed.contrasts]
    return torch.stack([(piece * sign).sum() for piece, sign in zip(pieces, signs, strict=True)])
