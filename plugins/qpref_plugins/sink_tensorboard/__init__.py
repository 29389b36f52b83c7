"""Metrics, recipe and result as TensorBoard event files in the run folder: `pip install "qpref[tensorboard]"`."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qpref.errors import PluginError
from qpref.hooks import Field, MetricSink, Options, SinkContext, flattened, hookimpl
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
        recipe: the resolved recipe; empty for none.
    """

    def __init__(self, folder: Path, first_step: int, recipe: Mapping[str, Any]) -> None:
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise PluginError(
                "the sink 'tensorboard' needs the package tensorboardX", 'pip install "qpref[tensorboard]"'
            ) from error
        purge = first_step + 1 if first_step else None
        # By default a killed process loses the events of two minutes.
        self._writer = SummaryWriter(str(folder), purge_step=purge, flush_secs=1)
        self._step = first_step
        if recipe and not first_step:
            self._add_text("recipe", recipe)

    def write(self, row: MetricRow) -> None:
        self._step = row.step
        for name, value in row.values.items():
            if math.isfinite(value):
                self._writer.add_scalar(name, value, row.step)

    def summarize(self, summary: Mapping[str, Any]) -> None:
        self._add_text("result", summary)

    def close(self) -> None:
        self._writer.close()

    def _add_text(self, tag: str, values: Mapping[str, Any]) -> None:
        """Add a Markdown table of the flat values."""
        lines = [f"| {key} | {json.dumps(value)} |" for key, value in flattened(values).items()]
        self._writer.add_text(tag, "\n".join(["| key | value |", "|---|---|", *lines]), self._step)


def open_tensorboard(options: TensorBoardOptions, context: SinkContext) -> TensorBoardWriter:
    return TensorBoardWriter(context.make_folder() / options.folder, context.first_step, context.recipe)


@hookimpl
def qpref_metric_sinks() -> Iterator[MetricSink]:
    yield MetricSink(
        name="tensorboard",
        summary="TensorBoard event files in the run folder",
        options=TensorBoardOptions,
        open=open_tensorboard,
        requires=("tensorboardX>=2.6",),
        close_seconds=30.0,  # a short run may end before tensorboardX is imported
    )
