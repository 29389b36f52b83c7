"""Dropout in models of several kinds: fused layers and others, layers with a state, and the adapter on the head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import load_worn, make_example
from fused_cases import apart, furthest, load_family, make_family, outcome, unfused
from test_partners import EXAMPLES, WITH_STATE, batches
from tiny_models import TinyModel

from qpref.data.pack import pack
from qpref.dropout import TokenDropout
from qpref.policy.logprobs import completion_logprobs
from qpref.policy.partners import logprobs_with_partners
from qpref.policy.policy import Policy

__all__ = ["make_family"]

CPU = torch.device("cpu")


@pytest.fixture
def load(make_base, tmp_path) -> Callable[..., Policy]:
    """`load("bamba")`: a policy with dropout and a worn adapter."""

    def make(family: str, **adapter: Any) -> Policy:
        base = tmp_path / family
        if family in WITH_STATE:
            TinyModel(model_type=family, config=WITH_STATE[family]).write(base)
        else:
            base = make_base(family, initializer_range=0.2)
        model = {"base": str(base), "quantization": "none", "dtype": "float32", "device": "cpu"}
        return load_worn({"model": model, "adapter": {"rank": 4, "alpha": 8, "dropout": 0.3} | adapter})

    return make


@pytest.mark.parametrize("family", ["llama", "gemma3", *WITH_STATE])
def test_a_stream_drops_what_rows_and_streams_of_single_examples_drop(family, load):
    policy = load(family)
    assert policy.shares_prompts
    examples = [make_example(line, *lengths) for line, lengths in enumerate(((9, 7, 5), (4, 3, 12)))]
    whole = outcome(policy, pack(examples, CPU))
    single = [outcome(policy, pack([example], CPU)) for example in examples]
    assert apart(torch.cat([each.pop("values") for each in single]), whole["values"]) <= 1e-5
    assert (
        furthest({name: single[0][name] + single[1][name] for name in single[0]} | {"values": whole["values"]}, whole)
        <= 1e-5
    )
    policy.share_prompts(False)
    assert furthest(outcome(policy, pack(examples, CPU)), whole) <= 1e-5
    policy.seed_dropout(0, 1)
    assert furthest(outcome(policy, pack(examples, CPU)), whole) > 0.05


@pytest.mark.parametrize("family", ["qwen3", "mixtral", "gemma3n"])
def test_fused_layers_drop_what_the_familys_own_drop(family, make_family):
    base = make_family(family)
    batch = pack([make_example(line, 9, 7, 5) for line in range(2)], CPU)
    found = outcome(load_family(base, family, dropout=0.3), batch)
    with unfused():
        policy = load_family(base, family, dropout=0.3)
    assert furthest(found, outcome(policy, batch)) <= 1e-5


@pytest.mark.parametrize(
    ("family", "targets"), [("llama", "all-linear"), ("llama", ["q_proj", "lm_head"]), ("bamba", "all-linear")], ids=str
)
def test_partners_that_continue_a_prompt_drop_what_a_stream_of_their_own_drops(family, targets, load):
    policy = load(family, targets=targets)
    batch, partners = batches()
    own, found = logprobs_with_partners(policy, batch, partners)
    assert apart(own.values, completion_logprobs(policy, batch).values) <= 1e-6
    assert apart(found.values, completion_logprobs(policy, partners).values) <= 1e-5
    policy.model.eval()
    assert apart(found.values, completion_logprobs(policy, partners).values) > 0.01


def test_prompts_are_scored_with_the_heads_dropout(load):
    policy = load("llama", targets=["lm_head"])
    batch = pack(EXAMPLES[:2], CPU)
    shared = completion_logprobs(policy, batch, prompts=True).values
    policy.share_prompts(False)
    assert apart(completion_logprobs(policy, batch, prompts=True).values, shared) <= 1e-5


def test_without_dropout_the_head_drops_nothing_either(load):
    policy = load("llama", targets=["lm_head"])
    policy.train_without_dropout()
    found = completion_logprobs(policy, pack(EXAMPLES, CPU)).values
    policy.model.eval()
    assert torch.equal(completion_logprobs(policy, pack(EXAMPLES, CPU)).values, found)


def test_inputs_have_masks_of_their_own_and_layers_of_one_input_share_one(load):
    names = {}
    for name, module in load("llama").decoder.named_modules():
        if isinstance(module, TokenDropout):
            names.setdefault(module.name, set()).add(name.split(".")[-3])
    inputs = [{"q_proj", "k_proj", "v_proj"}, {"o_proj"}, {"gate_proj", "up_proj"}, {"down_proj"}]
    assert sorted(map(sorted, names.values())) == sorted(map(sorted, inputs * 2))
