"""Render a conversation with the model's chat template: the text of its prompt and of its responses.

The prompt is rendered for generation; a response is the text that follows it when the whole conversation is rendered.
Some templates break this (they drop a response's thinking, or open a thinking block only for generation): such rows
are fixed where the format at inference is known, and refused otherwise.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qpref.data.example_rows import ExampleRow, RefusedRowError, responses_of, sides_of, strings_in, texts_of
from qpref.data.message_form import MessageForm, Turns
from qpref.data.template_limits import HINT, check_output_size, limited
from qpref.errors import PolicyError
from qpref.records import Message

log = logging.getLogger("qpref")

PROBE = (("user", "qpref asks"), ("assistant", "qpref answers"), ("user", "qpref asks again"))
THINKING: tuple[dict[str, bool], ...] = ({}, {"enable_thinking": True}, {"enable_thinking": False})
TAG = re.compile(r"\s*(<[^<>\s]+>|\[[^\[\]\s]+\])")
TEMPLATE_FAULTS = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
"""Exceptions that a template can raise, besides jinja2's own."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """Rendered texts of one row.

    Attributes:
        warnings: parts of the prompt that the template drops or changes.
    """

    prompt: str
    responses: tuple[str, ...]
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """The tokenizer's chat template, and its output for a probe conversation of three turns.

    Attributes:
        end: text after the last response.
        end_of_turn: the control token in `end` that ends an assistant turn; None where a turn ends in plain text.
        openings: ends of a prompt for generation: by default, then with and without `enable_thinking`, where only this
            end differs.
        start: text between such a prompt and the response; None where the prompt changes once a response follows.
        form: form in which it reads messages.
    """

    tokenizer: Any
    end: str = ""
    end_of_turn: str | None = None
    openings: tuple[str, ...] = ("",)
    start: str | None = None
    form: MessageForm = field(default_factory=MessageForm)

    @classmethod
    def of(cls, tokenizer: Any, control: re.Pattern[str]) -> ChatTemplate:
        """Probe the template.

        Raises:
            PolicyError: it cannot be parsed, or violates jinja2's sandbox.
        """
        from jinja2 import TemplateError, TemplateSyntaxError
        from jinja2.exceptions import SecurityError

        if "strftime_now" in str(tokenizer.chat_template):
            log.warning("the chat template may write today's date into prompts: the same rows can have other tokens "
                        "tomorrow, and then a run cannot be resumed")  # fmt: skip
        form = _form_of(tokenizer)
        turns = form.dicts(Message(role=role, content=content) for role, content in PROBE)
        try:
            with limited():
                prompts = [_render(tokenizer, turns[:1], None, True, 0, **thinking) for thinking in THINKING]
                without, ended, followed = (_render(tokenizer, turns[:num], None, False, 0) for num in (1, 2, 3))
        except (SecurityError, TemplateSyntaxError) as error:
            raise PolicyError(f"the chat template cannot be run: {error}", HINT) from None
        except (TemplateError, *TEMPLATE_FAULTS):
            log.debug("the chat template refuses a conversation of three turns", exc_info=True)
            return cls(tokenizer, form=form)
        is_prefix = ended.startswith(prompts[0])
        start = ended.removeprefix(prompts[0]).partition(PROBE[1][1])[0] if is_prefix else None
        return cls(tokenizer, *_end_of_turn(ended, followed, control), _openings(without, prompts), start, form)

    def render(self, row: ExampleRow) -> Rendered:
        """Render a row's prompt and responses.

        Raises:
            RefusedRowError: the template refuses the row, or renders it differently from inference.
            PolicyError: the template's output is far longer than the row.
        """
        from jinja2 import TemplateError

        turns = self.form.dicts(row.prompt)
        tools = [dict(tool) for tool in row.tools] or None
        responses = [side[0] for side in responses_of(row)]
        num_characters = sum(map(len, texts_of(row)))
        try:
            default = _render(self.tokenizer, turns, tools, True, num_characters)
            wholes = [
                _render(self.tokenizer, turns + self.form.dicts([last]), tools, False, num_characters)
                for last in responses
            ]
        except (TemplateError, *TEMPLATE_FAULTS) as error:
            raise RefusedRowError("template", f"the chat template refuses it: {error}{_greeting_hint(turns)}") from None
        prompt = self._prompt(default, wholes)
        texts = tuple(self._response(prompt, *pair) for pair in zip(wholes, responses, strict=True))
        for side, text in zip(sides_of(row), texts, strict=True):
            if not text.strip():
                raise RefusedRowError("empty", f"the chat template drops {side} completely")
        warnings = list(_left_out(prompt, row))
        if not all(whole.startswith(prompt) for whole in wholes):
            warnings.append(
                "the chat template changes the prompt once a response follows; training uses the one for generation"
            )
        return Rendered(prompt, texts, tuple(warnings))

    def _prompt(self, default: str, wholes: Sequence[str]) -> str:
        """Choose the longest prompt for generation that every response continues; else the default one.

        A row without thinking thus gets the prompt for generation without thinking, if the template has one.
        """
        if len(self.openings) == 1 or not default.endswith(self.openings[0]):
            return default
        before = default.removesuffix(self.openings[0])
        prompts = [before + opening for opening in self.openings]
        return max((text for text in prompts if all(whole.startswith(text) for whole in wholes)),
                   key=len, default=default)  # fmt: skip

    def _response(self, prompt: str, whole: str, response: Message) -> str:
        """Return the text that follows the prompt at inference: usually the rest of the rendered conversation.

        Exceptions use the response as written, followed by the template's end: it starts with the tag of the thinking
        block that the prompt opens; the template drops its start; or only the prompt's rendering changes.
        """
        follows, text = whole.startswith(prompt), whole.removeprefix(prompt)
        after_opening = whole[max(0, len(prompt) - max(map(len, self.openings))) :]
        tag = _opened_tag(prompt, response.content)
        if follows and (
            not text.strip() or (_contains_response(after_opening, response) and (tag is None or tag not in text))
        ):
            return text if self.end_of_turn else text.removesuffix(self.end[len(self.end.rstrip()) :])
        if tag and not response.extra:
            return response.content.partition(tag)[2].lstrip("\n") + self.end.rstrip()
        if not follows and self.start is not None and not response.extra:
            for content in (response.content, response.content.strip()):
                if whole.endswith(usual := self.start + content + self.end):
                    return usual if self.end_of_turn else usual.rstrip()
        if not follows:
            rest = prompt[_num_shared(prompt, whole) :][:60]
            message = f"the chat template changes the prompt once a response follows: {rest!r} is missing or different"
            raise RefusedRowError("template", message)
        kept = text.removesuffix(self.end).strip()
        if not kept or response.extra or not response.content.rstrip().endswith(kept):
            raise RefusedRowError("template", "the chat template drops a part of a response")
        return response.content + self.end.rstrip()


def _form_of(tokenizer: Any) -> MessageForm:
    """Find the form of messages that the template reads.

    Raises:
        PolicyError: the template takes too long or too much memory.
    """
    from jinja2 import TemplateError

    def render(turns: Turns, tools: list[dict[str, object]] | None) -> str | None:
        try:
            return _render(tokenizer, turns, tools, False, 0)
        except (TemplateError, *TEMPLATE_FAULTS):
            return None

    with limited():
        return MessageForm.of(render)


def _greeting_hint(turns: Sequence[Mapping[str, object]]) -> str:
    """Return what to do about a conversation that the assistant opens, which many templates refuse; else nothing."""
    first = next((turn["role"] for turn in turns if turn["role"] != "system"), None)
    return (
        "; the assistant speaks first: remove that turn, or move it into the system turn"
        if first == "assistant"
        else ""
    )


def _render(tokenizer: Any, turns: Any, tools: Any, for_generation: bool, num_characters: int, **options: Any) -> str:
    """Render a conversation whose texts have `num_characters` characters."""
    rendered: str = tokenizer.apply_chat_template(
        turns, tools=tools, tokenize=False, add_generation_prompt=for_generation, **options
    )
    check_output_size(rendered, num_characters)
    return rendered


def _end_of_turn(ended: str, followed: str, control: re.Pattern[str]) -> tuple[str, str | None]:
    """Return the text after the last response, and the last control token in it that also ends earlier responses.

    Some templates write more after the last response: Phi-3's adds the end-of-text token.
    """
    response = PROBE[1][1]
    end, later = (text.partition(response)[2] for text in (ended, followed))
    shared = end[: _num_shared(end, later)]
    found = control.findall(shared) or control.findall(end)
    return end, found[-1] if found else None


def _openings(without: str, prompts: Sequence[str]) -> tuple[str, ...]:
    """Return the text that the template adds for generation: by default, with thinking and without thinking.

    Args:
        without: the prompt rendered without it.
        prompts: the prompt rendered in these three ways.
    """
    before = prompts[0][: _num_shared(without, prompts[0])]
    return tuple(dict.fromkeys(text.removeprefix(before) for text in prompts if text.startswith(before)))


def _num_shared(first: str, second: str) -> int:
    """Return the length of the common prefix of two texts."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((index for index, (one, other) in pairs if one != other), min(len(first), len(second)))


