"""The `qpref` command with the allocator limited, as on a smaller card.

    python -m benchmarks.gpu.capped GIB REPORT train recipe.toml

The allocator's peaks are written to the file REPORT when the command ends. With an empty GIB there is neither limit nor
report.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main() -> None:
    cap, report = sys.argv[1:3]
    del sys.argv[1:3]
    from qpref.cli import main as qpref

    if not cap:  # as a user starts it: qpref sets up torch before it is imported
        qpref(prog_name="qpref")
    import torch

    from benchmarks.gpu.device import open_device

    device = open_device(rehearse=not torch.cuda.is_available())
    device.cap(float(cap))
    try:
        qpref(prog_name="qpref")
    finally:
        Path(report).write_text(json.dumps(device.memory()))


if __name__ == "__main__":
    main()
