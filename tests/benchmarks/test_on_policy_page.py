"""The page of `python -m benchmarks.on_policy`, and the recipe that it trains."""

from __future__ import annotations

import argparse

from benchmarks import on_policy
from qpref.sweep.rounds import make_rounds


def estimate(value):
    return {"value": value, "low": value - 0.1, "high": value + 0.1}


def test_the_page_has_a_row_for_the_base_and_each_round():
    heldout = {"reward": estimate(0.25), "kl_from_base": estimate(3.0)}
    rounds = [{"pairs": 40, "heldout": heldout, "gain": estimate(0.5), "refused": None}]
    found = {"start": {"heldout": heldout}, "rounds": rounds, "result": "rounds/round-1", "ended": None}
    page = on_policy._page(found, argparse.Namespace(prompts=64, heldout=32, rounds=1))
    assert "| before |  | 0.250 (0.150 to 0.350) |  | 3.00 |  |" in page
    assert "| 1 | 40 | 0.250 (0.150 to 0.350) | +0.500 (+0.400 to +0.600) | 3.00 | yes |" in page
    assert "Result: round-1. All rounds were done." in page


def test_its_recipe_has_rounds(tmp_path):
    (tmp_path / "recipe.toml").write_text(on_policy.RECIPE)
    (first,) = make_rounds(tmp_path / "recipe.toml", 1, (), tmp_path / "rounds")
    assert first.plan.reward.plugin.record.name == "sentiment"
