"""Form in which a chat template reads tool calls and reasoning, found by rendering a probe conversation.

Most templates encode a call's arguments as JSON themselves; some insert them as text. Reasoning has three names.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import product

from qpref.data.messages import REASONING
from qpref.records import Message

KEY, VALUE = "qpref_key", "qpref value"
ID = "qprefcall"
"""Mistral's templates require ids of nine letters and digits."""
TOOL: dict[str, object] = {
    "type": "function",
    "function": {"name": "qpref_call", "description": "none", "parameters": {"type": "object", "properties": {}}},
}
CALL = {"id": ID, "type": "function", "function": {"name": "qpref_call", "arguments": {KEY: VALUE}}}
ASK = Message(role="user", content="qpref asks")
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
    """

    arguments_as_text: bool = False
    reasoning: str = REASONING[0]

    @classmethod
    def of(cls, render: Callable[[Turns, list[dict[str, object]] | None], str | None]) -> MessageForm:
        """Choose the first form in which the template writes a probe's arguments, and its reasoning.

        Args:
            render: renders turns and tools; returns None where the template refuses them.
        """
        thinking = Message(role="assistant", content="qpref answers", extra={REASONING[0]: VALUE})
        forms = [cls(reasoning=key) for key in REASONING]
        reads = (form for form in forms if VALUE in (render(form.dicts([ASK, thinking]), None) or ""))
        reasoning = next(reads, cls()).reasoning
        for turns, tools in product([(ASK, CALLING, RESULT), (ASK, CALLING)], [[TOOL], None]):
            for form in (cls(as_text, reasoning) for as_text in (False, True)):
                if _shows_arguments(render(form.dicts(turns), tools) or ""):
                    return form
        return cls(reasoning=reasoning)

    def dicts(self, messages: Iterable[Message]) -> Turns:
        """Convert messages to the template's input."""
        return [self._dict(message) for message in messages]

    def _dict(self, message: Message) -> dict[str, object]:
        turn: dict[str, object] = {"role": message.role, "content": message.content, **message.extra}
        if REASONING[0] in turn:
            turn[self.reasoning] = turn.pop(REASONING[0])
        calls = turn.get("tool_calls")
        if self.arguments_as_text and isinstance(calls, list):
            turn["tool_calls"] = [_with_text(call) for call in calls]
        return turn


def _with_text(call: dict[str, object]) -> dict[str, object]:
    function = call.get("function")
    if not isinstance(function, dict) or isinstance(function.get("arguments", ""), str):
        return call
    return call | {"function": function | {"arguments": json.dumps(function["arguments"], ensure_ascii=False)}}


def _shows_arguments(rendered: str) -> bool:
    """Return whether the probe's arguments are in a rendering: as JSON, or key and value in the template's notation.

    Neither Python's notation counts, nor JSON that is encoded twice.
    """
    if json.dumps({KEY: VALUE}, separators=(",", ":")).replace(" ", "") in "".join(rendered.split()):
        return True
    wrong = (f"'{KEY}'", f'\\"{KEY}')
    return KEY in rendered and VALUE in rendered and not any(text in rendered for text in wrong)
