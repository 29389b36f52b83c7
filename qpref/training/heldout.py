"""What is told of held-out examples beside the loss's own metrics: accuracies, and a margin where the loss has none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from qpref.records import Source, TokenizedExample

WINDOW = 256
"""Held-out examples that are packed together; bounds the packing's quadratic search."""


def windows(examples: Sequence[TokenizedExample]) -> Iterator[Sequence[TokenizedExample]]:
    """Held-out examples that are packed together; completions of one row stay in one window."""
    start = 0
    while start < len(examples):
        stop = min(start + WINDOW, len(examples))
        while stop < len(examples) and examples[stop].source == examples[stop - 1].source:
            stop += 1
        yield examples[start:stop]
        start = stop


def with_accuracies(metrics: Mapping[str, Tensor], singles: Sequence[TokenizedExample] | None) -> dict[str, Tensor]:
    """[N] metrics with `logps/accuracies`; for single completions, those that were one row's pair are compared.

    Args:
        metrics: of N pairs, or of N single completions.
        singles: the completions; None for pairs.
    """
    everywhere = list(range(len(metrics["loss"])))
    better, worse = (everywhere, everywhere) if singles is None else _pairs_among(singles)
    return dict(metrics) | (_accuracies(metrics, better, worse, singles is None) if better else {})


def _pairs_among(examples: Sequence[TokenizedExample]) -> tuple[list[int], list[int]]:
    """Places of the desirable and of the undesirable completions that came from the same pairs."""
    places: dict[tuple[Source, int, bool | None], int] = {
        (example.source, example.number, example.label): place for place, example in enumerate(examples)
    }
    pairs = [
        (place, places[source, number, False])
        for (source, number, label), place in places.items()
        if label and (source, number, False) in places
    ]
    return [good for good, _ in pairs], [bad for _, bad in pairs]


def _accuracies(
    metrics: Mapping[str, Tensor], better: list[int], worse: list[int], is_paired: bool
) -> dict[str, Tensor]:
    """[N] whether the better response scores higher, NaN beyond the pairs; a tie between rewards is half right."""

    def higher(name: str) -> Tensor:
        good, bad = metrics[f"{name}/chosen"][better], metrics[f"{name}/rejected"][worse]
        values = torch.full_like(metrics["loss"], torch.nan)
        half = 0.5 if name == "rewards" else 0.0
        values[: len(better)] = ((good > bad) + half * (good == bad)).to(values.dtype)
        return values

    found = {"logps/accuracies": higher("logps")}
    if not is_paired and "rewards/chosen" in metrics and "rewards/rejected" in metrics:
        found["rewards/accuracies"] = higher("rewards")
    return found


def with_margin(means: dict[str, float]) -> dict[str, float]:
    """With the difference of the mean rewards as the margin, where a loss of single completions has none of its own."""
    if "rewards/margins" in means or not {"rewards/chosen", "rewards/rejected"} <= means.keys():
        return means
    return means | {"rewards/margins": means["rewards/chosen"] - means["rewards/rejected"]}
