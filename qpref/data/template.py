"""A conversation -> the texts of its prompt and of its responses, by the model's own chat template.

The prompt is what the template makes for generation, and a response is what it puts after that once the response
follows. A template may do otherwise (drop a response's thinking, or open a thinking block in the prompt alone); such
rows are mended where inference shows how, and refused else.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qpref.data.example_rows import ExampleRow, RefusedRowError, responses_of, sides_of, texts_of
from qpref.data.template_limits import HINT, bounded, refuse_flood
from qpref.errors import PolicyError
from qpref.records import Message

log = logging.getLogger("qpref")

PROBE = (("user", "qpref asks"), ("assistant", "qpref answers"), ("user", "qpref asks again"))
THINKING: tuple[dict[str, bool], ...] = ({}, {"enable_thinking": True}, {"enable_thinking": False})
REASONING = ("reasoning_content", "thinking", "reasoning")
"""Keys of a message under which templates look for reasoning."""
TAG = re.compile(r"\s*(<[^<>\s]+>|\[[^\[\]\s]+\])")
TEMPLATE_FAULTS = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
"""What a template's program may raise beside jinja2's own errors."""


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
        openings: what it ends a prompt with for generation: first as it does by itself, then asked for thinking or for
            none, where that makes a difference here alone.
        start: what it puts between such a prompt and a response's text; None where it changes the prompt then.
    """

    tokenizer: Any
    end: str = ""
    end_of_turn: str | None = None
    openings: tuple[str, ...] = ("",)
    start: str | None = None

    @classmethod
    def of(cls, tokenizer: Any, control: re.Pattern[str]) -> ChatTemplate:
        """Try the template.

        Raises:
            PolicyError: it cannot be parsed, or does what a template may not.
        """
        from jinja2 import TemplateError, TemplateSyntaxError
        from jinja2.exceptions import SecurityError

        if "strftime_now" in str(tokenizer.chat_template):
            log.warning("the chat template may write today's date into prompts: the same rows can make other tokens "
                        "tomorrow, and then no run goes on from today's")  # fmt: skip
        turns = [{"role": role, "content": content} for role, content in PROBE]
        try:
            with bounded():
                asked = [_render(tokenizer, turns[:1], None, True, 0, **thinking) for thinking in THINKING]
                unasked, ended, followed = (_render(tokenizer, turns[:num], None, False, 0) for num in (1, 2, 3))
        except (SecurityError, TemplateSyntaxError) as error:
            raise PolicyError(f"the chat template cannot be run: {error}", HINT) from None
        except (TemplateError, *TEMPLATE_FAULTS):
            log.debug("the chat template refuses a conversation of three turns", exc_info=True)
            return cls(tokenizer)
        start = ended.removeprefix(asked[0]).partition(PROBE[1][1])[0] if ended.startswith(asked[0]) else None
        return cls(tokenizer, *_end_of_turn(ended, followed, control), _openings(unasked, asked), start)

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
        num_characters = sum(map(len, texts_of(row)))
        try:
            asked = _render(self.tokenizer, turns, tools, True, num_characters)
            wholes = [
                _render(self.tokenizer, turns + _dicts([last]), tools, False, num_characters) for last in responses
            ]
        except (TemplateError, *TEMPLATE_FAULTS) as error:
            raise RefusedRowError("template", f"the chat template refuses it: {error}") from None
        prompt = self._prompt(asked, wholes)
        texts = tuple(self._response(prompt, *pair) for pair in zip(wholes, responses, strict=True))
        for side, text in zip(sides_of(row), texts, strict=True):
            if not text.strip():
                raise RefusedRowError("empty", f"the chat template leaves nothing of {side}")
        warnings = list(_left_out(prompt, row))
        if not all(whole.startswith(prompt) for whole in wholes):
            warnings.append("the chat template changes the prompt once a response follows; training has generation's")
        return Rendered(prompt, texts, tuple(warnings))

    def _prompt(self, asked: str, wholes: Sequence[str]) -> str:
        """The longest prompt for generation that every response goes on from; the template's own where there is none.

        So a row without thinking gets the prompt of generation without thinking, where the template has one.
        """
        if len(self.openings) == 1 or not asked.endswith(self.openings[0]):
            return asked
        before = asked.removesuffix(self.openings[0])
        prompts = [before + opening for opening in self.openings]
        return max((text for text in prompts if all(whole.startswith(text) for whole in wholes)),
                   key=len, default=asked)  # fmt: skip

    def _response(self, prompt: str, whole: str, response: Message) -> str:
        """What follows the prompt when it is generated, which is mostly what the template puts there.

        A response that starts with the tag of the thinking block that the prompt opens, or whose beginning the template
        drops, is taken as it is written, the template's end after it. So is one whose rendering is as ever while the
        prompt's changes.
        """
        follows, text = whole.startswith(prompt), whole.removeprefix(prompt)
        since_opening = whole[max(0, len(prompt) - max(map(len, self.openings))) :]
        tag = _opened_tag(prompt, response.content)
        if follows and (not text.strip() or (_says(since_opening, response) and (tag is None or tag not in text))):
            return text if self.end_of_turn else text.removesuffix(self.end[len(self.end.rstrip()) :])
        if tag and not response.extra:
            return response.content.partition(tag)[2].lstrip("\n") + self.end.rstrip()
        if not follows and self.start is not None and not response.extra:
            for content in (response.content, response.content.strip()):
                if whole.endswith(as_ever := self.start + content + self.end):
                    return as_ever if self.end_of_turn else as_ever.rstrip()
        if not follows:
            left = prompt[_num_shared(prompt, whole) :][:60]
            message = f"the chat template changes the prompt once a response follows: it doesn't go on from {left!r}"
            raise RefusedRowError("template", message)
        kept = text.removesuffix(self.end).strip()
        if not kept or response.extra or not response.content.rstrip().endswith(kept):
            raise RefusedRowError("template", "the chat template leaves out part of a response")
        return response.content + self.end.rstrip()


