"""The base while it trains: nothing of it is random, LoRA's dropout is, and recomputed layers are the same layers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import load_worn, make_example
from tiny_models import TinyModel
from torch import Tensor

from qpref.data.pack import pack
from qpref.policy.logprobs import completion_logprobs
from qpref.policy.policy import Policy
from qpref.policy.reference import frozen

EXAMPLES = [make_example(line, 7, 5, 4) for line in range(2)]
HALVES = dict.fromkeys(("attention_dropout", "hidden_dropout", "residual_dropout", "embedding_dropout"), 0.5)
RANDOM = {
    "biogpt": TinyModel(
        model_type="biogpt",
        config={"hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5, "activation_dropout": 0.5,
                "layerdrop": 0.9},
    ),
    "opt": TinyModel(model_type="opt", config={"dropout": 0.5, "attention_dropout": 0.5, "layerdrop": 0.9}),
    "starcoder2": TinyModel(model_type="starcoder2", config=HALVES),
    "gpt_neox": TinyModel(model_type="gpt_neox", config=HALVES),
    "gpt_bigcode": TinyModel(
        model_type="gpt_bigcode", config=dict.fromkeys(("attn_pdrop", "resid_pdrop", "embd_pdrop"), 0.5)
    ),
    "mixtral": TinyModel(model_type="mixtral", config={"router_jitter_noise": 0.9}),
}  # fmt: skip
"""Bases that are random in training mode, under settings of many names."""


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Policy]:
    """`load("opt", rate=0.0, recomputed=True)`: a policy with a worn adapter, in training mode."""

    def make(name: str, rate: float = 0.0, recomputed: bool = False) -> Policy:
        base = tmp_path / name
        if not base.exists():
            RANDOM[name].write(base)
        return load_worn(
            {
                "model": {"base": str(base), "quantization": "none", "dtype": "float32", "device": "cpu"},
                "adapter": {"rank": 4, "alpha": 8, "dropout": rate},
                "train": {"gradient_checkpointing": recomputed},
            }
        )

    return make


def values_and_gradients(policy: Policy, seed: int = 0) -> list[Tensor]:
    torch.manual_seed(seed)
    policy.seed_dropout(seed, 0)
    policy.model.zero_grad(set_to_none=True)
    values = completion_logprobs(policy, pack(EXAMPLES, policy.device)).values
    values.sum().backward()
    return [values.detach(), *(value.grad for value in policy.trained_parameters().values())]


def same(one: list[Any], other: list[Any]) -> bool:
    return all(torch.equal(*pair) for pair in zip(one, other, strict=True))


@pytest.mark.parametrize("name", RANDOM)
def test_a_base_that_is_random_in_training_mode_is_not_so_while_it_trains(name, load):
    policy = load(name)
    values, *gradients = values_and_gradients(policy)
    assert all(bool(gradient.any()) for gradient in gradients if gradient is not None)
    assert same([values, *gradients], values_and_gradients(policy, seed=1))
    with frozen(policy):
        assert torch.allclose(completion_logprobs(policy, pack(EXAMPLES, policy.device)).values, values, atol=1e-5)
    policy.model.train()
    policy.recompute_layers(policy.num_layers)
    assert same([values, *gradients], values_and_gradients(policy, seed=2))


def test_passes_without_a_graph_in_training_mode_are_not_random_either(load):
    # Losses that see the whole step score its micro-batches so, recomputed layers or not.
    policy = load("opt", recomputed=True)
    with torch.no_grad():
        first, second = (completion_logprobs(policy, pack(EXAMPLES, policy.device)).values for _ in range(2))
    assert torch.equal(first, second)


def test_loras_dropout_is_random_in_training_mode_alone(load):
    policy = load("opt", rate=0.5)
    first, second, repeated = (values_and_gradients(policy, seed)[0] for seed in (0, 1, 0))
    assert torch.equal(first, repeated)
    assert not torch.allclose(first, second, atol=1e-3)
    with frozen(policy):
        first, second = (values_without_graph(policy, seed) for seed in (0, 1))
    assert torch.equal(first, second)
    assert not torch.allclose(values_and_gradients(policy, seed=1)[0], second, atol=1e-3)


def values_without_graph(policy: Policy, seed: int) -> Tensor:
    policy.seed_dropout(seed, 0)
    return completion_logprobs(policy, pack(EXAMPLES, policy.device)).values


def test_recomputed_layers_draw_the_same_dropout_of_lora(load):
    expected = values_and_gradients(load("opt", rate=0.5))
    policy = load("opt", rate=0.5, recomputed=True)
    passes: list[None] = []
    policy.decoder.layers[0].self_attn.register_forward_hook(lambda *_: passes.append(None))
    assert same(expected, values_and_gradients(policy))
    assert len(passes) == 2  # and it was recomputed
