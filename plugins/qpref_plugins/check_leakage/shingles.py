"""Hash the word 5-grams (shingles) of many prompts at once, ignoring case and punctuation.

Scripts without spaces have sequences of characters for words; single characters would make a 5-gram of two words, and
near leaks of prompts that share no more than their phrasing.

The bytes of a prompt are the coefficients of a polynomial over the integers modulo 2^64 (Rabin-Karp): with running
sums, the hash of any sequence of words is one subtraction, which numpy does for all prompts of a batch together.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from unicodedata import normalize

import numpy as np
from numpy.typing import NDArray

WORDS = 5
IDEOGRAPHS, SYLLABLES = 4, 6
"""Lengths of the sequences that stand for words in scripts without spaces."""
MOST_CHARACTERS = 1 << 16

_BASE = 0x9E3779B97F4A7C15 | 1
_SPACE, _END = ord(" "), ord("\n")
_PLAIN = bytes(
    ord(chr(code).lower()) if chr(code).isalnum() and code < 128 else code if code >= 128 else _SPACE
    for code in range(256)
)
# Operators make another question of the same words: 5 + 3 and 5 - 3, a < b and a > b, C and C++. So do emoji.
# One class in front lets `re` skip to the few signs; a double asterisk is Markdown's.
_OPERATOR = re.compile(
    r"[-+*/^%$<>=#](?<!\*\*)(?!\*)(?:(?<=[0-9][-+*/^%])|(?<=[0-9][ ][-+*/^%])|(?<=[-+*/^$])(?=[ ]?[0-9])|"
    r"(?:(?<=\w[<>=+^])|(?<=\w[ ][<>=+^]))=?(?=[ ]?[\w(])|(?<=[A-Za-z]\+)\+(?!\w)|(?<=[A-Za-z]#)(?!\w))"
)
_SYMBOLS = "\u00ac\u00b1\u00d7\u00f7\u20a0-\u20bf\u2190-\u23ff\u25a0-\u27bf\u2900-\u2bff\U0001f000-\U0001faff"
_SYMBOL = re.compile(f"[{_SYMBOLS}]")
# `re` doesn't count marks as letters, but many scripts write their vowels with them.
_NO_WORD = re.compile(
    f"[^\\w\u0300-\u036f\u0591-\u05c7\u0610-\u065f\u0900-\u109f\u1780-\u17ff\u1a00-\u1bff\ua800-\uabff{_SYMBOLS}]+|_"
)
_IDEOGRAPHS = "[\u3005-\u3007\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
# A consonant of Thai, Lao, Burmese or Khmer with its marks.
_SYLLABLES = (
    "(?:[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]"
    "[\u0e31\u0e34-\u0e3a\u0e47-\u0e4e\u0eb1\u0eb4-\u0ebc\u0ec8-\u0ecd\u102b-\u103e\u1056-\u1059\u17b4-\u17d3]*)"
)
_UNSPACED = re.compile(f"{_IDEOGRAPHS}(?: ?{_IDEOGRAPHS})*|{_SYLLABLES}(?: ?{_SYLLABLES})*")
_UNIT = re.compile(f"{_IDEOGRAPHS}|{_SYLLABLES}")
_UNIT_IS_IDEOGRAPH = re.compile(_IDEOGRAPHS)

U64 = NDArray[np.uint64]
I64 = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Shingled:
    """Hashes of a batch of prompts.

    Attributes:
        whole: [prompts] hash of each whole prompt, 0 for one without a word.
        hashes: [shingles] hashes of the 5-grams, prompt after prompt.
        prompt: [shingles] index in the batch of the prompt of each 5-gram.
    """

    whole: U64
    hashes: U64
    prompt: I64


def plain(text: str) -> bytes:
    """Casefold and NFKC-normalize a text, and replace everything but letters, marks, digits and operators by spaces.

    Only the first `MOST_CHARACTERS` count. The words of scripts without spaces are overlapping sequences of characters.
    """
    text = _OPERATOR.sub(_name_of, text[:MOST_CHARACTERS])
    if text.isascii():
        return text.encode().translate(_PLAIN)
    folded = _NO_WORD.sub(" ", normalize("NFKC", text).casefold())
    return _UNSPACED.sub(_sequences, _SYMBOL.sub(r" \g<0> ", folded)).encode("utf-8", "replace")


def _name_of(operator: re.Match[str]) -> str:
    return f" operator{'x'.join(str(ord(sign)) for sign in operator[0].strip())} "


def _sequences(run: re.Match[str]) -> str:
    """Make words of a run without spaces, so that 5 of them are 8 characters of Chinese or 10 syllables of Thai."""
    units = _UNIT.findall(run[0])
    size = IDEOGRAPHS if _UNIT_IS_IDEOGRAPH.match(units[0]) else SYLLABLES
    words = ("".join(units[start : start + size]) for start in range(max(1, len(units) - size + 1)))
    return f" {' '.join(words)} "


def shingle(prompts: Sequence[bytes]) -> Shingled:
    """Hash prompts that `plain` has normalized."""
    bytes_ = np.frombuffer(b"\n" + b"\n".join(prompts) + b"\n", dtype=np.uint8)
    gap = (bytes_ == _SPACE) | (bytes_ == _END)
    kept = np.flatnonzero(~gap | (bytes_ == _END) | ~np.r_[True, gap[:-1]])
    bytes_, gap = bytes_[kept], gap[kept]
    powers, inverses = _powers(1 << len(bytes_).bit_length())
    sums = np.zeros(len(bytes_) + 1, dtype=np.uint64)
    np.cumsum(bytes_ * powers[: len(bytes_)], out=sums[1:])
    starts = np.flatnonzero(gap[:-1] & ~gap[1:]) + 1
    ends = np.flatnonzero(~gap[:-1] & gap[1:]) + 1
    prompt_of = np.cumsum(bytes_ == _END)[starts] - 1
    num_words = np.bincount(prompt_of, minlength=len(prompts))
    first = np.cumsum(num_words) - num_words
    same = prompt_of[: max(0, len(starts) - WORDS + 1)] == prompt_of[WORDS - 1 :]
    opening = np.flatnonzero(same)
    hashes = _mixed((sums[ends[opening + WORDS - 1]] - sums[starts[opening]]) * inverses[starts[opening]])
    whole = np.zeros(len(prompts), dtype=np.uint64)
    some = np.flatnonzero(num_words)
    from_, to = starts[first[some]], ends[first[some] + num_words[some] - 1]
    whole[some] = _mixed((sums[to] - sums[from_]) * inverses[from_])
    return Shingled(whole, hashes, prompt_of[opening])


def _mixed(hashes: U64) -> U64:
    """Mix the bits: the low bits of such a polynomial depend only on low bits of its coefficients."""
    hashes = hashes ^ (hashes >> np.uint64(32))
    hashes *= np.uint64(0xD6E8FEB86659FD93)
    hashes ^= hashes >> np.uint64(32)
    return hashes


@lru_cache(maxsize=1)
def _powers(count: int) -> tuple[U64, U64]:
    """Return the powers of the base and of its inverse modulo 2^64."""
    both = []
    for base in (_BASE, pow(_BASE, -1, 1 << 64)):
        factors = np.full(count, base, dtype=np.uint64)
        factors[0] = 1
        both.append(np.multiply.accumulate(factors))
    return both[0], both[1]
