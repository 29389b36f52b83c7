"""Score held-out examples: the losses' own metrics, accuracies, and a margin for losses that have none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from qpref.data.deal import deal
from qpref.distributed.world import ALONE, World
from qpref.hooks.lists import ordered_share
from qpref.memory.tune import Parts, in_microbatches, shrink_microbatch
from qpref.policy.out_of_memory import attempt
from qpref.policy.reference import frozen
from qpref.records import ListInputs, TokenizedExample
from qpref.training.heldout_scores import pairs_among
from qpref.training.inputs import example_metrics
from qpref.training.metrics import Averages
from qpref.training.scoring import Scorer, Scores
from qpref.training.whole_batch import Rows, Values, WholeBatch, values_of

WINDOW = 256
"""Held-out examples that are packed together; bounds the packing's quadratic search."""
Pairs = Tensor
"""[2, N] float32 log-probabilities of chosen and rejected responses, on the CPU, in the examples' order; NaN where an
example has no such response. Of a list, the best response is chosen, and the mean of the others rejected."""


def heldout_means(
    scorer: Scorer, examples: Sequence[TokenizedExample], budget: int, world: World = ALONE
) -> tuple[dict[str, float], Pairs, int]:
    """Score held-out examples without dropout and gradient, each window as one batch of the losses.

    Args:
        budget: tokens per micro-batch to begin with.
        world: the run's processes, which score as many windows at once as there are processes; each of them computes
            the metrics of all.

    Returns:
        Means by metric; log-probabilities of each example's responses; and the tokens per micro-batch that the memory
        sufficed for.

    Raises:
        DeviceMemoryError: one example is too large for the memory.
    """
    averages, cuts, pairs = Averages(), windows(examples), []
    positions: list[int] = []
    with frozen(scorer.policy):
        for first in range(0, len(cuts), world.size):
            chosen = cuts[first : first + world.size]
            rows, scored, budget = _add_windows(averages, scorer, world, examples, chosen, budget)
            positions += [len(positions) + position for position in rows]
            pairs.append(scored)
    on_host = torch.cat(pairs, dim=1).float().cpu()  # one copy
    return with_margin(averages.means()), on_host[:, positions], budget


def _add_windows(
    averages: Averages, scorer: Scorer, world: World, examples: Sequence[TokenizedExample], cuts: Sequence[range],
    budget: int,
) -> tuple[Sequence[int], Tensor, int]:  # fmt: skip
    """Score adjacent windows and add their metrics.

    Returns:
        Columns of the windows' examples; [2, N] log-probabilities, in those columns and on the device; and the tokens
        per micro-batch that the memory sufficed for.
    """
    start, policy = cuts[0].start, scorer.policy
    members = examples[start : cuts[-1].stop]
    inside = [range(cut.start - start, cut.stop - start) for cut in cuts]
    whole = WholeBatch.of(scorer, members, inside)

    def score(parts: Parts) -> tuple[Parts, list[Values]]:
        noted = world.noted(parts, "held-out micro-batch")
        return parts, [_values(scorer, [members[index] for index in part]) for part in noted]

    with scorer.sharing_references(world, members):
        share = deal(members, world.size, policy.shares_prompts)[world.rank]
        (parts, values), budget = in_microbatches(policy, members, share, budget, score)
        collected = whole.collect(world, policy, parts, values)
    pairs = []
    for window in inside:
        rows, scores = whole.window(collected, window)
        while (metrics := attempt(partial(_metrics, scorer, rows, scores))) is None:
            budget = shrink_microbatch(policy, members, budget)
        averages.add(metrics)
        pairs.append(torch.stack([metrics["logps/chosen"], metrics["logps/rejected"]]))
    return whole.positions, torch.cat(pairs, dim=1), budget


def _values(scorer: Scorer, examples: Sequence[TokenizedExample]) -> Values:
    return values_of(scorer.scores(examples, scorer.pack(examples)))


def _metrics(scorer: Scorer, rows: Rows, scores: Scores) -> dict[str, Tensor]:
    """Compute [N] metrics of a window."""
    objective, inputs = scorer.objective, scorer.lay_out(rows, scores)
    metrics = example_metrics(inputs, objective(inputs))
    if isinstance(inputs, ListInputs):
        return dict(metrics) | {"logps/accuracies": ordered_share(inputs.policy.total.detach(), inputs)}
    return with_accuracies(metrics, None if objective.is_paired else rows.examples)


def windows(examples: Sequence[TokenizedExample]) -> list[range]:
    """Cut held-out examples into windows that are packed together; completions of one row stay in one window."""
    cuts, start = [], 0
    while start < len(examples):
        stop = min(start + WINDOW, len(examples))
        while stop < len(examples) and examples[stop].source == examples[stop - 1].source:
            stop += 1
        cuts.append(range(start, stop))
        start = stop
    return cuts


def with_accuracies(metrics: Mapping[str, Tensor], singles: Sequence[TokenizedExample] | None) -> dict[str, Tensor]:
    """Add `logps/accuracies` to [N] metrics; of single completions, those that came from one pair are compared.

    Args:
        metrics: of N pairs, or of N single completions.
        singles: the completions; None for pairs.
    """
    everywhere = list(range(len(metrics["loss"])))
    better, worse = (everywhere, everywhere) if singles is None else pairs_among(singles)
    return dict(metrics) | (_accuracies(metrics, better, worse, singles is None) if better else {})


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
