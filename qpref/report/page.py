"""Render the page: its sections from the runs and from other commands' files, by one template.

The page loads nothing: its Content-Security-Policy allows only its own style and script, by their hashes. Every text is
escaped by the template; no code here produces markup.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from qpref import __version__
from qpref.report import charts, curves, tables
from qpref.report.cells import Fields, cell, label_of
from qpref.report.data_section import DataTables, data_tables
from qpref.report.read import RunRecord, nested
from qpref.report.results import evaluation_blocks, merge_blocks
from qpref.report.samples import Sample, samples_of

TEMPLATE, STYLE, SCRIPT = "page.html.j2", "page.css", "page.js"
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
    """A file's samples; `other` shows the file's content where no samples are recognized."""

    path: str
    samples: list[Sample]
    other: Any


def render(runs: Sequence[RunRecord], extras: ExtraResults) -> str:
    """Render the page as HTML."""
    style, script = _packaged(STYLE), _packaged(SCRIPT)
    policy = (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs: " + ", ".join(run.name for run in runs)
    return _environment().get_template(TEMPLATE).render(
        title=title,
        policy=policy,
        style=Markup(style),  # noqa: S704 - the package's own files
        script=Markup(script),  # noqa: S704
        version=__version__,
        runs=runs,
        colours=charts.COLOURS,
        area=AREA,
        tables=tables,
        overview=tables.overview(runs),
        differences=tables.differences(runs),
        charts=curves.all_charts(runs),
        heldout=tables.heldout(runs),
        data=[_data(run) for run in runs],
        speed=curves.speed_chart(runs),
        merged={path: merge_blocks(value) for path, value in extras.merged.items()},
        evaluations={path: evaluation_blocks(value) for path, value in extras.evaluations.items()},
        sample_files=[_sample_file(path, value) for path, value in extras.samples.items()],
        about=[_about(run) for run in runs],
    )  # fmt: skip


def _data(run: RunRecord) -> DataTables | None:
    return None if run.data is None else data_tables(run.data)


def _sample_file(path: str, value: Any) -> SampleFile:
    samples = samples_of(value)
    return SampleFile(path, samples, None if samples else cell(value))


def _about(run: RunRecord) -> Fields:
    """Collect a run's provenance."""
    facts = run.facts
    offers = facts.get("plugins")
    plugins = [
        f"{nested(offer, 'kind')} {nested(offer, 'name')} ({nested(offer, 'distribution')} {nested(offer, 'version')})"
        for offer in (offers if isinstance(offers, list) else [])
        if isinstance(offer, dict)
    ]
    keys = ("created", "base", "base_path", "device", "dtype", "attention", "versions", "fingerprints")
    known = {key: facts[key] for key in keys if key in facts} | ({"plugins": plugins} if plugins else {})
    folder = [("folder", str(run.path.resolve()))]
    return Fields(folder + [(label_of(key), cell(value)) for key, value in known.items()])


@cache
def _packaged(name: str) -> str:
    return files("qpref.report").joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("qpref.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=_path_to_text,
    )


def _path_to_text(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value
