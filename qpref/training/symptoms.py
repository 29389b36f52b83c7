"""Symptoms of a run that goes wrong, found in its metrics and warned of once a run, each with what to do.

A rule is a function of the rows so far. So a resumed run, which reads the rows that it has kept, knows what it has
already warned of.
"""

from __future__ import annotations

import json
import logging
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qpref.records import MetricRow

log = logging.getLogger("qpref")

WINDOW = 10
"""Training rows at the start, and up to the newest one, whose means are compared."""
ERRORS = 3.0
"""Standard errors by which two windows have to differ: the newest one is looked at after every row."""
ZERO_GRADIENTS = 3
LEAST_LOSS = 0.002
"""Change of the loss that counts, relative to its value at the start."""
MOST_NOISE = 0.01
"""Noise of the loss that may hide a change, relative to its value at the start."""
STUCK_SHARE = 0.25
"""Share of the run's steps after which a loss should have left its start."""
LEAST_REWARD = 0.1
LEARNED = 0.99
"""Accuracy on training pairs that leaves nothing to learn."""
FADED = 0.05
"""Share of its first gradient norms that a gradient has when little is left of it."""


@dataclass(slots=True)
class History:
    """A bounded record of the rows so far.

    Attributes:
        start: a loss's value while policy and reference agree, by its own record; None where it isn't a constant.
        first, last: the first training rows, and the newest ones, which have none of the first.
        best_heldout, heldout: the held-out row after step 0 with the highest accuracy, and the newest one.
        num_heldout: number of held-out examples.
        length_error: standard error of the held-out rows' length bias.
        step, total_steps: the newest row's step, and the run's last.
    """

    start: float | None = None
    num_heldout: int = 0
    length_error: float = math.inf
    total_steps: int = 0
    step: int = 0
    first: list[Mapping[str, float]] = field(default_factory=list)
    last: deque[Mapping[str, float]] = field(default_factory=lambda: deque(maxlen=WINDOW))
    best_heldout: Mapping[str, float] = field(default_factory=dict)
    heldout: Mapping[str, float] = field(default_factory=dict)

    def add(self, row: MetricRow) -> None:
        self.step = row.step
        if row.split == "train":
            (self.first if len(self.first) < WINDOW else self.last).append(row.values)
        elif row.step:
            accuracy = row.values.get(HELDOUT_ACCURACY, math.nan)
            if not self.best_heldout or accuracy > self.best_heldout.get(HELDOUT_ACCURACY, math.nan):
                self.best_heldout = row.values
            self.heldout = row.values

    def change(self, name: str) -> Change | None:
        """Compare the newest rows with the first ones; None where there are too few with that value."""
        before, after = ([row[name] for row in rows if name in row] for rows in (self.first, self.last))
        values = [*before, *after]
        if len(before) < WINDOW or len(after) < WINDOW or not all(map(math.isfinite, values)):
            return None
        means, errors = zip(*(_mean_and_error(each) for each in (before, after)), strict=True)
        return Change(means[0], means[1], math.hypot(*errors))


HELDOUT_ACCURACY = "eval_rewards/accuracies"


@dataclass(frozen=True, slots=True)
class Change:
    """Means of the first and of the newest rows, and the standard error of their difference."""

    before: float
    after: float
    error: float

    @property
    def fell(self) -> bool:
        return self.before - self.after > ERRORS * self.error

    @property
    def rose(self) -> bool:
        return self.after - self.before > ERRORS * self.error


def _mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    mean = math.fsum(values) / len(values)
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """A symptom and what to do about it.

    Attributes:
        find: history -> what is seen, in words; None where all is well.
        advice: what it means, and what to try.
        page: page and section of the manual.
    """

    name: str
    find: Callable[[History], str | None]
    advice: str
    page: str


def _zero_gradient(history: History) -> str | None:
    norms = [row.get("grad_norm", math.nan) for row in [*history.first, *history.last]][-ZERO_GRADIENTS:]
    if len(norms) < ZERO_GRADIENTS or any(norms):
        return None
    return f"the gradient was 0 in {ZERO_GRADIENTS} rows in a row"


def _stuck_loss(history: History) -> str | None:
    loss = history.change("loss")
    if loss is None or not history.start or history.step < history.total_steps * STUCK_SHARE or _warms_up(history):
        return None
    least = LEAST_LOSS * abs(history.start)
    if abs(history.first[0]["loss"] - history.start) > least:  # rows with margins of their own start elsewhere
        return None
    noise = min(ERRORS * loss.error, MOST_NOISE * abs(history.start))
    if abs(loss.after - history.start) > least + noise:
        return None
    return f"the loss is {loss.after:.4f}, where it started ({history.start:.4f})"


def _warms_up(history: History) -> bool:
    return history.last[-1].get("learning_rate", 0.0) > history.last[0].get("learning_rate", 0.0)