def _dicts(messages: Iterable[Message]) -> list[dict[str, object]]:
    return [{"role": message.role, "content": message.content, **message.extra} for message in messages]


def _render(tokenizer: Any, turns: Any, tools: Any, for_generation: bool, num_characters: int, **options: Any) -> str:
    """A conversation of so many characters as text."""
    rendered: str = tokenizer.apply_chat_template(
        turns, tools=tools, tokenize=False, add_generation_prompt=for_generation, **options
    )
    refuse_flood(rendered, num_characters)
    return rendered


def _end_of_turn(ended: str, followed: str, control: re.Pattern[str]) -> tuple[str, str | None]:
    """What stands after a last response, and its last control token that stands after an earlier response too.

    Some templates put more after the last one: Phi-3's adds the end of text.
    """
    answer = PROBE[1][1]
    end, later = (text.partition(answer)[2] for text in (ended, followed))
    shared = end[: _num_shared(end, later)]
    found = control.findall(shared) or control.findall(end)
    return end, found[-1] if found else None


def _openings(unasked: str, asked: Sequence[str]) -> tuple[str, ...]:
    """What the template adds for generation, by itself and asked for thinking and for none."""
    before = asked[0][: _num_shared(unasked, asked[0])]
    return tuple(dict.fromkeys(text.removeprefix(before) for text in asked if text.startswith(before)))


def _num_shared(first: str, second: str) -> int:
    """Characters that two texts begin with alike."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((place for place, (one, other) in pairs if one != other), min(len(first), len(second)))


def _opened_tag(prompt: str, content: str) -> str | None:
    """The tag that the prompt ends with and the response starts with."""
    found = TAG.match(content)
    return found[1] if found and prompt.rstrip().endswith(found[1]) else None


def _says(rendered: str, response: Message) -> bool:
    """Whether all that the response says stands in its rendering."""
    texts = [response.content, *(str(response.extra[key]) for key in REASONING if response.extra.get(key))]
    calls = response.extra.get("tool_calls")
    if isinstance(calls, list | tuple):
        texts.extend(_name(call) for call in calls if isinstance(call, Mapping))
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
        elif not _stands_in(text, rendered):
            yield f"the chat template leaves out or changes what the {message.role} turn says"
            break
        elif text in rendered:
            yield "the chat template changes the order of turns"
            break
    if any(_name(tool) not in rendered for tool in row.tools):
        yield "the chat template has no place for tools"


def _name(function: Mapping[str, object]) -> str:
    """Of a tool, or of a call of one; the function may stand below a key `function`."""
    inner = function.get("function", function)
    return str(inner.get("name", "")) if isinstance(inner, Mapping) else ""
