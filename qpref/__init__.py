"""qpref: preference training of 4-bit language models on one consumer GPU.

import qpref
run = qpref.train("recipes/quickstart.toml", overrides={"train.epochs": 2})
print(run.verdict)
"""

from __future__ import annotations

import logging

from qpref.api.commands import check, evaluate, generate, merge, plan
from qpref.api.models import load
from qpref.api.run import Run
from qpref.api.training import train
from qpref.version import __version__

__all__ = ["train", "Run", "check", "plan", "evaluate", "generate", "merge", "load", "__version__"]

# A program decides what it shows: logging.basicConfig(level="INFO") shows all of it.
logging.getLogger("qpref").addHandler(logging.NullHandler())
