"""Generate the benchmark's pairs: random tokens with a workload's length distribution, the same for all contestants."""

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
    """A length distribution, by mean lengths in tokens; a response includes its end token.

    Attributes:
        prompt_spread, response_spread: standard deviation of the log lengths. With 0.6 the longer response of a pair is
            1.33 times the mean, and padding a batch of two random chat-like pairs multiplies its tokens by 1.5; in 836
            judged pairs of PandaLM (characters) these are 1.31 and 1.56.
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
    """Token ids of one labelled completion, and of its mismatched partner, another prompt's completion."""

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
    """Define pairs of exactly `total` tokens, counting the prompt once: a quarter prompt, the rest responses."""
    return Workload(
        name=f"{total} tokens", prompt=total // 4, response=3 * total // 8, prompt_spread=0, response_spread=0
    )


def make_pairs(workload: Workload, count: int, vocabulary: int, seed: int = 7) -> list[Pair]:
    """Generate `count` pairs; a larger count extends the same sequence.

    The first pair has mean lengths. Each following group of eight covers the distribution's octiles, shuffled
    separately for prompts, chosen and rejected, so that few pairs represent the distribution.
    """
    rng = random.Random(seed)
    spreads = (workload.prompt_spread, workload.response_spread, workload.response_spread)
    means = (workload.prompt, workload.response, workload.response)
    lengths = [means]
    while len(lengths) < count:
        sides = [_octiles(mean, spread, rng) for mean, spread in zip(means, spreads, strict=True)]
        lengths += list(zip(*sides, strict=True))

    def tokens(length: int, last: int) -> list[int]:
        return [*(rng.randrange(FIRST_WORD, vocabulary) for _ in range(length - 1)), last]

    lasts = (FIRST_WORD, END, END)
    return [Pair(*(tokens(*side) for side in zip(sizes, lasts, strict=True))) for sizes in lengths[:count]]


def _octiles(mean: int, spread: float, rng: random.Random) -> list[int]:
    """Take the midpoints of a lognormal distribution's octiles, scaled to the mean and shuffled."""
    normal = NormalDist(0, spread) if spread else None
    raw = [math.exp(normal.inv_cdf((index + 0.5) / 8)) if normal else 1.0 for index in range(8)]
    lengths = [max(2, round(mean * 8 * value / sum(raw))) for value in raw]
    rng.shuffle(lengths)
    return lengths


def as_singles(pairs: Sequence[Pair]) -> list[Single]:
    """Make two single completions, of different prompts, for each pair, as in shuffled data.

    Each one's partner for the KL estimate is the other's completion: TRL rotates completions within a batch of two.
    """
    singles = []
    for index, pair in enumerate(pairs):
        other = pairs[(index + 1) % len(pairs)]
        singles += [
            Single(pair.prompt, pair.chosen, other.rejected, True),
            Single(other.prompt, other.rejected, pair.chosen, False),
        ]
    return singles


def text(tokens: Iterable[int]) -> str:
    """Write the text that the benchmark's tokenizer encodes as these ids."""
    return " ".join(word(token) for token in tokens)


def digest(rows: Iterable[Sequence[Sequence[int]]]) -> str:
    """Hash token ids, part by part, in training order."""
    sha256 = hashlib.sha256()
    for row in rows:
        for part in row:
            sha256.update(len(part).to_bytes(4, "little") + b"".join(token.to_bytes(4, "little") for token in part))
    return sha256.hexdigest()
