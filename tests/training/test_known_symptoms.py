"""What a run warns of before its first step: margins that its loss has no use for."""

import json

import pytest
from conftest import preference_rows, write_jsonl

import qpref


@pytest.mark.parametrize(
    ("loss", "margins", "warned"),
    [
        ({"name": "orpo"}, True, True),
        ({"name": "orpo"}, False, False),
        ({"name": "dpo"}, True, False),
        ([{"name": "sft"}, {"name": "apo_zero"}], True, True),
        ([{"name": "sft"}, {"name": "dpo"}], True, False),
    ],
)
def test_margins_that_no_loss_uses_are_said_once(make_recipe, tmp_path, caplog, loss, margins, warned):
    recipe = make_recipe({"train.max_steps": 1, "train.learning_rate": 0.02}) | {"loss": loss}
    rows = [row | ({"margin": 0.5} if margins and index < 3 else {}) for index, row in enumerate(preference_rows(12))]
    recipe["data"]["train"] = str(write_jsonl(tmp_path / "train.jsonl", rows))
    run = qpref.train(recipe, output=tmp_path / "run")
    said = [record.getMessage() for record in caplog.records if getattr(record, "rule", "") == "unused_margins"]
    assert len(said) == warned
    recorded = json.loads((run / "result.json").read_text())["warnings"]
    assert [one["rule"] for one in recorded].count("unused_margins") == warned
    if warned:
        assert said[0].startswith("3 pairs have a margin, and loss '")
