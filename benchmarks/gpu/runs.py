"""Runs of the `qpref` command as a user makes them: recipes, rows, and processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.pairs import Pair, text

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True)
class Command:
    """Attributes:
    output: the run's folder.
    start_of: the interpreter's arguments before the command's own.
    """

    arguments: tuple[str, ...]
    output: Path
    start_of: tuple[str, ...]

    def with_arguments(self, *more: str) -> Command:
        return replace(self, arguments=(*self.arguments, *more))

    def start(self) -> subprocess.Popen[str]:
        return subprocess.Popen(self._line, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True)

    def run(
        self, seconds: float | None = None, environment: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run to the end; killed after `seconds`. `environment` is added to this process's own.

        Raises:
            TimeoutExpired: it was killed.
        """
        return subprocess.run(
            self._line, cwd=ROOT, env=os.environ | (environment or {}), capture_output=True, text=True, check=False,
            timeout=seconds,
        )  # fmt: skip

    @property
    def _line(self) -> list[str]:
        return [sys.executable, *self.start_of, *self.arguments]


def qpref_command(
    name: str, subject: Path, *arguments: str | Path, cap: str = "", report: Path | None = None
) -> Command:
    """Make a command line of qpref about a recipe or a run.

    Args:
        cap: GiB that the allocator may take; no limit, and no report, if empty.
        report: file that receives the allocator's peaks.
    """
    parts = [name, str(subject), *map(str, arguments)]
    output = Path(parts[parts.index("--output") + 1]) if "--output" in parts else Path()
    return Command(tuple(parts), output, ("-m", "benchmarks.gpu.capped", cap, str(report or "")))


def write_recipe(
    path: Path, base: Path, rows: Path, device: str, *, dtype: str = "bf16", memory: str | None = None,
    train: dict[str, Any] | None = None, adapter: dict[str, Any] | None = None, heldout: Path | None = None,
) -> Path:  # fmt: skip
    """Write a recipe of DPO without checks that need real text."""
    import tomli_w

    from qpref.recipe.sections import TrainSection

    known = TrainSection.model_fields
    recipe: dict[str, Any] = {
        "model": {"base": str(base), "dtype": dtype, "device": device} | ({"memory": memory} if memory else {}),
        "adapter": {"rank": 16, "alpha": 32} | (adapter or {}),
        "data": {"train": str(rows), "max_length": 8192} | ({"heldout": str(heldout)} if heldout else {}),
        "checks": {},
        "loss": {"name": "dpo", "beta": 0.1},
        "train": {key: value for key, value in (train or {}).items() if key in known},
    }
    path.write_text(tomli_w.dumps(recipe))
    return path


def write_rows(path: Path, pairs: Iterable[Pair]) -> Path:
    """Write pairs as JSON Lines, whose texts the benchmark's tokenizer turns back into the same token ids."""
    with path.open("w") as file:
        for pair in pairs:
            sides = {"prompt": pair.prompt, "chosen": pair.chosen[:-1], "rejected": pair.rejected[:-1]}
            file.write(json.dumps({side: text(tokens) for side, tokens in sides.items()}) + "\n")
    return path


def longest_first(pairs: Sequence[Pair], batch_size: int) -> list[Pair]:
    """Order rows so that training, which shuffles them, meets the longest first."""
    from benchmarks.qpref_side import before_shuffle

    return before_shuffle(sorted(pairs, key=lambda pair: -pair.useful_tokens), batch_size, seed=0)
