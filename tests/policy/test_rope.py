"""Rotary positions that depend on a sequence's length: every response has those that it has alone."""

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
from qpref.policy.partners import logprobs_with_partners
from qpref.policy.policy import Policy

SWITCH = 20
FACTORS = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
LONGROPE = {"rope_type": "longrope", "rope_theta": 10_000.0, **FACTORS, "original_max_position_embeddings": SWITCH}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0}
DEFAULT = {"rope_type": "default", "rope_theta": 10_000.0}
MODELS = {
    "longrope": TinyModel(
        model_type="phi3",
        config={"rope_parameters": LONGROPE, "original_max_position_embeddings": SWITCH, "sliding_window": None},
    ),
    "dynamic": TinyModel(model_type="llama", config={"rope_parameters": DYNAMIC, "max_position_embeddings": SWITCH}),
    "by layers": TinyModel(
        model_type="gemma3_text",
        config={
            "rope_parameters": {"sliding_attention": DEFAULT, "full_attention": DYNAMIC},
            "layer_types": ["sliding_attention", "full_attention"],
            "max_position_embeddings": SWITCH,
        },
    ),
}
EXAMPLES = [
    make_example(1, 9, 5, 6),  # short
    make_example(2, 14, 6, 7),  # 20 and 21 tokens: on both sides of the switch
    make_example(3, 40, 9, 4),  # long
    make_example(4, 18, 1, 30),  # a response of one token
]


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Policy]:
    def make(name: str, **tables: Any) -> Policy:
        base = tmp_path / name
        if not base.exists():
            MODELS[name].write(base)
        return load_worn(
            {
                "model": {"base": str(base), "quantization": "none", "dtype": "float32", "device": "cpu"},
                "adapter": {"rank": 4, "alpha": 8},
                **tables,
            }
        )

    return make


def plain(policy: Policy) -> list[Tensor]:
    """Log-probabilities of each response, its row alone and unpadded, from the model's own logits."""
    policy.share_prompts(False)
    found = []
    with torch.no_grad():
        for example in EXAMPLES:
            for branch in example.branches:
                policy.plain_model(input_ids=torch.tensor([[1, 2]]))  # what a longer row has left is forgotten
                ids = torch.tensor([[*example.prompt, *branch]])
                values = policy.plain_model(input_ids=ids).logits[0, :-1].log_softmax(-1)
                found.append(values.gather(1, ids[0, 1:, None])[-len(branch) :, 0])
    return found


def pieces(policy: Policy, indices: list[int], **options: bool) -> list[Tensor]:
    with torch.no_grad():
        scores = completion_logprobs(policy, pack([EXAMPLES[index] for index in indices], policy.device), **options)
    return list(scores.values.split(list(scores.lengths)))


@pytest.mark.parametrize("name", MODELS)
def test_a_response_scores_as_it_does_alone_in_any_company_and_order(name, load):
    policy = load(name)
    expected = plain(policy)
    for shared in (True, False):
        policy.share_prompts(shared)
        for indices in ([0, 1, 2, 3], [2, 0], [0], [3, 2, 1]):
            wanted = [expected[2 * index + branch] for index in indices for branch in range(2)]
            for found, right in zip(pieces(policy, indices), wanted, strict=True):
                assert torch.allclose(found, right, atol=1e-4)


def test_the_switch_matters(load):
    # Else the tests here would show nothing.
    policy = load("longrope")
    right = plain(policy)[0]
    policy.rope_lengths = None
    assert not torch.allclose(pieces(policy, [0, 2])[0], right, atol=1e-2)


@pytest.mark.parametrize("name", ["longrope", "dynamic"])
def test_prompts_score_the_same_shared_and_in_rows(name, load):
    policy = load(name)
    policy.share_prompts(True)
    shared = pieces(policy, [0, 1, 2], prompts=True)
    policy.share_prompts(False)
    for found, right in zip(shared, pieces(policy, [0, 1, 2], prompts=True), strict=True):
        assert torch.allclose(found, right, atol=1e-4)


@pytest.mark.parametrize("name", ["longrope", "dynamic"])
def test_partners_on_the_other_side_score_as_alone(name, load):
    policy = load(name)
    expected = plain(policy)
    policy.share_prompts(True)
    own, others = ([single(index, side) for index in (0, 1, 3)] for side in (0, 1))
    with torch.no_grad():
        scores = logprobs_with_partners(policy, *(pack(each, policy.device) for each in (own, others)))
    for side, found in enumerate(scores):
        for index, values in zip((0, 1, 3), found.values.split(list(found.lengths)), strict=True):
            assert torch.allclose(values, expected[2 * index + side], atol=1e-4)


def single(index: int, side: int) -> Any:
    from dataclasses import replace

    example = EXAMPLES[index]
    return replace(example, branches=(example.branches[side],), truncated=(False,))


@pytest.mark.parametrize("name", ["longrope", "by layers"])
def test_recomputed_layers_have_the_same_gradients(name, load):
    found = []
    for recomputed in (False, True):
        policy = load(name, train={"gradient_checkpointing": recomputed})
        policy.share_prompts(True)
        completion_logprobs(policy, pack(EXAMPLES, policy.device)).values.sum().backward()
        found.append([value.grad for value in policy.trained_parameters().values()])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
