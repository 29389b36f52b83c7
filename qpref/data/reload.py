"""A finished run's data, read again as it was trained with them, and whether they still are what they were."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qpref.data.check import CheckedRows
from qpref.data.load import check_rows, fingerprint, tokenize_rows
from qpref.data.mismatch import with_mismatched
from qpref.data.tokenize import PairTokenizer
from qpref.hooks.types import Split
from qpref.recipe.resolve import Plan
from qpref.records import TokenizedExample


@dataclass(frozen=True, slots=True)
class ReadAgain:
    """What a run has held out; its training data where it has held nothing out."""

    examples: list[TokenizedExample]
    split: Split

    def have_changed(self, plan: Plan, fingerprints: Mapping[str, str]) -> bool | None:
        """Whether the run had other data; None where these can't say: held-out completions have partners of all data.

        Args:
            fingerprints: as run.json has them.
        """
        examples, recipe = self.examples, plan.recipe
        if "mismatched" in plan.needs:
            if self.split == "heldout":
                return None
            examples = with_mismatched(examples, recipe.train.seed, recipe.data.max_length)
        name = "held-out data" if self.split == "heldout" else "training data"
        return fingerprint(examples) != fingerprints[name]


def read_again(plan: Plan, tokenizer: PairTokenizer) -> ReadAgain:
    """Held-out examples as training tokenized them, without reading its data where they aren't needed for that.

    Raises:
        DataError: the data are gone, or can't be read.
    """
    checked = check_rows(plan.of_heldout_alone())
    rows = checked.heldout or checked.train
    return ReadAgain(tokenized_again(rows, plan, tokenizer), rows.split)


def tokenized_again(rows: CheckedRows, plan: Plan, tokenizer: PairTokenizer) -> list[TokenizedExample]:
    """The rows as training tokenized them.

    Raises:
        DataError: rows are refused, and training has refused none; or none is left.
    """
    data = plan.recipe.data
    if data.skip_bad:
        # The share that training allowed was of all rows, which may not be read here. Bad ones are left out as then.
        data = data.model_copy(update={"skip_bad": 1.0})
    return tokenize_rows(rows, tokenizer, data, plan.recipe.train.seed)
