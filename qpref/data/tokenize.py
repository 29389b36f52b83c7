"""Rows -> token ids, exactly as the trained model will meet them.

The prompt is tokenized by itself, as it is at inference, so both sides have the same prompt ids. A response's tokens
are those that follow the prompt's when both are tokenized in one piece. Where that would change the prompt's own
tokens, the response is tokenized by itself, and the row is warned of. The supervised span ends in exactly one stop
token.
"""

from __future__ import annotations

import itertools
import logging
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qpref.data.control_tokens import ControlTokens
from qpref.data.example_rows import ExampleRow, RefusedRowError, responses_of, texts_of
from qpref.data.template import ChatTemplate, Rendered
from qpref.data.template_limits import bounded
from qpref.data.truncate import shorten_prompt
from qpref.records import Finding, PreferencePair, TokenizedExample

log = logging.getLogger("qpref")

ROWS_AT_ONCE = 64
CHARACTERS_AT_ONCE = 4_000_000
TAIL_CHARACTERS = 200
BOUNDARY = "tokenized in one piece, prompt and response would share a token: the response is tokenized by itself"


@dataclass(frozen=True, slots=True)
class Pieces:
    """A rendered row, and what of its prompt decides over a response's tokens.

    Attributes:
        tail: the prompt's end, from its last control token on (tokenizers split texts there first, so nothing that
            follows depends on what comes before), and no more than TAIL_CHARACTERS.
    """

    rendered: Rendered
    tail: str

    @property
    def texts(self) -> tuple[str, ...]:
        """All that has to be tokenized."""
        return self.rendered.prompt, self.tail, *(self.tail + response for response in self.rendered.responses)


