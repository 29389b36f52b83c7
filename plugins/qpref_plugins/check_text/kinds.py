"""Tests for kinds of unusable responses, each a function of the response and its prompt: markup, echoes and loops.

They are few and narrow on purpose: false positives hide the real ones. A number is a valid response, and so are code, a
table and a short label.
"""

from __future__ import annotations

import re

from qpref.hooks import reading_length

SHORTEST_ECHO = 16
TAIL_CHARACTERS = 16
FEWEST_REPEATS = 4
FEWEST_SEQUENCES = 10

# `re` doesn't count marks as letters, but many scripts write vowels with them. Chinese and Japanese have no spaces.
_IDEOGRAPH = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_MARKS = "\u0300-\u036f\u0591-\u05c7\u0610-\u065f\u0900-\u109f"
_LETTERS = re.compile(f"[{_IDEOGRAPH}]|(?:[^\\W\\d_{_IDEOGRAPH}]|[{_MARKS}])+")
_LETTERS_AND_DIGITS = re.compile(r"\w+")
_TABLE_ROW = re.compile(r"^[^\n|]*\|[^\n|]*\|.*$", re.MULTILINE)
_STRUCTURED = re.compile(r"\A\s*[\[{<]|```|~~~|^[ \t]*\|.*\|[ \t]*$|[;{}][ \t]*$", re.MULTILINE)
_ASKS_TO_REPEAT = re.compile(
    r"\brepeat|\btimes\b|\bover and over|\brepet|wiederhol|r\u00e9p\u00e9t|повтор|重复|重複|繰り返|반복", re.IGNORECASE
)
_ASKS_FOR_VERSE = re.compile(
    r"\bsong|lyric|chorus|refrain|\bchant|mantra|poem|poetry|rhyme|verse|villanelle|ballad|lullaby|hymn|\brap\b|"
    r"canci\u00f3n|poema|chanson|po\u00e8me|\blied|gedicht|песн|стих|歌|诗|詩|노래|가사|कविता|गीत|أغنية|قصيدة|เพลง",
    re.IGNORECASE,
)
_MARKUP = re.compile(
    r"&(?:nbsp|amp|lt|gt|quot|apos|#\d{2,5}|#x[0-9a-f]{2,5});|"
    r"</?(?:p|br|div|span|a|b|i|u|ul|ol|li|td|tr|th|table|font|img|strong|em|h[1-6])(?:\s[^<>]*)?/?>",
    re.IGNORECASE,
)
_ABOUT_MARKUP = re.compile(
    r"html|xml|css|markup|markdown|<[a-z/!]|&[a-z#0-9]+;|\bweb|\bcode|javascript|\bphp\b|\bjsx?\b|\bsvg\b|"
    r"\breact\b|\bvue\b|"
    r"angular|\btags?\b|landing page|scrap|\bwiki|epub|e-?mail template|\bsitio|\bp\u00e1gina|c\u00f3digo|"
    r"веб|сайт|страниц|код\b|"
    r"网页|網頁|网站|網站|代码|代碼|ウェブ|サイト|コード|웹|사이트|코드",
    re.IGNORECASE,
)
_DOCUMENT = re.compile(r"\s*<(?:!doctype|html|svg|\?xml)\b", re.IGNORECASE)
_CODE_STUB = re.compile(
    r"\s*(?:def |class |import |from \w+ import |@\w+|#include|function |public |private |const |let |var |fn |func |"
    r"package |using |<\?php|<!doctype|select )",
    re.IGNORECASE,
)


def has_markup(answer: str, prompt: str) -> bool:
    """Return whether the response has HTML outside of code and tables, and the prompt isn't about it.

    A tag alone is fine, and so is a whole document. Cells of a Markdown table have no other way to break a line.
    """
    if ("<" not in answer and "&" not in answer) or "`" in answer:
        return False
    text = _TABLE_ROW.sub("", answer) if "|" in answer else answer
    leftover = _MARKUP.search(text)
    if leftover is None or leftover[0] == answer.strip() or _DOCUMENT.match(answer):
        return False
    return _ABOUT_MARKUP.search(prompt) is None


def echoes(answer: str, asked: str) -> bool:
    """Return whether the response starts with the whole last turn of the prompt; quoting a part of it is fine.

    A response that completes code starts with that code.
    """
    asked = asked.strip()
    if not asked or not answer.lstrip().startswith(asked):
        return False
    return reading_length(asked) >= SHORTEST_ECHO and _CODE_STUB.match(asked) is None


def repeats(answer: str, prompt: str) -> bool:
    """Return whether the response is stuck in a loop: its end and most of its text are repetitions.

    End: one of its last two segments of `TAIL_CHARACTERS` occurs `FEWEST_REPEATS` times; two, since the numbers of a
    list differ. Text: more than half of its word 4-grams (without digits) occur earlier; four in five in songs and
    poems, which have refrains. Lines of code, tables and data that differ in their numbers are no repetitions.
    """
    answer = answer.rstrip()
    size = len(answer)
    if size < TAIL_CHARACTERS * FEWEST_REPEATS:
        return False
    for end in (size, size - TAIL_CHARACTERS):
        start = end - TAIL_CHARACTERS
        tail = answer[start:end]
        # Most responses end in new text, and finding the first occurrence is faster than counting.
        if answer.find(tail) < start and answer.count(tail) >= FEWEST_REPEATS:
            return _loops(answer, prompt)
    return False


def _loops(answer: str, prompt: str) -> bool:
    if _ASKS_TO_REPEAT.search(prompt):
        return False
    pattern = _LETTERS_AND_DIGITS if _STRUCTURED.search(answer) else _LETTERS
    words = pattern.findall(answer.casefold())
    sequences = list(zip(words, words[1:], words[2:], words[3:], strict=False))
    most = 0.2 if _ASKS_FOR_VERSE.search(prompt) else 0.5
    return len(sequences) >= FEWEST_SEQUENCES and len(set(sequences)) < most * len(sequences)
