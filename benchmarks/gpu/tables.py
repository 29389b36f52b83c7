"""Format the results of `python -m benchmarks.gpu` as Markdown.

python -m benchmarks.gpu.tables FILE.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import race
from benchmarks import tables as races

LONGEST_CELL = 100
MOST_COLUMNS = 8
"""Entries of a mapping that become columns; of a longer one, the first three are shown in one cell."""
Row = dict[str, Any]


def table(result: dict[str, Any]) -> str:
    """Format a script's result: the machine, then a table for each stage."""
    machine, versions = result["machine"], result["machine"]["versions"]
    known = ", ".join(f"{name} {version}" for name, version in versions.items())
    lines = [
        f"# {result['script']} on a GPU, {result['date'][:10]}"
        if not result["rehearsal"]
        else f"# {result['script']}, rehearsed on a CPU, {result['date'][:10]}: its figures say nothing",
        "",
        f"`{result['command']}` at {result['commit'] or 'an unknown commit'}, on {machine['gpu'] or machine['cpu']}; "
        f"driver {machine.get('driver')}, CUDA {machine.get('cuda')}; Python {machine['python']}, {known}.",
    ]
    for stage in result["stages"]:
        took = f", {stage['seconds']:.0f} s" if "seconds" in stage else ""
        lines += ["", f"## {stage['name']}: {stage['status']}{took}", ""]
        lines += _race(result, stage) if stage["name"].startswith("race") else _plain(stage["rows"])
        lines += ["", "    " + "\n    ".join(stage["log"][-12:])] if stage.get("log") else []
    return "\n".join(lines) + "\n"


def _plain(rows: Sequence[Row]) -> list[str]:
    """Tabulate rows; rows with other columns than those before begin a table of their own."""
    lines: list[str] = []
    columns: tuple[str, ...] = ()
    for row in map(_flat, rows):
        if tuple(row) != columns:
            columns = tuple(row)
            lines += [""] * bool(lines) + [_line(columns), _line(["---"] * len(columns))]
        lines.append(_line(map(_cell, row.values())))
    return lines


def _flat(row: Row) -> Row:
    """Turn nested figures into columns `outer: inner`."""
    flat: Row = {}
    for name, value in row.items():
        if isinstance(value, dict) and 0 < len(value) <= MOST_COLUMNS:
            flat |= {f"{name}: {inner}": each for inner, each in _flat(value).items()}
        else:
            flat[name] = value
    return flat


def _cell(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "**no**", None: ""}[value]
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        shown = [f"{name} {_cell(each)}" for name, each in list(value.items())[:3]]
        value = "; ".join([*shown, *["…"] * (len(value) > len(shown))])
    if isinstance(value, list):
        value = ", ".join(map(_cell, value))
    text = str(value).replace("|", "/").replace("\n", " ")
    return text if len(text) <= LONGEST_CELL else text[: LONGEST_CELL - 1] + "…"


def _line(cells: Any) -> str:
    return "| " + " | ".join(cells) + " |"


def _race(result: dict[str, Any], stage: Row) -> list[str]:
    """Tabulate a race as the other suites do, its turns joined."""
    records = [row["record"] for row in stage["rows"] if "record" in row]
    peaks = next((row["peaks"] for row in stage["rows"] if "peaks" in row), None)
    others = [row for row in stage["rows"] if not {"record", "peaks"} & row.keys()]
    if not records:
        return _plain(others)
    measured, notes = {"device": result["machine"]["device"], "peaks": peaks}, list[str]()
    lines = races.race_table(race.merged_turns(records), measured, notes)
    lines += ["", *(f"[{number}] {note}" for number, note in enumerate(notes, 1))] if notes else []
    return lines + _plain(others)


if __name__ == "__main__":
    print(table(json.loads(Path(sys.argv[1]).read_text())), end="")
