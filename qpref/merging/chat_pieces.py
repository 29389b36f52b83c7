"""A chat template taken apart: the texts around the content of each turn, for engines with a template language of their
own.

A template is a program, so what is found is compared with its own rendering of several conversations. Templates that
write something else there, such as today's date or the system turn inside the user's, have no pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from qpref.data.template import TEMPLATE_FAULTS
from qpref.data.template_limits import limited

Turn = tuple[str, str]
"""Role and content."""
Render = Callable[[Sequence[Turn], bool], str]
"""Turns, and whether an answer is to follow -> the conversation's text."""

SYSTEM, USER, ANSWER, AGAIN = (
    ("system", "Sysword"),
    ("user", "Userword"),
    ("assistant", "Answerword"),
    ("user", "Lastword"),
)
PROBES: tuple[tuple[Turn, ...], ...] = (
    (USER,),
    (SYSTEM, USER),
    (USER, ANSWER, AGAIN),
    (SYSTEM, USER, ANSWER, AGAIN),
    (SYSTEM, USER, ANSWER, AGAIN, ("assistant", "Another answer."), ("user", "Two\nlines, \"quoted\"")),
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatPieces:
    """Texts before and after a turn's content.

    Attributes:
        default_system: what stands in the place of the system turn where there is none.
        generation: after the last turn, for the answer to follow.
    """

    system: tuple[str, str]
    default_system: str
    user: tuple[str, str]
    assistant: tuple[str, str]
    generation: str

    @property
    def texts(self) -> tuple[str, ...]:
        return (*self.system, self.default_system, *self.user, *self.assistant, self.generation)

    def render(self, turns: Sequence[Turn]) -> str:
        """Write a conversation that an answer follows, as the chat template does."""
        around = {"system": self.system, "user": self.user, "assistant": self.assistant}
        start = "" if turns[0][0] == "system" else self.default_system
        return start + "".join(around[role][0] + text + around[role][1] for role, text in turns) + self.generation


def chat_pieces(tokenizer: Any) -> ChatPieces | None:
    """Take a tokenizer's chat template apart; None for one whose turns aren't made of fixed texts.

    The BOS token at the start is left out where the tokenizer adds one: engines do that too.

    Raises:
        PolicyError: the template takes too much time or memory.
    """
    from jinja2 import TemplateError

    if not tokenizer.chat_template or "strftime_now" in str(tokenizer.chat_template):
        return None
    added = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    bos = tokenizer.bos_token if added else ""

    def render(turns: Sequence[Turn], for_generation: bool) -> str:
        listed = [{"role": role, "content": text} for role, text in turns]
        text: str = tokenizer.apply_chat_template(listed, tokenize=False, add_generation_prompt=for_generation)
        return text.removeprefix(bos)

    with limited():
        try:
            found = _taken_apart(render, tokenizer.eos_token or "")
            if found is None or any(found.render(turns) != render(turns, True) for turns in PROBES):
                return None
        except (TemplateError, *TEMPLATE_FAULTS):
            return None
    return found


def _taken_apart(render: Render, eos: str) -> ChatPieces | None:
    """Find the pieces in probe conversations; None where a probe's content isn't in its rendering.

    Args:
        eos: some templates, as Phi-3's, end a conversation with it, and not its turns.
    """
    whole = _split(render((SYSTEM, USER, ANSWER, AGAIN), True), SYSTEM, USER, ANSWER, AGAIN)
    plain = _split(render((USER,), True), USER)
    user_ended = _split(render((USER,), False), USER)
    answer_ended = _split(render((USER, ANSWER), False), USER, ANSWER)
    if whole is None or plain is None or user_ended is None or answer_ended is None:
        return None
    before_system, after_system, between, after_answer, generation = whole
    user_end = _end_of_turn(user_ended[-1], between, eos)
    answer_end = _end_of_turn(answer_ended[-1], after_answer, eos)
    user_start = after_answer.removeprefix(answer_end)
    return ChatPieces(
        system=(before_system, after_system.removesuffix(user_start)),
        default_system=plain[0].removesuffix(user_start),
        user=(user_start, user_end),
        assistant=(between.removeprefix(user_end), answer_end),
        generation=generation.removeprefix(user_end),
    )


def _end_of_turn(ended: str, followed: str, eos: str) -> str:
    """Return what ends a turn, by what stands after the last turn and after one that another follows."""
    return ended if followed.startswith(ended) else ended.removesuffix(eos)


def _split(text: str, *turns: Turn) -> list[str] | None:
    """Split a text at the turns' contents, each of which it has to have once and in this order."""
    parts = []
    for _, content in turns:
        before, found, text = text.partition(content)
        if not found:
            return None
        parts.append(before)
    return [*parts, text]