def _opened_tag(prompt: str, content: str) -> str | None:
    """Return the tag, such as <think>, that ends the prompt and also starts the response; else None."""
    found = TAG.match(content)
    return found[1] if found and prompt.rstrip().endswith(found[1]) else None


def _contains_response(rendered: str, response: Message) -> bool:
    """Return whether a rendering contains the response's content, reasoning and tool calls."""
    texts = [response.content, str(response.extra.get("reasoning_content", "")), *_texts_of_calls(response)]
    return all(_contains(rendered, text) for text in texts)


def _texts_of_calls(message: Message) -> Iterator[str]:
    """Yield the name of each called function, and the texts of its arguments."""
    calls = message.extra.get("tool_calls")
    for call in calls if isinstance(calls, list) else ():
        yield _name(call)
        function = call.get("function")
        if isinstance(function, Mapping):
            yield from strings_in(function.get("arguments"))


def _contains(rendered: str, text: str) -> bool:
    """Return whether a rendering contains a text, as it is or as a JSON string, white space ignored."""
    if text.strip() in rendered:
        return True
    squeezed = "".join(rendered.split())
    return any("".join(form.split()) in squeezed for form in (text, json.dumps(text, ensure_ascii=False)[1:-1]))


def _left_out(rendered: str, row: ExampleRow) -> Iterator[str]:
    """Yield a warning for turns and tools that are missing from the rendered prompt, or out of order."""
    position = 0
    for message in row.prompt:
        text = message.content.strip()
        found = rendered.find(text, position)
        if found >= 0:
            position = found + len(text)
        elif not _contains(rendered, text):
            yield f"the chat template drops or changes the text of the {message.role} turn"
            break
        elif text in rendered:
            yield "the chat template changes the order of turns"
            break
    if any(not _contains(rendered, text) for message in row.prompt for text in _texts_of_calls(message)):
        yield "the chat template drops or changes a tool call of the prompt"
    if any(_name(tool) not in rendered for tool in row.tools):
        yield "the chat template doesn't render tools"


def _name(function: Mapping[str, object]) -> str:
    """Return the function's name in a tool or a tool call, which may be below a key `function`."""
    inner = function.get("function", function)
    return str(inner.get("name", "")) if isinstance(inner, Mapping) else ""
