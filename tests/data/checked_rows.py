"""Rows as a recipe's source has them, checked without a file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from qpref.data.check import CheckedData, check_data
from qpref.data.split import HeldOutShare
from qpref.hooks import Reader
from qpref.hooks.manager import Loaded, Offer
from qpref.recipe.choices import SourceChoice
from qpref.recipe.contest_section import ContestSection
from qpref.records import Row, Source


def check(
    values: Iterable[Mapping[str, object]],
    contest: ContestSection | None = None,
    *,
    share: HeldOutShare | None = None,
    pairs_only: bool = True,
    **choice: Any,
) -> CheckedData:
    """Check rows of these values as one source's.

    Args:
        choice: fields of the source's choice, such as `columns` and `format`.
    """
    rows = [Row(values=one, source=Source(path="pairs.x", line=line)) for line, one in enumerate(values, start=1)]
    reader = Loaded(Reader(name="x", summary="", read=lambda path: iter(rows), takes="name"),
                    Offer("read", "x", "acme", "2.0", "acme_x"))  # fmt: skip
    source = SourceChoice(location="pairs.x", split="train", reader=reader, contest=contest, **choice)
    return check_data([source], [], share=share, pairs_only=pairs_only)
