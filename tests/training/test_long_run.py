"""A run of many steps: memory, open files and the time of a step stay as they are after the first thousands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import pytest
import tomli_w
from conftest import preference_rows, write_jsonl

NUM_STEPS, NUM_FIRST, NUM_ROWS = 20_000, 2_000, 100
"""Of the run; of its start, in which allocators and caches may grow; of its data file."""
MOST_GROWTH = 20 * 2**20
"""Bytes of memory between the start and the end."""
TOLERANCE = 1.5
"""Of the CPU time of a step at the end, by that of a step at the start."""
TICKS, PAGE = os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGESIZE")


@dataclass(frozen=True)
class Sample:
    """A look at the process from outside."""

    step: int
    num_bytes: int
    num_files: int
    cpu_seconds: float


def look_at(pid: int, metrics: Path) -> Sample:
    stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return Sample(
        step=last_step(metrics),
        num_bytes=int(stat[21]) * PAGE,
        num_files=len(list(Path(f"/proc/{pid}/fd").iterdir())),
        cpu_seconds=(int(stat[11]) + int(stat[12])) / TICKS,
    )


def last_step(metrics: Path) -> int:
    """The step of the last whole row; 0 before there is one."""
    if not metrics.is_file():
        return 0
    with metrics.open("rb") as file:
        file.seek(max(0, metrics.stat().st_size - 4096))
        rows = file.read().split(b"\n")[1:-1]
    return int(json.loads(rows[-1])["step"]) if rows else 0


@pytest.mark.soak
def test_twenty_thousand_steps_take_the_memory_of_the_first_thousands(make_base, tmp_path):
    base = make_base(num_hidden_layers=1, hidden_size=16, intermediate_size=32, num_attention_heads=2,
                     num_key_value_heads=1, head_dim=8)  # fmt: skip
    recipe = {
        "model": {"base": str(base), "quantization": "none", "dtype": "float32"},
        "adapter": {"rank": 2, "alpha": 4, "dropout": 0.1},
        "data": {
            "train": str(write_jsonl(tmp_path / "train.jsonl", preference_rows(NUM_ROWS))),
            "heldout": str(write_jsonl(tmp_path / "heldout.jsonl", preference_rows(8, start=1000))),
            "max_length": 256,
            "max_prompt_length": 128,
        },
        "checks": {"too_short": "off"},
        "loss": {"name": "dpo"},
        "train": {
            "batch_size": 1,
            "epochs": NUM_STEPS // NUM_ROWS,
            "log_every": 1,
            "eval_every": 1000,
            "save_every": 500,
            "tokens_per_microbatch": 400,
            "gradient_checkpointing": False,
        },
    }
    (tmp_path / "recipe.toml").write_text(tomli_w.dumps(recipe))
    run = tmp_path / "run"
    line = [sys.executable, "-m", "qpref", "train", str(tmp_path / "recipe.toml"), "--output", str(run)]
    samples = []
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(line, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=log, stderr=log)
        while process.poll() is None:
            with suppress(OSError):  # the process has just ended
                samples.append(look_at(process.pid, run / "metrics.jsonl"))
            time.sleep(0.5)
    assert process.returncode == 0, (tmp_path / "log").read_text()[-2000:]

    rows = [json.loads(row) for row in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["split"] == "train"] == list(range(1, NUM_STEPS + 1))
    later = [sample for sample in samples if NUM_FIRST <= sample.step < NUM_STEPS]
    growth = max(sample.num_bytes for sample in later) - later[0].num_bytes
    halves = seconds_per_step(later, NUM_FIRST, NUM_STEPS // 2), seconds_per_step(later, NUM_STEPS // 2, NUM_STEPS)
    print(f"{growth:,} bytes more; {1000 * halves[0]:.2f} and {1000 * halves[1]:.2f} CPU ms a step")
    assert growth <= MOST_GROWTH
    files = [sample.num_files for sample in later]
    quarter = len(files) // 4
    assert median(files[-quarter:]) <= median(files[:quarter]) + 1  # few samples fall into a save, which opens files
    assert halves[1] <= TOLERANCE * halves[0]


def seconds_per_step(samples: list[Sample], first: int, last: int) -> float:
    """CPU time between two steps."""
    inside = [sample for sample in samples if first <= sample.step <= last]
    return (inside[-1].cpu_seconds - inside[0].cpu_seconds) / (inside[-1].step - inside[0].step)
