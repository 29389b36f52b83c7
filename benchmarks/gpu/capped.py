"""The `qpref` command with the allocator limited, as on a smaller card.

    python -m benchmarks.gpu.capped GIB REPORT train recipe.toml

An empty GIB is no limit; with REPORT, the allocator's peaks are written to that file when the command ends.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path


def main() -> None:
    cap, report = sys.argv[1:3]
    del sys.argv[1:3]
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from benchmarks.gpu.device import open_device

    device = open_device(rehearse=not _has_gpu())
    if cap:
        device.cap(float(cap))
    from qpref.cli import main as qpref

    try:
        qpref(prog_name="qpref")
    finally:
        if report:
            Path(report).write_text(json.dumps(device.memory()))


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    main()
