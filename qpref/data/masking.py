"""Masks of responses: which characters of a rendered response count, and which tokens.

A row masks characters of a message's content. The chat template may have changed the white space in it, left out its
start, or put reasoning before it and calls behind it, so the characters are found by all that aren't white space. A
token counts if any of its characters does, apart from white space: text that counts is never lost, and a token that
reaches from a masked part into one that counts is in.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Literal

from qpref.data.example_rows import RefusedRowError
from qpref.data.tokenizer_failures import tokenizing
from qpref.recipe.data_section import DataSection
from qpref.records import Message

OPENING = re.compile(r"(?:<[^<>\s]+>|\[[^\[\]\s]+\])\s*\Z")
"""Tag at a prompt's end, such as the <think> that a template opens for generation: it belongs to the response."""
TAIL = 200
"""Characters of a prompt's end in which such a tag is looked for."""


@dataclass(frozen=True, slots=True)
class TokenizedResponse:
    """A response as it was tokenized: after a text that it follows.

    Attributes:
        joined: tokens of both.
        skipped: number of those that are the text before it.
        joins: False where this text isn't the prompt, whose tokens would be others with the response.
    """

    joined: list[int]
    skipped: int
    start: str
    text: str
    joins: bool

    @property
    def ids(self) -> list[int]:
        return self.joined[self.skipped :]


