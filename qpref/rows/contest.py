"""Two responses and a verdict: which one won, and the row with `chosen` and `rejected` that follows from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from qpref.recipe.contest_section import ContestSection, ValueRange, WinnerFlags, number_of, verdict_key
from qpref.records import Row
from qpref.rows.columns import has_prompt
from qpref.rows.values import BadRowError, json_value, named, shown

Outcome = Literal["first_wins", "second_wins", "tie"]
Values = Mapping[str, object]
UNLISTED = "unlisted_verdict"
"""Code of a verdict that no list has; the whole source is refused then."""
TIED = "tied"
"""Code of a row in which no response is preferred."""
_SET, _UNSET = {"1.0", "true"}, {"0.0", "false", ""}


@dataclass(frozen=True, slots=True)
class Contest:
    """Rule by which the rows of a source tell which of two responses won.

    Attributes:
        section: the columns and the verdicts.
        prompts: paths of the prompt, the first that a row has, for rows without a column that any format reads as such.
        finish: changes the row's values once `chosen` and `rejected` are known.
    """

    section: ContestSection
    prompts: tuple[str, ...] = ()
    finish: Callable[[Values], Values] = dict
    _outcomes: dict[str, Outcome] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for outcome, verdicts in self._lists():
            keys = (verdict_key(verdict) for verdict in verdicts)
            self._outcomes.update({key: outcome for key in keys if key is not None})

    def _lists(self) -> tuple[tuple[Outcome, list[object]], ...]:
        section = self.section
        return (
            ("first_wins", [*section.first_wins]),
            ("second_wins", [*section.second_wins]),
            ("tie", [*section.tie]),
        )

    def judge(self, row: Row) -> Row:
        """Return the row with the winner as `chosen` and the loser as `rejected`.

        Raises:
            BadRowError: a tie, no verdict, one that no list has, or a column is missing.
        """
        better, worse = self.sides(row.values)
        # What the contest has read means nothing else: a verdict in a column `margin` is no margin of the loss.
        read = {better, worse, *self.section.verdict_columns}
        values = {name: value for name, value in row.values.items() if name not in read}
        values |= {"chosen": value_at(row.values, better), "rejected": value_at(row.values, worse)}
        if not has_prompt(values):
            prompts = (value_at(row.values, path) for path in self.prompts)
            prompt = next((prompt for prompt in prompts if not is_missing(prompt)), None)
            values |= {} if prompt is None else {"prompt": prompt}
        return Row(values=self.finish(values), source=row.source)

    def sides(self, values: Values) -> tuple[str, str]:
        """Return the columns of the winner and of the loser."""
        section = self.section
        for name in (section.first, section.second):
            if _column(values, name) is None:
                raise BadRowError("not_a_pair", f"not a preference pair: no {name}")
        outcome = self.outcome(values)
        if outcome == "tie":
            raise BadRowError(TIED, f"{' and '.join(section.verdict_columns)}: a tie, so none is preferred")
        sides = section.first, section.second
        return sides if outcome == "first_wins" else (sides[1], sides[0])

    def outcome(self, values: Values) -> Outcome:
        """Read the verdict."""
        found = [_column(values, name) for name in self.section.verdict_columns]
        if all(is_missing(value) and verdict_key(value) not in self._outcomes for value in found):
            names = " and ".join(self.section.verdict_columns)
            raise BadRowError("not_a_pair", f"not a preference pair: no verdict in {names}")
        if self.section.scores is not None:
            return self._by_scores(found)
        outcome = self._by_flags(found) if isinstance(self.section.winner, WinnerFlags) else self._by_value(found[0])
        if outcome is None:
            raise BadRowError(UNLISTED, f"{self.described(values)}; expected {self.expected}")
        return outcome

    def described(self, values: Values) -> str:
        """Show the verdict of a row: `label = 7`."""
        columns = self.section.verdict_columns
        return ", ".join(f"{name} = {shown(value_at(values, name))}" for name in columns)

    @property
    def expected(self) -> str:
        """The verdicts that there are, and their meaning: `1 (output_1 is better), 2 (output_2 is better)`."""
        section = self.section
        meanings = f"{section.first} is better", f"{section.second} is better", "a tie"
        if isinstance(section.winner, WinnerFlags):
            return f"one of {', '.join(section.verdict_columns)} to be 1"
        if section.scores is not None:
            return f"the {section.scores.better} of {' and '.join(section.verdict_columns)} to win"
        parts = []
        for (_, verdicts), meaning in zip(self._lists(), meanings, strict=True):
            texts = [str(one) if isinstance(one, ValueRange) else shown(one) for one in verdicts]
            if texts:
                parts.append(f"{' or '.join(texts)} ({meaning})")
        return ", ".join(parts)

    def _by_value(self, value: object) -> Outcome | None:
        value = _selected(value)
        key = verdict_key(value)
        if key in self._outcomes:
            return self._outcomes[key]
        number = number_of(value)
        if number is None:
            return None
        for outcome, verdicts in self._lists():
            if any(isinstance(one, ValueRange) and one.holds(number) for one in verdicts):
                return outcome
        return None

    def _by_flags(self, found: list[object]) -> Outcome | None:
        keys = ["" if is_missing(value) else verdict_key(value) for value in found]
        if not all(key in _SET or key in _UNSET for key in keys):
            return None
        flagged = [index for index, key in enumerate(keys) if key in _SET]
        if len(flagged) == 1:
            return ("first_wins", "second_wins", "tie")[flagged[0]]
        return "tie" if not flagged and len(keys) == 2 else None

    def _by_scores(self, found: list[object]) -> Outcome:
        scores = self.section.scores
        assert scores is not None
        numbers = [number_of(value) for value in found]
        for name, value, number in zip(self.section.verdict_columns, found, numbers, strict=True):
            if number is None:
                raise BadRowError("bad_number", f"{name}: expected a number, found {shown(value)}")
        first, second = (number or 0.0 for number in numbers)
        if first == second:
            return "tie"
        return "first_wins" if (first > second) == (scores.better == "higher") else "second_wins"


def _selected(value: object) -> object:
    """Take the verdict out of a result of Label Studio's Pairwise: `[{"selected": "left"}]`, or its JSON."""
    result = json_value(value) if isinstance(value, str) and value[:1] in ("[", "{") else value
    result = result[0] if isinstance(result, list) and len(result) == 1 else result
    return result.get("selected", value) if isinstance(result, dict) else value


def is_missing(value: object) -> bool:
    """Return whether a cell is empty: null, NaN as pandas writes a gap, or a text without a character."""
    if isinstance(value, str):
        return not value.strip()
    return value is None or (isinstance(value, float) and math.isnan(value))


def value_at(values: Values, path: str) -> object:
    """Return a column, or a value within it: `summaries.0.text`. None where there is none."""
    if path in values:
        return values[path]
    value: object = values
    for step in path.split("."):
        if isinstance(value, Mapping):
            value = value.get(step)
        elif isinstance(value, list) and step.isdecimal() and len(step) < 6 and int(step) < len(value):
            value = value[int(step)]
        else:
            return None
    return value


def _column(values: Values, path: str) -> object:
    """Return the value at a path; refuse a row without its column."""
    if path not in values and path.split(".")[0] not in values:
        raise BadRowError("missing_column", f"no column '{path}' (for the contest); it has {named(values) or 'none'}")
    return value_at(values, path)
