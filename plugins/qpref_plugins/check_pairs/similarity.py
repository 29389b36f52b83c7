"""Compare difflib's similarity of two texts with a limit, without difflib's cost.

SequenceMatcher's ratio is 2 M / T: M the characters of its matching blocks, T those of both texts. The blocks have the
same order in both texts, so together they are a common subsequence, and M is at most L, the length of the longest one.
rapidfuzz computes L with bit-parallel arithmetic (its indel ratio is 2 L / T): if L is too short, so is M, which
settles most pairs. For the rest, blocks are searched as in SequenceMatcher, longest first, but only until they are
enough, or until the remaining characters are too few.
"""

from __future__ import annotations

from difflib import SequenceMatcher

from rapidfuzz.distance import LCSseq

SHORTEST_SEED = 8
MAX_HITS = 64
START_OF_UNMATCHED = 3
"""Length of a start that is compared first, in multiples of the characters that may be unmatched. Two thirds of it have
to match then, which is more than unrelated texts of one language have in common, as a rule."""


def more_alike_than(limit: float, first: str, second: str) -> bool:
    """Return exactly `SequenceMatcher(None, first, second, autojunk=False).ratio() > limit`."""
    total = len(first) + len(second)
    if not total:
        return limit < 1
    enough = _fewest_over(limit, total)
    if min(len(first), len(second)) < enough or _differ_at_the_start(first, second, enough):
        return False
    if LCSseq.similarity(first, second, score_cutoff=enough) < enough:
        return False
    return _matches(first, second, enough)


def _differ_at_the_start(first: str, second: str, enough: int) -> bool:
    """Return whether the starts of two texts are too different for `enough` matching characters in all.

    At most len(first) - enough characters of the first text have no match, so its first n characters have at least n
    minus that many, all of them among the first n + len(second) - enough characters of the second.
    """
    unmatched, size = len(first) - enough, START_OF_UNMATCHED * (len(first) - enough)
    if size >= len(first) // 2:
        return False
    start = second[: size + len(second) - enough]
    needed = size - unmatched
    return LCSseq.similarity(first[:size], start, score_cutoff=needed) < needed


def _fewest_over(limit: float, total: int) -> int:
    """Return the smallest number of matching characters whose ratio, as difflib computes it, exceeds the limit."""
    fewest = int(limit * total / 2)
    while 2.0 * fewest / total <= limit:
        fewest += 1
    while fewest and 2.0 * (fewest - 1) / total > limit:
        fewest -= 1
    return fewest


def _matches(first: str, second: str, enough: int) -> bool:
    """Return whether the matching blocks have `enough` characters: the longest block, then those on its sides."""
    open_parts = [(first, second)]
    found, possible = 0, min(len(first), len(second))
    while open_parts and found < enough <= found + possible:
        a, b = open_parts.pop()
        possible -= min(len(a), len(b))
        block = _longest_block(a, b)
        if block is None:
            found += sum(size for _, _, size in SequenceMatcher(None, a, b, autojunk=False).get_matching_blocks())
            continue
        i, j, size = block
        found += size
        for part in ((a[:i], b[:j]), (a[i + size :], b[j + size :])):
            if part[0] and part[1]:
                open_parts.append(part)
                possible += min(len(part[0]), len(part[1]))
    return found >= enough


def _longest_block(a: str, b: str) -> tuple[int, int, int] | None:
    """Find the longest common block: (start in a, start in b, length); the first in a, then b, as in difflib.

    A block of 2 n - 1 characters contains one of the pieces of n characters that `a` is split into, so it is enough to
    search all pieces in `b` and extend each hit; n is halved until the longest block found is that long. None where
    short blocks or many hits would make this slower than difflib.
    """
    seed = min(len(a), len(b)) // 2
    while seed >= SHORTEST_SEED:
        best, num_hits = (0, 0, 0), 0
        for start in range(0, len(a) - seed + 1, seed):
            hit = b.find(a[start : start + seed])
            while hit >= 0:
                num_hits += 1
                if num_hits > MAX_HITS * (len(a) // seed):
                    return None
                before = _common_end(a[:start], b[:hit])
                size = before + _common_start(a[start:], b[hit:])
                best = max(best, (size, before - start, before - hit))
                hit = b.find(a[start : start + seed], hit + 1)
        if best[0] >= 2 * seed - 1:
            return -best[1], -best[2], best[0]
        seed //= 2
    return None


def _common_start(a: str, b: str) -> int:
    """Return the length of the common prefix, by bisection: comparing slices is fast, a loop is not."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _common_end(a: str, b: str) -> int:
    """Return the length of the common suffix, by bisection."""
    shorter = min(len(a), len(b))
    low, high = 0, shorter
    while low < high:
        middle = (low + high + 1) // 2
        if a[len(a) - middle : len(a) - low] == b[len(b) - middle : len(b) - low]:
            low = middle
        else:
            high = middle - 1
    return low
