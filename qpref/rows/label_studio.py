"""Label Studio's JSON export: tasks as flat rows, as in its JSON-MIN, whose parts `columns` and a contest can name.

A task is `{"data": {...}, "annotations": [{"result": [{"from_name": ..., "value": {...}}]}]}`. Its flat row has the
columns of `data`, and for each control of the labelling interface the value that the annotators chose.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from qpref.records import Row
from qpref.rows.values import BadRowError, shown


def flattened(row: Row) -> Row:
    """Return the flat row of a task; any other row stays as it is.

    Raises:
        BadRowError: annotators disagree.
    """
    data, annotations = row.values.get("data"), row.values.get("annotations")
    if not isinstance(data, Mapping) or not isinstance(annotations, list) or not all(map(_is_annotation, annotations)):
        return row
    results: dict[str, object] = {}
    for annotation in annotations:
        for name, value in _results(annotation):
            if results.setdefault(name, value) != value:
                found = f"{shown(_only(results[name]))} and {shown(_only(value))}"
                message = f"{name}: the annotators disagree, found {found}; keep one annotation of the task"
                raise BadRowError("bad_label", message)
    return Row(values={**data, **{name: _only(value) for name, value in results.items()}}, source=row.source)


def _is_annotation(annotation: object) -> bool:
    return isinstance(annotation, Mapping) and isinstance(annotation.get("result"), list)


def _results(annotation: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    """Yield each control's name and value; a cancelled annotation has none."""
    results = annotation["result"]
    assert isinstance(results, list)
    for result in results if not annotation.get("was_cancelled") else ():
        if isinstance(result, Mapping) and isinstance(result.get("from_name"), str) and "value" in result:
            yield result["from_name"], result["value"]


def _only(value: object) -> object:
    """Take a single part out of a result's value: `{"choices": ["left"]}` is `left`."""
    while isinstance(value, Mapping | list) and len(value) == 1:
        (value,) = value.values() if isinstance(value, Mapping) else value
    return value
