"""The table of aliases is consistent: each key once for each tool, each equal a key of the recipe."""

from __future__ import annotations

from collections import Counter

import pytest

from qpref.aliases import lookup
from qpref.aliases.alias import TOOLS
from qpref.hooks.manager import LOSS, PluginHost
from qpref.recipe.sections import Recipe


@pytest.mark.parametrize("tool", TOOLS)
def test_a_tools_key_has_one_alias(tool):
    counts = Counter(key for alias in lookup.ALIASES for key in alias.keys(tool))
    assert len(counts) > 150
    assert [key for key, count in counts.items() if count > 1] == []


def test_a_name_means_the_same_in_every_tool():
    explanations: dict[str, set[str]] = {}
    for alias in lookup.ALIASES:
        for name in alias.names:
            explanations.setdefault(name.rpartition(".")[2], set()).add(alias.explanation())
    assert {name: found for name, found in explanations.items() if len(found) > 1} == {}


def test_each_equal_is_a_key_of_the_recipe():
    host = PluginHost()
    options = {
        key
        for offer in host.offers
        if offer.kind == LOSS.prefix
        for key in host.load(LOSS, offer.name).record.options.model_fields
    }
    for alias in lookup.ALIASES:
        table, _, key = (alias.ours or "model").partition(".")
        section = Recipe.model_fields[table].annotation
        if table == "loss":
            assert key in options | {"name", "weight"}
        elif table == "checks":
            assert key == "duplicates"  # a table of its own
        elif key:
            assert key in section.model_fields, alias.ours


def test_what_has_no_equal_has_a_reason():
    assert [alias for alias in lookup.ALIASES if alias.ours is None and not alias.why] == []
