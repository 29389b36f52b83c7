"""The recipe's `[data.contest]` table: the columns of two responses, and how their verdict is read.

Nothing has a default polarity. One dataset counts its responses from 0 and another from 1, and verdicts that are read
with the wrong one invert every label.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, PlainValidator, Tag, WithJsonSchema, model_validator

from qpref.recipe.problems import TABLE_ARM
from qpref.recipe.section import Section

Column = Annotated[str, Field(min_length=1)]
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


class ValueRange(Section):
    """A range of numbers: `{ min = 1, max = 3 }` includes its ends, `{ above = 0, below = 1 }` doesn't."""

    min: float | None = Field(default=None, description="Lowest number.")
    max: float | None = Field(default=None, description="Highest number.")
    above: float | None = Field(default=None, description="Bound that the number exceeds.")
    below: float | None = Field(default=None, description="Bound that the number stays under.")

    @model_validator(mode="after")
    def have_numbers(self) -> ValueRange:
        bounds = self.min, self.max, self.above, self.below
        if all(bound is None for bound in bounds):
            raise ValueError("a range has one of min, max, above, below at least")
        if (self.min is not None and self.above is not None) or (self.max is not None and self.below is not None):
            raise ValueError("a range has min or above, and max or below")
        if self.low > self.high or (self.low == self.high and not self.holds(self.low)):
            raise ValueError("no number is in this range")
        return self

    @property
    def low(self) -> float:
        return next((bound for bound in (self.min, self.above) if bound is not None), -math.inf)

    @property
    def high(self) -> float:
        return next((bound for bound in (self.max, self.below) if bound is not None), math.inf)

    def holds(self, number: float) -> bool:
        """Return whether the number is in the range."""
        is_over = number > self.low if self.above is not None else number >= self.low
        return is_over and (number < self.high if self.below is not None else number <= self.high)

    def meets(self, other: ValueRange) -> bool:
        """Return whether the two ranges share a number."""
        low, high = max(self.low, other.low), min(self.high, other.high)
        return low < high or (low == high and self.holds(low) and other.holds(low))

    def __str__(self) -> str:
        bounds = (("min", self.min), ("max", self.max), ("above", self.above), ("below", self.below))
        return "{ " + ", ".join(f"{name} = {bound:g}" for name, bound in bounds if bound is not None) + " }"


def _scalar(value: Any) -> Any:
    if isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise ValueError(f"expected a text, a number, true, false or a range such as {{ min = 1 }}, got {value!r}")


def _is_table(value: Any) -> str:
    return TABLE_ARM if isinstance(value, Mapping | Section) else "value"


Scalar = Annotated[
    bool | int | float | str,
    PlainValidator(_scalar),
    WithJsonSchema({"type": ["boolean", "number", "string"]}),
]
# Without the discriminator, pydantic reports what each arm of the union expects, bool first.
Verdict = Annotated[Annotated[ValueRange, Tag(TABLE_ARM)] | Annotated[Scalar, Tag("value")], Discriminator(_is_table)]


class WinnerFlags(Section):
    """One column for each outcome, exactly one of them set: 1 or true."""

    first: Column = Field(description="Column that is set where the first response won.")
    second: Column = Field(description="Column that is set where the second response won.")
    tie: Column | None = Field(default=None, description="Column that is set where neither won.")


Winner = Annotated[Annotated[WinnerFlags, Tag(TABLE_ARM)] | Annotated[Column, Tag("value")], Discriminator(_is_table)]


class ScoreColumns(Section):
    """One score for each response; equal scores are a tie."""

    first: Column = Field(description="Column with the score of the first response.")
    second: Column = Field(description="Column with the score of the second response.")
    better: Literal["higher", "lower"] = Field(description="The score that wins. lower: ranks, for example.")


