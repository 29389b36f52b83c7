"""A conversation -> the texts of its prompt and of its responses, by the model's own chat template.

The prompt is what the template makes for generation, and a response is what it puts after that once the response
follows. A template may do otherwise (drop a response's thinking, or open a thinking block in the prompt alone); such
rows are mended where inference shows how, and refused else.
"""

from __future__ import annotations

import json
import logging
import os.path
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qpref.data.guard import HINT, bounded, refuse_flood
from qpref.errors import PolicyError
from qpref.records import Message, PreferencePair, UnpairedExample

log = logging.getLogger("qpref")

ExampleRow = PreferencePair | UnpairedExample

PROBE = (("user", "qpref asks"), ("assistant", "qpref answers"), ("user", "qpref asks again"))
REASONING = ("reasoning_content", "thinking", "reasoning")
"""Keys of a message under which templates look for reasoning."""
TEMPLATE_FAULTS = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
"""What a template's program may raise beside jinja2's own errors."""


class RefusedRowError(ValueError):
    """Why a row cannot be tokenized; becomes a finding at the row's place."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True)
class Rendered:
    """The texts of one row.

    Attributes:
        warnings: what the template leaves out of the prompt.
    """

    prompt: str
    responses: tuple[str, ...]
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """The tokenizer's chat template, and what it does to a conversation of three turns.

    Attributes:
        end: what it puts after a last response.
        end_of_turn: the control token in it that ends an assistant's turn; None where a turn ends in plain text.
        no_thinking: what it adds to the prompt when asked for no thinking: mostly an empty thinking block.
    """

    tokenizer: Any
    end: str
    end_of_turn: str | None
    no_thinking: str

    @classmethod
    def of(cls, tokenizer: Any, control: re.Pattern[str]) -> ChatTemplate:
        """Try the template.

        Raises:
            PolicyError: it cannot be parsed, or does what a template may not.
        """
        from jinja2 import TemplateError, TemplateSyntaxError
        from jinja2.exceptions import SecurityError

        turns = [{"role": role, "content": content} for role, content in PROBE]
        end, end_of_turn, no_thinking = "", None, ""
        try:
            with bounded():
                asked, unthinking = (_render(tokenizer, [turns[:1]], None, True, **choice)[0]
                                     for choice in ({}, {"enable_thinking": False}))  # fmt: skip
                ended, followed = _render(tokenizer, [turns[:2], turns], None, False)
            for text in (asked, unthinking, ended, followed):
                refuse_flood(text, 0)
            end, end_of_turn = _end_of_turn(ended, followed, control)
            no_thinking = unthinking.removeprefix(asked) if unthinking.startswith(asked) else ""
        except (SecurityError, TemplateSyntaxError) as error:
            raise PolicyError(f"the chat template is not one that can be run: {error}", HINT) from None
        except (TemplateError, *TEMPLATE_FAULTS):
            log.debug("the chat template refuses a conversation of three turns", exc_info=True)
        if "strftime_now" in str(tokenizer.chat_template):
            log.warning("the chat template may write today's date into prompts: the same rows can make other tokens "
                        "tomorrow, and then no run goes on from today's")  # fmt: skip
        return cls(tokenizer, end, end_of_turn, no_thinking)

    def render(self, row: ExampleRow) -> Rendered:
        """The texts of a row's prompt and of its responses.

        Raises:
            RefusedRowError: the template refuses the row, or makes of it what no model meets.
            PolicyError: the template makes a flood of text.
        """
        from jinja2 import TemplateError

        turns = _dicts(row.prompt)
        tools = [dict(tool) for tool in row.tools] or None
        responses = [side[0] for side in responses_of(row)]
        try:
            (prompt,) = _render(self.tokenizer, [turns], tools, True)
            wholes = _render(self.tokenizer, [turns + _dicts([last]) for last in responses], tools, False)
        except (TemplateError, *TEMPLATE_FAULTS) as error:
            raise RefusedRowError("template", f"the chat template refuses it: {error}") from None
        num_characters = sum(map(len, texts_of(row)))
        for text in (prompt, *wholes):
            refuse_flood(text, num_characters)
        if self.no_thinking and all(whole.startswith(prompt + self.no_thinking) for whole in wholes):
            prompt += self.no_thinking
        texts = tuple(self._response(prompt, *pair) for pair in zip(wholes, responses, strict=True))
        for side, text in zip(sides_of(row), texts, strict=True):
            if not text.strip():
                raise RefusedRowError("empty", f"the chat template leaves nothing of {side}")
        return Rendered(prompt, texts, tuple(_left_out(prompt, row)))

    def _response(self, prompt: str, whole: str, response: Message) -> str:
        """What follows the prompt.

        Where the template drops the beginning of a last response, its thinking, the response is taken as it is written,
        less what the prompt has opened already, and the template's end after it: so it is generated.
        """
        text = whole.removeprefix(prompt)
        if whole.startswith(prompt) and (not text.strip() or _says(text, response)):
            return text if self.end_of_turn else text.removesuffix(self.end[len(self.end.rstrip()) :])
        shared = len(os.path.commonprefix([prompt, whole]))
        opened, kept = prompt[shared:], whole[shared:].removesuffix(self.end).strip()
        if response.extra or not kept or not response.content.rstrip().endswith(kept):
            if not whole.startswith(prompt):
                raise RefusedRowError("template", "the chat template changes the prompt once a response follows")
            raise RefusedRowError("template", "the chat template leaves out part of a response")
        if not response.content.startswith(opened):
            message = f"the chat template opens {opened!r} for the response, which doesn't start with it"
            raise RefusedRowError("template", message)
        return response.content.removeprefix(opened) + self.end.rstrip()


def responses_of(row: ExampleRow) -> tuple[tuple[Message, ...], ...]:
    return (row.chosen, row.rejected) if isinstance(row, PreferencePair) else (row.completion,)


def sides_of(row: ExampleRow) -> tuple[str, ...]:
    return ("chosen", "rejected") if isinstance(row, PreferencePair) else ("completion",)


def texts_of(row: ExampleRow) -> Iterator[str]:
    """Every text of a row that a template may put into a prompt or a response."""
    for turns in (row.prompt, *responses_of(row)):
        for message in turns:
            yield message.content
            yield from _strings(message.extra)
    yield from _strings(row.tools)


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield str(key)
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)


def _dicts(messages: Iterable[Message]) -> list[dict[str, object]]:
    return [{"role": message.role, "content": message.content, **message.extra} for message in messages]


def _render(tokenizer: Any, conversations: list[Any], tools: Any, is_prompt: bool, **options: Any) -> list[str]:
    rendered: list[str] = tokenizer.apply_chat_template(
        conversations, tools=tools, tokenize=False, add_generation_prompt=is_prompt, **options
    )
    return rendered


def _end_of_turn(ended: str, followed: str, control: re.Pattern[str]) -> tuple[str, str | None]:
    """What stands after a last response, and its last control token that stands after an earlier response too.

    Some templates put more after the last one: Phi-3's adds the end of text.
    """
    answer = PROBE[1][1]
    end, later = (text.partition(answer)[2] for text in (ended, followed))
    shared = os.path.commonprefix([end, later])
    found = control.findall(shared) or control.findall(end)
    return end, found[-1] if found else None


def _says(rendered: str, response: Message) -> bool:
    """Whether all that the response says stands in its rendering."""
    texts = [response.content, *(str(response.extra[key]) for key in REASONING if response.extra.get(key))]
    calls = response.extra.get("tool_calls")
    for call in calls if isinstance(calls, list | tuple) else ():
        function = call.get("function", call) if isinstance(call, Mapping) else {}
        texts.append(str(function.get("name", "")) if isinstance(function, Mapping) else "")
    return all(_stands_in(text, rendered) for text in texts)


def _stands_in(text: str, rendered: str) -> bool:
    """Whether a text stands in a rendering, white space aside, as it is or as a JSON string."""
    if text.strip() in rendered:
        return True
    squeezed = "".join(rendered.split())
    return any("".join(form.split()) in squeezed for form in (text, json.dumps(text, ensure_ascii=False)[1:-1]))


def _left_out(rendered: str, row: ExampleRow) -> Iterator[str]:
    """What of a prompt's turns and tools isn't in its rendering, or not in its order."""
    place = 0
    for message in row.prompt:
        text = message.content.strip()
        found = rendered.find(text, place)
        if found >= 0:
            place = found + len(text)
        elif not _stands_in(text, rendered[place:]):
            yield f"the chat template leaves out, moves or changes what the {message.role} turn says"
    names = (_name(tool) for tool in row.tools)
    if any(name not in rendered for name in names):
        yield "the chat template has no place for tools"


def _name(tool: Mapping[str, object]) -> str:
    function = tool.get("function", tool)
    return str(function.get("name", "")) if isinstance(function, Mapping) else ""
