"""LaTeX whose backslash was read as an escape: `\\times` became a tab and `imes`, `\\nabla` a newline and `abla`.

JSON and Python turn an undoubled `\\t`, `\\n` or `\\r` into white space without an error. Most remainders are words of
no language and count anywhere. Those that may be words (`au`, `o`, `u`) count in inline math only, and not where they
start an indented line.
"""

from __future__ import annotations

import re

from qpref.records import PreferencePair, UnpairedExample

_NO_WORDS = {
    "\t": r"heta|imes|riangle(?:q|down|left|right|lefteq|righteq)?|herefore|oprule|hinspace|woheadrightarrow|extstyle|"
    r"(?:ext|extbf|extit|extrm|exttt|extsf|extsc|extcolor|ilde|ag|binom)(?=\{)|frac(?=[\d{])",
    "\n": r"abla|otin|ewline|ewcommand|ewpage|oindent|onumber|olimits|ormalsize|atural|earrow|warrow|subseteq|"
    r"eqslant",
    "\r": r"ho|ight(?:left|leftharpoons|arrow|harpoonup|harpoondown)?|enewcommand|ef(?=\{)|ule(?=\{)",
}
_WORDS = {"\t": "au|o|an|anh|op|ilde", "\n": "u|e|eq|eg|i|ot|geq|leq|mid", "\r": "angle|floor|ceil|m|oot"}


def _pattern(start: str, rests: str) -> re.Pattern[str]:
    return re.compile(f"{start}(?:{rests})(?![A-Za-z])")


_ANYWHERE = {start: _pattern(start, rests) for start, rests in _NO_WORDS.items()}
_IN_MATH = {start: _pattern(rf"(?<![\t\n\r]){start}", rests) for start, rests in _WORDS.items()}
_INLINE_MATH = re.compile(
    r"(?<![\\$\w])\$(?![ $]|\s(?![a-z]))([^$]{1,200}?)(?<!\s)\$(?![\d$])|\\\((.{1,200}?)\\\)", re.DOTALL
)
_LETTERS = {"\t": "t", "\n": "n", "\r": "r"}


def escaped_away(example: PreferencePair | UnpairedExample) -> str:
    """Name the first command that lost its backslash in each text of an example; empty where none did."""
    sides = {"prompt": example.prompt}
    if isinstance(example, PreferencePair):
        sides |= {"chosen": example.chosen, "rejected": example.rejected}
    else:
        sides["completion"] = example.completion
    words = [
        f"{side}: '{word}' lost its backslash to the escape '{word[:2]}', JSON writes it '\\{word}'"
        for side, turns in sides.items()
        for turn in turns
        if (word := lost_backslash(turn.content))
    ]
    return "; ".join(words[:3])


def lost_backslash(text: str) -> str | None:
    """Return the first LaTeX command that lost its backslash, with it; None where there is none."""
    for start, pattern in _ANYWHERE.items():
        if start in text and (found := pattern.search(text)):
            return _restored(found[0])
    if "$" not in text and ("\\" not in text or "\\(" not in text):  # one character is found much faster than two
        return None
    for math in _INLINE_MATH.finditer(text):
        for start, pattern in _IN_MATH.items():
            if start in math[0] and (found := pattern.search(math[0])):
                return _restored(found[0])
    return None


def _restored(found: str) -> str:
    return f"\\{_LETTERS[found[0]]}{found[1:]}"
