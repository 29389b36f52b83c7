"""The interface for plugin authors.

    from qpref.hooks import Field, Options, PairedLoss, hookimpl

What needs pydantic or writes files is imported on first access, so that `qpref plugins` answers at once.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import pluggy

from qpref.hooks.checks import CountedRows, Places, RowCounts, Severity, SourceSeverity, composed, report, text_of
from qpref.hooks.lists import list_reward_metrics
from qpref.hooks.reader import Reader, ReaderContext
from qpref.hooks.reading import reading_length, reads_shorter
from qpref.hooks.reward import Reward, RewardFunction
from qpref.hooks.types import (
    ListLoss,
    MetricSink,
    PairedLoss,
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
    from qpref.hooks.tracking import RunRecord, Tracker, TrackerWriter, flattened

hookimpl = pluggy.HookimplMarker("qpref")

__all__ = [
    "hookimpl",
    "Field",
    "Options",
    "PairedLoss",
    "UnpairedLoss",
    "ListLoss",
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
    "ReaderContext",
    "Reward",
    "RewardFunction",
    "reward_metrics",
    "unpaired_reward_metrics",
    "list_reward_metrics",
]


_LAZY = {
    **dict.fromkeys(("Field", "Options", "TrackerOptions"), "options"),
    **dict.fromkeys(("RunRecord", "Tracker", "TrackerWriter", "flattened"), "tracking"),
}
"""Names that are imported on first access, and their modules."""


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"qpref.hooks.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
