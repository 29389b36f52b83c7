"""Metrics, recipe, tables and result as a run of SwanLab: `pip install "qpref[swanlab]"`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal
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


class SwanlabOptions(TrackerOptions):
    """Options of the sink `swanlab`; the key is in SWANLAB_API_KEY or from `swanlab login`."""

    project: str = Field(default="qpref", min_length=1, description="Project of the run.")
    workspace: str | None = Field(default=None, description="User or organization. Without it, yours.")
    group: str | None = Field(default=None, description="Group of the run.")
    mode: Literal["online", "offline"] = Field(
        default="online",
        description="online uploads while training; offline keeps the run in `sinks/swanlab` of the run folder for "
        "`swanlab sync`.",
    )


class SwanlabRun:
    """A run of SwanLab. A resumed offline run is a second folder of the same id."""

    def __init__(self, options: SwanlabOptions, record: RunRecord, context: SinkContext) -> None:
        import swanlab

        self._swanlab = swanlab
        if record.id is None:
            record.begin(uuid4().hex[:20])
        self._run = swanlab.init(
            project=options.project,
            workspace=options.workspace,
            group=options.group,
            name=options.run_name or context.run_folder.name,
            tags=list(options.tags),
            mode=options.mode,
            id=record.id,
            resume="allow",
            log_dir=str(context.make_folder() / "swanlab"),
            config=flattened(context.recipe),
            settings=swanlab.Settings.model_validate(
                {
                    "interactive": False,
                    "terminal": {"proxy_type": "none"},
                    "probe": {"requirements": False, "git": False, "monitor": False},
                }
            ),
        )
        self._step = context.first_step

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._step = step
        self._run.log(dict(values), step=step)

    def add_table(self, name: str, table: Table) -> None:
        chart = self._swanlab.echarts.Table()
        chart.add(list(table.columns), [list(row) for row in table.rows])
        self._run.log({f"tables/{name}": chart}, step=self._step)

    def finish(self, summary: Mapping[str, object] | None) -> None:
        if summary is None:
            self._run.finish(state="aborted")
            return
        self._run.config.update({f"summary.{name}": value for name, value in summary.items()})
        self._run.finish()


def open_swanlab(options: SwanlabOptions, context: SinkContext) -> TrackerWriter:
    record = RunRecord(context, "swanlab", parts="swanlab/run-*" if options.mode == "offline" else None)
    return TrackerWriter(SwanlabRun(options, record, context), record, context, options.samples)


@hookimpl
def qpref_metric_sinks() -> Iterator[MetricSink]:
    yield MetricSink(
        name="swanlab",
        summary="a run of SwanLab, online or offline",
        options=SwanlabOptions,
        open=open_swanlab,
        requires=("swanlab>=0.10",),
        close_seconds=60.0,
    )
