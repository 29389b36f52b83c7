"""Why a text is not JSON, in terms of what wrote it, and what to do: the parser alone names a character."""

from __future__ import annotations

import json
import re

INCOMPLETE = "the row doesn't end on its line: it was cut off, or a line break or quote in a text isn't escaped"
FAULTS_OF_A_LINE = (INCOMPLETE, "a lone backslash", "a raw ", "the control character", "several objects", "a closing")
"""Starts of the causes that each line has for itself; the others are a notation, which a whole file is written in."""
_PYTHON = "as Python prints a dict; write rows with json.dumps"
_TYPOGRAPHIC = "\u201c\u201d\u201e\u2018\u2019\u00ab\u00bb"
_STRAY = {
    "\ufeff": "a byte order mark within the file, as where files were joined; remove it",
    "\0": "zero bytes, as where the end of a file was never written; copy the file again",
}
_WORD = re.compile(r"\w+")
_ESCAPED = re.compile(r"\\\w*")
_NAMES = {"\t": ("tab", "\\t"), "\r": ("carriage return", "\\r"), "\n": ("line break", "\\n")}


def cause_of(text: str, error: json.JSONDecodeError) -> str:
    """Name the cause of a parser's error and the fix; empty where none is known."""
    at, here, before = error.pos, text[error.pos : error.pos + 40], text[max(0, error.pos - 40) : error.pos].rstrip()
    if error.msg.startswith("Extra data"):
        return _extra_data(text, at)
    if error.msg.startswith("Invalid control character"):
        if here[:1] not in _NAMES:
            return f"the control character U+{ord(here[0]):04X} inside a text; remove it"
        name, escape = _NAMES[here[0]]
        return f"a raw {name} inside a text; JSON writes it {escape}"
    if _is_incomplete(text[at : at + 40], error):
        return INCOMPLETE
    if error.msg.startswith("Invalid \\"):
        return _bad_escape(text, at)
    return _bad_token(error.msg, here, before)


def _extra_data(text: str, at: int) -> str:
    rest = text[at:].lstrip(", \t")[:1]
    if rest == "{" and "\r" in text[max(0, at - 2) : at]:
        return "lines end in carriage returns only; convert them to newlines"
    if rest == "{":
        return "several objects on one line; write each on a line of its own"
    return "a closing bracket that nothing opens; remove it" if rest in ("}", "]") else ""


def _is_incomplete(here: str, error: json.JSONDecodeError) -> bool:
    """Return whether the text ends where more was expected."""
    if error.msg.startswith("Invalid \\u"):
        return len(here) < 6 and '"' not in here
    is_cut_word = any(word.startswith(here) for word in ("true", "false", "null")) or set(here) <= set("-+.eE")
    return not here.strip() or is_cut_word or error.msg.startswith("Unterminated string")


def _bad_escape(text: str, at: int) -> str:
    start = text.rfind("\\", 0, at + 1)
    word = _ESCAPED.match(text, max(start, 0))
    shown = word[0][:20] if word else "\\"
    return f"a lone backslash in '{shown}'; JSON writes a backslash twice: '\\{shown}'"


def _bad_token(message: str, here: str, before: str) -> str:
    """Name the cause of an error at a token."""
    word = _WORD.match(here)
    if here[:1] in _TYPOGRAPHIC:
        return f'typographic quotes ({here[0]}); JSON has straight ones (")'
    if here[:1] == "'":
        return f"single quotes, {_PYTHON}"
    if here[:1] in _STRAY:
        return _STRAY[here[0]]
    if here.startswith("```"):
        return "a fence of Markdown; remove the line"
    if here.startswith(("//", "/*", "#")):
        return "a comment, which JSON doesn't have"
    if (before.endswith(",") and here[:1] in "}]") or message.startswith("Illegal trailing comma"):
        return "a comma before a closing bracket; remove it"
    if word and word[0] in ("True", "False", "None"):
        return f"{word[0]}, {_PYTHON}"
    if word and word[0] in ("nan", "inf", "undefined"):
        return f"{word[0]} is not JSON; write null"
    if message.startswith("Expecting property name") and word:
        return "a key without quotes; JSON has keys in double quotes"
    if message.startswith("Expecting ','") and before.endswith('"'):
        return "a comma is missing, or a quote inside a text isn't written \\\""
    return ""
