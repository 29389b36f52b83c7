"""The pairs that a verdict replays: held-out pairs of the run's own recipe, as token ids."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qpref.data.masking import Masking
from qpref.data.reload import reload_data
from qpref.data.tokenize import PairTokenizer
from qpref.merging.replay import ScoredRow
from qpref.policy.source import BaseFolder
from qpref.policy.tokenizer import stop_tokens
from qpref.recipe.plan import Plan
from qpref.records import TokenizedExample

log = logging.getLogger("qpref")


@dataclass(frozen=True, slots=True, kw_only=True)
class Contrast:
    """A pair, or a single completion, with the signs that make a margin of its log-probabilities.

    Attributes:
        rows: chosen and rejected, or the completion.
        sign: sign of each row's log-probability in the margin.
        location: file:line, without the folder.
    """

    rows: tuple[ScoredRow, ...]
    sign: tuple[int, ...]
    location: str


@dataclass(frozen=True, slots=True)
class Replayed:
    """The selected contrasts.

    Attributes:
        origin: their split and kind, such as "held-out pairs".
        data_changed: their data have changed since training; None if unknown.
    """

    contrasts: list[Contrast]
    origin: str
    data_changed: bool | None = None

    @property
    def rows(self) -> list[ScoredRow]:
        return [row for contrast in self.contrasts for row in contrast.rows]


def choose_pairs(
    plan: Plan, base: BaseFolder, tokenizer: Any, limit: int, fingerprints: Mapping[str, str] | None = None
) -> Replayed:
    """Select up to `limit` held-out pairs, spread evenly over the file; training pairs of a run without held-out data.

    Args:
        fingerprints: the run's, to check whether the data have changed; None to skip the check.

    Raises:
        DataError: the data are gone, or can't be read.
    """
    data = plan.recipe.data
    read = reload_data(plan, PairTokenizer.of(tokenizer, data.template, stop_tokens(base), Masking.of(data)))
    origin = "held-out" if read.split == "heldout" else "training"
    changed = None if fingerprints is None else read.has_changed(plan, fingerprints)
    if changed:
        log.warning("the %s data have changed since training; the verdict uses the changed data", origin)
    contrasts = list(_contrasts(read.examples))
    count = min(limit, len(contrasts))
    chosen = [contrasts[index * len(contrasts) // count] for index in range(count)]
    single = any(len(contrast.rows) == 1 for contrast in chosen)
    return Replayed(chosen, f"{origin} {'completions' if single else 'pairs'}", changed)


def _contrasts(examples: Sequence[TokenizedExample]) -> Iterator[Contrast]:
    """Yield pairs, lists by their first and last response, and completions; two of one pair are joined again."""
    index = 0
    while index < len(examples):
        example = examples[index]
        partner = examples[index + 1] if index + 1 < len(examples) else None
        if example.label is None:
            yield _contrast([example] * 2, [0, len(example.branches) - 1], (1, -1))
        elif partner and _are_one_pair(example, partner):
            yield _contrast([example, partner], [0, 0], (1, -1))
            index += 1
        else:
            yield _contrast([example], [0], (1 if example.label else -1,))
        index += 1


def _are_one_pair(example: TokenizedExample, partner: TokenizedExample) -> bool:
    is_same = (example.source, example.number) == (partner.source, partner.number)
    return is_same and bool(example.label) and not partner.label


def _contrast(examples: Sequence[TokenizedExample], branches: Sequence[int], sign: tuple[int, ...]) -> Contrast:
    rows = [
        ScoredRow(tuple(example.prompt), tuple(example.branches[branch]))
        for example, branch in zip(examples, branches, strict=True)
    ]
    # Without its folder: merge.json may be published.
    location = f"{Path(examples[0].source.path).name}:{examples[0].source.line}"
    return Contrast(rows=tuple(rows), sign=sign, location=location)
