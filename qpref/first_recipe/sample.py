"""The first rows of a data set: their kind, their lengths, and how many would be refused."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

from qpref.data.example_rows import responses_of
from qpref.data.source import DataSource
from qpref.errors import DataError
from qpref.recipe.choices import SourceChoice
from qpref.records import Finding, Message, PreferencePair

MOST_ROWS = 2000
BYTES_PER_TOKEN = 3
"""Of UTF-8, on the safe side: English has about 4 bytes a token, Chinese 3."""
TEMPLATE_TOKENS = 16
"""Assumed for each turn that a chat template writes around its text."""
SHARE = 0.99


@dataclass(slots=True)
class Sample:
    """Facts about a data set from its first rows.

    Attributes:
        num_rows: rows that were read.
        is_whole: they are all rows.
        num_pairs, num_singles: examples of each kind.
        refused: findings of rows that are no examples.
        prompts, totals: estimated tokens of each example's prompt, and of prompt and longest response.
    """

    num_rows: int = 0
    is_whole: bool = True
    num_pairs: int = 0
    num_singles: int = 0
    refused: list[Finding] = field(default_factory=list)
    prompts: list[int] = field(default_factory=list)
    totals: list[int] = field(default_factory=list)

    @property
    def is_paired(self) -> bool:
        return self.num_pairs > 0

    @property
    def most_prompt_tokens(self) -> int:
        """Tokens that 99 % of the prompts don't exceed, estimated."""
        return _quantile(self.prompts)

    @property
    def most_tokens(self) -> int:
        """Tokens of prompt and response that 99 % of the examples don't exceed, estimated."""
        return _quantile(self.totals)

    def summary(self) -> str:
        """Say in one sentence what the rows are."""
        kind = "pairs" if self.is_paired else "single completions"
        rows = f"{self.num_rows:,} rows" if self.is_whole else f"the first {self.num_rows:,} rows"
        refused = f", {len(self.refused)} of them refused" if self.refused else ""
        return (
            f"{rows}{refused}: {kind}, 99 % with prompts of at most {self.most_prompt_tokens:,} tokens and "
            f"{self.most_tokens:,} in all (estimated by their bytes)"
        )


def look_at(choice: SourceChoice) -> Sample:
    """Read the first rows of a source.

    Raises:
        DataError: it can't be read, or none of its first rows is an example.
    """
    sample = Sample()
    rows = DataSource(choice).rows()
    for row in itertools.islice(rows, MOST_ROWS):
        sample.num_rows += 1
        if isinstance(row, Finding):
            sample.refused.append(row)
            continue
        for example in row:
            paired = isinstance(example, PreferencePair)
            sample.num_pairs += paired
            sample.num_singles += not paired
            prompt = _tokens(example.prompt)
            sample.prompts.append(prompt)
            sample.totals.append(prompt + max(_tokens(response) for response in responses_of(example)))
    sample.is_whole = next(rows, None) is None
    if not sample.totals:
        first = f": {sample.refused[0].source}: {sample.refused[0].message}" if sample.refused else ""
        raise DataError(f"{choice.location}: none of its first {sample.num_rows} rows can be used{first}",
                        "`qpref check` lists every row")  # fmt: skip
    return sample


def _tokens(turns: tuple[Message, ...]) -> int:
    return sum(len(turn.content.encode(errors="replace")) // BYTES_PER_TOKEN + TEMPLATE_TOKENS for turn in turns)


def _quantile(values: list[int]) -> int:
    return sorted(values)[min(len(values) - 1, int(SHARE * len(values)))]
