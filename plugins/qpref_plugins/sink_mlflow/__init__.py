"""Metrics, recipe, tables and result as a run of MLflow: `pip install "qpref[mlflow]"`."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping

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

BATCH = 100
"""Parameters that MLflow takes in one call."""
TEXT = 500
"""Characters of a parameter's value that every MLflow server takes."""


class MlflowOptions(TrackerOptions):
    """Options of the sink `mlflow`; a server's user and password or token are MLflow's own environment variables."""

    experiment: str = Field(default="qpref", min_length=1, description="Experiment of the run.")
    uri: str | None = Field(
        default=None,
        description="Tracking server or database, such as `sqlite:///mlflow.db`. Without it, MLFLOW_TRACKING_URI, or "
        "else `sinks/mlflow.db` of the run folder.",
    )


class MlflowRun:
    """A run of MLflow, through the client that has no state of the whole process."""

    def __init__(self, options: MlflowOptions, record: RunRecord, context: SinkContext) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
        from mlflow.entities import Metric, Param, RunStatus, RunTag
        from mlflow.tracking import MlflowClient

        self._metric, self._status = Metric, RunStatus
        own_folder = context.make_folder().absolute()
        uri = options.uri or os.environ.get("MLFLOW_TRACKING_URI")
        self._client = MlflowClient(tracking_uri=uri or f"sqlite:///{own_folder / 'mlflow.db'}")
        if record.id is None:
            artifacts = None if uri else (own_folder / "mlflow-artifacts").as_uri()
            found = self._client.get_experiment_by_name(options.experiment)
            experiment = found.experiment_id if found else self._client.create_experiment(options.experiment, artifacts)
            run = self._client.create_run(experiment, run_name=options.run_name or context.run_folder.name)
            record.begin(run.info.run_id)
            tags = [RunTag(tag, "") for tag in options.tags]
            params = [Param(key, str(value)[:TEXT]) for key, value in flattened(context.recipe).items()]
            for start in range(0, max(len(params), 1), BATCH):
                self._client.log_batch(run.info.run_id, params=params[start : start + BATCH], tags=tags)
        assert record.id is not None
        self._id = record.id
        self._client.update_run(self._id, status=RunStatus.to_string(RunStatus.RUNNING))

    def log(self, values: Mapping[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        self._client.log_batch(
            self._id, metrics=[self._metric(name, value, now, step) for name, value in values.items()]
        )

    def add_table(self, name: str, table: Table) -> None:
        columns = {column: [row[index] for row in table.rows] for index, column in enumerate(table.columns)}
        self._client.log_table(self._id, data=columns, artifact_file=f"{name}.json")

    def finish(self, summary: Mapping[str, object] | None) -> None:
        if summary is not None:
            self._client.log_dict(self._id, dict(summary), "summary.json")
            if sentence := summary.get("verdict.sentence"):
                self._client.set_tag(self._id, "mlflow.note.content", str(sentence))
        status = self._status.KILLED if summary is None else self._status.FINISHED
        self._client.set_terminated(self._id, self._status.to_string(status))


def open_mlflow(options: MlflowOptions, context: SinkContext) -> TrackerWriter:
    record = RunRecord(context, "mlflow")
    return TrackerWriter(MlflowRun(options, record, context), record, context, options.samples)


@hookimpl
def qpref_metric_sinks() -> Iterator[MetricSink]:
    yield MetricSink(
        name="mlflow",
        summary="a run of MLflow, in a database file or on a server",
        options=MlflowOptions,
        open=open_mlflow,
        requires=("mlflow-skinny>=3", "sqlalchemy>=2", "alembic>=1.10"),
        close_seconds=60.0,
    )
