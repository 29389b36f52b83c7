"""The experiment's table, in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from benchmarks.frontier.measures import estimate
from benchmarks.frontier.points import Point, by_setting
from benchmarks.frontier.runs import Sampled
from benchmarks.frontier.task import SCALE
from qpref.evaluation.statistics import Estimate

HEAD = (
    "| method | dial | reward | KL (nats) | chosen | rejected | tokens | ended | CPU s per step | peak memory |",
    "|---|---|---|---|---|---|---|---|---|---|",
)


def table(results: Mapping[Point, dict[str, Any]]) -> list[str]:
    """Tabulate the settings, in the order of their points; seeds are pooled."""
    return [*HEAD, *(_row(*setting, runs) for setting, runs in by_setting(results).items())]


def _row(method: str, dial: str, value: float, runs: Sequence[dict[str, Any]]) -> str:
    cells = [
        method,
        f"{dial} {value:g}",
        interval(pooled(runs, "rewards")),
        interval(pooled(runs, "log_ratios"), 2),
        f"{fmean(run['chosen'] for run in runs):+.1f}",
        f"{fmean(run['rejected'] for run in runs):+.1f}",
        f"{pooled(runs, 'lengths').value:.1f}",
        f"{pooled(runs, 'ended').value:.2f}",
        f"{fmean(run['cpu_seconds'] for run in runs):.2f}",
        f"{max(run['peak_bytes'] for run in runs) / 2**20:,.0f} MiB",
    ]
    return f"| {' | '.join(cells)} |"


def pooled(runs: Sequence[dict[str, Any]], name: str) -> Estimate:
    """Estimate a measure's mean over the runs of all seeds, each opening with its responses under all of them."""
    by_opening = zip(*(run[name] for run in runs), strict=True)
    return estimate([[value for row in rows for value in row] for rows in by_opening])


def spread(results: Mapping[Point, dict[str, Any]]) -> list[str]:
    """List each setting's mean reward and KL by seed; nothing where there is one seed."""
    groups = {setting: runs for setting, runs in by_setting(results).items() if len(runs) > 1}
    if not groups:
        return []
    rows = [
        f"| {method} | {dial} {value:g} | {_each(runs, 'rewards')} | {_each(runs, 'log_ratios')} |"
        for (method, dial, value), runs in groups.items()
    ]
    return ["| method | dial | reward by seed | KL by seed (nats) |", "|---|---|---|---|", *rows]


def _each(runs: Sequence[dict[str, Any]], name: str) -> str:
    return ", ".join(f"{pooled([run], name).value:.2f}" for run in runs)


def interval(found: Estimate, digits: int = 3) -> str:
    """Write a value with its 95 % interval."""
    return f"{found.value:.{digits}f} ({found.low:.{digits}f} to {found.high:.{digits}f})"


def base_reward(sampled: Sampled) -> Estimate:
    """Estimate the base's mean reward on the held-out openings."""
    return estimate([one.rewards for one in sampled.heldout])


def task_in_words(sampled: Sampled, seeds: Sequence[int]) -> list[str]:
    """Describe the data: numbers of openings and pairs, the noise of the labels, the base's reward."""
    lines = []
    for seed in seeds:
        pairs = sampled.pairs(seed)
        gap = fmean(abs(pair.score_chosen - pair.score_rejected) for pair in pairs)
        flipped = fmean(pair.is_flipped for pair in pairs)
        lines.append(
            f"Seed {seed}: {len(pairs)} pairs from {len(sampled.train)} openings, {flipped:.1%} of them flipped by "
            f"Bradley-Terry at scale {SCALE:g}; the two rewards of a pair differ by {gap:.2f} on average."
        )
    rewards = [reward for one in sampled.train for reward in one.rewards]
    lines.append(
        f"Base: reward {interval(base_reward(sampled))} on {len(sampled.heldout)} held-out openings; "
        f"{fmean(reward == 0 for reward in rewards):.0%} of its responses have reward 0."
    )
    return lines
