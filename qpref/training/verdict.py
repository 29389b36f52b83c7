"""The verdict on a run in one sentence, from the held-out pairs before training and after it.

Each pair is compared with itself, so that its difficulty cancels; the intervals are those of `intervals`. A change
counts where its interval is on one side of 0; one of the log-probabilities also has to be large enough to matter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from qpref.records import TokenizedExample
from qpref.training.heldout_scores import HeldoutScores, pairs_of
from qpref.training.intervals import (
    LEVEL,
    Interval,
    difference_interval,
    mean_interval,
    share_change_interval,
)

Outcome = Literal["better", "worse", "mixed", "unchanged", "unknown"]
LEAST_PROMPTS = 20
"""Held-out prompts below which a verdict makes no claim."""
LEAST_NATS = 0.1
"""Change of a log-probability that counts: with less, the odds of chosen against rejected change by less than 10 %."""
LARGE_NATS = 1.0
"""Mean size of the margins' changes, whatever their direction, of a model that has changed for certain."""


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Share of the pairs whose chosen response has the higher log-probability, before training and after it."""

    before: float
    after: float
    change: Interval


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """A run's verdict.

    Attributes:
        outcome: of the preference for chosen over rejected responses. "mixed": accuracy and margin moved in opposite
            directions; "unchanged": by no measurable amount; "unknown": there is too little to compare.
        sentence: for people.
        steps: optimizer steps before the two evaluations; None where there are none to compare.
        pairs, prompts: number of held-out pairs, or of completions where they make no pairs, and of their prompts.
        accuracy: by log-probability; None without pairs.
        margin: change of log p(chosen) - log p(rejected), nats; of completions, of the difference of the two means.
        margin_grew: share of the pairs whose margin grew; None without pairs.
        chosen: change of the chosen responses' log-probability, nats.
    """

    outcome: Outcome
    sentence: str
    steps: tuple[int, int] | None = None
    pairs: int = 0
    prompts: int = 0
    accuracy: Accuracy | None = None
    margin: Interval | None = None
    margin_grew: float | None = None
    chosen: Interval | None = None

    def as_json(self) -> dict[str, Any]:
        """Convert to JSON values, for result.json; a bound that is undefined is null."""
        return {name: _json(value) for name, value in asdict(self).items()} | {"level": LEVEL}


def _json(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _json(each) for name, each in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def judge(
    examples: Sequence[TokenizedExample],
    before: HeldoutScores | None,
    after: HeldoutScores | None,
    step: int,
    advice: str,
) -> Verdict:
    """Judge a run.

    Args:
        examples: the held-out ones.
        before, after: their scores before the first step, and with the adapter that is the result.
        step: the result's.
        advice: for a run that has changed nothing.
    """
    if not examples:
        return Verdict(outcome="unknown", sentence=NO_HELDOUT)
    if before is None or after is None or before.step != 0 or after.step != step or step == 0:
        return Verdict(outcome="unknown", sentence=f"no held-out scores from before training and of step {step}")
    better, worse = pairs_of(examples)
    changes = _of_pairs(examples, better, worse, before, after) if better else _of_singles(examples, before, after)
    if changes is None:
        return Verdict(outcome="unknown", sentence=NOT_COMPARABLE)
    return _verdict(changes, (before.step, after.step), advice)


NO_HELDOUT = "no held-out data, so nothing says what was learned: set [data] heldout or heldout_share"
NOT_COMPARABLE = "the held-out examples can't be compared: all of one class, or without finite log-probabilities"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Changes:
    """Numbers of a verdict; the attributes are the verdict's.

    Attributes:
        size: mean size of the margins' changes, whatever their direction.
        unit: noun of `pairs`.
    """

    pairs: int
    prompts: int
    accuracy: Accuracy | None
    margin: Interval
    margin_grew: float | None
    chosen: Interval
    size: float
    unit: str


def _of_pairs(
    examples: Sequence[TokenizedExample], better: list[int], worse: list[int], before: HeldoutScores,
    after: HeldoutScores,
) -> _Changes | None:  # fmt: skip
    """Compare the pairs whose log-probabilities are finite; None without any."""
    finite = (before.margin_of(better, worse) + after.margin_of(better, worse)).isfinite().tolist()
    better, worse = ([index for index, good in zip(side, finite, strict=True) if good] for side in (better, worse))
    if not better:
        return None
    prompts = [examples[index].prompt.tobytes() for index in better]
    margins = [scores.margin_of(better, worse) for scores in (before, after)]
    margin = margins[1] - margins[0]
    right = [margins[0] > 0, margins[1] > 0]
    flips = (right[1].int() - right[0].int()).tolist()
    return _Changes(
        pairs=len(better),
        prompts=len(set(prompts)),
        accuracy=Accuracy(_mean(right[0]), _mean(right[1]), share_change_interval(flips, prompts)),
        margin=mean_interval(margin.tolist(), prompts),
        margin_grew=_mean(margin > 0),
        chosen=mean_interval((after.chosen[better] - before.chosen[better]).tolist(), prompts),
        size=_mean(margin.abs()),
        unit="lists" if examples[0].ranks else "pairs",
    )


def _of_singles(examples: Sequence[TokenizedExample], before: HeldoutScores, after: HeldoutScores) -> _Changes | None:
    """Compare desirable completions with undesirable ones of other prompts; None where a class has no finite one."""
    prompts = [example.prompt.tobytes() for example in examples]
    sides = []
    for label, change in ((True, after.chosen - before.chosen), (False, after.rejected - before.rejected)):
        finite = change.isfinite().tolist()
        members = [index for index, example in enumerate(examples) if example.label == label and finite[index]]
        if not members:
            return None
        sides.append(mean_interval(change[members].tolist(), [prompts[index] for index in members]))
    desirable, undesirable = sides
    both = torch.cat([after.chosen - before.chosen, after.rejected - before.rejected])
    return _Changes(
        pairs=len(examples),
        prompts=len(set(prompts)),
        accuracy=None,
        margin=difference_interval(desirable, undesirable),
        margin_grew=None,
        chosen=desirable,
        size=_mean(both[both.isfinite()].abs()),
        unit="completions",
    )


def _mean(values: Tensor) -> float:
    return float(values.double().mean())


def _verdict(changes: _Changes, steps: tuple[int, int], advice: str) -> Verdict:
    outcome = _outcome(changes)
    return Verdict(
        outcome=outcome,
        sentence=_sentence(changes, outcome, advice),
        steps=steps,
        pairs=changes.pairs,
        prompts=changes.prompts,
        accuracy=changes.accuracy,
        margin=changes.margin,
        margin_grew=changes.margin_grew,
        chosen=changes.chosen,
    )


def _outcome(changes: _Changes) -> Outcome:
    if changes.prompts < LEAST_PROMPTS:
        return "unknown"
    signs = {_sign(changes.margin)} | ({changes.accuracy.change.sign} if changes.accuracy else set())
    if {1, -1} <= signs:
        return "mixed"
    return "better" if 1 in signs else "worse" if -1 in signs else "unchanged"


def _sign(change: Interval) -> int:
    """Return the direction of a change of log-probabilities that counts; 0 for none."""
    return change.sign if abs(change.value) >= LEAST_NATS else 0


def _sentence(changes: _Changes, outcome: Outcome, advice: str) -> str:
    facts = ", ".join([*_facts(changes), _chosen(changes)])
    if outcome == "unknown":
        measured = facts if changes.accuracy is None else _accuracy(changes.accuracy, changes)
        return f"{measured}: too few prompts to say more ({changes.prompts}, of {LEAST_PROMPTS} at least)"
    if outcome == "unchanged":
        moved = (
            f"margins moved by {changes.size:.1f} nats, up as often as down: more or cleaner {changes.unit} are needed"
            if changes.size >= LARGE_NATS
            else advice
        )
        return f"no measurable change: {', '.join(_facts(changes))}; {moved}"
    if outcome == "worse":
        return f"worse than before training: {facts}; lower learning_rate, take fewer steps, or check the labels"
    return f"accuracy and margin disagree: {facts}" if outcome == "mixed" else facts


def _facts(changes: _Changes) -> list[str]:
    nats, range_of_nats = f"{changes.margin.value:+z.1f} nats", _range(changes.margin, "+z.1f")
    if changes.accuracy is None:
        both = "desirable against undesirable completions"
        return [f"{both} {nats} on {changes.pairs} held-out ones (95 % interval {range_of_nats})"]
    range_of_change = _range(changes.accuracy.change, "+z.2f")
    # Within the noise about half of the margins are up, which would read as growth.
    up = f" and up in {changes.margin_grew:.0%} of them" if _sign(changes.margin) else ""
    return [
        f"{_accuracy(changes.accuracy, changes)} (95 % interval {range_of_change})",
        f"margin {nats} ({range_of_nats}){up}",
    ]


def _accuracy(accuracy: Accuracy, changes: _Changes) -> str:
    shares = f"{accuracy.before:.2f} → {accuracy.after:.2f}"
    return f"held-out accuracy {shares} of {changes.pairs} {changes.unit} by log-probability"


def _chosen(changes: _Changes) -> str:
    """Describe the change of the chosen responses' likelihood."""
    name = "chosen answers" if changes.accuracy else "desirable answers"
    sign = _sign(changes.chosen)
    if sign == 0:
        return f"{name} kept their likelihood"
    return f"{name} became {'likelier' if sign > 0 else 'less likely'} ({changes.chosen.value:+z.1f} nats)"


def _range(interval: Interval, form: str) -> str:
    return f"{interval.low:{form}} to {interval.high:{form}}"
