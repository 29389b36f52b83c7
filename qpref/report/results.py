"""Lay out the results of other commands, `qpref eval --json` and a merge's merge.json, as blocks of the page.

Known values get tables of their own; other values are shown as they are. A block is a heading with a text, Fields or a
Table.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qpref.report.cells import MAX_COLUMNS, MAX_LABEL, MAX_ROWS, Fields, Table, cell, cell_text, label_of
from qpref.report.curves import TITLES
from qpref.report.read import is_number, nested, number
from qpref.report.text import bounded, number_text, share_text

Block = tuple[str, str | Fields | Table]
VERDICT_ROWS = {
    "learned": "mean learned change of the margin, nats",
    "margin_error": "mean margin error, nats",
    "allowed": "largest that passes, nats",
    "largest_margin_error": "largest margin error, nats",
    "logprob_error": "mean error of a response's log-probability, nats",
    "kl": "KL(trained, merged) per token, nats",
    "largest_kl": "largest KL of a single token, nats",
    "tokens": "tokens compared",
}


def evaluation_blocks(value: Any) -> list[Block]:
    """Lay out an evaluation: its warnings, and its metrics with intervals, one column per model."""
    models = value.get("models") if isinstance(value, dict) else None
    if not isinstance(models, list) or not all(isinstance(model, dict) for model in models):
        return [("", cell(value))]
    models = models[:MAX_COLUMNS]
    names = [cell_text(model.get("model")) for model in models]
    blocks: list[Block] = [
        ("warning", cell_text(text))
        for text in (value["warnings"][:MAX_ROWS] if isinstance(value.get("warnings"), list) else [])
    ]
    blocks += _estimates("metrics", names, [model.get("metrics") for model in models])
    kinds = dict.fromkeys(kind for model in models for kind in (model.get("by") or ()) if isinstance(model["by"], dict))
    for kind in list(kinds)[:MAX_ROWS]:
        blocks += _estimates(f"by {kind}", names, [_accuracies(nested(model, "by", kind)) for model in models])
    differences = [model.get("difference_from_first") for model in models]
    if names:
        blocks += _estimates(f"difference from {names[0]}, pair by pair", names[1:], differences[1:])
    others = {name: part for name, part in value.items() if name not in ("models", "warnings")}
    return [*blocks, ("settings", cell(others))]


def _accuracies(buckets: Any) -> dict[str, Any] | None:
    """Pick each bucket's accuracy, by reward if there is one."""
    if not isinstance(buckets, dict):
        return None
    names = ("rewards/accuracies", "logps/accuracies")
    return {
        bucket: next((part[name] for name in names if name in part), None)
        for bucket, part in buckets.items()
        if isinstance(part, dict)
    }


def _estimates(heading: str, names: Sequence[str], columns: Sequence[Any]) -> Iterator[Block]:
    """Yield a table of estimates, with a row for each key of any column; nothing without keys."""
    known = [column if isinstance(column, dict) else {} for column in columns]
    keys = dict.fromkeys(key for column in known for key in column)
    if keys:
        rows: list[list[Any]] = [
            [TITLES.get(key) or label_of(key), *(_estimate(column.get(key)) for column in known)]
            for key in list(keys)[:MAX_ROWS]
        ]
        yield heading, Table(["", *names], rows, max(0, len(keys) - MAX_ROWS))


def _estimate(value: Any) -> str:
    """Format a number with its interval."""
    if not isinstance(value, dict):
        return "" if value is None else cell_text(value)
    middle, low, high = (number(value.get(name)) for name in ("value", "low", "high"))
    if middle != middle:  # NaN
        return "-"
    return number_text(middle) if low != low else f"{number_text(middle)} ({number_text(low)} to {number_text(high)})"


def merge_blocks(value: Any) -> list[Block]:
    """Lay out a merge: its verdict, its figures beside those of the dtypes tried before, and preference flips."""
    verdict = value.get("verdict") if isinstance(value, dict) else None
    if not isinstance(verdict, dict):
        return [("", cell(value))]
    tried = value.get("tried") if isinstance(value.get("tried"), dict) else {}
    asked = value.get("asked")
    quantized = asked.get("quantize") if isinstance(asked, dict) else None
    columns = {cell_text(quantized or value.get("dtype")): verdict} | {
        bounded(name, MAX_LABEL): part for name, part in list(tried.items())[:MAX_COLUMNS] if isinstance(part, dict)
    }
    blocks: list[Block] = [("verdict", _headline(verdict, value))]
    kept = value.get("kept_in_weights")
    kept = kept if isinstance(kept, dict) else {}
    header = ["", *(f"{name}, stored" if index == 0 else f"{name}, tried" for index, name in enumerate(columns))]
    rows: list[list[Any]] = [["passed", *(cell_text(part.get("passed")) for part in columns.values())]]
    for key, title in VERDICT_ROWS.items():
        if any(key in part for part in columns.values()):
            rows.append([title, *(cell_text(part.get(key)) for part in columns.values())])
    rows.append(["learned change retained in the weights", *(_share(kept.get(name)) for name in columns)])
    blocks.append(("figures", Table(header, rows)))
    if verdict.get("flips"):
        blocks.append(("preference flips", cell(verdict["flips"])))
    others = {
        name: part
        for name, part in value.items()
        if name not in ("verdict", "tried", "dtype", "run") and part not in (None, [], {})
    }
    return [*blocks, ("settings", cell(others))]


def _headline(verdict: Mapping[str, Any], value: Mapping[str, Any]) -> str:
    passed = {True: "passed", False: "NOT passed"}.get(bool(verdict.get("passed")), "")
    share = verdict.get("share_of_learned")
    of_learned = f", {100 * number(share):.2f} % of the learned change" if is_number(share) else ""
    flips = verdict.get("flips")
    flipped = f"; preference flips: {len(flips):,}" if isinstance(flips, list) else ""
    return (
        f"{passed}: on {cell_text(verdict.get('pairs'))} {cell_text(verdict.get('origin'))}, read back from disk as "
        f"{cell_text(value.get('dtype'))}, the mean margin error is {cell_text(verdict.get('margin_error'))} nats"
        f"{of_learned}{flipped}."
    )


def _share(value: Any) -> str:
    return share_text(number(value)) if is_number(value) else ""
