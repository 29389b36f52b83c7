"""Shared by the loss tests: pairs, their inputs, and the arithmetic of their oracles."""

from __future__ import annotations

import functools
import itertools
import math
import random
from collections.abc import Callable, Mapping

import mpmath
import torch

from qpref.records import LossOutput, PairedInputs, PairLogProbs, TokenLogProbs

SIDES = ("policy chosen", "policy rejected", "reference chosen", "reference rejected")


def scores(rows: list[list[float]], dtype: torch.dtype = torch.float64) -> TokenLogProbs:
    values = torch.tensor([value for row in rows for value in row], dtype=dtype)
    return TokenLogProbs(values=values, lengths=tuple(map(len, rows)))


def paired(pairs: list[dict], dtype: torch.dtype = torch.float64) -> PairedInputs:
    """Inputs from one dict a pair: a list of token log-probabilities for each of SIDES, and the margin."""
    chosen, rejected, reference_chosen, reference_rejected = (
        scores([pair[side] for pair in pairs], dtype) for side in SIDES
    )
    chosen.values.requires_grad_()
    rejected.values.requires_grad_()
    return PairedInputs(
        policy=PairLogProbs(chosen=chosen, rejected=rejected),
        reference=PairLogProbs(chosen=reference_chosen, rejected=reference_rejected),
        margin=torch.tensor([pair["margin"] for pair in pairs], dtype=dtype),
    )


def runner(records: Mapping, inputs_of: Callable[..., PairedInputs] = paired) -> Callable[..., LossOutput]:
    """A function that computes the loss of a name on pairs, under options."""

    def run(name: str, pairs: list[dict], dtype: torch.dtype = torch.float64, **options: object) -> LossOutput:
        record = records[name]
        return record.build(record.options(**options))(inputs_of(pairs, dtype))

    return run


def random_tokens(rng: random.Random, length: int) -> list[float]:
    """Log-probabilities from -1e-8 to -20."""
    return [-(10 ** rng.uniform(-8, 1.3)) for _ in range(length)]


def nearby(rng: random.Random, tokens: list[float]) -> list[float]:
    return [min(0.0, token + rng.gauss(0, 0.3)) for token in tokens]


def random_pair(rng: random.Random, longest: int = 40) -> dict:
    """Random tokens, a reference near the policy, a margin in half of the pairs."""
    lengths = {"chosen": rng.randint(1, longest), "rejected": rng.randint(1, longest)}
    pair: dict = {"margin": rng.choice([0.0, rng.uniform(-3, 3)])}
    for side, length in lengths.items():
        pair[f"policy {side}"] = random_tokens(rng, length)
        pair[f"reference {side}"] = nearby(rng, pair[f"policy {side}"])
    return pair


def flat_pair(chosen: float, rejected: float, reference: float = -1.0, tokens: int = 1, margin: float = 0.0) -> dict:
    """A pair whose tokens have one log-probability on each side."""
    values = (chosen, rejected, reference, reference)
    return {side: [value] * tokens for side, value in zip(SIDES, values, strict=True)} | {"margin": margin}


def untrained(pair: dict) -> dict:
    """The pair with the policy's log-probabilities as the reference's, and no margin."""
    return pair | {f"reference {side}": pair[f"policy {side}"] for side in ("chosen", "rejected")} | {"margin": 0.0}


def extreme_pairs(flat: Callable[..., dict] = flat_pair) -> list[dict]:
    levels = (0.0, -1e-8, -1e-3, -1.0, -1e4)
    return [flat(*values, tokens) for values in itertools.product(levels, repeat=3) for tokens in (1, 4096)]


def extreme_margins(flat: Callable[..., dict] = flat_pair) -> list[dict]:
    return [flat(chosen, -1.0, margin=margin) for chosen in (0.0, -1.0, -1e4) for margin in (-1e4, 1e4)]


@functools.cache
def extremes(dtype: torch.dtype) -> PairedInputs:
    return paired(extreme_pairs() + [flat_pair(-1.0, -2.0, margin=margin) for margin in (-1e4, 1e4)], dtype)


def all_finite(losses: torch.Tensor, inputs: PairedInputs) -> bool:
    """Check that the losses and their gradients in both responses are finite."""
    gradients = torch.autograd.grad(losses.sum(), (inputs.policy.chosen.values, inputs.policy.rejected.values))
    return all(bool(value.isfinite().all()) for value in (losses, *gradients))


def losses_at(
    function: Callable[[PairedInputs], LossOutput], inputs: PairedInputs, chosen: torch.Tensor, rejected: torch.Tensor
) -> torch.Tensor:
    """The losses with these values for the policy's tokens."""
    policy = PairLogProbs(
        chosen=TokenLogProbs(values=chosen, lengths=inputs.policy.chosen.lengths),
        rejected=TokenLogProbs(values=rejected, lengths=inputs.policy.rejected.lengths),
    )
    return function(PairedInputs(policy=policy, reference=inputs.reference, margin=inputs.margin)).losses


def directional_derivatives(
    function: Callable[[PairedInputs], LossOutput], inputs: PairedInputs, step: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each pair's derivative in a random direction: from the gradient in `inputs`, and by central differences."""
    torch.manual_seed(0)
    sides = (inputs.policy.chosen, inputs.policy.rejected)
    directions = [torch.randn_like(side.values) for side in sides]
    derivatives = sum(
        TokenLogProbs(values=side.values.grad * direction, lengths=side.lengths).total
        for side, direction in zip(sides, directions, strict=True)
    )
    up, down = (
        losses_at(
            function,
            inputs,
            *(side.values.detach() + move * direction for side, direction in zip(sides, directions, strict=True)),
        )
        for move in (step, -step)
    )
    return derivatives, (up - down) / (2 * step)


def finite_difference(function: Callable[[dict], float], pair: dict, side: str, token: int, step: float) -> float:
    """The central difference of a function of a pair in one of its tokens."""
    up, down = (pair | {side: [*pair[side]]} for _ in range(2))
    up[side][token] += step
    down[side][token] -= step
    return (function(up) - function(down)) / (2 * step)


def nudged(tokens: list[float], place: int, step: float) -> list[float]:
    return [token + step * (number == place) for number, token in enumerate(tokens)]


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


def smoothed(x: float, label_smoothing: float) -> float:
    """DPO's loss at x, with a share of the labels taken as swapped."""
    return -(1 - label_smoothing) * log_sigmoid(x) - label_smoothing * log_sigmoid(-x)


def exact_total(tokens: list[float]) -> mpmath.mpf:
    return mpmath.fsum(map(mpmath.mpf, tokens))
