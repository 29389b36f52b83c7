"""Format a result file as Markdown tables.

    python -m benchmarks.tables benchmarks/results/2026-11-23-cpu.json

The measured ratio of two contestants is the ratio of their total costs for the same pairs; the predicted one is the
ratio of the FLOPs in `benchmarks.limit`. Where they differ by more than a tenth, a footnote gives the reason.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.limit import least_seconds
from benchmarks.reasons import reason

TOLERANCE = 0.1
MIB = 2**20

Record = dict[str, Any]


def table(result: dict[str, Any]) -> str:
    """Format a whole result."""
    lines = [*_head(result), *_data_table(result.get("data", []))]
    notes: list[str] = []
    for (race, workload, shape), group in groupby(
        result["records"], key=lambda record: (record["race"], record["workload"], record["shape"])
    ):
        lines += ["", f"## {race}, {workload}, {shape}", "", *race_table(list(group), result, notes)]
    lines += ["", *(f"[{number}] {note}" for number, note in enumerate(notes, 1))] if notes else []
    if result["suite"] == "scaling":
        lines += ["", "## growth with the length of a pair", "", *_growth_table(result["records"])]
    return "\n".join(lines) + "\n"


def _head(result: dict[str, Any]) -> list[str]:
    machine, peaks = result["machine"], result["peaks"]
    unit = "second" if result["device"] == "cuda" else "CPU second"
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    where = peaks.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads of {machine['cores']} cores"
    return [
        f"# {result['suite']} suite, {result['date'][:10]}",
        "",
        f"`{result['command']}` on {where}; Python {machine['python']}, {versions}.",
        f"Measured peaks: {peaks['flops_per_second'] / 1e9:.0f} GFLOP of bf16 products and "
        f"{peaks['bytes_per_second'] / 1e9:.1f} GB copied per {unit}.",
    ]


def race_table(group: Sequence[Record], result: dict[str, Any], notes: list[str]) -> list[str]:
    """Tabulate a race, one row per contestant; all figures except memory are per pair.

    Args:
        result: the result's device and peaks.
        notes: footnotes so far, which a row may add to.
    """
    unit = "s" if result["device"] == "cuda" else "CPU s"
    lines = _rows(
        "contestant",
        f"{unit}, least",
        f"{unit}, median",
        "wall s, median",
        f"pairs / {unit}",
        f"tokens / {unit}",
        "peak MiB (model)",
        "TFLOP",
        "U",
        "times the first",
        "model",
        "off",
    )
    for record in group:
        lines += _row(_cells(record, group[0], result, notes))
    return lines


def _cells(record: Record, first: Record, result: dict[str, Any], notes: list[str]) -> list[str]:
    if record["failure"] or not record["steps"]:
        failure = (record["failure"] or "no steps").strip().splitlines()[-1]
        return [record["contestant"], failure, *[""] * 10]
    each, costs = record["pairs_per_step"], _costs(record, result)
    predicted = record["predicted"]
    peak, model_peak = (max(values) / MIB for values in (_of(record, "peak_bytes"), predicted["peak_bytes"]))
    ratio, model_ratio = _ratio(record, first, result)
    off = ratio / model_ratio - 1
    return [
        record["contestant"],
        f"{min(costs) / each:.2f}",
        f"{median(costs) / each:.2f}",
        f"{median(_of(record, 'wall_seconds')) / each:.2f}",
        f"{each * len(costs) / sum(costs):.3f}",
        f"{sum(predicted['useful_tokens']) / sum(costs):.0f}",
        f"{peak:.0f} ({model_peak:.0f})",
        f"{median(predicted['flops']) / each / 1e12:.3f}",
        f"{_share_of_limit(record, result):.2f}",
        f"{ratio:.2f}",
        f"{model_ratio:.2f}",
        f"{off:+.0%}{_mark(record, result['device'], notes)}" if abs(off) > TOLERANCE else "",
    ]


def _mark(record: Record, device: str, notes: list[str]) -> str:
    note = reason(record["contestant"], record["workload"], device)
    if note not in notes:
        notes.append(note)
    return f" [{notes.index(note) + 1}]"


def _of(record: Record, name: str) -> list[float]:
    return [step[name] for step in record["steps"]]


def _costs(record: Record, result: dict[str, Any]) -> list[float]:
    """Return the seconds of each step: wall time on a GPU, CPU seconds on a CPU."""
    return _of(record, "wall_seconds" if result["device"] == "cuda" else "cpu_seconds")


def _ratio(record: Record, first: Record, result: dict[str, Any]) -> tuple[float, float]:
    """Divide the cost by the first contestant's, measured and predicted."""

    def of_sums(own: Sequence[float], others: Sequence[float]) -> float:
        return sum(own) / sum(others)

    measured = of_sums(_costs(record, result), _costs(first, result))
    return measured, of_sums(record["predicted"]["flops"], first["predicted"]["flops"])


def _share_of_limit(record: Record, result: dict[str, Any]) -> float:
    """Compute U: the machine's minimum seconds for the contestant's own FLOPs, over its measured seconds."""
    peaks, predicted = result["peaks"], record["predicted"]
    return median(
        least_seconds(flops, moved, peaks["flops_per_second"], peaks["bytes_per_second"]) / cost
        for flops, moved, cost in zip(predicted["flops"], predicted["moved_bytes"], _costs(record, result), strict=True)
    )


def _data_table(records: Sequence[Record]) -> list[str]:
    if not records:
        return []
    names = list(records[0]["stages"])
    lines = ["", "## reading, tokenizing and packing short pairs", ""]
    lines += _rows(
        "pairs", *(f"{name}, CPU s" for name in names), "pairs / CPU minute", "peak MiB", "time grew", "memory grew"
    )
    for index, record in enumerate(records):
        total = sum(record["stages"].values())
        before = records[index - 1] if index else None
        lines += _row(
            [
                f"{record['pairs']:,}",
                *(f"{record['stages'][name]:.2f}" for name in names),
                f"{record['pairs'] / total * 60:,.0f}",
                f"{record['peak_bytes'] / MIB:.0f}",
                _growth(total, before, lambda one: sum(one["stages"].values())),
                _growth(record["peak_bytes"], before, lambda one: one["peak_bytes"]),
            ]
        )
    return lines


def _growth_table(records: Sequence[Record]) -> list[str]:
    lines = _rows("contestant", "pair", "CPU s, least", "peak MiB", "operations grew", "time grew", "memory grew")
    for name in dict.fromkeys(record["contestant"] for record in records):
        before = None
        for record in (one for one in records if one["contestant"] == name):
            lines += _row(
                [
                    name,
                    record["workload"],
                    f"{_least(record):.2f}",
                    f"{_peak(record) / MIB:.0f}",
                    _growth(record["predicted"]["flops"][0], before, lambda one: one["predicted"]["flops"][0]),
                    _growth(_least(record), before, _least),
                    _growth(_peak(record), before, _peak),
                ]
            )
            before = record
    return lines


def _least(record: Record) -> float:
    return min(_of(record, "cpu_seconds"))


def _peak(record: Record) -> float:
    return max(_of(record, "peak_bytes"))


def _growth(value: float, before: Record | None, of: Callable[[Record], float]) -> str:
    return "" if before is None else f"{value / of(before):.2f}x"


def _rows(*names: str) -> list[str]:
    return [*_row(names), *_row(["---"] * len(names))]


def _row(cells: Sequence[str]) -> list[str]:
    return ["| " + " | ".join(cells) + " |"]


if __name__ == "__main__":
    print(table(json.loads(Path(sys.argv[1]).read_text())), end="")
