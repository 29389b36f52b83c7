"""The whole page: sections from the runs and the files beside them, put down by one template.

The page loads nothing and may not: its Content-Security-Policy allows its own style and script by their hashes, and
forbids all else. Every text goes through the template's escaping; nothing here makes markup.
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
from qpref.report.data_section import DataReport, data_report
from qpref.report.facts import Facts, Sample, samples_of, shown
from qpref.report.read import RunRecord, leaf
from qpref.report.results import evaluation_blocks, merge_blocks

TEMPLATE, STYLE, SCRIPT = "page.html.j2", "page.css", "page.js"
AREA = {
    "width": charts.WIDTH,
    "height": charts.HEIGHT,
    "left": charts.LEFT,
    "right": charts.WIDTH - charts.RIGHT,
    "top": charts.TOP,
    "bottom": charts.HEIGHT - charts.BOTTOM,
}
"""Where a chart's axes lie."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Beside:
    """Files that other commands wrote, each with the path that it came from.

    Attributes:
        merged: merge.json of merged models.
        evaluations: of `qpref eval --json`.
        samples: of `qpref generate --json`.
    """

    merged: Mapping[str, Any] = field(default_factory=dict)
    evaluations: Mapping[str, Any] = field(default_factory=dict)
    samples: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Answers:
    """A file of samples; `other` where it holds none that can be told apart."""

    path: str
    samples: list[Sample]
    other: Any


def render(runs: Sequence[RunRecord], beside: Beside) -> str:
    """The page as HTML."""
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
        merged={path: merge_blocks(value) for path, value in beside.merged.items()},
        evaluations={path: evaluation_blocks(value) for path, value in beside.evaluations.items()},
        answers=[_answers(path, value) for path, value in beside.samples.items()],
        about=[_about(run) for run in runs],
    )  # fmt: skip


def _data(run: RunRecord) -> DataReport | None:
    return None if run.data is None else data_report(run.data)


def _answers(path: str, value: Any) -> Answers:
    samples = samples_of(value)
    return Answers(path, samples, None if samples else shown(value))


def _about(run: RunRecord) -> Facts:
    """Where a run came from."""
    facts = run.facts
    offers = facts.get("plugins")
    plugins = [
        f"{leaf(offer, 'kind')} {leaf(offer, 'name')} ({leaf(offer, 'distribution')} {leaf(offer, 'version')})"
        for offer in (offers if isinstance(offers, list) else [])
        if isinstance(offer, dict)
    ]
    kept = ("created", "base", "base_path", "device", "dtype", "attention", "versions", "fingerprints")
    said = {name: facts[name] for name in kept if name in facts} | ({"plugins": plugins} if plugins else {})
    pairs = [("folder", str(run.path.resolve()))]
    return Facts(pairs + [(name.replace("_", " "), shown(value)) for name, value in said.items()])


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
        finalize=_never_a_path,
    )


def _never_a_path(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value
