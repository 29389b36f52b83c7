"""Characters that a reader doesn't see, or that a wrong encoding has made of others."""

from __future__ import annotations

import re

from qpref.hooks.characters import odd_characters

# The bytes 0x80 to 0xbf, which follow the first of each character in UTF-8, as Latin-1 and Windows-1252 show them.
_NEXT = (
    "[\u0080-\u00bf\u20ac\u201a\u0192\u201e\u2026\u2020\u2021\u02c6\u2030\u0160\u2039\u0152\u017d\u2018\u2019\u201c\u201d"
    "\u2022\u2013\u2014\u02dc\u2122\u0161\u203a\u0153\u017e\u0178]"
)
_NEXT_CYRILLIC = "[\u00a0-\u00bb\u0400-\u040f\u0450-\u045f\u0490\u0491\u2010-\u2030\u2039\u203a\u20ac\u2116\u2122]"
# One class in front lets `re` skip to the few characters with which such a sequence starts.
_SEQUENCES = (
    "[\u00c2-\u00f0\u0420\u0421\u951f\ufffd](?:"
    "(?<=\ufffd)|(?<=\u951f)\u65a4\u62f7|(?<=\u00ef)(?:\u00bb\u00bf|\u00bf\u00bd)|"
    # UTF-8 read as Windows-1252 or Latin-1: accents (closing quotes are left out, as they may follow a real A with a
    # tilde), dashes and quotes, emoji; letters of Central Europe and Turkey inside a word.
    "(?<=[\u00c2\u00c3])[\u0080-\u009f\u00a1-\u00aa\u00ac-\u00ba\u00bc-\u00bf]|(?<=\u00f0)\u0178|"
    f"(?<=\u00e2)\u20ac%s|(?<=[\u00c4\u00c5]){_NEXT}%s|"
    # The same of scripts with two and with three bytes for each letter: letters in a row are no coincidence.
    f"(?<=[\u00c3-\u00df]){_NEXT}(?:[\u00c3-\u00df]{_NEXT}){{2}}|"
    f"(?<=[\u00e0-\u00ef]){_NEXT}{{2}}[\u00e0-\u00ef]{_NEXT}{{2}}|"
    # Cyrillic in UTF-8 read as Windows-1251.
    f"(?<=[\u0420\u0421]){_NEXT_CYRILLIC}(?:[\u0420\u0421]{_NEXT_CYRILLIC}){{3}})"
)
_GARBLED = re.compile(_SEQUENCES % (r"[^\s\w]", "(?=[a-z])"))
_MAY_BE_GARBLED = re.compile(_SEQUENCES % ("", ""))
"""Finds what the pattern above does, and more, in the text's odd characters alone."""
_ABOUT_ENCODING = re.compile(
    r"unicode|utf-?\d|encod|mojibake|replacement character|latin-?1|cp125\d|charset|\ufffd", re.I
)
_UNSEEN = re.compile(
    "[\x00-\x08\x0e-\x1f\x7f\u0080-\u009f\u2060\ufeff\u202d\u202e]|"
    "(?<![\U0001f3f4\U000e0020-\U000e007f])[\U000e0020-\U000e007f]{4}"
)
# Scripts that write no spaces, where zero-width ones divide words: Thai, Lao, Burmese, Khmer, Tai Tham, Cham.
_UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u1a20-\u1aaf\ua9e0-\ua9ff\uaa00-\uaa7f]")
_MAY_BE_UNSEEN = re.compile(
    "[\x00-\x08\x0e-\x1f\x7f\u0080-\u009f\u200b\u2060\ufeff\u202a-\u202e\u2066-\u2069\U000e0020-\U000e007f]"
)
_DIRECTIONS = re.compile("[\u202a-\u202c\u2066-\u2069]")
_OPENS = frozenset("\u202a\u202b\u2066\u2067\u2068")
_RIGHT_TO_LEFT = re.compile("[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefc\U00010800-\U00010fff\U0001e800-\U0001efff]")


def is_garbled(answer: str, prompt: str) -> bool:
    """Return whether the response has U+FFFD, or character sequences of UTF-8 decoded as another encoding."""
    if _MAY_BE_GARBLED.search(odd_characters(answer)) is None:
        return False
    return _GARBLED.search(answer) is not None and _ABOUT_ENCODING.search(prompt) is None


def has_unseen(answer: str) -> bool:
    """Return whether the response has control or invisible characters: zero-width, direction overrides, tags.

    Zero-width spaces of a text in Thai, Khmer, Lao or Burmese, and directions that are set back in a text from
    right to left, are part of the text.
    """
    if _MAY_BE_UNSEEN.search(odd_characters(answer)) is None:
        return False
    if "\u200b" in answer and _UNSPACED.search(answer) is None:
        return True
    return _UNSEEN.search(answer) is not None or _stray_directions(answer)


def _stray_directions(answer: str) -> bool:
    signs = _DIRECTIONS.findall(answer)
    if not signs:
        return False
    return 2 * sum(sign in _OPENS for sign in signs) != len(signs) or _RIGHT_TO_LEFT.search(answer) is None
