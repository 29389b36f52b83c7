"""Texts that are formatted already: another chat template's tokens or labels, and responses that go on past their end.

qpref puts each text into the model's own template, so a marker in it becomes text that the model learns to read and to
write. One warning for each family and source; as an error, one for each row.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from qpref.hooks import RowCounts, Severity, Split, report
from qpref.records import Finding, Message, PreferencePair, UnpairedExample
from qpref_plugins.check_text.template_tokens import END_OF_TEXT, FAMILIES, FAMILY_OF, find_token, mentions_token
from qpref_plugins.check_text.turn_labels import next_turn, prompt_labels, response_labels

CODE = "turn_markers"

_ABOUT_TEMPLATES = re.compile(
    r"template|tokeni[sz]|\btokens?\b|chatml|\balpaca\b|prompt format|\bLLMs?\b|fine-?tun|\bllama|\bmistral|\bgemma",
    re.IGNORECASE,
)


class FormattedTexts:
    """Counts the rows with markers, by family, and those whose responses go on into the next turn."""

    def __init__(self, severity: Severity) -> None:
        self.severity = severity
        self.formatted = RowCounts()
        self.continued = RowCounts()

    def look(self, example: PreferencePair | UnpairedExample, split: Split) -> Sequence[Finding]:
        """Count an example's row; as an error, return the finding that refuses it."""
        if self.severity == "off":
            return ()
        families, labels = find_markers(example)
        if self.severity == "warn":
            self.formatted.add(example.source, split, families)
            self.continued.add(example.source, split, labels)
            return ()
        parts = [f"a text is formatted already, with {family}" for family in families]
        parts += [f"a response goes on into the next turn ({label})" for label in labels]
        return report("error", CODE, "; ".join(parts), example.source) if parts else ()

    def finish(self) -> Iterator[Finding]:
        for counts in self.formatted:
            for family, rows in counts.items():
                message = (
                    f"{rows.share} have a text that is formatted already, with {family}, {rows.lines}. The model's own "
                    "chat template comes around it: remove the markers, and write several turns as messages"
                )
                yield from report("warn", CODE, message, rows.source)
        for counts in self.continued:
            for label, rows in counts.items():
                message = f"{rows.share} have a response that goes on into the next turn ({label}), {rows.lines}"
                yield from report("warn", CODE, f"{message}. Cut it there", rows.source)


def find_markers(example: PreferencePair | UnpairedExample) -> tuple[set[str], set[str]]:
    """Find the families that an example's texts are formatted for, and the labels that its responses go on with."""
    families = {family for message in example.prompt if (family := _prompt_family(message))}
    asked, in_prompt = example.prompt[-1].content, bool(families)
    labels = set()
    for turns in (example.chosen, example.rejected) if isinstance(example, PreferencePair) else (example.completion,):
        text = turns[-1].content
        family = _response_family(text) or response_labels(text, asked)
        if family and (in_prompt or not _asks_about_templates(asked)):
            families.add(family)
        if label := next_turn(text, asked):
            labels.add(label)
    if len(families) > 1:
        families.discard(_named(FAMILIES[END_OF_TEXT][0]))
    return families, labels


def _asks_about_templates(prompt: str) -> bool:
    return mentions_token(prompt) or _ABOUT_TEMPLATES.search(prompt) is not None


def _prompt_family(message: Message) -> str | None:
    text = message.content
    if message.role == "user" and (labels := prompt_labels(text)):
        return labels
    found = find_token(text)
    if found is None or found.place == "inside":
        return None  # a question about the token, in most cases
    return None if found.place != "start" and _ABOUT_TEMPLATES.search(text) else _named(found.token)


def _response_family(text: str) -> str | None:
    found = find_token(text)
    if found is None or (found.place in ("line", "inside") and _ABOUT_TEMPLATES.search(text)):
        return None
    return _named(found.token)


def _named(token: str) -> str:
    """Name a token's family, and its first token, which is the one that people know it by."""
    family = FAMILY_OF[token]
    return f"{family} (such as {FAMILIES[family][0]})"
