"""A key that another tool has is explained, before any guess at its spelling."""

from __future__ import annotations

import pytest

from qpref.errors import RecipeError
from qpref.recipe.resolve import make_plan


def problems(table, keys):
    """What a small recipe with these keys in one of its tables is refused with, less the headline."""
    recipe = {"model": {"base": "org/base"}, "data": {"train": "pairs.jsonl"}, "loss": {"name": "dpo"}}
    recipe[table] = {**recipe.get(table, {}), **keys}
    with pytest.raises(RecipeError) as caught:
        make_plan(recipe)
    return [line.strip() for line in caught.value.what.splitlines()[1:]]


@pytest.mark.parametrize(
    ("table", "key", "explanation"),
    [
        (
            "train",
            "gradient_accumulation_steps",
            "here it is [train] batch_size: the effective batch: per-device batch",
        ),
        ("train", "eval_steps", 'here it is [train] eval_every: a number of steps, or "epoch"; held-out data are'),
        ("train", "lr", "here it is [train] learning_rate"),
        ("train", "num_train_epochs", "here it is [train] epochs: a whole number"),
        ("adapter", "r", "here it is [adapter] rank"),
        ("train", "lora_r", "here it is [adapter] rank"),
        ("model", "load_in_4bit", 'here it is [model] quantization: "nf4" is 4 bits, "none" keeps the base in `dtype`'),
        ("train", "bf16", 'here it is [model] dtype: "bf16", "fp16" or "float32"; adapters, sums and losses'),
        ("train", "beta", "here it is [loss] beta"),
        ("train", "sync_ref_model", "a reference that moves with the policy can't be cached; train in rounds"),
        ("data", "template_type", 'here it is [data] template: "chat" renders with the tokenizer\'s own chat template'),
        ("train", "rank", "it belongs into [adapter]"),
    ],
)
def test_a_key_of_another_tool_is_explained(table, key, explanation):
    (problem,) = problems(table, {key: 1})
    assert problem.startswith(f"[{table}] {key}: unknown key; {explanation}")


def test_an_option_that_the_chosen_loss_lacks_is_not_said_to_be_there():
    (problem,) = problems("loss", {"name": "ipo", "label_smoothing": 0.1})[:1]
    assert problem.startswith("[loss] label_smoothing: unknown option of loss 'ipo' (")
    assert "here it is" not in problem


def test_an_option_under_trls_name_is_explained():
    (problem,) = problems("loss", {"name": "dpo", "use_weighting": True})
    assert problem.endswith("; here it is [loss] wpo")


@pytest.mark.parametrize(("name", "ours"), [("sigmoid", "dpo"), ("kto_pair", "kto"), ("slic", "hinge"), ("nll", "sft")])
def test_a_loss_under_another_tools_name_is_found_by_what_losses_declare(name, ours):
    assert problems("loss", {"name": name}) == [f"[loss] name: no loss '{name}' is installed; here it is '{ours}'"]