class ContestSection(Section):
    """Two responses and who won: for rows without `chosen` and `rejected`.

    Names are the file's own columns; `summaries.0.text` reaches into objects and lists. One of three: `winner` with
    lists of its values, `winner` as a table of flags, or `scores`. A verdict in no list refuses the whole source.
    """

    first: Column = Field(description="Column of the first response.")
    second: Column = Field(description="Column of the second response.")
    winner: Winner | None = Field(
        default=None,
        description="Column of the verdict, or one column for each outcome, one of them set: "
        '`{ first = "winner_a", second = "winner_b", tie = "winner_tie" }`.',
    )
    first_wins: list[Verdict] = Field(
        default_factory=list,
        description="Verdicts for the first response: texts (in any case), numbers (`1` is also the text `1`), true or "
        "false, or ranges such as `{ min = -3, max = -1 }` and `{ above = 0 }`.",
    )
    second_wins: list[Verdict] = Field(default_factory=list, description="Verdicts for the second response.")
    tie: list[Verdict] = Field(
        default_factory=list, description="Verdicts for neither; such rows are refused (`tied`)."
    )
    scores: ScoreColumns | None = Field(
        default=None,
        description="Score of each response, in place of a verdict: "
        '`{ first = "score_a", second = "score_b", better = "higher" }`.',
    )

    @property
    def lists(self) -> Mapping[str, Sequence[Verdict]]:
        """The verdicts of each outcome."""
        return {"first_wins": self.first_wins, "second_wins": self.second_wins, "tie": self.tie}

    @property
    def verdict_columns(self) -> tuple[str, ...]:
        """Columns that tell the winner, the first response's first."""
        if isinstance(self.winner, str):
            return (self.winner,)
        pair = self.winner or self.scores
        assert pair is not None  # the validator requires one
        return (pair.first, pair.second, *((pair.tie,) if isinstance(pair, WinnerFlags) and pair.tie else ()))

    @model_validator(mode="after")
    def tell_one_winner(self) -> ContestSection:
        if (self.winner is None) == (self.scores is None):
            raise ValueError("name the column of the verdict in winner, or the columns of scores: one of the two")
        names = [self.first, self.second, *self.verdict_columns]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"{twice[0]} is named twice; the responses and their verdict are different columns")
        if not isinstance(self.winner, str):
            if any(self.lists.values()):
                raise ValueError("first_wins, second_wins and tie list values of one column, winner")
            return self
        if missing := [name for name in ("first_wins", "second_wins") if not self.lists[name]]:
            raise ValueError(f"{' and '.join(missing)}: list the values of {self.winner} for this outcome")
        if clashes := list(_clashes(self.lists)):
            raise ValueError("; ".join(clashes))
        return self


def _clashes(lists: Mapping[str, Sequence[Verdict]]) -> list[str]:
    """Name each value that two outcomes claim, such as 1 and "1", or true and "True"."""
    return [
        f"{_shown(one)} in {name} and {_shown(other)} in {another} are the same verdict"
        for (name, values), (another, others) in itertools.combinations(lists.items(), 2)
        for one in values
        for other in others
        if _meet(one, other)
    ]


def _meet(one: Verdict, other: Verdict) -> bool:
    if isinstance(one, ValueRange) and isinstance(other, ValueRange):
        return one.meets(other)
    if isinstance(one, ValueRange) or isinstance(other, ValueRange):
        value, values = (other, one) if isinstance(one, ValueRange) else (one, other)
        assert isinstance(values, ValueRange)
        number = number_of(value)
        return number is not None and values.holds(number)
    return verdict_key(one) == verdict_key(other)


def _shown(value: Verdict) -> str:
    return (
        str(value).lower() if isinstance(value, bool) else str(value) if isinstance(value, ValueRange) else repr(value)
    )


def verdict_key(value: object) -> str | None:
    """Return a text that is equal for equal verdicts in any file format; None for what is no verdict.

    CSV has texts alone, and pandas writes an integer column with a gap as 1.0. So 1, 1.0, "1" and "1.0" are the same
    verdict, and so are true and "True". 1 and true differ: nothing says that a file of bools counts from 0 or from 1.
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float | str):
        number = number_of(value)
        if number is not None:
            return repr(number)
        return value.strip().casefold() if isinstance(value, str) else None
    return None


def number_of(value: object) -> float | None:
    """Return the finite number that a value is, or whose text it is; None for anything else, bools too."""
    if isinstance(value, str):
        text = value.strip()
        number = float(text) if _NUMBER.fullmatch(text) else math.nan
    elif isinstance(value, int | float) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            return None
    else:
        return None
    return number + 0.0 if math.isfinite(number) else None  # -0.0 + 0.0 is 0.0
