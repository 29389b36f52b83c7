"""Random and extreme examples: log-probabilities to call a loss with."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

LEVELS = (0.0, -1e-8, -1.0, -1e4)
"""Log-probabilities of a token at which value and gradient have to be finite."""

NUMBERS = (0.0, 1.0, -1.0, 1e4, -1e4, 1e-8)
"""Numbers of a column at which value and gradient have to be finite."""

LONGEST = 4096
"""Tokens of the longest response."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """Log-probabilities of one sequence's tokens, and what else a loss may need of each."""

    policy: Tensor
    reference: Tensor
    log_sum_squares: Tensor
    entropy: Tensor
    tokens: Tensor
    mask: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A pair: first is chosen, second rejected. A single completion: first is its own, second the mismatched one.

    Attributes:
        numbers: of the columns that a loss reads, from the first one on again where it reads more.
    """

    first: Scores
    second: Scores
    prompt: Tensor
    margin: float = 0.0
    desirable: bool = True
    numbers: tuple[float, ...] = (0.0,)

    def __str__(self) -> str:
        sides = [
            f"{side.policy[0]:g} (reference {side.reference[0]:g}, {len(side.policy)} tokens)"
            for side in (self.first, self.second)
        ]
        label = "desirable" if self.desirable else "undesirable"
        return f"log-probabilities {sides[0]} and {sides[1]}, margin {self.margin:g}, {label}"


@dataclass(frozen=True, slots=True)
class Ranked:
    """A list of responses, the best first, with their ranks.

    Attributes:
        numbers: as in `Example`.
    """

    ranks: tuple[int, ...]
    responses: tuple[Scores, ...]
    margin: float = 0.0
    numbers: tuple[float, ...] = (0.0,)


def untrained(scores: Scores) -> Scores:
    """Return the scores of a policy that is its reference."""
    same: Scores = replace(scores, reference=scores.policy)
    return same


NEAR_LENGTHS = ((5, 8), (8, 5), (4, 9), (9, 4), (6, 7), (7, 6))
"""Tokens of first and second response in `near_reference`."""


class Draws:
    """Seeded random examples: a reference near the policy, responses of 1 to 4 tokens of which some are masked."""

    def __init__(self, seed: int = 0) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def scores(self, num_tokens: int) -> Scores:
        uniform = torch.rand(num_tokens, dtype=torch.float64, generator=self._generator)
        normal = torch.randn(num_tokens, dtype=torch.float64, generator=self._generator)
        policy = -0.05 - 3 * uniform
        return Scores(
            policy=policy,
            reference=(policy + 0.5 * normal).clamp(max=-0.01),
            log_sum_squares=policy * uniform.flip(0),
            entropy=-policy * (1 + uniform.flip(0)),
            tokens=(1000 * uniform).long(),
            mask=(normal < 0.5) | (normal == normal.min()),
        )

    def examples(self, count: int) -> list[Example]:
        return [
            Example(
                first=self.scores(1 + number % 3),
                second=self.scores(4 - number % 4),
                prompt=self.scores(1 + number % 2).policy,
                margin=(0.0, 0.7, -0.4)[number % 3],
                desirable=number % 2 == 0,
                numbers=tuple(torch.randn(5, dtype=torch.float64, generator=self._generator).tolist()),
            )
            for number in range(count)
        ]


def near_reference() -> list[Example]:
    """Make examples as after a few steps: the policy within some 0.02 nats a token of its reference, no margins.

    All responses have more than three tokens, none masked, and each pair of lengths is there in both orders, so that a
    difference between the sides is none of their lengths.
    """
    draws = Draws(3)

    def scores(num_tokens: int) -> Scores:
        drawn = draws.scores(num_tokens)
        policy = 0.5 * drawn.policy - 0.4
        reference = policy + 0.04 * (drawn.reference - drawn.policy)
        return replace(drawn, policy=policy, reference=reference, mask=torch.ones_like(drawn.mask))

    return [
        Example(first=scores(chosen), second=scores(rejected), prompt=draws.scores(2).policy, desirable=index % 2 == 0)
        for index, (chosen, rejected) in enumerate(NEAR_LENGTHS)
    ]


def alike() -> list[Example]:
    """Make a step of six equal examples, each with equal responses and the policy at its reference."""
    drawn = Draws(5).scores(4)
    side = replace(drawn, reference=drawn.policy)
    return [Example(first=side, second=side, prompt=side.policy[:2], desirable=index % 2 == 0) for index in range(6)]


def level(policy: float, reference: float, num_tokens: int = 1) -> Scores:
    # Probability 1 leaves nothing to other tokens; probability 0 leaves everything to a single other token.
    sums, entropy = (-1.5, 1.2) if policy == -1.0 else (0.0, 0.0)
    values = torch.tensor([policy, reference, sums, entropy], dtype=torch.float64)
    return Scores(
        policy=values[0].repeat(num_tokens),
        reference=values[1].repeat(num_tokens),
        log_sum_squares=values[2].repeat(num_tokens),
        entropy=values[3].repeat(num_tokens),
        tokens=torch.arange(num_tokens),
        mask=torch.arange(num_tokens) >= num_tokens // 2,
    )


def extreme_pairs() -> list[list[Example]]:
    """Make two batches of pairs at the extremes: one-token responses, and one with 4,096-token ones."""
    margins, numbers = itertools.cycle((0.0, 1e4, -1e4)), itertools.cycle(itertools.permutations(NUMBERS))
    lengths = itertools.cycle(((LONGEST, 1), (1, LONGEST), (LONGEST, LONGEST), (LONGEST, 1), (1, LONGEST)))
    short: list[Example] = []
    long: list[Example] = []
    for chosen, chosen_reference, rejected, rejected_reference in itertools.product(LEVELS, repeat=4):
        first, second = level(chosen, chosen_reference), level(rejected, rejected_reference)
        short.append(
            Example(first=first, second=second, prompt=first.policy, margin=next(margins), numbers=next(numbers))
        )
    for (chosen, rejected), reference in itertools.product(itertools.product(LEVELS, repeat=2), (None, -1.0)):
        num_chosen, num_rejected = next(lengths)
        first = level(chosen, chosen if reference is None else reference, num_chosen)
        second = level(rejected, rejected if reference is None else reference, num_rejected)
        long.append(
            Example(first=first, second=second, prompt=second.policy, margin=next(margins), numbers=next(numbers))
        )
    return [short, long]


def extreme_completions(mismatched: bool) -> list[list[Example]]:
    """Make batches of both classes and of one class, each with one extreme of the mismatched completions."""
    batches: list[list[Example]] = []
    numbers = itertools.cycle(itertools.permutations(NUMBERS))
    partners = list(itertools.product(LEVELS, repeat=2)) if mismatched else [(-1.0, -1.0)]
    for levels, classes in itertools.product(partners, ((True, False), (True,), (False,))):
        length = LONGEST if len(batches) % 8 == 0 else 1
        partner = level(levels[0], levels[1], length)
        batches.append(
            [
                Example(
                    first=level(policy, reference, length),
                    second=partner,
                    prompt=partner.policy[:1],
                    desirable=desirable,
                    numbers=next(numbers),
                )
                for policy, reference, desirable in itertools.product(LEVELS, LEVELS, classes)
            ]
        )
    return batches
