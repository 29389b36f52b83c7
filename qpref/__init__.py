"""qpref: preference training of 4-bit language models on one consumer GPU.

import qpref
run = qpref.train("recipes/quickstart.toml", overrides={"train.epochs": 2})
print(run.verdict)
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

from qpref.version import __version__

if TYPE_CHECKING:
    from qpref.api.commands import check, evaluate, gate, generate, merge, plan
    from qpref.api.models import load
    from qpref.api.run import Run
    from qpref.api.training import train

__all__ = ["train", "Run", "check", "plan", "evaluate", "gate", "generate", "merge", "load", "__version__"]

_HOME = {
    **dict.fromkeys(("check", "evaluate", "gate", "generate", "merge", "plan"), "commands"),
    "load": "models",
    "Run": "run",
    "train": "training",
}
"""Names that are imported on first access, so that a command starts at once, and their modules of `qpref.api`."""

# A program decides what it shows: logging.basicConfig(level="INFO") shows all of it.
logging.getLogger("qpref").addHandler(logging.NullHandler())


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"qpref.api.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
