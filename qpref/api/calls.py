"""Surroundings of each function of the interface: Linux, quiet libraries, messages in Python's words"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from qpref.api.words import python_words


@contextmanager
def call() -> Iterator[None]:
    """Run the work of one function, with transformers' bars and warnings off.

    Raises:
        InstallError: this is native Windows.
    """
    from qpref.linux import require_linux, set_torch_variables

    require_linux()
    if "torch" not in sys.modules:
        set_torch_variables()
    with python_words(), _quiet_transformers():
        yield


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Keep transformers' progress bars and warnings off; both are as before afterwards."""
    from transformers.utils import logging as transformers_logging

    verbosity, had_bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if had_bars:
            transformers_logging.enable_progress_bar()
