"""Log-probabilities of the held-out responses at the steps that a run's verdict compares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qpref.records import Source, TokenizedExample


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldoutScores:
    """Scores of N held-out examples after `step` optimizer steps.

    Attributes:
        chosen, rejected: [N] float32 nats, on the CPU, in the order of the examples. Of a single completion one of
            them is NaN: a desirable one is chosen, an undesirable one rejected. Of a list, the best response is chosen,
            and the mean of the others rejected.
    """

    step: int
    chosen: Tensor
    rejected: Tensor

    def margin_of(self, chosen: Sequence[int], rejected: Sequence[int]) -> Tensor:
        """Compute [pairs] log p(chosen) - log p(rejected), float64, of the pairs whose responses stand there."""
        return self.chosen[list(chosen)].double() - self.rejected[list(rejected)].double()

    def to_tensors(self, name: str) -> dict[str, Tensor]:
        """Copy to tensors for a checkpoint, named after `name`; no two share memory, which safetensors refuses."""
        return {
            f"{name}.step": torch.tensor([self.step]),
            f"{name}.chosen": self.chosen.clone(),
            f"{name}.rejected": self.rejected.clone(),
        }

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor], name: str) -> HeldoutScores | None:
        """Read a checkpoint's scores; None where it has none of that name."""
        if f"{name}.step" not in tensors:
            return None
        return cls(
            step=int(tensors[f"{name}.step"]), chosen=tensors[f"{name}.chosen"], rejected=tensors[f"{name}.rejected"]
        )


def pairs_of(examples: Sequence[TokenizedExample]) -> tuple[list[int], list[int]]:
    """Find the positions of each pair's chosen and rejected response; of single completions, those of one pair."""
    if examples[0].label is not None:
        return pairs_among(examples)
    everywhere = list(range(len(examples)))
    return everywhere, everywhere


def pairs_among(examples: Sequence[TokenizedExample]) -> tuple[list[int], list[int]]:
    """Find the positions of desirable and undesirable completions that came from the same pairs."""
    positions: dict[tuple[Source, int, bool | None], int] = {
        (example.source, example.number, example.label): position for position, example in enumerate(examples)
    }
    pairs = [
        (position, positions[source, number, False])
        for (source, number, label), position in positions.items()
        if label and (source, number, False) in positions
    ]
    return [good for good, _ in pairs], [bad for _, bad in pairs]
