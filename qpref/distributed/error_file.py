"""The file by which torchrun, and `qpref train --gpus`, learn why a process failed."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

from qpref import fsio
from qpref.errors import DiskError, FailedElsewhere

VARIABLE = "TORCHELASTIC_ERROR_FILE"


def write_error_file(error: BaseException) -> None:
    """Write the message of this process's error where torchrun looks for it; nothing where another process failed."""
    path = os.environ.get(VARIABLE)
    if not path or isinstance(error, FailedElsewhere):
        return
    message = {"message": str(error), "extraInfo": {"timestamp": str(int(time.time())), "py_callstack": ""}}
    with suppress(DiskError):
        fsio.write_json(Path(path), {"message": message})
