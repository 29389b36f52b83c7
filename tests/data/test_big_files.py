"""Files of any size: `qpref check` reads a million rows in little memory, each in the time of one of a small file."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

NUM_ROWS, NUM_FEWER = 1_000_000, 100_000
MOST_BYTES = 400 * 2**20
"""Of memory, whatever the size of the file."""
COMMAND = """
import atexit, re, sys, time
from qpref.cli import main

def report():
    peak = re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1]
    print(time.process_time(), peak, file=sys.stderr)

atexit.register(report)
main(["check", sys.argv[1], "--json"])
"""
"""It reports by itself: the peak that `os.wait4` has of a child counts what its parent had before."""
TOLERANCE = 1.5
"""Of the CPU time of a row in the large file, by that of one in the small file."""


@dataclass(frozen=True)
class Checked:
    """What `qpref check --json` printed, and what it took."""

    facts: dict[str, Any]
    exit_code: int
    seconds: float
    peak_bytes: int


def check(path: Path) -> Checked:
    done = subprocess.run([sys.executable, "-c", COMMAND, str(path)], capture_output=True, text=True, check=False)
    seconds, kibibytes = done.stderr.splitlines()[-1].split()
    return Checked(
        facts=json.loads(done.stdout),
        exit_code=done.returncode,
        seconds=float(seconds),
        peak_bytes=int(kibibytes) * 1024,
    )


def lines() -> Iterator[str]:
    """Endless distinct pairs of some 2,000 bytes."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9))) for _ in range(5000)]
    sentences = [" ".join(draw.choices(words, k=12)).capitalize() + "." for _ in range(5000)]
    number = 0
    while True:
        prompt, chosen, rejected = (" ".join(draw.choices(sentences, k=count)) for count in (6, 11, 11))
        yield f'{{"prompt": "{number}. {prompt}", "chosen": "{chosen}", "rejected": "{rejected}"}}\n'
        number += 1


@pytest.mark.soak
def test_a_million_rows_take_little_memory_and_no_longer_than_their_number(tmp_path):
    path = tmp_path / "pairs.jsonl"
    endless = lines()
    checked = []
    for num_rows in (NUM_FEWER, NUM_ROWS):
        with path.open("a") as file:
            file.writelines(islice(endless, num_rows - (NUM_FEWER if checked else 0)))
        checked.append(check(path))
    num_bytes = path.stat().st_size
    path.unlink()
    fewer, all_rows = checked
    print(f"{num_bytes:,} bytes; {NUM_ROWS / all_rows.seconds:,.0f} rows a CPU second; {all_rows.peak_bytes:,} bytes")
    assert num_bytes > 1.9e9
    assert [one.exit_code for one in checked] == [0, 0]
    assert (all_rows.facts["read"], all_rows.facts["kept"]) == (NUM_ROWS, NUM_ROWS)
    assert all_rows.peak_bytes <= MOST_BYTES
    assert all_rows.seconds / NUM_ROWS <= TOLERANCE * fewer.seconds / NUM_FEWER


@pytest.mark.soak
def test_a_row_of_half_a_gigabyte_is_refused_in_little_memory(tmp_path):
    path = tmp_path / "pairs.jsonl"
    good = '{"prompt": "Which one?", "chosen": "This one here.", "rejected": "That one there."}\n'
    with path.open("w") as file:
        file.write(good + '{"prompt": "')
        for _ in range(512):
            file.write("x" * 2**20)
        file.write('"}\n' + good.replace("Which", "What"))
    checked = check(path)
    path.unlink()
    (refused,) = (finding for finding in checked.facts["findings"] if finding["severity"] == "error")
    assert (refused["line"], refused["message"]) == (2, "the line is longer than 4 MiB")
    assert (checked.exit_code, checked.facts["read"], checked.facts["kept"]) == (3, 3, 2)
    assert checked.peak_bytes <= MOST_BYTES
