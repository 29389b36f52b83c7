"""The results as a page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.rlhf import curves
from benchmarks.rlhf.curves import Curve, Estimate
from benchmarks.rlhf.results import Arm
from benchmarks.rlhf.settings import NEEDS_PAIRS, TITLES

Groups = Mapping[str, Sequence[Arm]]
"""An arm's results, one for each seed."""


def page(head: Sequence[str], groups: Groups, drawn: Mapping[str, Sequence[Curve]], pairs_seconds: float) -> str:
    """Write the page.

    Args:
        head: lines above the tables.
        drawn: the curves of each arm's seeds.
        pairs_seconds: mean CPU seconds of sampling the shared pairs.
    """
    return "\n".join([*head, "", *cost(groups, pairs_seconds), "", *effect(drawn), "", *points(drawn)]) + "\n"


def cost(groups: Groups, pairs_seconds: float) -> list[str]:
    """Tabulate models, memory, CPU seconds, labels and settings; means over the seeds."""
    rows = [
        "| | models in memory | peak memory, MiB | of it libraries | CPU s | of it sampling the pairs | labels "
        "| settings |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, arms in groups.items():
        shared = pairs_seconds if name in NEEDS_PAIRS else 0.0
        rows.append(
            f"| {TITLES[name]} | {models(arms[0].arm['models'])} | {_mean(arms, 'peak_bytes') / 2**20:,.0f} "
            f"| {_mean(arms, 'library_bytes') / 2**20:,.0f} | {shared + _mean(arms, 'cpu_seconds'):,.0f} "
            f"| {f'{shared:,.0f}' if shared else '-'} | {_mean(arms, 'labels'):,.0f} | {arms[0].arm['settings']} |"
        )
    return rows


def models(counted: Mapping[str, int]) -> str:
    """Name the models of a process by what they are for."""
    roles = {"CausalLM": "policy", "SequenceClassification": "reward"}
    named = []
    for kind, count in sorted(counted.items()):
        role = next((role for end, role in roles.items() if kind.endswith(end)), kind)
        named.append(role if count == 1 else f"{count} {role}")
    return f"{sum(counted.values())}: {' + '.join(named)}"


def effect(drawn: Mapping[str, Sequence[Curve]]) -> list[str]:
    """Tabulate reward at equal KL, reward at equal CPU seconds, and CPU seconds to a given reward."""
    every = [curve for seeds in drawn.values() for curve in seeds]
    kl, seconds, reward = curves.common_kl(every), curves.common_seconds(every), curves.half_of_the_gain(every)
    rows = [
        f"| | seeds | reward at a KL of {kl:.1f} nats | reward after {seconds:,.0f} CPU s "
        f"| CPU s to a reward of {reward:.2f} |",
        "|---|---|---|---|---|",
    ]
    for name, seeds in drawn.items():
        rows.append(
            f"| {TITLES[name]} | {len(seeds)} | {written(curves.estimate(seeds, curves.reward_at_kl, kl), '.2f')} "
            f"| {written(curves.estimate(seeds, curves.reward_at_seconds, seconds), '.2f')} "
            f"| {written(curves.estimate(seeds, curves.seconds_to_reward, reward), '.0f')} |"
        )
    return rows


def written(found: Estimate, form: str) -> str:
    """Write a value with its interval, and the range of the seeds where there are several."""
    if math.isnan(found.value):
        return "not reached"
    text = f"{found.value:{form}}"
    if not math.isnan(found.low):
        text += f" [{found.low:{form}}, {found.high:{form}}]"
    if len(found.seeds) > 1:
        reached = [seed for seed in found.seeds if not math.isnan(seed)]
        text += f"; seeds {min(reached):{form}} to {max(reached):{form}}"
        text += "" if len(reached) == len(found.seeds) else f", {len(found.seeds) - len(reached)} not reached"
    return text


def points(drawn: Mapping[str, Sequence[Curve]]) -> list[str]:
    """List each measured adapter."""
    rows = ["| | seed | CPU s | reward | KL, nats |", "|---|---|---|---|---|"]
    base = next(iter(drawn.values()))[0][0]
    rows.append(f"| base | - | 0 | {_interval(base.rewards, '.2f')} | 0 |")
    for name, seeds in drawn.items():
        for seed, curve in enumerate(seeds):
            rows += [
                f"| {TITLES[name]} | {seed} | {one.cpu_seconds:,.0f} | {_interval(one.rewards, '.2f')} "
                f"| {_interval(one.kls, '.1f')} |"
                for one in curve[1:]
            ]
    return rows


def _interval(values: Any, form: str) -> str:
    low, high = curves.mean_interval(values)
    return f"{values.mean():{form}} [{low:{form}}, {high:{form}}]"


def _mean(arms: Sequence[Arm], key: str) -> float:
    return sum(float(one.arm[key]) for one in arms) / len(arms)
