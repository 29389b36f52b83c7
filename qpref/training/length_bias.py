"""A policy's new preference for long answers, from the signs of its held-out margins' changes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

from qpref.records import TokenizedExample
from qpref.training.heldout_scores import HeldoutScores, pairs_of


@dataclass(frozen=True, slots=True)
class LengthGroups:
    """Held-out pairs by the longer of their two responses; those of equal length are in neither group.

    Attributes:
        longer, shorter: positions of chosen and rejected response of each pair whose chosen one is longer, or shorter.
    """

    longer: Sequence[tuple[int, int]]
    shorter: Sequence[tuple[int, int]]

    @classmethod
    def of(cls, examples: Sequence[TokenizedExample]) -> LengthGroups:
        better, worse = pairs_of(examples) if examples else ([], [])
        groups: dict[bool, list[tuple[int, int]]] = {True: [], False: []}
        for chosen, rejected in zip(better, worse, strict=True):
            lengths = _mean_length(examples[chosen], best=True), _mean_length(examples[rejected], best=False)
            if lengths[0] != lengths[1]:
                groups[lengths[0] > lengths[1]].append((chosen, rejected))
        return cls(groups[True], groups[False])

    def bias(self, before: HeldoutScores, after: HeldoutScores) -> float:
        """Compute the share of growing margins where the chosen response is longer, less that where it is shorter.

        Training that looks at what the answers say makes both shares grow alike; one that learns length makes the
        margins of the first pairs grow and those of the others shrink. Sizes of margins grow with length in any case,
        so only their signs count. From -1 to 1; NaN where a group is empty.
        """
        shares = []
        for group in (self.longer, self.shorter):
            if not group:
                return math.nan
            sides = [chosen for chosen, _ in group], [rejected for _, rejected in group]
            growth = after.margin_of(*sides) - before.margin_of(*sides)
            shares.append(float((growth > 0).double().mean()))
        return shares[0] - shares[1]

    @property
    def error(self) -> float:
        """Standard error of the bias, at most; infinite where a group is empty."""
        if not self.longer or not self.shorter:
            return math.inf
        return math.sqrt((1 / len(self.longer) + 1 / len(self.shorter)) / 4)


def _mean_length(example: TokenizedExample, best: bool) -> float:
    """Tokens of a pair's chosen or rejected response; of a list, the means of the best ones and of the others; of a
    single completion, its own."""
    if example.label is not None:
        return len(example.branches[0])
    ranked = zip(example.ranks or (1, 2), example.branches, strict=True)
    return mean(len(branch) for rank, branch in ranked if (rank == 1) == best)
