"""Length of a text by what it says: a Chinese character says as much as several Latin letters.

The weights are measured: characters of English messages against those of their translations in Django 5.2's message
catalogues. The ratios are 2.8 for Chinese, digits, spaces and punctuation included, 1.8 for Japanese and Korean, 1.3
for Hebrew, 1.2 for Thai, 1.1 for Arabic; about 1 for other alphabets and for the scripts of India. Khmer, Lao and
Burmese, written without spaces between words like Thai, have its weight.
"""

from __future__ import annotations

from bisect import bisect_right
from unicodedata import normalize

_RANGES = (
    # Weight 0: marks on letters, vowel points, joiners, direction and variation marks, skin tones, tags.
    (0x0300, 0x036F, 0.0), (0x0483, 0x0489, 0.0), (0x0591, 0x05C7, 0.0), (0x05D0, 0x05F2, 1.3), (0x0610, 0x061A, 0.0),
    (0x0620, 0x064A, 1.1), (0x064B, 0x065F, 0.0), (0x0671, 0x06D3, 1.1), (0x06D6, 0x06ED, 0.0),
    (0x0E00, 0x0EFF, 1.2), (0x1000, 0x109F, 1.2), (0x1780, 0x17FF, 1.2),
    (0x200B, 0x200F, 0.0), (0x202A, 0x202E, 0.0), (0x2060, 0x206F, 0.0), (0x20D0, 0x20FF, 0.0),
    (0x2E80, 0x2FDF, 3.5), (0x3005, 0x3007, 3.5), (0x3041, 0x312F, 1.6), (0x31A0, 0x31FF, 1.6), (0x3400, 0x4DBF, 3.5),
    (0x4E00, 0x9FFF, 3.5), (0xAC00, 0xD7A3, 2.25), (0xF900, 0xFAFF, 3.5), (0xFE00, 0xFE0F, 0.0), (0xFEFF, 0xFEFF, 0.0),
    (0xFF66, 0xFF9D, 1.6), (0x1F3FB, 0x1F3FF, 0.0), (0x20000, 0x3FFFF, 3.5), (0xE0000, 0xE01EF, 0.0),
)  # fmt: skip
_STARTS = [start for start, _, _ in _RANGES]


def reading_length(text: str) -> float:
    """Return the length of a text in characters of Latin script that say as much, without the space around it."""
    if text.isascii():
        return len(text.strip())
    return sum(map(_weight, normalize("NFC", text).strip()))


def reads_shorter(text: str, minimum: int) -> bool:
    """Return `reading_length(text) < minimum`, without weighing the characters of a text that is clearly long enough.

    A text of many invisible characters may count as long.
    """
    return len(text) <= 8 * minimum and reading_length(text) < minimum


def _weight(character: str) -> float:
    if character < "\u0300":
        return 1.0
    code = ord(character)
    index = bisect_right(_STARTS, code) - 1
    _, end, weight = _RANGES[index]
    return weight if code <= end else 1.0