@dataclass(frozen=True, slots=True)
class PairTokenizer:
    """Renders and tokenizes rows.

    Attributes:
        tokenizer: a Hugging Face tokenizer.
        template: its chat template; None where prompt and response stand as they are.
        stop_tokens: ids that end a response; the first is the end-of-sequence token, added where a response lacks one.
        control: the control tokens, which must not come from the data's words.
        prefix: what the tokenizer puts before a text by itself, a BOS mostly; a template rules over it.
    """

    tokenizer: Any
    template: ChatTemplate | None
    stop_tokens: tuple[int, ...]
    control: ControlTokens
    prefix: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: Any, template: str, stop_tokens: Sequence[int]) -> PairTokenizer:
        """Look at a tokenizer, and try its chat template.

        Args:
            template: the recipe's: "chat" or "none".
            stop_tokens: ids at which generation ends by the model's own settings.

        Raises:
            PolicyError: the chat template cannot be run.
        """
        has_template = bool(tokenizer.chat_template)
        if template == "chat" and not has_template:
            log.warning("the model has no chat template: prompt, response and end token are used as they are")
        ends = [end for end in (tokenizer.eos_token_id, *stop_tokens) if end is not None]
        control = ControlTokens.of(tokenizer, ends)
        chat = ChatTemplate.of(tokenizer, control.pattern) if template == "chat" and has_template else None
        if chat and chat.end_of_turn:
            end = tokenizer.convert_tokens_to_ids(chat.end_of_turn)
            if end not in ends:
                log.warning("the chat template ends a response in %s, where generation doesn't stop by the model's own "
                            "settings: add %d to the eos_token_id of generation_config.json",
                            chat.end_of_turn, end)  # fmt: skip
            ends.append(end)
        prefix = () if chat else _prefix(tokenizer)
        return cls(tokenizer, chat, tuple(dict.fromkeys(ends)), control, prefix)

    def tokenize(
        self, rows: Iterable[ExampleRow], max_prompt_length: int | None = None
    ) -> Iterator[TokenizedExample | Finding]:
        """Each row's ids, or why it cannot be tokenized; a warning comes before the row that it is about.

        Args:
            max_prompt_length: cut longer prompts to so many tokens; None cuts none.

        Raises:
            PolicyError: the chat template takes too long or too much memory.
        """
        for some in _some_at_once(rows):
            with bounded():
                pieces = [self._pieces(row) for row in some]
            texts = itertools.chain.from_iterable(each.texts for each in pieces if isinstance(each, Pieces))
            ids = self._ids_of(dict.fromkeys(texts))
            for row, each in zip(some, pieces, strict=True):
                yield from self._finish(row, each, ids, max_prompt_length)

    def render_first(self, example: TokenizedExample) -> str:
        """The example as the model meets it, special tokens visible, each scored span in double brackets."""
        decode = self.tokenizer.decode
        spans = [f"⟦{decode(list(branch))}⟧" for branch in example.branches]
        return "\n".join([decode(list(example.prompt)), *spans])

    def _finish(
        self, row: ExampleRow, pieces: Pieces | RefusedRowError, ids: dict[str, list[int]], limit: int | None
    ) -> Iterator[TokenizedExample | Finding]:
        try:
            if isinstance(pieces, RefusedRowError):
                raise pieces
            example, warnings = self._example(row, pieces, ids)
            if limit is not None and len(example.prompt) > limit:
                example = self._cut(row, example, limit)
        except RefusedRowError as error:
            yield Finding(code=error.code, severity="error", message=str(error), source=row.source)
            return
        for code, message in warnings:
            yield Finding(code=code, severity="warning", message=message, source=row.source)
        yield example

    def _cut(self, row: ExampleRow, example: TokenizedExample, limit: int) -> TokenizedExample:
        """The example with a prompt of at most `limit` tokens."""
        if self.template is None:
            start = len(self.prefix) if limit > len(self.prefix) else 0
            kept = example.prompt[:start] + example.prompt[start - limit :]
            return replace(example, prompt=kept, prompt_cut=True)
        tried = {_sizes(row): example}

        def cut(row: ExampleRow) -> TokenizedExample:
            tried[_sizes(row)] = tried.get(_sizes(row)) or self._alone(row)
            return tried[_sizes(row)]

        shorter = shorten_prompt(row, limit, lambda row: len(cut(row).prompt), self._token_starts)
        return replace(cut(shorter), prompt_cut=True)

    def _alone(self, row: ExampleRow) -> TokenizedExample:
        with bounded():
            pieces = self._pieces(row)
        if isinstance(pieces, RefusedRowError):
            raise pieces
        return self._example(row, pieces, self._ids_of(dict.fromkeys(pieces.texts)))[0]

    def _pieces(self, row: ExampleRow) -> Pieces | RefusedRowError:
        """The texts of a row; an error is given back, since others are rendered with it."""
        try:
            self.control.refuse_typed(texts_of(row))
            rendered = self.template.render(row) if self.template else _as_it_is(row)
        except RefusedRowError as error:
            return error
        prompt = rendered.prompt[-TAIL_CHARACTERS:]
        return Pieces(rendered, prompt[self.control.last_in(prompt) :])

    def _example(
        self, row: ExampleRow, pieces: Pieces, ids: dict[str, list[int]]
    ) -> tuple[TokenizedExample, list[tuple[str, str]]]:
        """A row's ids, and what to warn of: code and message."""
        for text in pieces.texts:
            self.control.refuse_hidden(text, ids[text])
        prompt = [*self.prefix, *ids[pieces.rendered.prompt]]
        if not prompt:
            raise RefusedRowError("empty", "the prompt has no tokens")
        found = [self._response(prompt, pieces, response, ids) for response in pieces.rendered.responses]
        branches = tuple(array("i", self._with_stop(after)) for after, _ in found)
        warnings = [("template", message) for message in pieces.rendered.warnings]
        if not all(joins for _, joins in found):
            warnings.append(("boundary", BOUNDARY))
        label, margin = (None, row.margin) if isinstance(row, PreferencePair) else (row.label, 0.0)
        example = TokenizedExample(
            prompt=array("i", prompt),
            branches=branches,
            truncated=(False,) * len(branches),
            weight=row.weight,
            margin=margin,
            label=label,
            number=row.number,
            source=row.source,
        )
        return example, warnings

    def _response(
        self, prompt: list[int], pieces: Pieces, response: str, ids: dict[str, list[int]]
    ) -> tuple[list[int], bool]:
        """The tokens of a response, and whether they are those of tokenizing prompt and response in one piece.

        A tail that starts within a word has other tokens at first; where its second half has the prompt's own, a
        response after the tail has the tokens that it has after the whole prompt.
        """
        before, joined = ids[pieces.tail], ids[pieces.tail + response]
        settled = before[len(before) // 2 :]
        if not settled or prompt[-len(settled) :] != settled:
            whole = pieces.rendered.prompt
            before, joined = ids[whole], self._ids(whole + response)
        if joined[: len(before)] == before:
            return joined[len(before) :], True
        return self._inside(response), False

    def _inside(self, text: str) -> list[int]:
        """A text's ids, without the space that SentencePiece's tokenizers put before a text's first word."""
        before, joined = self._ids("\n"), self._ids("\n" + text)
        return joined[len(before) :] if joined[: len(before)] == before else self._ids(text)

    def _with_stop(self, ids: list[int]) -> list[int]:
        """Ids up to the first stop token; templates put white space after it. Without one, the end token is added."""
        place = next((place for place, token in enumerate(ids) if token in self.stop_tokens), None)
        if place is not None:
            after = [token for token in ids[place + 1 :] if token not in self.control.ids]
            if after and self.tokenizer.decode(after).strip():
                name = self.tokenizer.decode(ids[place])
                raise RefusedRowError("template", f"the chat template goes on after the stop token {name}")
            return ids[: place + 1]
        if not self.stop_tokens:
            raise RefusedRowError("no_stop", "the tokenizer has no end-of-sequence token")
        return [*ids, self.stop_tokens[0]]

    def _ids(self, text: str) -> list[int]:
        return self._ids_of([text])[text]

    def _ids_of(self, texts: Iterable[str]) -> dict[str, list[int]]:
        some = list(texts)
        if not some:
            return {}
        found = self.tokenizer(
            some, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
        )
        return dict(zip(some, found["input_ids"], strict=True))

    def _token_starts(self, text: str) -> list[int]:
        """The characters at which a text's tokens start; evenly spread where the tokenizer doesn't tell."""
        if self.tokenizer.is_fast:
            offsets = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
            return [start for start, _ in offsets]
        count = len(self._ids(text))
        return [place * len(text) // count for place in range(count)]


def _sizes(row: ExampleRow) -> tuple[int, ...]:
    """What tells the cuts of one row apart."""
    return tuple(len(turn.content) for turn in row.prompt)


def _prefix(tokenizer: Any) -> tuple[int, ...]:
    full, bare = (tokenizer("a", add_special_tokens=adds)["input_ids"] for adds in (True, False))
    start = next((place for place in range(len(full)) if full[place : place + len(bare)] == bare), 0)
    return tuple(full[:start])


def _as_it_is(row: ExampleRow) -> Rendered:
    if len(row.prompt) > 1 or row.tools:
        raise RefusedRowError("no_template", "a conversation and tools need a chat template")
    return Rendered(row.prompt[0].content, tuple(side[0].content for side in responses_of(row)))


def _some_at_once(rows: Iterable[ExampleRow]) -> Iterator[list[ExampleRow]]:
    """Rows in their order, so many at once as the tokenizer's threads have use for."""
    some: list[ExampleRow] = []
    size = 0
    for row in rows:
        some.append(row)
        size += sum(map(len, texts_of(row)))
        if len(some) == ROWS_AT_ONCE or size > CHARACTERS_AT_ONCE:
            yield some
            some, size = [], 0
    if some:
        yield some
