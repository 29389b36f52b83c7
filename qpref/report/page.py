"""Render the report of some runs: its sections from the runs and from other commands' files, by one template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qpref.opening import real_path
from qpref.report import charts, curves, tables
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


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtraResults:
    """Parsed JSON files of other commands, by path.

    Attributes:
        merged: merge.json of merged models.
        evaluations: of `qpref eval --json`.
        samples: of `qpref generate --json`.
    """

    merged: Mapping[str, Any] = field(default_factory=dict)
    evaluations: Mapping[str, Any] = field(default_factory=dict)
    samples: Mapping[str, Any] = field(default_factory=dict)


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


def render(runs: Sequence[RunRecord], extras: ExtraResults) -> str:
    """Render the page as HTML."""
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs: " + ", ".join(run.name for run in runs)
    return render_page(
        "page.html.j2",
        script="page.js",
        title=title,
        command="report",
        origin="the run folders",
        runs=runs,
        bounded=bounded,
        colours=charts.COLOURS,
        area=AREA,
        tables=tables,
        overview=tables.overview(runs),
        differences=tables.differences(runs),
        charts=curves.all_charts(runs),
        charts_left_out=max(0, len(curves.metric_names(runs)) - curves.MAX_CHARTS),
        heldout=tables.heldout(runs),
        data=[_data(run) for run in runs],
        speed=curves.speed_chart(runs),
        merged={path: merge_blocks(value) for path, value in extras.merged.items()},
        evaluations={path: evaluation_blocks(value) for path, value in extras.evaluations.items()},
        sample_files=[_sample_file(path, value) for path, value in extras.samples.items()],
        about=[_about(run) for run in runs],
    )


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
