"""Format numbers, sizes and times for people, and choose round ticks for an axis."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

_UNSEEN = re.compile(
    "\r(?!\n)|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff]"
)
DIGITS = 5
NO_VALUE = "no value"
MAX_CHARACTERS = 20_000
"""Longest text that a page shows whole, such as an answer or a recipe."""


def number_text(value: float) -> str:
    """Format with five significant digits: 0.69315, -121.96, 12,346, 1.2e-05."""
    if not math.isfinite(value):
        return NO_VALUE
    size = abs(value)
    if value == 0:
        return "0"
    if size < 1e-3 or size >= 1e9:
        return f"{value:.4g}"
    text = f"{value:,.{max(0, DIGITS - 1 - math.floor(math.log10(size)))}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def size_text(size: float) -> str:
    """Format bytes in GiB, or in MiB below 0.1 GiB."""
    if not math.isfinite(size):
        return NO_VALUE
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.1f} MiB"


def time_text(seconds: float) -> str:
    """Format seconds as 12.3 s, 4 min 05 s or 3 h 20 min."""
    if not math.isfinite(seconds):
        return NO_VALUE
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, left = divmod(minutes, 60)
    return f"{hours:,} h {left:02} min" if hours else f"{minutes} min {rest:02} s"


def count_text(value: float) -> str:
    return f"{round(value):,}" if math.isfinite(value) else NO_VALUE


def share_text(value: float) -> str:
    return f"{100 * value:.1f} %" if math.isfinite(value) else NO_VALUE


def bounded(text: str, characters: int = MAX_CHARACTERS) -> str:
    """Keep the start of a text that would make a page too long to open."""
    left_out = len(text) - characters
    return text if left_out <= 0 else f"{text[:characters]} [... {left_out:,} characters left out]"


def visible(text: str) -> str:
    """Replace characters that no page shows, or that reorder a line, by their code: ⟨U+200B⟩.

    Line breaks, tabs and the joiners that scripts and emoji need stay.
    """
    return text if text.isascii() and text.isprintable() else _UNSEEN.sub(_code_point, text)


def _code_point(found: re.Match[str]) -> str:
    return f"⟨U+{ord(found[0]):04X}⟩"


def ticks(low: float, high: float, most: int, whole: bool = False) -> list[float]:
    """Choose about `most` round numbers from `low` to `high`: multiples of 1, 2 or 5 times a power of ten.

    Args:
        whole: only whole numbers.
    """
    assert low < high
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    if whole:
        step = max(1.0, step)
    first = math.ceil(low / step - 1e-9)
    return [multiple * step for multiple in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float, most: int = 7) -> list[float]:
    """Choose round numbers for a log axis from 10**low to 10**high: 1, 2 and 5 times powers of ten, or every n-th power
    of ten where those are more than `most`."""
    powers = range(math.floor(low), math.ceil(high) + 1)
    inside = [power for power in powers if low <= power <= high]
    every = math.ceil(len(inside) / most) if len(inside) > most else 1
    fine = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
    fine = [value for value in fine if low <= math.log10(value) <= high]
    return fine if len(fine) <= most else [10.0**power for power in inside[::every]]


def tick_texts(values: Sequence[float]) -> list[str]:
    """Format tick labels, with as many decimals as their distance requires."""
    largest = max((abs(value) for value in values), default=0.0)
    if largest == 0:
        return ["0" for _ in values]
    step = abs(values[1] - values[0]) if len(values) > 1 else largest
    power = math.floor(math.log10(largest)) if largest < 1e-3 or largest >= 1e7 else 0
    decimals = max(0, power - math.floor(math.log10(step) + 1e-9))
    end = f"e{power}" if power else ""
    return ["0" if value == 0 else f"{value / 10.0**power:,.{decimals}f}{end}" for value in values]
