"""Render the report of some runs: its sections from the runs and from other commands' files, by one template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qpref.opening import real_path
from qpref.report import charts, curves, outcome, tables
from qpref.report.cells import MAX_ROWS, Fields, cell, label_of
from qpref.report.data_section import DataTables, data_tables
from qpref.report.frame import render_page
from qpref.report.read import RunRecord, nested
from qpref.report.results import evaluation_blocks, merge_blocks
from qpref.report.samples import Sample, samples_of
from qpref.report.text import bounded

AREA = {
    "width": charts.WIDTH,
    "height": charts.HEIGHT,
    "left": charts.LEFT,
    "right": charts.WIDTH - charts.RIGHT,
    "top": charts.TOP,
    "bottom": charts.HEIGHT - charts.BOTTOM,
}
"""The plot area inside a chart's SVG."""
MAX_TITLED = 3
"""Most runs that the title names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtraResults:
    """Parsed JSON files of other commands, by path.

    Attributes:
        merged: merge.json of merged models.
        evaluations: of `qpref eval --json`.
        samples: of `qpref generate --json`.
        rounds: rows of a table on the rounds that the runs are, each a text by column.
    """

    merged: Mapping[str, Any] = field(default_factory=dict)
    evaluations: Mapping[str, Any] = field(default_factory=dict)
    samples: Mapping[str, Any] = field(default_factory=dict)
    rounds: Sequence[Mapping[str, str]] = ()


@dataclass(frozen=True, slots=True)
class SampleFile:
    """A file's samples; `other` shows the file's content where no samples are recognized.

    Attributes:
        left_out: number of samples that are not shown.
    """

    path: str
    samples: list[Sample]
    left_out: int
    other: Any


def render(runs: Sequence[RunRecord], extras: ExtraResults, refresh: int | None = None) -> str:
    """Render the page as HTML.

    Args:
        refresh: seconds after which the page reloads itself; None for never.
    """
    heldout = tables.heldout(runs)
    names = [run.name for run in runs]
    title = names[0] if len(runs) == 1 else f"{len(runs)} runs"
    title += ": " + ", ".join(names) if 1 < len(runs) <= MAX_TITLED else ""
    return render_page(
        "page.html.j2",
        script="page.js",
        title=title,
        command="report",
        origin="the run folders",
        refresh=refresh,
        runs=runs,
        outcome=outcome,
        sections=_sections(heldout is not None, extras),
        left_out=_left_out(str(runs[0].path), heldout is not None, extras),
        smoothing=charts.SMOOTHING,
        bounded=bounded,
        colours=charts.COLOURS,
        area=AREA,
        tables=tables,
        rounds=cell([dict(row) for row in extras.rounds]),
        comparison=tables.comparison(runs),
        differences=tables.differences(runs),
        charts=curves.all_charts(runs),
        charts_left_out=max(0, len(curves.metric_names(runs)) - curves.MAX_CHARTS),
        heldout=heldout,
        data=[_data(run) for run in runs],
        speed=curves.speed_chart(runs),
        merged={path: merge_blocks(value) for path, value in extras.merged.items()},
        evaluations={path: evaluation_blocks(value) for path, value in extras.evaluations.items()},
        sample_files=[_sample_file(path, value) for path, value in extras.samples.items()],
        about=[_about(run) for run in runs],
    )


def _sections(has_heldout: bool, extras: ExtraResults) -> list[str]:
    """Name the sections that have something to show, in the page's order."""
    shown = {
        "rounds": bool(extras.rounds),
        "curves": True,
        "held-out": has_heldout or bool(extras.evaluations),
        "data": True,
        "memory and speed": True,
        "merge": bool(extras.merged),
        "answers": bool(extras.samples),
        "about": True,
    }
    return [name for name, is_shown in shown.items() if is_shown]


def _left_out(run: str, has_heldout: bool, extras: ExtraResults) -> list[tuple[str, str]]:
    """Name what the page could show too, with the command or setting that makes it."""
    ways = []
    if not has_heldout:
        ways.append(("held-out metrics", "[data] heldout or heldout_share in the recipe"))
    if not extras.evaluations:
        ways.append(("evaluation", f"qpref eval {run} --json > eval.json; qpref report ... --eval eval.json"))
    if not extras.merged:
        ways.append(("merge verdict", f"qpref merge {run} OUT; qpref report ... --merged OUT"))
    if not extras.samples:
        samples = f"qpref generate {run} --json > samples.json; qpref report ... --samples samples.json"
        ways.append(("sample answers", samples))
    return ways


def _data(run: RunRecord) -> DataTables | None:
    return None if run.data is None else data_tables(run.data)


def _sample_file(path: str, value: Any) -> SampleFile:
    samples, left_out = samples_of(value)
    return SampleFile(path, samples, left_out, None if samples else cell(value))


def _about(run: RunRecord) -> Fields:
    """Collect a run's provenance."""
    facts = run.facts
    offers = facts.get("plugins")
    plugins = [
        f"{nested(offer, 'kind')} {nested(offer, 'name')} ({nested(offer, 'distribution')} {nested(offer, 'version')})"
        for offer in (offers[:MAX_ROWS] if isinstance(offers, list) else [])
        if isinstance(offer, dict)
    ]
    keys = ("created", "base", "base_path", "device", "dtype", "attention", "versions", "fingerprints")
    known = {key: facts[key] for key in keys if key in facts} | ({"plugins": plugins} if plugins else {})
    folder = [("folder", str(real_path(run.path)))]
    return Fields(folder + [(label_of(key), cell(value)) for key, value in known.items()])
