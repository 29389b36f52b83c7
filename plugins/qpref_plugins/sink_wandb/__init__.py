"""Metrics, recipe, tables and result as a run of Weights & Biases: `pip install "qpref[wandb]"`.

Each row is an entry of the run's history with the training step as x-axis `step`. W&B's own steps only count entries:
it would drop an entry of a step that it has, and hold a step's entry back until the next one comes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any, Literal
from uuid import uuid4

from qpref.errors import PluginError
from qpref.hooks import (
    Field,
    MetricSink,
    RunRecord,
    SinkContext,
    Table,
    TrackerOptions,
    TrackerWriter,
    hookimpl,
)

Mode = Literal["online", "offline"]


class WandbOptions(TrackerOptions):
    """Options of the sink `wandb`; the key is in WANDB_API_KEY or from `wandb login`."""

    project: str = Field(default="qpref", min_length=1, description="Project of the run.")
    entity: str | None = Field(default=None, description="User or team. Without it, your default one.")
    group: str | None = Field(default=None, description="Group of the run.")
    mode: Mode | None = Field(
        default=None,
        description="online uploads while training; offline keeps the run in `sinks/wandb` of the run folder for "
        "`wandb sync`. Without it, WANDB_MODE, or else online.",
    )


class WandbRun:
    """A run of Weights & Biases."""

    def __init__(self, options: WandbOptions, record: RunRecord, context: SinkContext) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        self._wandb = wandb
        mode = _mode_of(options)
        if mode == "online" and not wandb.login(prompt=False):
            raise PluginError(
                "the sink 'wandb' has no key", 'run `wandb login`, or set WANDB_API_KEY, or mode = "offline"'
            )
        is_new = record.id is None
        if is_new:
            record.begin(uuid4().hex)
        self._run = wandb.init(
            project=options.project,
            entity=options.entity,
            group=options.group,
            name=options.run_name or context.run_folder.name,
            tags=options.tags,
            mode=mode,
            id=record.id,
            resume=None if is_new else "allow",
            dir=str(context.make_folder()),
            config=dict(context.recipe),
            settings=_settings(wandb),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log({**values, "step": step})

    def add_table(self, name: str, table: Table) -> None:
        self._run.log({name: self._wandb.Table(columns=list(table.columns), data=[list(row) for row in table.rows])})

    def finish(self, summary: Mapping[str, object] | None) -> None:
        self._run.summary.update(dict(summary or {}))
        self._run.finish(exit_code=1 if summary is None else 0)


def _mode_of(options: WandbOptions) -> Mode:
    return options.mode or ("offline" if os.environ.get("WANDB_MODE") == "offline" else "online")


def _settings(wandb: Any) -> Any:
    """Return settings under which W&B neither captures the output, nor prints, nor reads the repository's code."""
    return wandb.Settings(console="off", silent=True, disable_code=True, disable_git=True)


def open_wandb(options: WandbOptions, context: SinkContext) -> TrackerWriter:
    is_offline = _mode_of(options) == "offline"
    record = RunRecord(context, "wandb", parts="wandb/offline-run-*" if is_offline else None)
    return TrackerWriter(WandbRun(options, record, context), record, context, options.samples)


@hookimpl
def qpref_metric_sinks() -> Iterator[MetricSink]:
    yield MetricSink(
        name="wandb",
        summary="a run of Weights & Biases, online or offline",
        options=WandbOptions,
        open=open_wandb,
        requires=("wandb>=0.19",),
        close_seconds=60.0,
    )
