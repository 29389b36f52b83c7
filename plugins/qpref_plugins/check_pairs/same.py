"""Tests for the same text and the same words, in any script.

Letters, digits, marks and symbols are content: `a < b` isn't `a > b`, and a thumb up isn't a thumb down. Punctuation,
case, the marks of Markdown and the width of a Japanese form are not.
"""

from __future__ import annotations

import re
from itertools import zip_longest
from unicodedata import category, normalize

_CHUNK = re.compile(r"\S+")
_WORD = re.compile(r"\w+")
_UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\uff01-\uff9f]")
_LINE_MARK = re.compile(r"^[ \t]*(?:#{1,6}|>|[-+*]|=+|-+)(?=\s|$)", re.MULTILINE)
_SIGN = re.compile(r"[+<>=%$#@&]|(?<=\d)[ ]?[-*/][ ]?(?=\d)|(?<![\w)])-(?=\d)")
_FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}
_FIRST = 64


def same_text(first: str, second: str) -> bool:
    """Return whether two texts are equal apart from white space and Unicode normalization (NFC).

    Compared word by word, since most pairs differ in the first; white space never combines with a letter.
    """
    return first == second or all(
        one is not None
        and other is not None
        and (one[0] == other[0] or normalize("NFC", one[0]) == normalize("NFC", other[0]))
        for one, other in zip_longest(_CHUNK.finditer(first), _CHUNK.finditer(second))
    )


def same_indentation(first: str, second: str) -> bool:
    """Return False where the lines of two texts are the same but for their indentation, which is content of code."""
    lines, others = ([line for line in text.expandtabs(4).split("\n") if line.strip()] for text in (first, second))
    if [line.strip() for line in lines] != [line.strip() for line in others]:
        return True
    return _indentation(lines) == _indentation(others)


def _indentation(lines: list[str]) -> list[int]:
    widths = [len(line) - len(line.lstrip()) for line in lines]
    return [width - min(widths) for width in widths]


def same_words(first: str, second: str) -> bool:
    """Return whether two texts have the same words and symbols in the same order, ignoring case and punctuation.

    False for texts without a word. In scripts without spaces, punctuation doesn't divide words.
    """
    if _WORD.search(first) is None:
        return False
    if not all(
        one is not None and other is not None and (one[0] == other[0] or one[0].casefold() == other[0].casefold())
        for one, other in zip_longest(_WORD.finditer(first), _WORD.finditer(second))
    ):
        if _UNSPACED.search(first[:_FIRST] + second[:_FIRST]) is None:
            return False
        start, other_start = _letters(first[:_FIRST]), _letters(second[:_FIRST])
        common = min(len(start), len(other_start))
        if start[:common] != other_start[:common]:
            return False
    if _signs(first) != _signs(second):
        return False
    return (first.isascii() and second.isascii()) or _letters(first) == _letters(second)


def _letters(text: str) -> str:
    """Reduce a text to casefolded letters, digits and marks; many scripts write vowels as marks."""
    folded = normalize("NFC", text.translate(_FULL_WIDTH).casefold())
    return "".join(sign for sign in folded if category(sign)[0] not in "CPSZ")


def _signs(text: str) -> list[str]:
    """Return the symbols of a text: operators, currencies, emoji; a hyphen only where it subtracts or negates."""
    text = _LINE_MARK.sub("", text)
    signs = [sign.strip() for sign in _SIGN.findall(text)]
    if not text.isascii():
        signs += [sign for sign in text if sign > "\x7f" and category(sign)[0] == "S"]
    return signs
