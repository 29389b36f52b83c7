"""A conversation with a model and with its base: each has turns of its own, made of its own answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from qpref.data.tokenize import PairTokenizer
from qpref.errors import DataError, DeviceMemoryError
from qpref.evaluation.generate import Sampling, as_turns, new_tokens, prompt_ids, text_of_answer
from qpref.evaluation.subjects import Subject
from qpref.policy.out_of_memory import out_of_memory_as
from qpref.policy.policy import Policy
from qpref.policy.reference import as_reference
from qpref.records import Message

Side = Literal["base", "model"]
UNFINISHED = "\ufffd"
"""Decoded in place of a character of which not all tokens are there yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """An answer; `ended` where a stop token ended it."""

    text: str
    ended: bool


@dataclass(slots=True)
class Conversation:
    """Turns with a loaded model, and with its base where it has an adapter.

    Attributes:
        context: most tokens of a prompt and its answer; an answer ends there.
        system: text of the system turn; empty for the chat template's own.
        turns: of each side, user and assistant in alternation.
    """

    policy: Policy
    tokenizer: PairTokenizer
    sampling: Sampling
    context: int
    turns: dict[Side, list[Message]]
    system: str = ""

    @classmethod
    def begin(cls, subject: Subject, sampling: Sampling, system: str = "") -> Conversation:
        """Load the model.

        Raises:
            PolicyError: it cannot be loaded.
            DeviceMemoryError: it doesn't fit.
        """
        tokenizer = subject.tokenizer()
        subject.announce_device()
        with out_of_memory_as(f"{subject.name}: the device ran out of memory", "free its memory"):
            policy = subject.load(subject.dtype)
        policy.share_prompts(False)
        turns: dict[Side, list[Message]] = {"base": []} if subject.has_reference else {}
        return cls(policy, tokenizer, sampling, subject.context, {**turns, "model": []}, system)

    def reset(self) -> None:
        """Forget all turns; the system turn stays."""
        for turns in self.turns.values():
            turns.clear()

    def ask(self, text: str, on_text: Callable[[Side, str], None]) -> Mapping[Side, Reply]:
        """Answer a user turn on each side, the base first. An exception leaves the conversation as it was.

        Args:
            on_text: gets a side and its answer so far, as its tokens come.

        Raises:
            DataError: the turn cannot be rendered, or the conversation fills the context.
            DeviceMemoryError: it doesn't fit.
        """
        question = Message(role="user", content=text)
        prompts = {side: self._prompt([*turns, question]) for side, turns in self.turns.items()}
        replies = {side: self._answer(side, prompt, on_text) for side, prompt in prompts.items()}
        for side, reply in replies.items():
            self.turns[side] += [question, Message(role="assistant", content=reply.text)]
        return replies

    def _prompt(self, turns: list[Message]) -> list[int]:
        start = [Message(role="system", content=self.system)] if self.system else []
        (ids,) = prompt_ids(self.tokenizer, [as_turns((*start, *turns))])
        if len(ids) >= self.context:
            raise DataError(
                f"the conversation has {len(ids)} tokens, and the model's context {self.context}",
                "start over with /reset",
            )
        return ids

    def _answer(self, side: Side, prompt: list[int], on_text: Callable[[Side, str], None]) -> Reply:
        def show(tokens: list[int]) -> None:
            on_text(side, text_of_answer(self.tokenizer, tokens)[0].rstrip(UNFINISHED))

        room = self.context - len(prompt)
        sampling = replace(self.sampling, max_new_tokens=min(self.sampling.max_new_tokens, room))
        torch.manual_seed(sampling.seed)
        with as_reference(self.policy) if side == "base" else nullcontext():
            found = new_tokens(self.policy, self.tokenizer, [prompt], sampling, _Streamer(show))
        if found is None:
            raise DeviceMemoryError("the device ran out of memory", "start over with /reset, or allow shorter answers")
        text, ended = text_of_answer(self.tokenizer, found[0])
        return Reply(text=text, ended=ended)


@dataclass(slots=True)
class _Streamer:
    """A streamer as transformers' generate calls it: the prompt's tokens first, then each new one."""

    show: Callable[[list[int]], None]
    tokens: list[int] | None = field(default=None)

    def put(self, value: Any) -> None:
        if self.tokens is None:
            self.tokens = []
            return
        self.tokens += value.flatten().tolist()
        self.show(self.tokens)

    def end(self) -> None:
        """Nothing: the whole answer is what `generate` returns."""
