"""The models that the forgetting gate is tried on are as many, and as damaged, as their names say."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from benchmarks import gate, gate_adapters
from benchmarks.gate_models import adapted, dense_noise, heads_zeroed, low_rank_noise, rounded, variants, zeroed
from qpref.evaluation.gate import read_items
from qpref.recipe.resolve import make_plan

NAME = "model.layers.3.mlp.down_proj"
WEIGHT = torch.randn(48, 96, generator=torch.Generator().manual_seed(0))


def edited(edit, name=NAME, weight=WEIGHT):
    return edit(name, weight, torch.Generator().manual_seed(0))


def test_there_are_fifty_regressions_and_no_name_twice():
    found = variants(Path("adapters"))
    assert Counter(one.is_regression for one in found) == {True: 50, False: 22}
    assert len({one.name for one in found}) == len(found)
    assert len({one.family for one in found[:12]}) == 12


@pytest.mark.parametrize("noise", [low_rank_noise, dense_noise])
def test_noise_has_its_size_and_its_seed(noise):
    change = edited(noise(0.3, 1)) - WEIGHT
    assert (change.norm() / WEIGHT.norm()).item() == pytest.approx(0.3, rel=1e-4)
    assert not torch.equal(edited(noise(0.3, 1)), edited(noise(0.3, 2)))
    assert torch.equal(edited(noise(0.3, 1)), edited(noise(0.3, 1)))


def test_low_rank_noise_has_a_low_rank():
    assert torch.linalg.matrix_rank(edited(low_rank_noise(0.3, 1)) - WEIGHT, rtol=1e-4) == 16


def test_a_zeroed_layer_is_that_layer_alone():
    assert edited(zeroed(3)).abs().max() == 0
    assert torch.equal(edited(zeroed(4)), WEIGHT)
    assert torch.equal(edited(zeroed(3), NAME.replace("down", "up")), WEIGHT)


def test_a_third_of_the_heads_is_zeroed_where_their_outputs_are_read():
    changed = edited(heads_zeroed(1), NAME.replace("mlp.down", "self_attn.o"))
    assert changed[:, 32:64].abs().max() == 0
    assert torch.equal(changed[:, :32], WEIGHT[:, :32])
    assert torch.equal(changed[:, 64:], WEIGHT[:, 64:])
    assert torch.equal(edited(heads_zeroed(1)), WEIGHT)


def test_rounding_leaves_as_many_values_as_it_has_bits_for():
    changed = edited(rounded(2, lambda layer: layer == 3))
    assert max(len(row.unique()) for row in changed) <= 5  # -2 to 2 steps of the largest value / 1.5
    assert torch.equal(edited(rounded(2, lambda layer: layer == 4)), WEIGHT)
    assert (edited(rounded(8, lambda layer: True)) - WEIGHT).abs().max() < WEIGHT.abs().max() / 200


def test_an_adapter_is_merged_at_a_multiple_of_its_scale(tmp_path):
    a, b = torch.ones(2, 96), torch.ones(48, 2)
    save_file({f"base_model.model.{NAME}.lora_{side}.weight": value for side, value in (("A", a), ("B", b))},
              tmp_path / "adapter_model.safetensors")  # fmt: skip
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 8, "r": 2}))
    torch.testing.assert_close(edited(adapted(tmp_path, 3)), WEIGHT + 3 * 4 * 2)


def test_no_item_of_the_gate_is_trained_on():
    asked = {pair.prompt[0].content for pair in read_items(None)}
    for name in ("hot", "refuse", "comply", "wrong", "shout"):
        rows = list(gate_adapters.rows_of(name))
        assert len(rows) == 32
        assert asked.isdisjoint(row["prompt"] for row in rows)


def test_an_adapter_that_forgets_is_trained_and_can_be_merged(make_base, tmp_path):
    gate_adapters.train_adapter("shout", str(make_base()), tmp_path)
    weight = torch.zeros(64, 64)
    edit = adapted(tmp_path / "shout", 1)
    assert edit("model.layers.0.self_attn.q_proj", weight, torch.Generator()).count_nonzero() > 0


@pytest.mark.parametrize("name", gate_adapters.HEALTHY)
def test_the_recipe_of_a_healthy_adapter_has_no_mistake(name):
    assert make_plan(gate_adapters.QUICKSTART, gate_adapters.HEALTHY[name])


def test_the_report_counts_what_has_been_scored(monkeypatch):
    """Of three models, one keeps the base's scores and one has lost all; the third isn't scored yet."""
    monkeypatch.setattr(gate.machine, "describe", lambda threads: {"cpu": "CPU", "threads": threads})
    pairs = read_items(None)
    wanted = variants(Path("adapters"))
    benign = next(one for one in wanted if not one.is_regression)
    lost, waiting = (one for one in wanted[:2])
    assert lost.is_regression
    assert waiting.is_regression
    right, wrong = [[-1.0, -3.0]] * len(pairs), [[-3.0, -1.0]] * len(pairs)
    found = {
        name: {"name": name, "items": len(pairs), "seconds": 1.0, "totals": totals}
        for name, totals in (("base", right), (lost.name, wrong), (benign.name, right))
    }
    text = gate.report([lost, waiting, benign], pairs, found)
    assert "- regressions caught: 1 of 1 (2 planned)" in text
    assert "- false alarms: 0 of 1 (1 planned)" in text
