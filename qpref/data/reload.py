"""Reload a finished run's data as training tokenized them, and check whether they have changed since."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qpref.data.check import CheckedRows
from qpref.data.load import check_rows, fingerprint, tokenize_rows
from qpref.data.mismatch import with_mismatched
from qpref.data.tokenize import PairTokenizer
from qpref.hooks.types import Split
from qpref.recipe.plan import Plan
from qpref.records import TokenizedExample


@dataclass(frozen=True, slots=True)
class ReloadedData:
    """Tokenized held-out examples of a run; its training examples where it has no held-out data."""

    examples: list[TokenizedExample]
    split: Split

    def has_changed(self, plan: Plan, fingerprints: Mapping[str, str]) -> bool | None:
        """Compare the examples with those of the run.

        Args:
            fingerprints: fingerprints of the run's data, from run.json.

        Returns:
            True if they differ; None if the loss uses mismatched partners and the split is held out, since those
            partners come from the training data too, which aren't reloaded.
        """
        examples, recipe = self.examples, plan.recipe
        if "mismatched" in plan.needs:
            if self.split == "heldout":
                return None
            examples = with_mismatched(examples, recipe.train.seed, recipe.data.max_length)
        name = "held-out data" if self.split == "heldout" else "training data"
        return fingerprint(examples) != fingerprints[name]


def reload_data(plan: Plan, tokenizer: PairTokenizer) -> ReloadedData:
    """Tokenize the held-out examples as training did; the training examples of a run without held-out data.

    Args:
        plan: reopened for the held-out data alone.

    Raises:
        DataError: the data are missing, or cannot be read.
    """
    checked = check_rows(plan)
    rows = checked.heldout or checked.train
    return ReloadedData(reload_rows(rows, plan, tokenizer), rows.split)


def reload_rows(rows: CheckedRows, plan: Plan, tokenizer: PairTokenizer) -> list[TokenizedExample]:
    """Tokenize checked rows as training did.

    Raises:
        DataError: rows are refused although training refused none, or no row is left.
    """
    data = plan.recipe.data
    if data.skip_bad:
        # Training checked the share over all rows, and passed. Fewer may be read here, so no limit applies.
        data = data.model_copy(update={"skip_bad": 1.0})
    return tokenize_rows(rows, tokenizer, data, plan.recipe.train.seed)
