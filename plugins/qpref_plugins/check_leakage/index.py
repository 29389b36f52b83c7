"""Index of the held-out prompts by their word 5-grams (shingles), to find those that a training prompt contains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qpref_plugins.check_leakage.shingles import I64, U64, Shingled, shingle

MOST_SHINGLES = 64
FEWEST_SHINGLES = 5
MOST_PROMPTS = 10
_MOST_FILTER_BITS = 24


@dataclass(slots=True)
class Match:
    """Leaked prompts of a batch of training prompts, one entry each.

    Attributes:
        row: index in the batch.
        prompt: number of the most similar held-out prompt.
        share: share of the held-out prompt's shingles that it contains; 1.0 where the two are equal.
        equal: True where the two are the same text.
    """

    row: I64
    prompt: I64
    share: np.ndarray
    equal: np.ndarray


class HeldOutIndex:
    """Shingles of distinct held-out prompts; at most `MOST_SHINGLES` of each, with the smallest hashes (MinHash).

    Shingles in more than `MOST_PROMPTS` prompts, or in more than a quarter of few prompts, come from templates and are
    ignored. A prompt with fewer than `FEWEST_SHINGLES` others is only matched as a whole.
    """

    def __init__(self) -> None:
        self._numbers: dict[int, int] = {}
        self._parts: list[tuple[U64, I64]] = []
        self._hashes: U64 = np.empty(0, dtype=np.uint64)
        self._prompts: I64 = np.empty(0, dtype=np.int64)
        self._sizes: I64 = np.empty(0, dtype=np.int64)
        self._filter = np.zeros(2, dtype=bool)
        self._shift = np.uint64(63)
        self.first_row: list[int] = []

    def __len__(self) -> int:
        return len(self._numbers)

    def add(self, prompts: Sequence[bytes], rows: Sequence[int]) -> None:
        """Add held-out prompts.

        Args:
            rows: location of each prompt; `first_row` keeps that of the first of equal ones.
        """
        batch = shingle(prompts)
        number_of = np.full(len(prompts), -1, dtype=np.int64)
        for index, (whole, row) in enumerate(zip(batch.whole.tolist(), rows, strict=True)):
            if whole and whole not in self._numbers:
                number_of[index] = self._numbers[whole] = len(self.first_row)
                self.first_row.append(row)
        number = number_of[batch.prompt]
        fresh = number >= 0
        self._parts.append(_smallest(batch.hashes[fresh], number[fresh]))

    def close(self) -> None:
        """Sort the added prompts; required before `find`."""
        hashes = np.concatenate([part[0] for part in self._parts] or [self._hashes])
        prompts = np.concatenate([part[1] for part in self._parts] or [self._prompts])
        self._parts = []
        order = np.argsort(hashes, kind="stable")
        hashes, prompts = hashes[order], prompts[order]
        _, index, counts = np.unique(hashes, return_inverse=True, return_counts=True)
        specific = counts[index] <= min(MOST_PROMPTS, max(1, len(self) // 4))
        sizes = np.bincount(prompts[specific], minlength=len(self))
        specific &= sizes[prompts] >= FEWEST_SHINGLES
        self._hashes, self._prompts, self._sizes = hashes[specific], prompts[specific], sizes
        bits = min(_MOST_FILTER_BITS, (16 * len(self._hashes)).bit_length() + 1)
        self._shift = np.uint64(64 - bits)
        self._filter = np.zeros(1 << bits, dtype=bool)
        self._filter[self._hashes >> self._shift] = True

    def find(self, prompts: Sequence[bytes], least_share: float) -> Match:
        """Find the prompts that equal a held-out one, or contain at least `least_share` of its shingles."""
        batch = shingle(prompts)
        whole = np.array([self._numbers.get(value, -1) for value in batch.whole.tolist()], dtype=np.int64)
        row, prompt, share = self._near(batch)
        best = np.full(len(prompts), -1.0)
        best_prompt = np.full(len(prompts), -1, dtype=np.int64)
        order = np.argsort(share, kind="stable")
        best[row[order]], best_prompt[row[order]] = share[order], prompt[order]
        equal = whole >= 0
        best[equal], best_prompt[equal] = 1.0, whole[equal]
        rows = np.flatnonzero((best >= least_share) | equal)
        return Match(rows, best_prompt[rows], best[rows], equal[rows])

    def _near(self, batch: Shingled) -> tuple[I64, I64, np.ndarray]:
        """Return (row, held-out prompt, share of its shingles in the row) for every two that share a shingle."""
        maybe = np.flatnonzero(self._filter[batch.hashes >> self._shift])
        hashes, rows = batch.hashes[maybe], batch.prompt[maybe]
        order = np.lexsort((hashes, rows))
        hashes, rows = hashes[order], rows[order]
        new = np.ones(len(hashes), dtype=bool)
        new[1:] = (hashes[1:] != hashes[:-1]) | (rows[1:] != rows[:-1])
        hashes, rows = hashes[new], rows[new]
        start = np.searchsorted(self._hashes, hashes, side="left")
        count = np.searchsorted(self._hashes, hashes, side="right") - start
        posting = np.repeat(start - np.cumsum(count) + count, count) + np.arange(count.sum())
        both = np.repeat(rows, count) * max(1, len(self)) + self._prompts[posting]
        both, shared = np.unique(both, return_counts=True)
        row, prompt = np.divmod(both, max(1, len(self)))
        return row, prompt, shared / self._sizes[prompt]


def _smallest(hashes: U64, prompts: I64) -> tuple[U64, I64]:
    """Keep the `MOST_SHINGLES` smallest distinct hashes of each prompt."""
    order = np.lexsort((hashes, prompts))
    hashes, prompts = hashes[order], prompts[order]
    new = np.ones(len(hashes), dtype=bool)
    new[1:] = (hashes[1:] != hashes[:-1]) | (prompts[1:] != prompts[:-1])
    hashes, prompts = hashes[new], prompts[new]
    rank = np.arange(len(prompts)) - np.searchsorted(prompts, prompts, side="left")
    few = rank < MOST_SHINGLES
    return hashes[few], prompts[few]
