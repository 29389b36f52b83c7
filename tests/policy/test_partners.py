"""Mismatched partners continue the prompts of another pass: their scores, and everything that must not change by it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import load_worn, make_example
from tiny_models import TinyModel

from qpref.attention import segments
from qpref.attention.register import BLOCKS, SEGMENTS
from qpref.data.mismatch import only_partner, without_partner
from qpref.data.pack import pack
from qpref.policy.logprobs import completion_logprobs
from qpref.policy.partners import logprobs_with_partners
from qpref.policy.policy import Policy
from qpref.records import PackedBatch

CPU = torch.device("cpu")
EXAMPLES = [
    make_example(line, *lengths) for line, lengths in enumerate(((5, 9, 2), (1, 1, 6), (17, 4, 13), (3, 6, 1)), start=1)
]
EXAMPLES.append(replace(make_example(5, 1, 3, 8), prompt=EXAMPLES[2].prompt))
FAMILIES = ("llama", "qwen", "mistral", "gemma3")
WITH_STATE = {
    "qwen3_5_text": {"layer_types": ["linear_attention", "full_attention"]},
    "bamba": {"attn_layer_indices": [1]},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
}
TOLERANCE = 1e-5


def load(base, **train) -> Policy:
    model = {"base": str(base), "quantization": "none", "dtype": "float32", "device": "cpu"}
    return load_worn({"model": model, "adapter": {"rank": 4, "alpha": 8}, "train": train})


def batches(examples=EXAMPLES) -> tuple[PackedBatch, PackedBatch]:
    return tuple(pack([side(each) for each in examples], CPU) for side in (without_partner, only_partner))


def grads_of(policy: Policy, values: torch.Tensor) -> dict[str, torch.Tensor]:
    policy.model.zero_grad(set_to_none=True)
    values.backward(torch.randn(values.shape, generator=torch.Generator().manual_seed(2)))
    return {name: value.grad for name, value in policy.trained_parameters().items()}


@pytest.mark.parametrize("path", [SEGMENTS, BLOCKS])
@pytest.mark.parametrize("family", FAMILIES)
def test_partners_score_as_in_a_stream_of_their_own(family, path, make_base, monkeypatch):
    monkeypatch.setattr(segments, "QUERY_BLOCK", 4)
    policy = load(make_base(family, initializer_range=0.2))
    policy.use_attention(path)
    batch, partners = batches()
    _, found = logprobs_with_partners(policy, batch, partners)
    wanted = completion_logprobs(policy, partners)
    assert found.lengths == wanted.lengths
    assert not found.values.requires_grad
    torch.testing.assert_close(found.values, wanted.values.detach(), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("family", WITH_STATE)
def test_partners_continue_from_the_state_at_their_prompts_end(family, tmp_path):
    policy = load(TinyModel(model_type=family, config=WITH_STATE[family]).write(tmp_path))
    assert policy.shares_prompts
    batch, partners = batches()
    own, found = logprobs_with_partners(policy, batch, partners)
    policy.share_prompts(False)
    for values, side in ((own.values, batch), (found.values, partners)):
        wanted = completion_logprobs(policy, side).values
        torch.testing.assert_close(values.detach(), wanted.detach(), atol=10 * TOLERANCE, rtol=0)


@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
def test_examples_have_the_scores_and_gradients_to_the_bit_that_they_have_alone(recomputed, make_base):
    policy = load(make_base("llama", initializer_range=0.2), gradient_checkpointing=recomputed)
    batch, partners = batches()
    alone = completion_logprobs(policy, batch).values
    wanted = grads_of(policy, alone)
    scores, _ = logprobs_with_partners(policy, batch, partners)
    assert torch.equal(scores.values, alone)
    found = grads_of(policy, scores.values)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_partners_of_one_token_are_predicted_by_their_prompts_alone(make_base):
    policy = load(make_base("llama", initializer_range=0.2))
    batch, partners = batches([make_example(line, 3 + line, 4, 1) for line in (1, 2)])
    _, found = logprobs_with_partners(policy, batch, partners)
    wanted = completion_logprobs(policy, partners).values.detach()
    torch.testing.assert_close(found.values, wanted, atol=TOLERANCE, rtol=0)


def test_rows_that_share_no_prompt_are_scored_apart(make_base):
    policy = load(make_base("llama", initializer_range=0.2))
    policy.share_prompts(False)
    batch, partners = batches()
    found = logprobs_with_partners(policy, batch, partners)
    for each, alone in zip(found, (batch, partners), strict=True):
        assert torch.equal(each.values, completion_logprobs(policy, alone).values)
    assert not found[1].values.requires_grad


def test_each_prompt_is_computed_once_and_partners_have_no_backward_pass(make_base):
    policy = load(make_base("llama", initializer_range=0.2))
    batch, partners = batches()
    fed, had_gradient = [], []

    def note(module: torch.nn.Module, inputs: tuple[torch.Tensor], result: torch.Tensor) -> None:
        fed.append(result.shape[1])
        had_gradient.append(result.requires_grad)

    layer = policy.decoder.layers[-1].mlp
    hook = layer.register_forward_hook(note)
    logprobs_with_partners(policy, batch, partners)
    hook.remove()
    assert fed == [batch.num_tokens, sum(length - 1 for length in partners.lengths)]
    assert had_gradient == [True, False]


def test_no_prompt_is_kept_after_the_partners_have_been_scored(make_base, monkeypatch):
    """Not by the layers that are recomputed in the backward pass either."""
    from qpref.policy import partners as module

    kept: list[module.KeptPrompts] = []
    real = module.KeptPrompts
    monkeypatch.setattr(module, "KeptPrompts", lambda at: (kept.append(real(at)), kept[-1])[1])
    policy = load(make_base("llama", initializer_range=0.2), gradient_checkpointing=True)
    scores, _ = logprobs_with_partners(policy, *batches())
    grads_of(policy, scores.values)
    assert [each.states for each in kept] == [None]
