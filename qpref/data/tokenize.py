"""Tokenize rows exactly as the trained model sees them at inference.

The prompt is tokenized on its own, as at inference, so that both sides have the same prompt ids. The tokens of a
response are those that follow the prompt's when both are tokenized together. Where that would change the prompt's
tokens, the response is tokenized separately, with a warning. The scored span ends in exactly one stop token.
"""

from __future__ import annotations

import itertools
import logging
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qpref.data.control_tokens import ControlTokens
from qpref.data.example_rows import ExampleRow, RefusedRowError, responses_of, sides_of, texts_of, tokenized_row
from qpref.data.masking import NO_MASKS, Masking, TokenizedResponse
from qpref.data.template import ChatTemplate, Rendered
from qpref.data.template_limits import limited
from qpref.data.tokenizer_failures import TokenizerError, on_rows, tokenizing
from qpref.data.truncate import shorten_prompt
from qpref.records import Finding, TokenizedExample

log = logging.getLogger("qpref")

ROWS_AT_ONCE = 64
CHARACTERS_AT_ONCE = 4_000_000
TAIL_CHARACTERS = 200
SIDES = {True: "desirable", False: "undesirable"}
"""Names of single completions by their label."""
BOUNDARY = "tokenized together, prompt and response would share a token: the response is tokenized separately"


@dataclass(frozen=True, slots=True)
class Pieces:
    """A rendered row, and the end of its prompt that can affect the tokens of a response.

    Attributes:
        tail: the prompt from its last control token on, at most TAIL_CHARACTERS. Tokenizers split texts at control
            tokens first, so that earlier text has no effect on later tokens.
    """

    rendered: Rendered
    tail: str

    @property
    def texts(self) -> tuple[str, ...]:
        """Texts to tokenize."""
        return self.rendered.prompt, self.tail, *(self.tail + response for response in self.rendered.responses)


