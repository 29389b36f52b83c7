"""Which rows are held out, and how often the others are trained on: functions of a row and a seed, whatever the order.

Whole prompts are held out, so that none is on both sides.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from unicodedata import normalize

from qpref.hooks.types import Split
from qpref.records import Finding, Message, PreferencePair, TokenizedExample, UnpairedExample

_NO_WORD = re.compile(r"[\W_]+")


@dataclass(frozen=True, slots=True)
class HeldOutShare:
    """Holds out about `share` of the prompts.

    Prompts that differ in case, punctuation, white space or the system turn alone count as the same.
    """

    share: float
    seed: int

    def split_of(self, row: Sequence[PreferencePair | UnpairedExample] | Finding) -> Split:
        """The side of a row; what is no example counts to the training data."""
        if isinstance(row, Finding):
            return "train"
        return "heldout" if _uniform(self.seed, _plain(row[0].prompt)) < self.share else "train"


def mixed(examples: Iterable[TokenizedExample], weights: Mapping[str, float], seed: int) -> Iterator[TokenizedExample]:
    """Each example as often as its source's weight says; of a fraction, a seeded part of the rows is one more time.

    Args:
        weights: path of a source -> how often an epoch trains on each of its rows; 1 for those that aren't there.
    """
    for example in examples:
        weight = weights.get(example.source.path, 1.0)
        times, fraction = int(weight), weight % 1
        if fraction and _uniform(seed, f"{example.source.line} {example.prompt.tobytes().hex()}") < fraction:
            times += 1
        for _ in range(times):
            yield example


def _plain(prompt: Sequence[Message]) -> str:
    """A prompt's letters and digits, whatever their case and Unicode's spelling; all of it where there are none."""
    text = "\n".join(message.content for message in prompt if message.role != "system")
    return _NO_WORD.sub("", normalize("NFKC", text).casefold()) or text


def _uniform(seed: int, text: str) -> float:
    """A number in [0, 1) that follows from the seed and the text."""
    digest = blake2b(text.encode(), digest_size=8, key=str(seed).encode()).digest()
    return int.from_bytes(digest, "big") / 2**64
