"""The adapter's card: the run, the way to use it, and no path of this machine."""

from __future__ import annotations

import json
import re

import pytest
import torch

from qpref import sealed

NF4 = {"model.quantization": "nf4", "model.dtype": "float32"}


@pytest.fixture
def run(trained_run):
    return trained_run(**NF4)


@pytest.fixture
def card(run):
    return (run / "adapter/README.md").read_text()


def test_the_card_is_the_runs_and_has_no_path(run, card, make_base):
    facts = sealed.read_sealed(run / "run.json")
    assert card.startswith("---\nlibrary_name: peft\npipeline_tag: text-generation\ntags:\n- qpref\n")
    assert "- lora\n- dpo\n---" in card
    assert f"A LoRA adapter of rank 4 for `{facts['base_name']}`, trained by dpo with qpref" in card
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    first, last = (row["eval_loss"] for row in rows if row["split"] == "eval")
    assert f"| loss | {first:.4g} | {last:.4g} |" in card
    assert facts["fingerprints"]["training data"] in card
    assert sealed.read_sealed(run / "result.json")["verdict"]["sentence"] in card
    for folder in (str(make_base()), str(run), str(run.parent)):
        for file in (run / "adapter").iterdir():
            assert folder.encode() not in file.read_bytes(), file


def test_a_base_that_no_hub_has_is_told_by_its_hash(run, card):
    name = sealed.read_sealed(run / "run.json")["base_name"]
    own, _, digest = name.partition("@sha256:")
    assert f"The base is `{own}`, on no hub. Its SHA-256 is `{digest}`" in card
    assert "base_model" not in card


def test_the_cards_code_loads_what_was_trained(run, card, make_base):
    """With the base put in, and without double quantization, which a CPU doesn't have."""
    from qpref.evaluation.subjects import identify
    from qpref.policy.reference import as_reference

    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    code = code.replace('"BASE"', repr(str(make_base()))).replace('"ADAPTER"', repr(str(run / "adapter")))
    found: dict[str, object] = {}
    exec(code.replace("double_quant=True", "double_quant=False"), found)
    policy = identify(str(run)).load("float32")
    policy.share_prompts(False)
    ids = found["tokenizer"]("What comes after 3?", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        shown, trained = (model(ids).logits for model in (found["model"].eval(), policy.plain_model))
    with as_reference(policy):
        base = policy.plain_model(ids).logits
    # 4-bit products are added in another order there.
    assert (shown - trained).abs().max() < 0.05 * (trained - base).abs().max()


def test_a_base_of_the_hub_is_named_with_its_revision_and_its_dtype():
    from qpref.recipe.sections import Recipe
    from qpref.training.card import _use, front_matter

    tables = {"model": {"base": "org/Model-7B", "revision": "v1"}, "data": {"train": "x"}, "loss": {"name": "dpo"}}
    recipe = Recipe.model_validate(tables)
    assert "base_model: org/Model-7B\nbase_model_relation: adapter\n" in front_matter(recipe, "peft", "adapter")
    use = _use(recipe, {"base_name": "org/Model-7B"})
    assert 'base = "org/Model-7B"' in use
    assert '    revision="v1",' in use
    assert "bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16" in use
