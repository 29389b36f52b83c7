"""The experiment's table, in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """A method at one value of its dial; its seeds are pooled.

    Attributes:
        reward: mean of VADER's compound score.
        kl: mean log-ratio of a response, nats.
        chosen, rejected: mean change of held-out pairs' log-probability, nats.
        tokens: mean length of a response.
        ended: share of responses that weren't cut off.
        cpu_seconds: of a step.
        peak_bytes: of the process while it trained.
    """

    method: str
    dial: str
    value: float
    seeds: int
    reward: Estimate
    kl: Estimate
    chosen: float
    rejected: float
    tokens: float
    ended: float
    cpu_seconds: float
    peak_bytes: int


def summaries(results: Mapping[Point, dict[str, Any]]) -> list[Summary]:
    """Summarize the settings, in the order of their points."""
    return [
        Summary(
            method=method,
            dial=dial,
            value=value,
            seeds=len(runs),
            reward=pooled(runs, "rewards"),
            kl=pooled(runs, "log_ratios"),
            chosen=fmean(run["chosen"] for run in runs),
            rejected=fmean(run["rejected"] for run in runs),
            tokens=pooled(runs, "lengths").value,
            ended=pooled(runs, "ended").value,
            cpu_seconds=fmean(run["cpu_seconds"] for run in runs),
            peak_bytes=max(run["peak_bytes"] for run in runs),
        )
        for (method, dial, value), runs in by_setting(results).items()
    ]


def from_json(values: Mapping[str, Any]) -> Summary:
    """Read what `dataclasses.asdict` made of a summary."""
    return Summary(**{**values, "reward": Estimate(**values["reward"]), "kl": Estimate(**values["kl"])})


def table(found: Sequence[Summary]) -> list[str]:
    """Tabulate the settings."""
    return [*HEAD, *map(_row, found)]


def _row(one: Summary) -> str:
    cells = [
        one.method,
        f"{one.dial} {one.value:g}",
        interval(one.reward),
        interval(one.kl, 2),
        f"{one.chosen:+.1f}",
        f"{one.rejected:+.1f}",
        f"{one.tokens:.1f}",
        f"{one.ended:.2f}",
        f"{one.cpu_seconds:.2f}",
        f"{one.peak_bytes / 2**20:,.0f} MiB",
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
