"""Pairs -> token ids, exactly as the trained model will meet them.

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

from qpref.records import Finding, Message, PreferencePair, TokenizedExample

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

    def tokenize(self, pairs: Iterable[PreferencePair]) -> Iterator[TokenizedExample | Finding]:
        """Each pair's ids, or why it cannot be tokenized."""
        for pair in pairs:
            try:
                yield self._tokenize(pair)
            except _RefusedRowError as error:
                yield Finding(code=error.code, severity="error", message=str(error), source=pair.source)

    def _tokenize(self, pair: PreferencePair) -> TokenizedExample:
        for message in (*pair.prompt, *pair.chosen, *pair.rejected):
            if found := self.control.search(message.content):
                raise _RefusedRowError("control_token", f"the text holds the control token {found[0]}")
        prompt, chosen, rejected = self._rendered(pair)
        prompt_ids = self._bos(prompt) + self._ids(prompt)
        if not prompt_ids:
            raise _RefusedRowError("empty", "the prompt has no tokens")
        branches = tuple(array("i", self._with_stop(self._ids(text))) for text in (chosen, rejected))
        return TokenizedExample(
            prompt=array("i", prompt_ids),
            branches=branches,
            truncated=(False, False),
            weight=pair.weight,
            margin=pair.margin,
            source=pair.source,
        )

    def _rendered(self, pair: PreferencePair) -> tuple[str, str, str]:
        if not self.use_template:
            if len(pair.prompt) > 1:
                raise _RefusedRowError("no_template", "a conversation needs a chat template")
            return pair.prompt[0].content, pair.chosen[0].content, pair.rejected[0].content
        from jinja2 import TemplateError
        from trl import apply_chat_template

        sides = {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}
        try:
            texts = apply_chat_template({side: _dicts(turns) for side, turns in sides.items()}, self.tokenizer)
            asked = self.tokenizer.apply_chat_template(_dicts(pair.prompt), tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            raise _RefusedRowError("template", f"the chat template refuses it: {error}") from None
        if texts["prompt"] != asked:
            raise _RefusedRowError("template", "the chat template changes the prompt once a response follows")
        for side in ("chosen", "rejected"):
            if not texts[side].strip():
                raise _RefusedRowError("empty", f"the chat template leaves nothing of {side}")
        return texts["prompt"], texts["chosen"], texts["rejected"]

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