@dataclass(frozen=True, slots=True)
class Masking:
    """Masks as a recipe uses them.

    Attributes:
        mode: as `[data] mask`.
        patterns: what they match in a rendered response is masked.
    """

    mode: Literal["exclude", "loss", "ignore"] = "exclude"
    patterns: tuple[re.Pattern[str], ...] = ()

    @classmethod
    def of(cls, data: DataSection) -> Masking:
        return cls(data.mask, tuple(re.compile(pattern, re.DOTALL) for pattern in data.mask_patterns))

    @property
    def scores_masked(self) -> bool:
        return self.mode == "loss"

    def applies_to(self, message: Message) -> bool:
        """Return whether tokens of this response may be masked."""
        return self.mode != "ignore" and bool(self.patterns or message.masked)

    def mask(
        self, tokenizer: Any, side: str, message: Message, prompt: str, response: TokenizedResponse, num_tokens: int
    ) -> bytes:
        """Return one byte for each token of a response and its end, which always counts: 1 for one that counts.

        Args:
            side: name of the response, for messages.
            prompt: as the template renders it.
            num_tokens: tokens of the response, with its end.

        Raises:
            RefusedRowError: no token but the end counts, or the mask has no position.
        """
        if not self.applies_to(message):
            return b"\1" * num_tokens
        characters = self.characters(prompt, response.text, message)
        if len(set(characters)) < 2:
            mask = characters[:1] * (num_tokens - 1)
        elif not tokenizer.is_fast:
            raise RefusedRowError("bad_mask", "a mask needs a tokenizer that tells the characters of its tokens")
        else:
            with tokenizing():
                both = response.start + response.text
                offsets = tokenizer(both, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
            first = len(response.start)
            own = [(start - first, end - first) for start, end in offsets[response.skipped :]]
            mask = token_mask(response.text, characters, own)[: num_tokens - 1]
        if not any(mask):
            raise RefusedRowError("masked", f"{side}: every token is masked, so that nothing of it counts")
        return mask + b"\1"

    def characters(self, prompt: str, response: str, message: Message) -> bytes:
        """Return one byte for each character of a rendered response: 1 for one that counts.

        Raises:
            RefusedRowError: the content isn't in the response, so that its spans have no position there.
        """
        counts = bytearray(b"\1" * len(response))
        if message.masked:
            counts = _located(response, message)
        opening = OPENING.search(prompt[-TAIL:])
        before = opening[0] if opening else ""
        for pattern in self.patterns:
            for found in pattern.finditer(before + response):
                start, end = (max(0, at - len(before)) for at in found.span())
                counts[start:end] = bytes(end - start)
        return bytes(counts)


NO_MASKS = Masking()


def token_mask(text: str, characters: bytes, offsets: Sequence[tuple[int, int]]) -> bytes:
    """Return one byte for each token: 1 for one with a character that counts. White space decides only where a token
    has nothing else.

    Args:
        text: the response.
        characters: as `Masking.characters` has them.
        offsets: first character of each token and the one after its last, as the tokenizer has them. White space that
            it leaves out of a token belongs to the next one.
    """
    starts = [min(start, before) for (start, _), before in zip(offsets, _ends_before(offsets), strict=True)]
    mask = bytearray()
    for start, (_, end) in zip(starts, offsets, strict=True):
        own = range(max(start, 0), min(max(end, start + 1), len(text)))
        decisive = [at for at in own if not text[at].isspace()] or own
        mask.append(any(characters[at] for at in decisive) or not own)
    return bytes(mask)


def _ends_before(offsets: Sequence[tuple[int, int]]) -> list[int]:
    """Return for each token the end of those before it."""
    return [0, *accumulate((end for _, end in offsets), max)][: len(offsets)]


def _located(response: str, message: Message) -> bytearray:
    """Mark the characters of a rendered response that the masked spans of its message's content are."""
    content, inside = message.content, bytearray(b"\1" * len(message.content))
    for start, end in message.masked:
        end = min(end, len(content))
        inside[start:end] = bytes(end - start)
    found = _alignment(response, message)
    if found is None:
        raise RefusedRowError(
            "bad_mask", "the chat template changes the text of a response with masked parts, so they have no position"
        )
    counts = bytearray(b"\1" * len(response))
    for own, there in found:
        counts[there] = inside[own]
    for (own, there), (next_own, next_there) in pairwise(found):
        between = slice(there + 1, next_there)
        if response[between] == content[own + 1 : next_own]:
            counts[between] = inside[own + 1 : next_own]
        else:
            counts[between] = bytes([max(counts[there], counts[next_there])]) * (next_there - there - 1)
    for (own, there), step in ((found[0], -1), (found[-1], 1)) if found else ():
        _mark_white_space(response, content, inside, counts, (own, there), step)
    return counts


def _mark_white_space(
    response: str, content: str, inside: bytearray, counts: bytearray, outermost: tuple[int, int], step: int
) -> None:
    """Mark the white space on one side of the content: as far as it is the content's own as that is, and what the
    template has put there as its neighbour.

    Args:
        outermost: position of the content's last character on that side, in the content and in the response.
        step: -1 for the left side, 1 for the right.
    """
    own, there = outermost
    mark, is_own = inside[own], True
    while 0 <= (there := there + step) < len(response) and response[there].isspace():
        own += step
        is_own = is_own and 0 <= own < len(content) and content[own] == response[there]
        mark = inside[own] if is_own else mark
        counts[there] = mark


def _alignment(response: str, message: Message) -> list[tuple[int, int]] | None:
    """Pair the content's characters that aren't white space with their positions in a rendered response.

    The content comes after the reasoning. Where the prompt opens a tag that the content starts with, the response lacks
    it.

    Returns:
        (index in the content, index in the response) of each, or None where the content isn't there.
    """
    there = [at for at, character in enumerate(response) if not character.isspace()]
    squeezed = "".join(response[at] for at in there)
    reasoning = "".join(str(message.extra.get("reasoning_content", "")).split())
    after = squeezed.find(reasoning)
    first = after + len(reasoning) if reasoning and after >= 0 else 0
    tag = re.match(r"\s*(?:<[^<>\s]+>|\[[^\[\]\s]+\])", message.content)
    for start in (0, tag.end() if tag else 0):
        own = [at for at, character in enumerate(message.content) if at >= start and not character.isspace()]
        position = squeezed.find("".join(message.content[at] for at in own), first)
        if position >= 0:
            return list(zip(own, there[position : position + len(own)], strict=True))
    return None
