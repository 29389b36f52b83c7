"""Context of a stage: the device, a scratch folder, its sizes, and the file that its rows are written to."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.gpu.device import Device, open_device
from benchmarks.shapes import SHAPES, Shape, make_base

Row = dict[str, Any]
T = TypeVar("T")


@dataclass
class Context:
    """Attributes:
    scratch: folder that the stages of one command share.
    model: a real model for `memory`'s stage `real`, a GGUF file or a folder; None for the quickstart's own.
    rows: reported so far; where a row has `ok`, false is a failure.
    """

    device: Device
    rehearse: bool
    scratch: Path
    target: Path
    model: str | None = None
    rows: list[Row] = field(default_factory=list)

    def report(self, **row: Any) -> None:
        """Add a row, on disk at once, so that a stage that is stopped keeps what it has found."""
        self.rows.append(row)
        staging = self.target.with_suffix(".staging")
        staging.write_text(json.dumps(self.rows))
        staging.replace(self.target)
        print(json.dumps(row), flush=True)

    def pick(self, full: T, rehearsed: T) -> T:
        """Choose between the full size and a rehearsal's."""
        return rehearsed if self.rehearse else full

    def shape(self, name: str) -> Shape:
        return self.pick(SHAPES[name], replace(SHAPES["tiny"], name=f"tiny {name}", qkv_bias=SHAPES[name].qkv_bias))

    def base(self, shape: Shape) -> Path:
        """Return an NF4 base with random weights, made on the device unless a stage has made it before."""
        folder = self.scratch / "bases" / shape.name.replace(" ", "-").replace(",", "")
        if not folder.exists():
            staging = folder.with_name(f"{folder.name}-{os.getpid()}")
            make_base(shape, staging, nf4=True, device=self.device.name)
            staging.rename(folder)
        return folder

    def folder(self, name: str) -> Path:
        """Make a folder of its own in the scratch folder."""
        made = self.scratch / name
        made.mkdir(parents=True)
        return made


def run_stage(script: str, name: str, context: Context) -> int:
    """Run a stage in this process; an error becomes its last row. Returns the exit status."""
    try:
        stage: Callable[[Context], None] = getattr(import_module(f"benchmarks.gpu.{script}"), name)
        stage(context)
    except Exception as error:  # noqa: BLE001  whatever it is, it is the finding
        traceback.print_exc()
        context.report(ok=False, error=f"{type(error).__name__}: {error}"[:2000])
    return int(any(row.get("ok") is False for row in context.rows))


def main() -> None:
    """Run one stage: the body of the process that `benchmarks.gpu.__main__` starts."""
    script, name, scratch, target, rehearse, model = sys.argv[1:]
    context = Context(open_device(rehearse == "rehearse"), rehearse == "rehearse", Path(scratch), Path(target))
    context.model = model or None
    sys.exit(run_stage(script, name, context))


if __name__ == "__main__":
    main()