def _chosen_falls(history: History) -> str | None:
    chosen, rejected = history.change("rewards/chosen"), history.change("rewards/rejected")
    if chosen is None or rejected is None or not (chosen.fell and rejected.fell):
        return None
    fall = chosen.before - chosen.after
    if fall < max(LEAST_REWARD, (rejected.before - rejected.after) / 4):
        return None
    return f"rewards/chosen fell from {chosen.before:z.2f} to {chosen.after:z.2f}, along with rewards/rejected"


def _saturated_margins(history: History) -> str | None:
    accuracy, norm = history.change("rewards/accuracies"), history.change("grad_norm")
    if accuracy is None or norm is None or not norm.before:
        return None
    if accuracy.after < LEARNED or norm.after > FADED * norm.before:
        return None
    return (
        f"the margins are saturated: {accuracy.after:.0%} of the training pairs are right, and the gradient has "
        f"{norm.after / norm.before:.1%} of its first size"
    )


def _falling_accuracy(history: History) -> str | None:
    loss, accuracy = history.change("loss"), history.change("rewards/accuracies")
    if loss is not None and accuracy is not None and loss.fell and accuracy.fell:
        return f"the loss falls, and so does the accuracy, from {accuracy.before:.2f} to {accuracy.after:.2f}"
    before, after = (row.get(HELDOUT_ACCURACY, math.nan) for row in (history.best_heldout, history.heldout))
    if not history.num_heldout or math.isnan(before) or math.isnan(after):
        return None
    error = math.sqrt((before * (1 - before) + after * (1 - after)) / history.num_heldout)
    if before - after <= max(ERRORS * error, 1 / history.num_heldout) or loss is None or not loss.fell:
        return None
    return f"the training loss falls, and the held-out accuracy has fallen from {before:.2f} to {after:.2f}"


def _length_grows(history: History) -> str | None:
    bias = history.heldout.get("eval_logps/length_bias", math.nan)
    if not bias > ERRORS * history.length_error:
        return None
    return (
        "the policy has come to prefer longer answers: held-out margins grow where the chosen response is the longer "
        f"one, in a share of the pairs that is higher by {bias:.2f} than where it is the shorter one"
    )


RULES: tuple[Rule, ...] = (
    Rule(
        name="zero_gradient",
        find=_zero_gradient,
        advice="nothing is learned there: all pairs are beyond the loss's margin, or their weights are 0; stop here, "
        "or train on harder pairs",
        page="troubleshooting.md#it-doesnt-learn",
    ),
    Rule(
        name="stuck_loss",
        find=_stuck_loss,
        advice="the learning rate is too low for LoRA; try ten times as much",
        page="troubleshooting.md#it-doesnt-learn",
    ),
    Rule(
        name="chosen_falls",
        find=_chosen_falls,
        advice="the probability goes to answers that are in neither column (likelihood displacement); try a larger "
        "beta, a lower learning_rate, fewer steps, or a loss that also raises the chosen responses' likelihood",
        page="troubleshooting.md#it-learns-the-wrong-thing",
    ),
    Rule(
        name="saturated_margins",
        find=_saturated_margins,
        advice="more steps learn these pairs by heart; stop earlier (best_by with patience), or train on harder pairs",
        page="troubleshooting.md#it-learns-the-wrong-thing",
    ),
    Rule(
        name="falling_accuracy",
        find=_falling_accuracy,
        advice="a few pairs gain much while more of them turn wrong, or pairs are learned by heart; look at the labels "
        "(qpref check), lower learning_rate, take fewer epochs",
        page="metrics.md#labels-are-noise",
    ),
    Rule(
        name="length_grows",
        find=_length_grows,
        advice="compare lengths in the data (qpref check), and answers (qpref generate); a loss that divides by the "
        "length, or balanced data, prevents it",
        page="troubleshooting.md#it-learns-the-wrong-thing",
    ),
)


@dataclass(slots=True)
class Watch:
    """The rules at work on one run's rows.

    Attributes:
        found: warnings so far: rule, step, message.
    """

    history: History
    found: list[dict[str, Any]] = field(default_factory=list)

    def replay(self, lines: bytes) -> None:
        """Read the rows of a resumed run's metrics.jsonl, whose warnings have been given; damaged rows are skipped."""
        for line in lines.splitlines():
            try:
                values = json.loads(line)
                step, split = values.pop("step"), values.pop("split")
                numbers = {name: math.nan if value is None else float(value) for name, value in values.items()}
            except (ValueError, TypeError, KeyError, AttributeError):
                continue
            self._look(MetricRow(step=step, split=split, values=numbers, tokens=0, seconds=0.0))

    def look(self, row: MetricRow) -> None:
        """Add a row, and warn of each symptom that it shows for the first time."""
        for found in self._look(row):
            log.warning("%s", found["message"], extra={"rule": found["rule"]})

    def _look(self, row: MetricRow) -> list[dict[str, Any]]:
        self.history.add(row)
        known = {each["rule"] for each in self.found}
        new = []
        for rule in RULES:
            if rule.name not in known and (seen := rule.find(self.history)):
                message = f"step {row.step}: {seen}: {rule.advice} (docs/{rule.page})"
                new.append({"rule": rule.name, "step": row.step, "message": message})
        self.found += new
        return new