@dataclass(frozen=True, slots=True)
class PairTokenizer:
    """Renderer and tokenizer of rows.

    Attributes:
        tokenizer: a Hugging Face tokenizer.
        template: its chat template; None where prompt and response are used as they are.
        stop_tokens: ids that end a response; the first is the end-of-sequence token, appended to a response without.
        control: the control tokens, which must not come from texts of the data.
        prefix: ids that the tokenizer adds before a text, usually BOS; unused with a template, which writes its own.
        masking: the recipe's masks.
    """

    tokenizer: Any
    template: ChatTemplate | None
    stop_tokens: tuple[int, ...]
    control: ControlTokens
    prefix: tuple[int, ...]
    masking: Masking = NO_MASKS

    @classmethod
    def of(
        cls, tokenizer: Any, template: str, stop_tokens: Sequence[int], masking: Masking = NO_MASKS
    ) -> PairTokenizer:
        """Inspect a tokenizer and probe its chat template.

        Args:
            template: `[data] template`: "chat" or "none".
            stop_tokens: ids at which the model's generation settings stop.

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
                log.warning("the chat template ends a response with %s, at which the model's generation settings don't "
                            "stop: add %d to the eos_token_id of generation_config.json",
                            chat.end_of_turn, end)  # fmt: skip
            ends.append(end)
        prefix = () if chat else _prefix(tokenizer)
        return cls(tokenizer, chat, tuple(dict.fromkeys(ends)), control, prefix, masking)

    def tokenize(
        self, rows: Iterable[ExampleRow], max_prompt_length: int | None = None
    ) -> Iterator[TokenizedExample | Finding]:
        """Tokenize each row, or yield the finding that refuses it; a warning comes before its row.

        Args:
            max_prompt_length: truncate longer prompts to this many tokens; None truncates none.

        Raises:
            PolicyError: the chat template takes too long or too much memory, or the tokenizer fails on a row.
        """
        for batch in _batched(rows):
            with limited():
                pieces = [self._pieces(row) for row in batch]
            ids = self._ids_of_rows(batch, pieces)
            for row, each in zip(batch, pieces, strict=True):
                with on_rows(self.tokenizer.name_or_path, [row]):
                    finished = list(self._finish(row, each, ids, max_prompt_length))
                yield from finished

    def render_first(self, example: TokenizedExample) -> str:
        """Decode the example as the model sees it: special tokens visible, scored spans in double brackets, each after
        the name of its side."""
        usual = ("chosen", "rejected") if example.label is None else (SIDES[example.label], "mismatched")
        names = tuple(f"rank {rank}" for rank in example.ranks) or usual
        masks = example.masks or [b"\1" * len(branch) for branch in example.branches]
        sides = zip(names, example.branches, masks, strict=False)
        spans = [f"{name}: {self._render_branch(branch, mask)}" for name, branch, mask in sides]
        return "\n".join([f"prompt: {self.tokenizer.decode(list(example.prompt))}", *spans])

    def _render_branch(self, branch: Sequence[int], mask: bytes) -> str:
        parts = []
        for counts, members in itertools.groupby(zip(branch, mask, strict=True), key=lambda one: one[1]):
            text = self.tokenizer.decode([token for token, _ in members])
            parts.append(f"⟦{text}⟧" if counts else text)
        return "".join(parts)

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
        """Truncate the prompt to at most `limit` tokens."""
        if self.template is None:
            start = len(self.prefix) if limit > len(self.prefix) else 0
            kept = example.prompt[:start] + example.prompt[start - limit :]
            return replace(example, prompt=kept, prompt_cut=True)
        tried = {_sizes(row): example}

        def cut(row: ExampleRow) -> TokenizedExample:
            tried[_sizes(row)] = tried.get(_sizes(row)) or self._tokenize_one(row)
            return tried[_sizes(row)]

        shorter = shorten_prompt(row, limit, lambda row: len(cut(row).prompt), self._token_starts)
        return replace(cut(shorter), prompt_cut=True)

    def _tokenize_one(self, row: ExampleRow) -> TokenizedExample:
        with limited():
            pieces = self._pieces(row)
        if isinstance(pieces, RefusedRowError):
            raise pieces
        return self._example(row, pieces, self._ids_of(dict.fromkeys(pieces.texts)))[0]

    def _pieces(self, row: ExampleRow) -> Pieces | RefusedRowError:
        """Render a row; a refusal is returned, not raised, since other rows are rendered in the same batch."""
        try:
            self.control.refuse_in_texts(texts_of(row))
            rendered = self.template.render(row) if self.template else _unrendered(row)
        except RefusedRowError as error:
            return error
        prompt = rendered.prompt[-TAIL_CHARACTERS:]
        return Pieces(rendered, prompt[self.control.last_start(prompt) :])

    def _example(
        self, row: ExampleRow, pieces: Pieces, ids: dict[str, list[int]]
    ) -> tuple[TokenizedExample, list[tuple[str, str]]]:
        """Build the tokenized example of a row; returns it with its warnings (code, message)."""
        for text in pieces.texts:
            self.control.refuse_normalized(text, ids[text])
        prompt = [*self.prefix, *ids[pieces.rendered.prompt]]
        if not prompt:
            raise RefusedRowError("empty", "the prompt has no tokens")
        found = [self._response(prompt, pieces, response, ids) for response in pieces.rendered.responses]
        branches = tuple(array("i", self._with_stop(each.ids)) for each in found)
        sides = zip(sides_of(row), responses_of(row), branches, found, strict=True)
        masks = [
            self.masking.mask(self.tokenizer, name, turns[0], pieces.rendered.prompt, each, len(branch))
            for name, turns, branch, each in sides
        ]
        warnings = [("template", message) for message in pieces.rendered.warnings]
        if not all(each.joins for each in found):
            warnings.append(("boundary", BOUNDARY))
        example = replace(
            tokenized_row(row, array("i", prompt), branches),
            masks=tuple(masks) if any(0 in mask for mask in masks) else (),
            scores_masked=self.masking.scores_masked,
        )
        return example, warnings

    def _response(
        self, prompt: list[int], pieces: Pieces, response: str, ids: dict[str, list[int]]
    ) -> TokenizedResponse:
        """Find the tokens of a response: those after the prompt's, where both are tokenized together.

        A tail that starts inside a word has different tokens at first. If the second half of its tokens equals the end
        of the prompt's, a response has the same tokens after the tail as after the whole prompt.
        """
        start = pieces.tail
        before, joined = ids[start], ids[start + response]
        settled = before[len(before) // 2 :]
        if not settled or prompt[-len(settled) :] != settled:
            start = pieces.rendered.prompt
            before, joined = ids[start], self._ids(start + response)
        if joined[: len(before)] == before:
            return TokenizedResponse(joined, len(before), start, response, joins=True)
        # The newline keeps SentencePiece tokenizers from adding a space before the first word.
        before, joined = self._ids("\n"), self._ids("\n" + response)
        if joined[: len(before)] == before:
            return TokenizedResponse(joined, len(before), "\n", response, joins=False)
        return TokenizedResponse(self._ids(response), 0, "", response, joins=False)

    def _with_stop(self, ids: list[int]) -> list[int]:
        """Cut ids after the first stop token (templates add white space there); without one, append end-of-sequence."""
        stop = min((ids.index(token) for token in self.stop_tokens if token in ids), default=None)
        if stop is not None:
            after = [token for token in ids[stop + 1 :] if token not in self.control.ids]
            if after and self.tokenizer.decode(after).strip():
                name = self.tokenizer.decode(ids[stop])
                raise RefusedRowError("template", f"the chat template writes more text after the stop token {name}")
            return ids[: stop + 1]
        if not self.stop_tokens:
            raise RefusedRowError("no_stop", "the tokenizer has no end-of-sequence token")
        return [*ids, self.stop_tokens[0]]

    def _ids_of_rows(
        self, rows: Sequence[ExampleRow], pieces: Sequence[Pieces | RefusedRowError]
    ) -> dict[str, list[int]]:
        """Tokenize the texts of a batch together; where that fails, row by row, so that the error names one."""
        texts = [each.texts if isinstance(each, Pieces) else () for each in pieces]
        name = self.tokenizer.name_or_path
        with on_rows(name, rows):
            try:
                return self._ids_of(dict.fromkeys(itertools.chain.from_iterable(texts)))
            except TokenizerError:
                for row, own in zip(rows, texts, strict=True):
                    with on_rows(name, [row]):
                        self._ids_of(own)
                raise

    def _ids(self, text: str) -> list[int]:
        return self._ids_of([text])[text]

    def _ids_of(self, texts: Iterable[str]) -> dict[str, list[int]]:
        batch = list(texts)
        if not batch:
            return {}
        with tokenizing():
            found = self.tokenizer(
                batch, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
            )
        return dict(zip(batch, found["input_ids"], strict=True))

    def _token_starts(self, text: str) -> list[int]:
        """Return the character offsets of a text's tokens; evenly spaced where the tokenizer has no offsets."""
        if self.tokenizer.is_fast:
            with tokenizing():
                offsets = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
            return [start for start, _ in offsets]
        count = len(self._ids(text))
        return [index * len(text) // count for index in range(count)]


def _sizes(row: ExampleRow) -> tuple[int, ...]:
    """Return the lengths of the prompt's turns, which identify a truncation of one row."""
    return tuple(len(turn.content) for turn in row.prompt)


def _prefix(tokenizer: Any) -> tuple[int, ...]:
    """Return the ids that the tokenizer adds before a text, usually BOS."""
    full, bare = (tokenizer("a", add_special_tokens=adds)["input_ids"] for adds in (True, False))
    start = next((index for index in range(len(full)) if full[index : index + len(bare)] == bare), 0)
    return tuple(full[:start])


def _unrendered(row: ExampleRow) -> Rendered:
    if len(row.prompt) > 1 or row.tools:
        raise RefusedRowError("no_template", "a conversation and tools need a chat template")
    if any(
        message.extra.keys() & {"tool_calls", "reasoning_content"} for side in responses_of(row) for message in side
    ):
        raise RefusedRowError("no_template", "tool calls and reasoning need a chat template")
    return Rendered(row.prompt[0].content, tuple(side[0].content for side in responses_of(row)))


def _batched(rows: Iterable[ExampleRow]) -> Iterator[list[ExampleRow]]:
    """Batch rows in their order, enough at a time to keep the tokenizer's threads busy."""
    batch: list[ExampleRow] = []
    num_characters = 0
    for row in rows:
        batch.append(row)
        num_characters += sum(map(len, texts_of(row)))
        if len(batch) == ROWS_AT_ONCE or num_characters > CHARACTERS_AT_ONCE:
            yield batch
            batch, num_characters = [], 0
    if batch:
        yield batch
