"""Metrics, recipe, tables and result as an experiment of Comet: `pip install "qpref[comet]"`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any, Literal
from uuid import uuid4

from qpref.hooks import (
    Field,
    MetricSink,
    RunRecord,
    SinkContext,
    Table,
    TrackerOptions,
    TrackerWriter,
    flattened,
    hookimpl,
)

QUIET = {
    "log_code": False,
    "log_graph": False,
    "log_git_metadata": False,
    "log_git_patch": False,
    "log_env_details": False,
    "parse_args": False,
    "auto_param_logging": False,
    "auto_metric_logging": False,
    "auto_output_logging": False,
    "display_summary_level": 0,
}
"""Arguments under which Comet neither captures the output nor hooks into torch."""


class CometOptions(TrackerOptions):
    """Options of the sink `comet`; the key is in COMET_API_KEY."""

    project: str = Field(default="qpref", min_length=1, description="Project of the experiment.")
    workspace: str | None = Field(default=None, description="User or team. Without it, your default one.")
    mode: Literal["online", "offline"] = Field(
        default="online",
        description="online uploads while training; offline keeps an archive in `sinks/comet` of the run folder for "
        "`comet upload`.",
    )


class CometRun:
    """An experiment of Comet. A resumed offline one is a second archive with the same key."""

    def __init__(self, options: CometOptions, record: RunRecord, context: SinkContext) -> None:
        os.environ.setdefault("COMET_ERROR_TRACKING_ENABLE", "false")
        os.environ.setdefault("COMET_LOGGING_CONSOLE", "ERROR")
        import comet_ml

        is_new = record.id is None or (options.mode == "offline" and record.is_empty)  # a killed one has no archive
        if record.id is None:
            record.begin(uuid4().hex)
        self._experiment = _experiment(comet_ml, options, record.id, is_new, str(context.make_folder() / "comet"))
        self._experiment.set_name(options.run_name or context.run_folder.name)
        self._experiment.add_tags(list(options.tags))
        self._experiment.log_parameters(flattened(context.recipe))

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._experiment.log_metrics(dict(values), step=step)

    def add_table(self, name: str, table: Table) -> None:
        self._experiment.log_table(f"{name}.csv", [list(row) for row in table.rows], headers=list(table.columns))

    def finish(self, summary: Mapping[str, object] | None) -> None:
        self._experiment.log_others(dict(summary or {}))
        self._experiment.end()


def _experiment(comet_ml: Any, options: CometOptions, key: str | None, is_new: bool, folder: str) -> Any:
    names = {"project_name": options.project, "workspace": options.workspace}
    if options.mode == "offline":
        if is_new:
            return comet_ml.OfflineExperiment(experiment_key=key, offline_directory=folder, **names, **QUIET)
        return comet_ml.ExistingOfflineExperiment(experiment_key=key, offline_directory=folder, **QUIET)
    if is_new:
        return comet_ml.Experiment(experiment_key=key, **names, **QUIET)
    return comet_ml.ExistingExperiment(experiment_key=key, **QUIET)


def open_comet(options: CometOptions, context: SinkContext) -> TrackerWriter:
    record = RunRecord(context, "comet", parts="comet/*.zip" if options.mode == "offline" else None)
    return TrackerWriter(CometRun(options, record, context), record, context, options.samples)


@hookimpl
def qpref_metric_sinks() -> Iterator[MetricSink]:
    yield MetricSink(
        name="comet",
        summary="an experiment of Comet, online or offline",
        options=CometOptions,
        open=open_comet,
        requires=("comet-ml>=3.47",),
        close_seconds=60.0,
    )
