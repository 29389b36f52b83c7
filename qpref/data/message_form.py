"""Form in which a chat template reads messages, found by rendering probe conversations.

Most templates encode a call's arguments as JSON themselves; some insert them as text. Reasoning has three names. Some
multimodal templates read contents as lists of parts alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product

from qpref.records import Message
from qpref.rows.messages import REASONING

KEY, VALUE = "qpref_key", "qpref value"
ID = "qprefcall"
"""Mistral's templates require ids of nine letters and digits."""
TOOL: dict[str, object] = {
    "type": "function",
    "function": {"name": "qpref_call", "description": "none", "parameters": {"type": "object", "properties": {}}},
}
CALL = {"id": ID, "type": "function", "function": {"name": "qpref_call", "arguments": {KEY: VALUE}}}
ASK = Message(role="user", content="qpref asks")
ANSWER = Message(role="assistant", content="qpref answers")
THINKING = replace(ANSWER, extra={REASONING[0]: VALUE})
CALLING = Message(role="assistant", content="", extra={"tool_calls": [CALL]})
RESULT = Message(role="tool", content="qpref result", extra={"name": "qpref_call", "tool_call_id": ID})

Turns = list[dict[str, object]]


@dataclass(frozen=True, slots=True)
class MessageForm:
    """Form of messages for one template.

    Attributes:
        arguments_as_text: a call's arguments are JSON text, which the template inserts; else an object, which it
            encodes.
        reasoning: key of the reasoning.
        content_as_parts: a content is a list of one part; else a text.
    """

    arguments_as_text: bool = False
    reasoning: str = REASONING[0]
    content_as_parts: bool = False

    @classmethod
    def of(cls, render: Callable[[Turns, list[dict[str, object]] | None], str | None]) -> MessageForm:
        """Choose the first form in which the template writes the probes' contents, reasoning and arguments.

        Args:
            render: renders turns and tools; returns None where the template refuses them.
        """

        def first(forms: Sequence[MessageForm], *turns: Message) -> MessageForm | None:
            text = str(turns[-1].extra.get(REASONING[0], turns[-1].content))
            return next((form for form in forms if _shows(render(form.dicts(turns), None) or "", text)), None)

        base = first([cls(), cls(content_as_parts=True)], ASK, ANSWER) or cls()
        base = first([replace(base, reasoning=key) for key in REASONING], ASK, THINKING) or base
        for turns, tools in product([(ASK, CALLING, RESULT), (ASK, CALLING)], [[TOOL], None]):
            for form in (base, replace(base, arguments_as_text=True)):
                if _shows_arguments(render(form.dicts(turns), tools) or ""):
                    return form
        return base

    def dicts(self, messages: Iterable[Message]) -> Turns:
        """Convert messages to the template's input."""
        return [self._dict(message) for message in messages]

    def _dict(self, message: Message) -> dict[str, object]:
        turn: dict[str, object] = {"role": message.role, "content": message.content, **message.extra}
        if REASONING[0] in turn:
            turn[self.reasoning] = turn.pop(REASONING[0])
        if self.content_as_parts:
            turn["content"] = [{"type": "text", "text": message.content}]
        calls = turn.get("tool_calls")
        if self.arguments_as_text and isinstance(calls, list):
            turn["tool_calls"] = [_with_text(call) for call in calls]
        return turn


def _with_text(call: dict[str, object]) -> dict[str, object]:
    function = call.get("function")
    if not isinstance(function, dict) or isinstance(function.get("arguments", ""), str):
        return call
    return call | {"function": function | {"arguments": json.dumps(function["arguments"], ensure_ascii=False)}}


def _shows(rendered: str, text: str) -> bool:
    """Return whether a text is in a rendering, and not within the notation of a list of parts."""
    return text in rendered and "'type'" not in rendered and '"type"' not in rendered


def _shows_arguments(rendered: str) -> bool:
    """Return whether the probe's arguments are in a rendering: as JSON, or key and value in the template's notation.

    Neither Python's notation counts, nor JSON that is encoded twice.
    """
    if json.dumps({KEY: VALUE}, separators=(",", ":")).replace(" ", "") in "".join(rendered.split()):
        return True
    wrong = (f"'{KEY}'", f'\\"{KEY}')
    return KEY in rendered and VALUE in rendered and not any(text in rendered for text in wrong)
