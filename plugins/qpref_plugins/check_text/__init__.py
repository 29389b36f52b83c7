"""Validator `text`: responses that are no usable text: placeholders, broken encodings, loops, HTML markup, refusals.

Each kind has its own code and severity, so that a report counts them separately. All of them warn by default: a broken
response on the rejected side may be the reason why it was rejected.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache

from qpref.hooks import Field, Options, Severity, Split, Validator, hookimpl, report, text_of
from qpref.records import Finding, PreferencePair, UnpairedExample
from qpref_plugins.check_text.characters import has_unseen, is_garbled
from qpref_plugins.check_text.escapes import escaped_away
from qpref_plugins.check_text.formatted import FormattedTexts
from qpref_plugins.check_text.kinds import echoes, has_markup, repeats
from qpref_plugins.check_text.placeholders import has_no_word, is_placeholder
from qpref_plugins.check_text.refusals import declines


class TextChecks(Options):
    """Options of the validator `text`: a severity for each kind of response."""

    placeholder: Severity = Field(
        default="warn", description="the whole response is a placeholder: <nooutput>, N/A, None, [image], [Link to ...]"
    )
    no_word: Severity = Field(
        default="warn", description="a response without any letter or digit, unless the prompt asks for signs"
    )
    garbled: Severity = Field(
        default="warn", description="broken encoding: U+FFFD, or UTF-8 decoded as another encoding (mojibake)"
    )
    unseen: Severity = Field(
        default="warn", description="control characters, zero-width characters, direction overrides"
    )
    lost_backslash: Severity = Field(
        default="warn", description="LaTeX that lost its backslash to an escape: a tab and `imes` for `\\times`"
    )
    markup: Severity = Field(default="warn", description="HTML tags or entities outside of code and tables")
    echo: Severity = Field(default="warn", description="the response starts with the prompt's whole last turn")
    repetition: Severity = Field(default="warn", description="the response is stuck in a loop")
    refusal: Severity = Field(
        default="warn",
        description='a preferred response that refuses without an answer, or says "as an AI language model"',
    )
    turn_markers: Severity = Field(
        default="warn",
        description="a text that is formatted already (ChatML, Llama, Alpaca, Human: ... Assistant:), or "
        " a response that goes on into the next turn; a warning counts the rows of each source",
    )


WHAT = {
    "placeholder": "is a placeholder, not a response",
    "no_word": "has no letter or digit",
    "garbled": "has broken characters (a wrong encoding)",
    "unseen": "has control or invisible characters",
    "markup": "has HTML left in it",
    "echo": "starts with the whole prompt",
    "repetition": "is stuck in a loop",
    "refusal": 'refuses, or speaks "as an AI"',
}


class CheckText:
    """Check of single examples; keeps nothing but the number of rows with turn markers."""

    def __init__(self, options: TextChecks) -> None:
        self.options = options
        self.formatted = FormattedTexts(options.turn_markers)

    def look(self, example: PreferencePair | UnpairedExample, split: Split) -> Iterable[Finding]:
        """Return at most one finding of each kind, which names the sides that have it."""
        prompt, asked = text_of(example.prompt), example.prompt[-1].content
        others = [*self._lost_backslash(example), *self.formatted.look(example, split)]
        if isinstance(example, PreferencePair):
            chosen = kinds_of(text_of(example.chosen), prompt, asked)
            rejected = kinds_of(text_of(example.rejected), prompt, asked)
            rejected = tuple(code for code in rejected if code != "refusal")
            if not chosen and not rejected:
                return others
            found = [
                (code, _message(_sides(code in chosen, code in rejected), code))
                for code in WHAT
                if code in chosen or code in rejected
            ]
        else:
            kinds = kinds_of(text_of(example.completion), prompt, asked)
            found = [(code, _message("completion", code)) for code in kinds if example.label or code != "refusal"]
        return [finding for code, message in found for finding in self._found(code, message, example)] + others

    def finish(self) -> Iterable[Finding]:
        return self.formatted.finish()

    def _lost_backslash(self, example: PreferencePair | UnpairedExample) -> list[Finding]:
        message = escaped_away(example)
        return list(self._found("lost_backslash", message, example)) if message else []

    def _found(self, code: str, message: str, example: PreferencePair | UnpairedExample) -> tuple[Finding, ...]:
        severity: Severity = getattr(self.options, code)
        return report(severity, code, message, example.source)


def kinds_of(answer: str, prompt: str, asked: str) -> tuple[str, ...]:
    """Return the codes that apply to a response; a placeholder, or one without a word, has no other code.

    Args:
        prompt: text of all turns of the prompt.
        asked: text of its last turn.
    """
    if is_placeholder(answer, prompt):
        return ("placeholder",)
    if has_no_word(answer, prompt):
        return ("no_word",)
    found = (
        ("garbled", is_garbled(answer, prompt)),
        ("unseen", has_unseen(answer)),
        ("markup", has_markup(answer, prompt)),
        ("echo", echoes(answer, asked)),
        ("repetition", repeats(answer, prompt)),
        ("refusal", declines(answer, prompt)),
    )
    return tuple(code for code, fits in found if fits)


def _sides(chosen: bool, rejected: bool) -> str:
    return "chosen and rejected" if chosen and rejected else "chosen" if chosen else "rejected"


@cache
def _message(subject: str, code: str) -> str:
    """Build the message of a kind once; all its findings share the text."""
    what = WHAT[code]
    if subject == "chosen and rejected":
        return f"chosen and rejected: each {what}"
    return f"{subject} {what}"


@hookimpl
def qpref_validators() -> Iterator[Validator]:
    yield Validator(
        name="text",
        summary="unusable responses: placeholders, broken encodings, loops, markup, refusals",
        options=TextChecks,
        start=CheckText,
    )
