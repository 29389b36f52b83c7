"""Responses that are no answer: placeholders, and signs without a word, where the prompt doesn't ask for them."""

from __future__ import annotations

import re

LONGEST_PLACEHOLDER = 60

_WORDS = frozenset({
    "none", "null", "nil", "nan", "n/a", "na", "tbd", "tba", "todo", "undefined", "unknown", "blank", "empty",
    "missing", "deleted", "removed", "redacted", "placeholder", "lorem", "ipsum", "no output", "no response",
    "no answer", "no input", "not applicable", "not available", "lorem ipsum",
})  # fmt: skip
_VALUES = frozenset({"none", "null", "nil", "nan", "undefined", "empty", "todo", "unknown", "n/a", "na"})
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
_STRUCTURE = re.compile(r"[,;=\"()]")
_ABOUT_VALUES = re.compile(
    r"```|\bcode\b|python|java|\bsql\b|json|yaml|\bapi\b|print|return|variable|function|\bprogram|evaluat|regex|jinja|"
    r"mustache|classif|categor|\blabel|extract|\bfield|\bcolumn|\bform\b|options?\b|choose|\bif (?:not|there|no|you)|"
    r"otherwise|symbol|element|abbreviat|formula|how (?:many|much)|which (?:of|one)|are there|is there|\bany\b|\bwho\b|"
    r"\bwhen (?:was|did|is)|\bwhere (?:was|is)|\u00bf",
    re.IGNORECASE,
)
_ANY_WORD = re.compile(r"[^\W_]")
_MEANS_SOMETHING = re.compile("[\u2200-\u22ff\u2190-\u21ff\u2800-\u28ff]")  # mathematics, arrows, Braille
_ASKS_FOR_SIGNS = re.compile(
    r"emoji|emoticon|smiley|kaomoji|symbol|\bsigns?\b|punctuat|operator|(?:which|what|special|single) character|"
    r"bracket|arrow|\bdraw|ascii|pattern|\bart\b|whitespace|\bblank|notation|regex|morse|braille|\bdash|\bicons?\b|"
    r"\breact|\bmarks?\b|símbolo|signe|zeichen|"
    r"表情|符号|符號|标点|標點|絵文字|顔文字|記号|이모|기호|"
    r"эмодзи|смайл|символ|знак|इमोजी|رمز|إيموجي|อีโมจิ|สัญลักษณ์",
    re.IGNORECASE,
)


def is_placeholder(answer: str, prompt: str) -> bool:
    """Return whether the whole response is a placeholder: `<nooutput>`, `N/A`, `[image]`, `[Link to the list]`.

    A value that the prompt names or asks for isn't one, nor is JSON or code.
    """
    answer = answer.strip()
    if len(answer) > LONGEST_PLACEHOLDER:
        return False
    word = answer.strip(" .!*_\"'`-").casefold()
    if word in _WORDS:
        return not _names(prompt, word) and not (word in _VALUES and _ABOUT_VALUES.search(prompt))
    if answer in ("...", "\u2026"):
        return True
    bracketed = _BRACKETED.fullmatch(answer)
    return bracketed is not None and _is_slot(bracketed) and not _names(prompt, answer)


def _is_slot(bracketed: re.Match[str]) -> bool:
    inner = (bracketed["angle"] or bracketed["square"] or bracketed["curly"]).strip(" |").casefold()
    if _NOTHING.fullmatch(inner) or inner in _WORDS or inner in _TOKENS:
        return True
    if bracketed["angle"] or _STRUCTURE.search(inner) or (bracketed["curly"] and ":" in inner):
        return False
    return not _SLOTS.isdisjoint(re.findall(r"[a-z]+", inner))


def _names(prompt: str, text: str) -> bool:
    """Return whether the prompt has the text as words of its own: one of the answers that it allows, in most cases."""
    return re.search(rf"(?<!\w){re.escape(text)}(?!\w)", prompt, re.IGNORECASE) is not None


def has_no_word(answer: str, prompt: str) -> bool:
    """Return whether the response has no letter and no digit of any script, though the prompt asks for words."""
    if _ANY_WORD.search(answer):
        return False
    if _MEANS_SOMETHING.search(answer) or _ASKS_FOR_SIGNS.search(prompt):
        return False
    last_line = prompt.rstrip().rpartition("\n")[2]
    return _ANY_WORD.search(last_line) is not None and not _is_quoted(answer.strip(), prompt)


def _is_quoted(answer: str, prompt: str) -> bool:
    return any(f"{left}{answer}{right}" in prompt for left, right in ("''", '""', "``", "()", "\u201c\u201d"))
