"""Metrics as TensorBoard event files in the run folder: `pip install "qpref[tensorboard]"`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from qpref.errors import PluginError
from qpref.hooks import Field, MetricSink, Options, SinkContext, hookimpl
from qpref.records import MetricRow


class TensorBoardOptions(Options):
    """Options of the sink `tensorboard`."""

    folder: str = Field(
        default="tensorboard", description="Folder of the event files, relative to `sinks` in the run folder."
    )


class TensorBoardWriter:
    """Writes each finite value of a row as a scalar of the row's step.

    Args:
        folder: folder of the event files.
        first_step: on resuming, TensorBoard hides earlier events after this step.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise PluginError(
                "the sink 'tensorboard' needs the package tensorboardX", 'pip install "qpref[tensorboard]"'
            ) from error
        purge = first_step + 1 if first_step else None
        self._writer = SummaryWriter(str(folder), purge_step=purge)

    def write(self, row: MetricRow) -> None:
        for name, value in row.values.items():
            if math.isfinite(value):
                self._writer.add_scalar(name, value, row.step)

    def close(self) -> None:
        self._writer.close()


def open_tensorboard(options: TensorBoardOptions, context: SinkContext) -> TensorBoardWriter:
    return TensorBoardWriter(context.make_folder() / options.folder, context.first_step)


@hookimpl
def qpref_metric_sinks() -> Iterator[MetricSink]:
    yield MetricSink(
        name="tensorboard",
        summary="TensorBoard event files in the run folder",
        options=TensorBoardOptions,
        open=open_tensorboard,
    )
