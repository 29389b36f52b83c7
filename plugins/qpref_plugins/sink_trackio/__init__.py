"""Metrics, recipe, tables and result as a run of trackio: `pip install "qpref[trackio]"`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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


class TrackioOptions(TrackerOptions):
    """Options of the sink `trackio`; the token of a Space is in HF_TOKEN or from `hf auth login`."""

    project: str = Field(default="qpref", min_length=1, description="Project of the run.")
    group: str | None = Field(default=None, description="Group of the run.")
    space: str | None = Field(
        default=None,
        description="Hugging Face Space that shows the run, such as `name/space`. Without it, the run stays in "
        "trackio's folder on this machine, see TRACKIO_DIR.",
    )


class TrackioRun:
    """A run of trackio, whose name ends with a part of its id: trackio resumes by name."""

    def __init__(self, options: TrackioOptions, record: RunRecord, context: SinkContext) -> None:
        import trackio

        self._table = trackio.Table
        is_new = record.id is None
        if is_new:
            record.begin(f"{options.run_name or context.run_folder.name}-{uuid4().hex[:8]}")
        tags = {"tags": ", ".join(options.tags)} if options.tags else {}
        self._run = trackio.init(
            project=options.project,
            name=record.id,
            group=options.group,
            space_id=options.space,
            config=flattened(context.recipe) | tags,
            resume="never" if is_new else "allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        self._step = context.first_step

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._step = step
        self._run.log(dict(values), step=step)

    def add_table(self, name: str, table: Table) -> None:
        rows = [list(row) for row in table.rows]
        self._run.log({name: self._table(columns=list(table.columns), data=rows)}, step=self._step)

    def finish(self, summary: Mapping[str, object] | None) -> None:
        if summary:
            self._run.log({f"summary/{name}": value for name, value in summary.items()}, step=self._step)
        self._run.finish()


def open_trackio(options: TrackioOptions, context: SinkContext) -> TrackerWriter:
    record = RunRecord(context, "trackio")
    return TrackerWriter(TrackioRun(options, record, context), record, context, options.samples)


@hookimpl
def qpref_metric_sinks() -> Iterator[MetricSink]:
    yield MetricSink(
        name="trackio",
        summary="a run of trackio, on this machine or in a Space",
        options=TrackioOptions,
        open=open_trackio,
        requires=("trackio>=0.10",),
        close_seconds=60.0,
    )
