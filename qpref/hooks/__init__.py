"""The interface for plugin authors.

    from qpref.hooks import Field, Options, PairedLoss, hookimpl

`Options`, `TrackerOptions` and `Field` are imported on first access, so that `qpref --help` and `qpref plugins` don't
import pydantic.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pluggy

from qpref.hooks.checks import CountedRows, Places, RowCounts, Severity, SourceSeverity, composed, report, text_of
from qpref.hooks.reading import reading_length, reads_shorter
from qpref.hooks.tracking import RunRecord, Tracker, TrackerWriter, flattened
from qpref.hooks.types import (
    MetricSink,
    PairedLoss,
    Reader,
    RowCheck,
    SinkContext,
    SinkWriter,
    Split,
    SummaryWriter,
    Table,
    TrlCase,
    UnpairedLoss,
    Validator,
    reward_metrics,
    unpaired_reward_metrics,
)

if TYPE_CHECKING:
    from qpref.hooks.options import Field, Options, TrackerOptions

hookimpl = pluggy.HookimplMarker("qpref")

__all__ = [
    "hookimpl",
    "Field",
    "Options",
    "PairedLoss",
    "UnpairedLoss",
    "TrlCase",
    "Validator",
    "RowCheck",
    "Split",
    "Severity",
    "SourceSeverity",
    "Places",
    "CountedRows",
    "RowCounts",
    "reading_length",
    "reads_shorter",
    "report",
    "text_of",
    "composed",
    "MetricSink",
    "SinkContext",
    "SinkWriter",
    "SummaryWriter",
    "Table",
    "RunRecord",
    "Tracker",
    "TrackerOptions",
    "TrackerWriter",
    "flattened",
    "Reader",
    "reward_metrics",
    "unpaired_reward_metrics",
]


def __getattr__(name: str) -> Any:
    if name in ("Field", "Options", "TrackerOptions"):
        from qpref.hooks import options

        return getattr(options, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
