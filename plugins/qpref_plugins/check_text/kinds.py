"""Tests for kinds of unusable responses, each a function of the response.

They are few and narrow on purpose: false positives hide the real ones. A number is a valid response, and so are code, a
table and a short label.
"""

from __future__ import annotations

import re
from functools import lru_cache

LONGEST_PLACEHOLDER = 60
SHORTEST_ECHO = 16
TAIL_CHARACTERS = 16
FEWEST_REPEATS = 4
FEWEST_SEQUENCES = 10

_PLACEHOLDER_WORDS = frozenset({
    "none", "null", "nil", "nan", "n/a", "na", "tbd", "tba", "todo", "undefined", "unknown", "blank", "empty",
    "missing", "deleted", "removed", "redacted", "placeholder", "lorem", "ipsum", "no output", "no response",
    "no answer", "no input", "not applicable", "not available", "lorem ipsum",
})  # fmt: skip
_SLOTS = frozenset({
    "answer", "article", "attachment", "audio", "chart", "content", "deleted", "file", "graph", "graphic",
    "here", "image", "img", "input", "insert", "link", "name", "output", "photo", "picture", "playlist",
    "redacted", "removed", "response", "table", "template", "text", "url", "video", "website",
})  # fmt: skip
_TOKENS = frozenset({
    "s", "/s", "unk", "pad", "eos", "bos", "sep", "cls", "mask", "endoftext", "end", "blank", "empty", "none",
    "null",
})  # fmt: skip
_BRACKETED = re.compile(r"<(?P<angle>[^<>]+)>|\[(?P<square>[^\[\]]+)\]|\{\{?(?P<curly>[^{}]+)\}?\}")
_NOTHING = re.compile(r"no[ _-]?(?:input|output|answer|response|text|content|data|result)s?")
_LETTERS = re.compile(r"[^\W\d_]+")
_ANY_WORD = re.compile(r"[^\W_]")
_PLAIN = bytes(code for code in range(127) if code >= 32 or code in b"\t\n\r\f\v")
"""ASCII characters that no test of characters looks for."""
# UTF-8 read as Windows-1252 or Latin-1. Closing quotes are left out: they may follow a real A with a tilde.
_GARBLED = re.compile(
    "\ufffd|[\u00c2\u00c3][\u0080-\u009f\u00a1-\u00aa\u00ac-\u00ba\u00bc-\u00bf]|\u00e2\u20ac[^\\s\\w]|\u00f0\u0178|"
    "\u00ef\u00bb\u00bf|\u00ef\u00bf\u00bd"
)
_MAY_BE_GARBLED = re.compile("\ufffd|[\u00c2\u00c3][\u0080-\u00bf]|\u00e2\u20ac|\u00f0\u0178|\u00ef[\u00bb\u00bf]")
_UNSEEN = re.compile(
    "[\x00-\x08\x0e-\x1f\x7f\u0080-\u009f\u200b\u2060\ufeff\u202a-\u202e\u2066-\u2069]|(?<![\U0001f3f4\U000e0020-\U000e007f])[\U000e0020-\U000e007f]{4}"
)
_MAY_BE_UNSEEN = re.compile(
    "[\x00-\x08\x0e-\x1f\x7f\u0080-\u009f\u200b\u2060\ufeff\u202a-\u202e\u2066-\u2069\U000e0020-\U000e007f]"
)
"""Finds what the pattern above does, and more, in the text's odd characters alone."""
_MARKUP = re.compile(
    r"&(?:nbsp|amp|lt|gt|quot|apos|#\d{2,5}|#x[0-9a-f]{2,5});|"
    r"</?(?:p|br|div|span|a|b|i|u|ul|ol|li|td|tr|th|table|font|img|strong|em|h[1-6])(?:\s[^<>]*)?/?>",
    re.IGNORECASE,
)
_ABOUT_MARKUP = re.compile(
    r"html|xml|css|markup|markdown|<[a-z/!]|&[a-z#0-9]+;|\bweb|\bcode|javascript|\bphp\b|\bjsx?\b", re.IGNORECASE
)
_DISCLAIMERS = (
    "as an ai ",
    "as an ai,",
    "as a language model",
    "as a large language model",
    "i am an ai language model",
    "i'm an ai language model",
    "i am just an ai",
    "i'm just an ai",
)
_REFUSALS = tuple(
    opening + end
    for opening in ("", "i'm sorry, but ", "i am sorry, but ", "sorry, but ", "i apologize, but ")
    for end in ("i can't ", "i cannot ", "i'm unable to ", "i am unable to ", "i'm not able to ", "i am not able to ")
)
_FIRST_LETTERS = frozenset("IiSs")
_HELP = ("assist", "help", "provide", "fulfill", "comply", "answer", "create", "generate", "write", "do that")


