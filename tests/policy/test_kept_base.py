"""A kept base gives every run the policy that a base of its own would, whatever earlier runs have put on it."""

from __future__ import annotations

import pytest
import torch
from conftest import make_example
from tiny_models import TinyModel

from qpref.data.pack import pack
from qpref.policy.kept_base import KeptBase
from qpref.policy.load import load_policy
from qpref.policy.logprobs import completion_logprobs
from qpref.policy.reference import as_reference
from qpref.policy.source import resolve_base
from qpref.recipe.sections import Recipe

FAMILIES = {
    "tied": TinyModel(model_type="qwen2", config={"tie_word_embeddings": True}),
    "fused experts": TinyModel(model_type="mixtral"),
    "forked layers": TinyModel(model_type="lfm2", config={"layer_types": ["conv", "full_attention"]}),
    "dynamic positions": TinyModel(
        model_type="llama", config={"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}
    ),
}
EXAMPLES = [make_example(1, 9, 12, 7), make_example(2, 5, 4, 11)]


def recipe_of(base, **adapter) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"base": str(base), "quantization": "nf4", "dtype": "bf16", "device": "cpu"},
            "adapter": {"rank": 3, "alpha": 6} | adapter,
            "data": {"train": "none"},
            "loss": {"name": "none"},
        }
    )


def scores_and_gradients(policy):
    """What the policy and its reference give the examples, and the adapter's gradients, with every B random."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in policy.trained_parameters().items():
        if "lora_B" in name:
            parameter.data.normal_(std=0.2, generator=generator)
    batch = pack(EXAMPLES, policy.device)
    policy.model.train()
    scores = completion_logprobs(policy, batch).values
    scores.sum().backward()
    with as_reference(policy):
        reference = completion_logprobs(policy, batch).values
    return [scores.detach(), reference, *(value.grad for value in policy.trained_parameters().values())]


@pytest.mark.parametrize("family", FAMILIES)
def test_each_run_has_the_policy_of_a_base_of_its_own(family, tmp_path):
    base = resolve_base(recipe_of(FAMILIES[family].write(tmp_path / "base")).model)
    kept = KeptBase()

    def load_and_score(recipe, **keep):
        return scores_and_gradients(load_policy(recipe, base, **keep))

    load_and_score(recipe_of(tmp_path / "base", rank=2, targets=["q_proj", "v_proj"]), kept=kept)
    again = load_and_score(recipe_of(tmp_path / "base"), kept=kept)
    alone = load_and_score(recipe_of(tmp_path / "base"))
    assert all(torch.equal(one, other) for one, other in zip(again, alone, strict=True))
    assert again[0].ne(again[1]).any()


def test_copies_share_every_tensor_and_no_module(tmp_path):
    base = resolve_base(recipe_of(FAMILIES["tied"].write(tmp_path / "base")).model)
    kept = KeptBase()
    first, second = (load_policy(recipe_of(tmp_path / "base"), base, kept=kept) for _ in range(2))
    places = [
        {name: value.data_ptr() for name, value in policy.model.named_parameters() if "lora" not in name}
        for policy in (first, second)
    ]
    assert places[0] == places[1] != {}
    assert not {id(module) for module in first.model.modules()} & {id(module) for module in second.model.modules()}
    constants = {
        id(module.weight.quant_state)
        for policy in (first, second)
        for module in policy.model.modules()
        if getattr(getattr(module, "weight", None), "quant_state", None) is not None
    }
    assert len(constants) == sum("proj" in name and name.endswith("weight") for name in places[0])


def test_another_base_takes_the_place_of_the_kept_one(tmp_path):
    kept = KeptBase()
    for name in ("tied", "dynamic positions"):
        base = resolve_base(recipe_of(FAMILIES[name].write(tmp_path / name)).model)
        load_policy(recipe_of(tmp_path / name), base, kept=kept)
    assert kept.model.config.model_type == "llama"
    assert kept.num_bytes_on(torch.device("cpu")) > 0
    assert kept.num_bytes_on(torch.device("meta")) == 0
    kept.free()
    assert kept.num_bytes_on(torch.device("cpu")) == 0
