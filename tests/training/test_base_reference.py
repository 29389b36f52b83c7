"""A run from a start adapter whose reference is the base: rewards go on where those of the run before have ended."""

from __future__ import annotations

import json

import pytest

import qpref


def heldout_rows(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["split"] == "eval"]


def test_rewards_continue_from_those_of_the_run_before(make_recipe, tmp_path):
    first = qpref.train(make_recipe({"train.max_steps": 2}), output=tmp_path / "first")
    start = {"train.max_steps": 1, "adapter.start": str(first.adapter)}
    second = qpref.train(make_recipe(start | {"adapter.reference": "base"}), output=tmp_path / "second")
    before, after = heldout_rows(first)[-1], heldout_rows(second)[0]
    assert abs(before["eval_rewards/margins"]) > 1e-4
    for name in ("eval_rewards/margins", "eval_rewards/chosen", "eval_loss"):
        assert after[name] == pytest.approx(before[name], rel=1e-4)
    assert json.loads((second / "run.json").read_text())["reference"] == "the base, with its adapter off"
    moved = qpref.train(make_recipe(start), output=tmp_path / "moved")
    assert heldout_rows(moved)[0]["eval_rewards/margins"] == 0.0
