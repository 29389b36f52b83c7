"""Held-out split by prompt and resampling by source weight; both depend on the row and a seed, not on the order.

All rows of a prompt go to the same split, so that no prompt is in both.
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
    """Hold out about `share` of the prompts.

    Prompts that differ only in case, punctuation, white space or the system turn count as the same.
    """

    share: float
    seed: int

    def split_of(self, row: Sequence[PreferencePair | UnpairedExample] | Finding) -> Split:
        """Return the split of a row; refused rows count as training data."""
        if isinstance(row, Finding):
            return "train"
        return "heldout" if _uniform(self.seed, _plain(row[0].prompt)) < self.share else "train"


def resample(
    examples: Iterable[TokenizedExample], weights: Mapping[str, float], seed: int
) -> Iterator[TokenizedExample]:
    """Repeat or drop examples by the weight of their source; a fraction repeats a seeded part of the rows once more.

    Args:
        weights: path of a source -> times that an epoch trains on each of its rows; 1 for other paths.
    """
    for example in examples:
        weight = weights.get(example.source.path, 1.0)
        times, fraction = int(weight), weight % 1
        if fraction and _uniform(seed, f"{example.source.line} {example.prompt.tobytes().hex()}") < fraction:
            times += 1
        for _ in range(times):
            yield example


def _plain(prompt: Sequence[Message]) -> str:
    """Reduce a prompt to letters and digits, casefolded and NFKC-normalized; a prompt without any stays as it is."""
    text = "\n".join(message.content for message in prompt if message.role != "system")
    return _NO_WORD.sub("", normalize("NFKC", text).casefold()) or text


def _uniform(seed: int, text: str) -> float:
    """Hash seed and text to a number in [0, 1)."""
    digest = blake2b(text.encode(), digest_size=8, key=str(seed).encode()).digest()
    return int.from_bytes(digest, "big") / 2**64
