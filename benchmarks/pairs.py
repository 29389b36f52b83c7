"""The pairs that are measured on: random tokens with the lengths of a kind of data, the same for everyone."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

from benchmarks.shapes import END, FIRST_WORD, word


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A kind of data by its mean lengths in tokens; a response's includes its end token.

    Attributes:
        prompt_spread, response_spread: standard deviation of the logarithm of lengths. 0.6 makes the longer response of
            a pair 1.33 times the mean, and a batch of two random chat-like pairs 1.5 times its tokens; in 836 judged
            pairs of PandaLM (characters) these are 1.31 and 1.56.
    """

    name: str
    prompt: int
    response: int
    prompt_spread: float = 0.6
    response_spread: float = 0.6


@dataclass(frozen=True, slots=True)
class Pair:
    """Token ids of a prompt and two responses."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]

    @property
    def useful_tokens(self) -> int:
        return len(self.prompt) + len(self.chosen) + len(self.rejected)


@dataclass(frozen=True, slots=True)
class Single:
    """Token ids of one completion, whether it is desirable, and the completion of another prompt beside it."""

    prompt: list[int]
    completion: list[int]
    mismatched: list[int]
    desirable: bool

    @property
    def useful_tokens(self) -> int:
        return len(self.prompt) + len(self.completion)


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload(name="chat-like", prompt=167, response=300),
        Workload(name="long prompt", prompt=1600, response=150, prompt_spread=0.1),
        Workload(name="2k pairs", prompt=500, response=750),
        Workload(name="tiny", prompt=20, response=12),
    )
}


def growing(total: int) -> Workload:
    """Pairs of exactly `total` tokens, the prompt once: a quarter prompt, the rest responses."""
    return Workload(
        name=f"{total} tokens", prompt=total // 4, response=3 * total // 8, prompt_spread=0, response_spread=0
    )


def make_pairs(workload: Workload, count: int, vocabulary: int, seed: int = 7) -> list[Pair]:
    """`count` pairs; the first ones are the same however many are asked for.

    The first is of mean lengths; each eight after it have the distribution's eighths, in an order of their own for
    prompts, chosen and rejected, so that few pairs stand for many.
    """
    rng = random.Random(seed)
    spreads = (workload.prompt_spread, workload.response_spread, workload.response_spread)
    means = (workload.prompt, workload.response, workload.response)
    lengths = [means]
    while len(lengths) < count:
        sides = [_eighths(mean, spread, rng) for mean, spread in zip(means, spreads, strict=True)]
        lengths += list(zip(*sides, strict=True))

    def tokens(length: int, last: int) -> list[int]:
        return [*(rng.randrange(FIRST_WORD, vocabulary) for _ in range(length - 1)), last]

    lasts = (FIRST_WORD, END, END)
    return [Pair(*(tokens(*side) for side in zip(sizes, lasts, strict=True))) for sizes in lengths[:count]]


def _eighths(mean: int, spread: float, rng: random.Random) -> list[int]:
    """The middles of a lognormal distribution's eighths, scaled to their mean, shuffled."""
    normal = NormalDist(0, spread) if spread else None
    raw = [math.exp(normal.inv_cdf((place + 0.5) / 8)) if normal else 1.0 for place in range(8)]
    lengths = [max(2, round(mean * 8 * value / sum(raw))) for value in raw]
    rng.shuffle(lengths)
    return lengths


def as_singles(pairs: Sequence[Pair]) -> list[Single]:
    """Two single completions for each pair, of different prompts, as shuffled data have them.

    Each one's partner for the KL estimate is the other's completion: TRL rotates completions within a batch of two.
    """
    singles = []
    for place, pair in enumerate(pairs):
        other = pairs[(place + 1) % len(pairs)]
        singles += [
            Single(pair.prompt, pair.chosen, other.rejected, True),
            Single(other.prompt, other.rejected, pair.chosen, False),
        ]
    return singles


def text(tokens: Iterable[int]) -> str:
    """What the benchmark's tokenizer turns into these ids."""
    return " ".join(word(token) for token in tokens)


def digest(rows: Iterable[Sequence[Sequence[int]]]) -> str:
    """A fingerprint of token ids, part by part, in the order in which they are trained on."""
    found = hashlib.sha256()
    for row in rows:
        for part in row:
            found.update(len(part).to_bytes(4, "little") + b"".join(token.to_bytes(4, "little") for token in part))
    return found.hexdigest()
