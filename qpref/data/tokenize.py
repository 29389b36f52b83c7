"""Rows -> token ids, exactly as the trained model will meet them.

The prompt is rendered and tokenized by itself, as it is at inference, and each response by itself, so both sides have
the same prompt ids and a response's first token never swallows the prompt's last. The supervised span ends in exactly
one stop token.
"""

from __future__ import annotations

import logging
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from qpref.errors import DataError
from qpref.records import Finding, Message, PreferencePair, TokenizedExample, UnpairedExample

log = logging.getLogger("qpref")


@dataclass(frozen=True, slots=True)
class PairTokenizer:
    """Renders and tokenizes pairs.

    Attributes:
        tokenizer: a Hugging Face tokenizer.
        use_template: render with the tokenizer's chat template, else prompt and response stand as they are.
        stop_tokens: ids that end a response; the first is the end-of-sequence token, added where a response lacks one.
        control: finds the texts of special tokens, which must not come from a user's words.
    """

    tokenizer: Any
    use_template: bool
    stop_tokens: tuple[int, ...]
    control: re.Pattern[str]

    @classmethod
    def of(cls, tokenizer: Any, template: str, stop_tokens: Sequence[int]) -> PairTokenizer:
        has_template = bool(tokenizer.chat_template)
        if template == "chat" and not has_template:
            log.warning("the model has no chat template: prompt, response and end token are used as they are")
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        special |= set(tokenizer.all_special_tokens)
        control = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or r"(?!)")
        ends = dict.fromkeys([tokenizer.eos_token_id, *stop_tokens])
        return cls(
            tokenizer, template == "chat" and has_template, tuple(end for end in ends if end is not None), control
        )

    def tokenize(self, rows: Iterable[PreferencePair | UnpairedExample]) -> Iterator[TokenizedExample | Finding]:
        """Each row's ids, or why it cannot be tokenized."""
        for row in rows:
            try:
                yield self._tokenize(row)
            except _RefusedRowError as error:
                yield Finding(code=error.code, severity="error", message=str(error), source=row.source)

    def _tokenize(self, row: PreferencePair | UnpairedExample) -> TokenizedExample:
        if isinstance(row, PreferencePair):
            sides = {"prompt": row.prompt, "chosen": row.chosen, "rejected": row.rejected}
            label, margin = None, row.margin
        else:
            sides = {"prompt": row.prompt, "completion": row.completion}
            label, margin = row.label, 0.0
        for turns in sides.values():
            for message in turns:
                self._refuse_control(message)
        prompt, *responses = self._rendered(sides)
        prompt_ids = self._bos(prompt) + self._ids(prompt)
        if not prompt_ids:
            raise _RefusedRowError("empty", "the prompt has no tokens")
        branches = tuple(array("i", self._with_stop(self._ids(text))) for text in responses)
        return TokenizedExample(
            prompt=array("i", prompt_ids),
            branches=branches,
            truncated=(False,) * len(branches),
            weight=row.weight,
            margin=margin,
            label=label,
            source=row.source,
        )

    def prompt_ids(self, prompt: Sequence[Message]) -> list[int]:
        """The ids that a model is asked with: the same as before a response in training.

        Raises:
            DataError: the text holds a control token, the chat template refuses it, or nothing is left.
        """
        try:
            for message in prompt:
                self._refuse_control(message)
            text = self._rendered_prompt(prompt)
            ids = self._bos(text) + self._ids(text)
            if not ids:
                raise _RefusedRowError("empty", "the prompt has no tokens")
        except _RefusedRowError as error:
            raise DataError(f"the prompt {prompt[-1].content[:40]!r} cannot be asked: {error}") from None
        return ids

    def _rendered_prompt(self, prompt: Sequence[Message]) -> str:
        if not self.use_template:
            if len(prompt) > 1:
                raise _RefusedRowError("no_template", "a conversation needs a chat template")
            return prompt[0].content
        from jinja2 import TemplateError

        try:
            return str(self.tokenizer.apply_chat_template(_dicts(prompt), tokenize=False, add_generation_prompt=True))
        except TemplateError as error:
            raise _RefusedRowError("template", f"the chat template refuses it: {error}") from None

    def _refuse_control(self, message: Message) -> None:
        if found := self.control.search(message.content):
            raise _RefusedRowError("control_token", f"the text holds the control token {found[0]}")

    def _rendered(self, sides: dict[str, tuple[Message, ...]]) -> list[str]:
        """The text of the prompt and of each response."""
        if not self.use_template:
            if len(sides["prompt"]) > 1:
                raise _RefusedRowError("no_template", "a conversation needs a chat template")
            return [turns[0].content for turns in sides.values()]
        from jinja2 import TemplateError
        from trl import apply_chat_template

        try:
            texts = apply_chat_template({side: _dicts(turns) for side, turns in sides.items()}, self.tokenizer)
            asked = self.tokenizer.apply_chat_template(
                _dicts(sides["prompt"]), tokenize=False, add_generation_prompt=True
            )
        except TemplateError as error:
            raise _RefusedRowError("template", f"the chat template refuses it: {error}") from None
        if texts["prompt"] != asked:
            raise _RefusedRowError("template", "the chat template changes the prompt once a response follows")
        for side in sides:
            if not texts[side].strip():
                raise _RefusedRowError("empty", f"the chat template leaves nothing of {side}")
        return [texts[side] for side in sides]

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _bos(self, prompt: str) -> list[int]:
        """The BOS that the tokenizer puts before a text by itself, unless the prompt has it or a template rules."""
        bos = self.tokenizer.bos_token_id
        if self.use_template or bos is None or self._ids(prompt)[:1] == [bos]:
            return []
        return [bos] if self.tokenizer("")["input_ids"][:1] == [bos] else []

    def _with_stop(self, ids: list[int]) -> list[int]:
        """Ids up to the first stop token; templates put white space after it. Without one, the end token is added."""
        for place, token in enumerate(ids):
            if token in self.stop_tokens:
                return ids[: place + 1]
        if not self.stop_tokens:
            raise _RefusedRowError("no_stop", "the tokenizer has no end-of-sequence token")
        return [*ids, self.stop_tokens[0]]

    def render_first(self, example: TokenizedExample) -> str:
        """The example as the model meets it, special tokens visible, each scored span in double brackets."""
        decode = self.tokenizer.decode
        spans = [f"⟦{decode(list(branch))}⟧" for branch in example.branches]
        return "\n".join([decode(list(example.prompt)), *spans])


class _RefusedRowError(ValueError):
    """Why a pair cannot be tokenized; becomes a finding at the row's place."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def _dicts(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]
