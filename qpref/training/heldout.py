"""Score held-out examples: the losses' own metrics, accuracies, and a margin for losses that have none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from qpref.data.pack import split_by_tokens
from qpref.memory.tune import shrink_microbatch
from qpref.policy.out_of_memory import attempt
from qpref.policy.reference import frozen
from qpref.records import Source, TokenizedExample
from qpref.training.inputs import example_metrics, joined_inputs
from qpref.training.metrics import Averages
from qpref.training.scoring import Scorer

WINDOW = 256
"""Held-out examples that are packed together; bounds the packing's quadratic search."""


def heldout_means(scorer: Scorer, examples: Sequence[TokenizedExample], budget: int) -> tuple[dict[str, float], int]:
    """Score held-out examples without dropout and gradient, each window as one batch of the losses.

    Args:
        budget: tokens per micro-batch to begin with.

    Returns:
        Means by metric, and the tokens per micro-batch that the memory sufficed for.

    Raises:
        DeviceMemoryError: one example is too large for the memory.
    """
    averages = Averages()
    with frozen(scorer.policy):
        for window in windows(examples):
            while (metrics := _try_metrics(scorer, window, budget)) is None:
                budget = shrink_microbatch(scorer.policy, window, budget)
            averages.add(metrics)
    return with_margin(averages.means()), budget


def _try_metrics(scorer: Scorer, window: Sequence[TokenizedExample], budget: int) -> dict[str, Tensor] | None:
    """Compute [N] metrics of a window; None if memory runs out."""
    parts = split_by_tokens(window, budget, scorer.policy.shares_prompts)
    return attempt(lambda: _metrics(scorer, parts))


def _metrics(scorer: Scorer, parts: Sequence[Sequence[TokenizedExample]]) -> dict[str, Tensor]:
    objective = scorer.objective
    inputs = joined_inputs([scorer.inputs(members)[1] for members in parts])
    metrics = example_metrics(inputs, objective(inputs))
    singles = None if objective.is_paired else [example for members in parts for example in members]
    return with_accuracies(metrics, singles)


def windows(examples: Sequence[TokenizedExample]) -> Iterator[Sequence[TokenizedExample]]:
    """Cut held-out examples into windows that are packed together; completions of one row stay in one window."""
    start = 0
    while start < len(examples):
        stop = min(start + WINDOW, len(examples))
        while stop < len(examples) and examples[stop].source == examples[stop - 1].source:
            stop += 1
        yield examples[start:stop]
        start = stop


def with_accuracies(metrics: Mapping[str, Tensor], singles: Sequence[TokenizedExample] | None) -> dict[str, Tensor]:
    """Add `logps/accuracies` to [N] metrics; of single completions, those that came from one pair are compared.

    Args:
        metrics: of N pairs, or of N single completions.
        singles: the completions; None for pairs.
    """
    everywhere = list(range(len(metrics["loss"])))
    better, worse = (everywhere, everywhere) if singles is None else _pairs_among(singles)
    return dict(metrics) | (_accuracies(metrics, better, worse, singles is None) if better else {})


def _pairs_among(examples: Sequence[TokenizedExample]) -> tuple[list[int], list[int]]:
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


def _accuracies(
    metrics: Mapping[str, Tensor], better: list[int], worse: list[int], is_paired: bool
) -> dict[str, Tensor]:
    """[N] 1 where the better response scores higher, else 0, NaN beyond the pairs; a tie between rewards is 0.5."""

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
    """Add the difference of the mean rewards as the margin, where a loss of single completions has none of its own."""
    if "rewards/margins" in means or not {"rewards/chosen", "rewards/rejected"} <= means.keys():
        return means
    return means | {"rewards/margins": means["rewards/chosen"] - means["rewards/rejected"]}


def untrained(means: dict[str, float]) -> dict[str, float]:
    """Take the accuracy by log-probability for that by reward: before the first step every reward is 0, a tie."""
    if not {"rewards/accuracies", "logps/accuracies"} <= means.keys():
        return means
    return means | {"rewards/accuracies": means["logps/accuracies"]}
