"""Faults that the harness has to catch, and one kind that it cannot; the command fails where a fault is caught.

python planted.py layout-on-cpu        # caught: FAIL, exit > 0
python planted.py weight-on-cpu        # caught
python planted.py ends-in-int64        # not caught: a fake kernel doesn't look at its arguments' types
"""

from __future__ import annotations

import sys
from dataclasses import replace

import torch

from tests.fake_cuda import names, startup
from tests.fake_cuda.job import Job, within


def layout_on_cpu() -> None:
    key_layout = names.varlen.key_layout
    names.varlen.key_layout = lambda groups, device: key_layout(groups, torch.device("cpu"))


def weight_on_cpu() -> None:
    pack = names.scoring.pack
    names.scoring.pack = lambda members, device: replace(pack(members, device), weight=torch.ones(len(members)))


def ends_in_int64() -> None:
    key_layout = names.varlen.key_layout

    def wide(groups: object, device: torch.device) -> object:
        layout = key_layout(groups, device)
        return replace(layout, query_ends=layout.query_ends.long())

    names.varlen.key_layout = wide


FAULTS = {"layout-on-cpu": layout_on_cpu, "weight-on-cpu": weight_on_cpu, "ends-in-int64": ends_in_int64}

if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in FAULTS:
        sys.exit(__doc__)
    FAULTS[sys.argv[1]]()
    sys.exit(len(within(Job(), startup.failures)))
