"""Measure of forgetting: how well a model tells right from wrong answers beside its base, and a test of the loss.

Items are made in couples: two prompts and two answers, each answer right for one prompt and wrong for the other. An
item's log-odds are log p(right answer) - log p(wrong answer). A model's liking for an answer whatever the prompt (its
length, its words) is half the difference of a couple's log-odds; the base's is subtracted from both models, as in the
calibration of Zhao et al. 2021 ("Calibrate Before Use"). Then sigmoid(log-odds) is 1/2 for a base that doesn't tell the
two prompts apart. A trained model that refuses everything, or that answers everything in one format, loses one item of
a couple and can't gain as much at the other.

The test flips signs: without a loss, a couple's change is as likely up as down (Fisher's randomization test). Holm's
procedure keeps false alarms over the whole and all categories to 5 % in total.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qpref.evaluation.statistics import Bootstrap, Estimate, Floats

FALSE_ALARMS = 0.05
LEAST_LOSS = 0.01
"""Mean change of the score that is no loss yet: training moves every score a little."""
FLIPS = 5_000
"""Drawn sign vectors; the smallest p-value is 1 / (FLIPS + 1)."""
CHANCE = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Items:
    """The items of a regression set, by what the statistics need.

    Attributes:
        partner: [N] index of each item's counterpart, with the same two answers swapped; its own index without one.
        categories: [N] names.
    """

    partner: NDArray[np.int64]
    categories: Sequence[str]

    @classmethod
    def of(cls, answers: Sequence[tuple[str, str]], categories: Sequence[str]) -> Items:
        """Find the couples.

        Args:
            answers: [N] right and wrong answer of each item.
        """
        partner = np.arange(len(answers))
        waiting: dict[tuple[str, str, str], list[int]] = {}
        for index, ((right, wrong), category) in enumerate(zip(answers, categories, strict=True)):
            others = waiting.get((category, wrong, right))
            if others:
                other = others.pop(0)
                partner[index], partner[other] = other, index
            else:
                waiting.setdefault((category, right, wrong), []).append(index)
        return cls(partner=partner, categories=list(categories))

    @property
    def couples(self) -> NDArray[np.int64]:
        """[N] index of each item's couple, or of the item itself: the first item of it."""
        return np.minimum(np.arange(len(self.partner)), self.partner)


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """The change of a model beside its base, over all items or those of a category.

    Attributes:
        base: mean score of the base, from 0 to 1; chance is 1/2.
        trained: mean score of the trained model.
        difference: trained minus base, pair by pair.
        lost: number of items that the base gets right and the trained model wrong.
        gained: the other way round.
        p_value: probability of such a loss or a larger one without any, not corrected for the number of categories.
        is_loss: whether the loss is significant after that correction.
    """

    items: int
    base: Estimate
    trained: Estimate
    difference: Estimate
    lost: int
    gained: int
    p_value: float
    is_loss: bool

    @property
    def at_chance(self) -> bool:
        """True where the base isn't significantly better than chance, so that a loss could hardly be seen."""
        return not self.base.low > CHANCE


@dataclass(frozen=True, slots=True, kw_only=True)
class Forgetting:
    """The changes of one model.

    Attributes:
        overall: over all items.
        categories: by name, in the order of the items; empty where there is one category.
        log_odds: [N, 2] of the base and of the trained model, nats, without the base's liking for either answer.
    """

    overall: Change
    categories: Mapping[str, Change]
    log_odds: Floats

    def changes(self) -> dict[str, Change]:
        """List all changes by name, the whole first."""
        return {"overall": self.overall, **self.categories}

    def lost_items(self) -> list[int]:
        """Return the indices of the lost items, the largest change of log-odds first."""
        base, trained = self.log_odds.T
        lost = np.flatnonzero((base > 0) & (trained <= 0))
        return [int(index) for index in lost[np.argsort((trained - base)[lost], kind="stable")]]


def measure(items: Items, base: Floats, trained: Floats, *, samples: int = 2000, seed: int = 0) -> Forgetting:
    """Compare a trained model with its base.

    Args:
        base, trained: [N, 2] log-probabilities of the right and the wrong answer, nats.
        samples: bootstrap resamples, of couples.
        seed: of bootstrap and test.
    """
    raw = np.stack([base[:, 0] - base[:, 1], trained[:, 0] - trained[:, 1]], 1)
    liking = (raw[:, 0] - raw[items.partner, 0]) / 2
    log_odds = raw - liking[:, None]
    scores = 1 / (1 + np.exp(-np.clip(log_odds, -500, 500)))
    bootstrap = Bootstrap.of([str(couple) for couple in items.couples], samples, seed)
    names = list(dict.fromkeys(items.categories))
    members = {"overall": np.full(len(scores), True)}
    if len(names) > 1:
        categories = np.array(items.categories)
        members |= {name: categories == name for name in names}
    sums = _sums_of_couples(items.couples, scores[:, 1] - scores[:, 0] + LEAST_LOSS)
    p_values = {name: _p_of_loss(sums[np.unique(items.couples[chosen])], seed) for name, chosen in members.items()}
    losses = holm(p_values)
    found = {
        name: _change(log_odds, scores, chosen, bootstrap, p_values[name], name in losses)
        for name, chosen in members.items()
    }
    return Forgetting(overall=found.pop("overall"), categories=found, log_odds=log_odds)


def holm(p_values: Mapping[str, float]) -> set[str]:
    """Return the hypotheses that are rejected at FALSE_ALARMS in total (Holm 1979, the step-down procedure)."""
    rejected: set[str] = set()
    for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        if p_values[name] > FALSE_ALARMS / (len(p_values) - rank):
            break
        rejected.add(name)
    return rejected


def _change(
    log_odds: Floats, scores: Floats, chosen: NDArray[np.bool_], bootstrap: Bootstrap, p_value: float, is_loss: bool
) -> Change:
    base, trained = np.where(chosen[:, None], scores, np.nan).T
    was_right, is_right = (log_odds[chosen] > 0).T
    return Change(
        items=int(chosen.sum()),
        base=bootstrap.mean(base),
        trained=bootstrap.mean(trained),
        difference=bootstrap.mean(trained - base),
        lost=int((was_right & ~is_right).sum()),
        gained=int((is_right & ~was_right).sum()),
        p_value=p_value,
        is_loss=is_loss,
    )


def _sums_of_couples(couples: NDArray[np.int64], values: Floats) -> Floats:
    """Sum the values of each couple, at the index of its first item."""
    return np.bincount(couples, values, minlength=len(couples)).astype(np.float64)


def _p_of_loss(sums: Floats, seed: int) -> float:
    """Test by random signs that [couples] values have a mean below 0; one-sided."""
    signs = np.random.default_rng(seed).integers(0, 2, (FLIPS, len(sums)), dtype=np.int8) * np.int8(2) - np.int8(1)
    drawn = signs @ sums
    as_low = drawn <= sums.sum() + 1e-9 * np.abs(sums).sum()
    return float((1 + as_low.sum()) / (FLIPS + 1))
