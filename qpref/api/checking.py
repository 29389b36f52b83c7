"""The check of a recipe's data, or of one source, for `qpref check` and `qpref.check`"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qpref.data.audit import Audit
    from qpref.data.tokenize import PairTokenizer
    from qpref.recipe.data_section import DataSection
    from qpref.recipe.plan import Plan
    from qpref.recipe.sections import ModelSection
    from qpref.training.swapped_labels import SwapSearch


def audit_recipe(plan: Plan) -> Audit:
    """Check the data of a recipe, and tokenize them as its run would.

    Raises:
        DataError: a source cannot be read.
    """
    from qpref.data.audit import audit_data
    from qpref.data.load import check_rows

    recipe = plan.recipe
    swaps = _swap_search(recipe.model)
    note = swaps.note if swaps else None
    audit = audit_data(check_rows(plan), recipe.data, _tokenizer(recipe.model, recipe.data), note)
    audit.checked.report.add(swaps.findings() if swaps else ())
    return audit


def audit_source(location: str, base: str | None, options: Mapping[str, Any]) -> Audit:
    """Check one source with the defaults of a recipe.

    Args:
        location: as `[data] train`.
        base: model whose tokenizer checks the rows, too; None for none.
        options: other keys of `[data]`.

    Raises:
        RecipeError: no reader is known for the source, or an option has an invalid value.
        DataError: it cannot be read.
    """
    from qpref.data.audit import audit_data
    from qpref.data.check import check_data
    from qpref.recipe.resolve import make_data_plan

    plan = make_data_plan(location, base, options)
    checked = check_data(plan.sources, plan.validators, pairs_only=False)
    return audit_data(checked, plan.data, _tokenizer(plan.model, plan.data) if plan.model else None)


def _swap_search(model: ModelSection) -> SwapSearch | None:
    """Search for swapped labels; None unless the base is on this machine and an earlier run scored pairs on it."""
    from qpref.memory.known_shapes import local_base
    from qpref.policy.reference_cache import DESCRIPTION, root
    from qpref.policy.source import resolve_base

    if local_base(model) is None or not any(root().glob(f"*/{DESCRIPTION}")):
        return None
    from qpref.training.swapped_labels import SwapSearch

    return SwapSearch(resolve_base(model))


def _tokenizer(model: ModelSection, data: DataSection) -> PairTokenizer:
    from qpref.data.masking import Masking
    from qpref.data.tokenize import PairTokenizer
    from qpref.policy.source import resolve_tokenizer
    from qpref.policy.tokenizer import load_tokenizer, stop_tokens

    base = resolve_tokenizer(model)
    return PairTokenizer.of(load_tokenizer(model, base), data.template, stop_tokens(base), Masking.of(data))