def is_placeholder(answer: str) -> bool:
    """Return whether the whole response is a placeholder: `<nooutput>`, `N/A`, `[image]`, `[Link to the list]`."""
    answer = answer.strip()
    if len(answer) > LONGEST_PLACEHOLDER:
        return False
    if answer.strip(" .!*_\"'`-").casefold() in _PLACEHOLDER_WORDS or answer in ("...", "\u2026"):
        return True
    bracketed = _BRACKETED.fullmatch(answer)
    if bracketed is None:
        return False
    inner = (bracketed["angle"] or bracketed["square"] or bracketed["curly"]).strip(" |").casefold()
    if _NOTHING.fullmatch(inner) or inner in _PLACEHOLDER_WORDS or inner in _TOKENS:
        return True
    return bracketed["angle"] is None and not _SLOTS.isdisjoint(re.findall(r"[a-z]+", inner))


def has_no_word(answer: str) -> bool:
    """Return whether the response has no letter and no digit of any script."""
    return _ANY_WORD.search(answer) is None


def is_garbled(answer: str) -> bool:
    """Return whether the response has U+FFFD, or character sequences of UTF-8 decoded as another encoding."""
    odd = odd_characters(answer)
    return _MAY_BE_GARBLED.search(odd) is not None and _GARBLED.search(answer) is not None


def has_unseen(answer: str) -> bool:
    """Return whether the response has control or invisible characters: zero-width, direction overrides, tags."""
    odd = odd_characters(answer)
    return _MAY_BE_UNSEEN.search(odd) is not None and _UNSEEN.search(answer) is not None


@lru_cache(maxsize=2)
def odd_characters(answer: str) -> str:
    """Return the characters of a text that aren't plain ASCII, in order: few, so that patterns are fast on them."""
    return answer.encode("utf-8", "replace").translate(None, _PLAIN).decode()


def has_markup(answer: str, prompt: str) -> bool:
    """Return whether the response has HTML outside of code, and the prompt isn't about it; a tag alone is fine."""
    if "<" not in answer and "&" not in answer:
        return False
    leftover = _MARKUP.search(answer)
    if leftover is None or leftover[0] == answer.strip():
        return False
    return "`" not in answer and _ABOUT_MARKUP.search(prompt) is None


def echoes(answer: str, prompt: str) -> bool:
    """Return whether the response starts with the whole prompt; quoting a part of it is fine."""
    prompt = prompt.strip()
    return len(prompt) >= SHORTEST_ECHO and answer.lstrip().startswith(prompt)


def repeats(answer: str) -> bool:
    """Return whether the response is stuck in a loop: its end and most of its text are repetitions.

    End: one of its last two segments of `TAIL_CHARACTERS` occurs `FEWEST_REPEATS` times; two, since the numbers of a
    list differ. Text: more than half of its word 4-grams (without digits) occur earlier.
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
            words = _LETTERS.findall(answer.casefold())
            sequences = list(zip(words, words[1:], words[2:], words[3:], strict=False))
            return len(sequences) >= FEWEST_SEQUENCES and 2 * len(set(sequences)) < len(sequences)
    return False


def declines(answer: str) -> bool:
    """Return whether the response opens with a refusal, or calls itself a language model near its start."""
    start = answer[:300].lstrip()
    if "AI" in start or "language model" in start:
        lower = start.replace("\u2019", "'").casefold()
        if any(phrase in lower for phrase in _DISCLAIMERS):
            return True
    if start[:1] not in _FIRST_LETTERS:
        return False
    lower = start[:80].replace("\u2019", "'").casefold()
    return lower.startswith(_REFUSALS) and any(word in lower for word in _HELP)
