"""The rows that a verdict replays: held-out ones of the run's own recipe."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qpref.data.load import check_rows
from qpref.data.reload import reload_data, reload_rows
from qpref.data.tokenize import PairTokenizer
from qpref.merge.replay import ScoredRow
from qpref.policy.source import BaseFolder
from qpref.policy.tokenizer import stop_tokens
from qpref.recipe.resolve import Plan
from qpref.records import TokenizedExample

log = logging.getLogger("qpref")


@dataclass(frozen=True, slots=True, kw_only=True)
class Contrast:
    """What a margin is taken of: a pair, or a single completion.

    Attributes:
        rows: chosen and rejected, or the completion.
        sign: of each row's log-probability in the margin.
        place: the row's place in its file.
    """

    rows: tuple[ScoredRow, ...]
    sign: tuple[int, ...]
    place: str


@dataclass(frozen=True, slots=True)
class Replayed:
    """The chosen contrasts, and in words what they are.

    Attributes:
        data_changed: whether they are of other data than the run's; None where nobody knows.
    """

    contrasts: list[Contrast]
    origin: str
    data_changed: bool | None = None

    @property
    def rows(self) -> list[ScoredRow]:
        return [row for contrast in self.contrasts for row in contrast.rows]


def choose_rows(
    plan: Plan, base: BaseFolder, tokenizer: Any, limit: int, fingerprints: Mapping[str, str] | None = None
) -> Replayed:
    """Up to `limit` held-out pairs, spread evenly over the file; training ones where the run has held nothing out.

    Args:
        fingerprints: of the run, to say whether these are its data; None where nobody asks.

    Raises:
        DataError: the data are gone, or can't be read.
    """
    read = reload_data(plan, _pair_tokenizer(plan, base, tokenizer))
    origin = "held-out" if read.split == "heldout" else "training"
    changed = None if fingerprints is None else read.has_changed(plan, fingerprints)
    if changed:
        log.warning("the %s data have changed since training; the verdict is on what they are today", origin)
    contrasts = list(_contrasts(read.examples))
    count = min(limit, len(contrasts))
    chosen = [contrasts[place * len(contrasts) // count] for place in range(count)]
    single = any(len(contrast.rows) == 1 for contrast in chosen)
    return Replayed(chosen, f"{origin} {'completions' if single else 'pairs'}", changed)


def read_examples(plan: Plan, base: BaseFolder, tokenizer: Any, heldout: bool) -> list[TokenizedExample] | None:
    """A run's held-out or training examples, as it tokenized them; None where it has held nothing out.

    Raises:
        DataError: the data are gone, or can't be read.
    """
    checked = check_rows(plan)
    rows = checked.heldout if heldout else checked.train
    return None if rows is None else reload_rows(rows, plan, _pair_tokenizer(plan, base, tokenizer))


def _pair_tokenizer(plan: Plan, base: BaseFolder, tokenizer: Any) -> PairTokenizer:
    return PairTokenizer.of(tokenizer, plan.recipe.data.template, stop_tokens(base))


def _contrasts(examples: Sequence[TokenizedExample]) -> Iterator[Contrast]:
    """Pairs as they are; two completions of one row, which were a pair, as that pair; others one by one."""
    place = 0
    while place < len(examples):
        example = examples[place]
        partner = examples[place + 1] if place + 1 < len(examples) else None
        if example.label is None:
            yield _contrast([example] * 2, [0, 1], (1, -1))
        elif partner and _are_one_pair(example, partner):
            yield _contrast([example, partner], [0, 0], (1, -1))
            place += 1
        else:
            yield _contrast([example], [0], (1 if example.label else -1,))
        place += 1


def _are_one_pair(example: TokenizedExample, partner: TokenizedExample) -> bool:
    is_same = (example.source, example.number) == (partner.source, partner.number)
    return is_same and bool(example.label) and not partner.label


def _contrast(examples: Sequence[TokenizedExample], branches: Sequence[int], sign: tuple[int, ...]) -> Contrast:
    rows = [
        ScoredRow(tuple(example.prompt), tuple(example.branches[branch]))
        for example, branch in zip(examples, branches, strict=True)
    ]
    # Without its folder: merge.json may be published.
    place = f"{Path(examples[0].source.path).name}:{examples[0].source.line}"
    return Contrast(rows=tuple(rows), sign=sign, place=place)
