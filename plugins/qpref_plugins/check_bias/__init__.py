"""Validator `bias`: length bias and class imbalance, which a model can learn instead of the preference.

Lengths are in characters. Pairs: share of pairs whose chosen response is longer, with Wilson's interval (Wilson 1927),
and Cohen's d_z, the mean of the paired differences over their standard deviation (Cohen 1988, section 2.3.5; Lakens
2013, eq. 6). Single completions: Cohen's d of the two classes, over their pooled standard deviation.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from qpref.hooks import Field, Options, SourceSeverity, Split, Validator, hookimpl, report, text_of
from qpref.records import Finding, PreferencePair, Source, UnpairedExample

FEWEST_EXAMPLES = 20
_Z95 = 1.959964


class BiasChecks(Options):
    """Options of the validator `bias`: severities and thresholds.

    Applied to each source of 20 examples or more.
    """

    length_bias: SourceSeverity = Field(
        default="warn", description="length bias: the length of a response predicts whether it is preferred"
    )
    max_longer_share: float = Field(
        default=0.6,
        ge=0.5,
        le=1,
        description="maximum share of pairs, without ties, whose chosen response is the longer (or the shorter) one",
    )
    max_effect_size: float = Field(
        default=0.5,
        ge=0,
        description="maximum effect size (Cohen's d) of the lengths; 0.2 is small, 0.5 medium, 0.8 large",
    )
    one_class: SourceSeverity = Field(default="warn", description="all single completions have the same label")
    class_balance: SourceSeverity = Field(default="warn", description="one label is rarer than `min_class_share`")
    min_class_share: float = Field(default=0.2, ge=0, le=0.5, description="minimum share of the rarer label")


@dataclass(slots=True)
class Lengths:
    """Count, sum and sum of squares of integers, all exact."""

    count: int = 0
    total: int = 0
    squares: int = 0

    def add(self, value: int) -> None:
        self.count += 1
        self.total += value
        self.squares += value * value

    @property
    def mean(self) -> float:
        return self.total / self.count

    @property
    def deviations(self) -> float:
        """Sum of squared deviations from the mean."""
        return (self.count * self.squares - self.total * self.total) / self.count


@dataclass(slots=True)
class PairLengths:
    """Length statistics of the pairs of one source: chosen minus rejected."""

    difference: Lengths
    rejected_characters: int = 0
    num_longer: int = 0
    num_shorter: int = 0

    def add(self, chosen: int, rejected: int) -> None:
        self.difference.add(chosen - rejected)
        self.rejected_characters += rejected
        self.num_longer += chosen > rejected
        self.num_shorter += chosen < rejected


class CheckBias:
    """Length and label statistics of each source of a split."""

    def __init__(self, options: BiasChecks) -> None:
        self.options = options
        self.pairs: dict[tuple[str, Split], PairLengths] = {}
        self.classes: dict[tuple[str, Split], tuple[Lengths, Lengths]] = {}

    def look(self, example: PreferencePair | UnpairedExample, split: Split) -> Iterable[Finding]:
        key = example.source.path, split
        if isinstance(example, PreferencePair):
            lengths = self.pairs.get(key)
            if lengths is None:
                lengths = self.pairs[key] = PairLengths(Lengths())
            lengths.add(len(text_of(example.chosen)), len(text_of(example.rejected)))
        else:
            classes = self.classes.setdefault(key, (Lengths(), Lengths()))
            classes[example.label].add(len(text_of(example.completion)))
        return ()

    def finish(self) -> Iterator[Finding]:
        for (path, split), lengths in self.pairs.items():
            if lengths.difference.count >= FEWEST_EXAMPLES and (message := _bias_of_pairs(self.options, lengths)):
                yield from self._found("length_bias", f"{message}, {_where(split)}. {ADVICE}", path)
        for (path, split), (bad, good) in self.classes.items():
            if bad.count + good.count >= FEWEST_EXAMPLES:
                yield from self._of_classes(path, split, bad, good)

    def _of_classes(self, path: str, split: Split, bad: Lengths, good: Lengths) -> Iterator[Finding]:
        counts = f"{good.count} desirable and {bad.count} undesirable completions"
        if not (bad.count and good.count):
            missing = "desirable" if bad.count else "undesirable"
            message = (
                f"all {bad.count + good.count} completions are {'un' if bad.count else ''}desirable, {_where(split)}: "
                f"without the other class, no preference can be learned. Add {missing} ones"
            )
            yield from self._found("one_class", message, path)
            return
        if min(bad.count, good.count) < self.options.min_class_share * (bad.count + good.count):
            message = (
                f"{counts}, {_where(split)}. The larger class dominates unless the loss weights the rarer one more: "
                "see desirable_weight and undesirable_weight of kto, which compensate by default"
            )
            yield from self._found("class_balance", message, path)
        pooled = math.sqrt((bad.deviations + good.deviations) / (bad.count + good.count - 2))
        effect = _over(good.mean - bad.mean, pooled)
        if abs(effect) > self.options.max_effect_size:
            message = (
                f"desirable completions are {_by(good.mean - bad.mean, bad.mean)} on average (Cohen's d {effect:+.2f})"
            )
            yield from self._found("length_bias", f"{message}, {_where(split)}. {ADVICE}", path)

    def _found(self, code: str, message: str, path: str) -> tuple[Finding, ...]:
        severity: SourceSeverity = getattr(self.options, code)
        return report(severity, code, message, Source(path=path, line=0))


ADVICE = (
    "The model may learn only the length: balance the lengths, or use a length-normalized loss (simpo, sigmoid_norm, "
    "dpo with ld_alpha), and monitor the length of its responses"
)


def _bias_of_pairs(options: BiasChecks, lengths: PairLengths) -> str:
    """Describe the length bias of a source; empty where it is within the thresholds."""
    longer, shorter = lengths.num_longer, lengths.num_shorter
    difference = lengths.difference
    if not longer + shorter:
        return ""
    low, high = wilson_interval(longer, longer + shorter)
    share = longer / (longer + shorter)
    effect = _over(difference.mean, math.sqrt(difference.deviations / (difference.count - 1)))
    uneven = max(share, 1 - share) > options.max_longer_share and not low <= 0.5 <= high
    if not uneven and abs(effect) <= options.max_effect_size:
        return ""
    side, count = ("longer", longer) if longer >= shorter else ("shorter", shorter)
    if side == "shorter":
        share, low, high = 1 - share, 1 - high, 1 - low
    ties = f", without {difference.count - longer - shorter} ties" if difference.count > longer + shorter else ""
    return (
        f"chosen is the {side} one in {count} of {longer + shorter} pairs{ties} ({share:.1%}, 95 % interval {low:.1%} "
        f"to {high:.1%}), and {_by(difference.mean, lengths.rejected_characters / difference.count)} on average "
        f"(Cohen's d_z {effect:+.2f})"
    )


def wilson_interval(num_hits: int, num_all: int) -> tuple[float, float]:
    """Return the 95 % interval of a share (Wilson 1927)."""
    share, square = num_hits / num_all, _Z95 * _Z95
    middle = share + square / (2 * num_all)
    half = _Z95 * math.sqrt(share * (1 - share) / num_all + square / (4 * num_all * num_all))
    return (middle - half) / (1 + square / num_all), (middle + half) / (1 + square / num_all)


def _over(difference: float, deviation: float) -> float:
    """Divide a difference by its standard deviation; infinite for a constant non-zero difference."""
    return difference / deviation if deviation else math.copysign(math.inf, difference) if difference else 0.0


def _by(difference: float, of: float) -> str:
    share = f" ({abs(difference) / of:.0%})" if of else ""
    return f"{abs(difference):.0f} characters{share} {'longer' if difference >= 0 else 'shorter'}"


def _where(split: Split) -> str:
    return "held-out" if split == "heldout" else "for training"


@hookimpl
def qpref_validators() -> Iterator[Validator]:
    yield Validator(
        name="bias",
        summary="lengths or labels that give the preference away",
        options=BiasChecks,
        start=CheckBias,
        skips_refused=True,
    )
