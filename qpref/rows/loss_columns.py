"""Numbers that losses read from a row: a column's number, or of ranked responses the number of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from qpref.records import PreferencePair, UnpairedExample
from qpref.rows.column_hints import words
from qpref.rows.columns import finite
from qpref.rows.ranked import RANKED_COLUMNS, responses_in
from qpref.rows.values import BadRowError, json_value, kind_of, named

SIDES = ("chosen", "rejected")
LARGEST = 3.4028234e38
"""Largest number of float32, in which losses get the columns."""
Values = Mapping[str, object]


def with_loss_columns(
    record: PreferencePair | UnpairedExample, values: Values, names: Sequence[str]
) -> PreferencePair | UnpairedExample:
    """Add the numbers of the named columns to a record of a row.

    A column whose name has the word `chosen` or `rejected` is about that response. Where a row has a list of them, the
    column is a list too, with a number for each; and of ranked responses `score_chosen` is the `score` of the better
    one: from a list `score` or `scores`, or a key of the response.

    Raises:
        BadRowError: a column is missing, or has no finite number.
    """
    return replace(record, columns={name: _number(record, values, name) for name in names})


def _number(record: PreferencePair | UnpairedExample, values: Values, name: str) -> float:
    side = side_of(name)
    value = values.get(name)
    if isinstance(record, PreferencePair) and side is not None:
        position = record.positions[SIDES.index(side)]
        if name not in values:
            return _of_ranked(values, name, side, position)
        listed = _decoded(value)
        if isinstance(listed, list):
            responses = values.get(side)
            value = _item(listed, len(responses) if isinstance(responses, list) else 1, position, name)
    if name not in values:
        raise _missing(values, name)
    return _checked(value, name)


def _of_ranked(values: Values, name: str, side: str, position: int) -> float:
    """Return the number of one ranked response."""
    if all(values.get(column) is None for column in RANKED_COLUMNS):
        raise _missing(values, name)
    _, responses = responses_in(values)
    own = "_".join(word for word in words(name) if word != side)
    listed = next((values[column] for column in (own, f"{own}s") if values.get(column) is not None), None)
    if listed is not None:
        return _checked(_item(_decoded(listed), len(responses), position, f"{own} (for {name})"), name)
    response = responses[position]
    if isinstance(response, dict) and response.get(own) is not None:
        return _checked(response[own], name)
    raise BadRowError(
        "missing_column",
        f"no column '{name}', which a loss reads: of ranked responses that is a list '{own}', or a key '{own}' of each",
    )


def _item(listed: object, count: int, position: int, name: str) -> object:
    if not isinstance(listed, list) or len(listed) != count:
        found = f"{len(listed)} of them" if isinstance(listed, list) else kind_of(listed)
        raise BadRowError("bad_number", f"{name}: expected a number for each of {count} responses, found {found}")
    return listed[position]


def _decoded(value: object) -> object:
    """Return a list for its JSON text, as CSV files have it; other values as they are."""
    return json_value(value) if isinstance(value, str) and value.lstrip()[:1] == "[" else value


def _checked(value: object, name: str) -> float:
    number = finite(value, name)
    if abs(number) > LARGEST:
        raise BadRowError("bad_number", f"{name}: {number:g} is too large for a loss (at most 3.4e38)")
    return number


def side_of(name: str) -> str | None:
    """Return the side that a column's name is about; None where it names none, or both."""
    found = [side for side in SIDES if side in words(name)]
    return found[0] if len(found) == 1 else None


def _missing(values: Values, name: str) -> BadRowError:
    message = f"no column '{name}', which a loss reads; it has {named(values) or 'none'}"
    return BadRowError("missing_column", message)
