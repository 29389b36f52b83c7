"""Openings of sentences, written for this benchmark: 160 to train on and 64 held out."""

from __future__ import annotations

from pathlib import Path

FILE = Path(__file__).with_name("openings.txt")
HELD_OUT_OF_SEVEN = (2, 5)
"""Indices modulo 7 of the openings that are held out: two of each seven neighbours, so of each subject."""


def openings() -> tuple[list[str], list[str]]:
    """Read the openings: those to train on, and those held out."""
    lines = [line for line in FILE.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    train = [line for index, line in enumerate(lines) if index % 7 not in HELD_OUT_OF_SEVEN]
    return train, [line for index, line in enumerate(lines) if index % 7 in HELD_OUT_OF_SEVEN]
