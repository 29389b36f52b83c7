"""Scores of pairs against the models' own logits, and KL against whole softmaxes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import preference_rows, write_jsonl

from qpref.evaluation import heldout_pairs
from qpref.evaluation.scores import kl_positions, score_pairs, score_reference
from qpref.evaluation.subjects import identify
from qpref.recipe.resolve import make_plan
from qpref.training.run import train_plan


@pytest.fixture(scope="module")
def run(make_base, tmp_path_factory):
    """A finished run of three large steps on an NF4 base that computes in bf16."""
    folder = tmp_path_factory.mktemp("scored")
    recipe = {
        "model": {"base": str(make_base()), "quantization": "nf4", "dtype": "bf16"},
        "adapter": {"rank": 4, "alpha": 8},
        "data": {"train": str(write_jsonl(folder / "train.jsonl", preference_rows(12)))},
        "checks": {"too_short": "off"},
        "loss": {"name": "dpo", "beta": 0.2},
        "train": {"learning_rate": 0.02, "batch_size": 4, "warmup_ratio": 0.0},
        "sinks": [],
    }
    return train_plan(make_plan(recipe, output=folder / "run"))


@pytest.fixture(scope="module")
def scored(run, tmp_path_factory):
    """The run's policy in float32, five pairs, their scores, and the KL positions."""
    subject = identify(str(run))
    path = write_jsonl(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", preference_rows(5, start=50))
    kept, left_out = heldout_pairs.tokenize_pairs(
        heldout_pairs.pairs_of(heldout_pairs.data_at(str(path))), subject.tokenizer(), subject.recipe.data
    )
    assert not left_out
    examples = list(kept.values())
    policy = subject.load("float32")
    positions = kl_positions(examples, seed=0)
    reference = score_reference("run", policy, examples, positions)
    return policy, examples, score_pairs(policy, examples, positions, reference), positions


@torch.no_grad()
def plain_logprobs(policy, example, branch):
    """[tokens, vocabulary] float64, by the model's own forward pass on one row under its own attention."""
    before = policy.attention
    policy.use_attention(policy.own_attention)
    ids = torch.tensor([[*example.prompt, *branch]])
    logits = policy.plain_model(input_ids=ids, use_cache=False).logits[0, -len(branch) - 1 : -1]
    policy.use_attention(before)
    return logits.double().log_softmax(-1)


def both(policy, example, branch):
    """The same of the policy and of its base."""
    ours = plain_logprobs(policy, example, branch)
    with policy.model.disable_adapter():
        return ours, plain_logprobs(policy, example, branch)


def test_log_probabilities_are_those_of_the_models_own_logits(scored):
    policy, examples, scores, _ = scored
    for number, example in enumerate(examples):
        for side, branch in enumerate(example.branches):
            totals = [table.gather(1, torch.tensor(branch)[:, None]).sum() for table in both(policy, example, branch)]
            assert scores.policy[number, side] == pytest.approx(totals[0].item(), abs=2e-3)
            assert scores.reference[number, side] == pytest.approx(totals[1].item(), abs=2e-3)
            assert scores.lengths[number, side] == len(branch)
    assert np.abs(scores.policy - scores.reference).max() > 1


def test_kl_is_that_of_whole_softmaxes_at_every_response_token(scored):
    policy, examples, scores, _ = scored
    for number, example in enumerate(examples):
        apart = []
        for branch in example.branches:
            ours, theirs = both(policy, example, branch)
            apart.append((ours.exp() * (ours - theirs)).sum(1))
        assert scores.kl[number] == pytest.approx(torch.cat(apart).mean().item(), rel=1e-3)
    assert scores.kl.min() > 0.01


def test_kl_over_slices_of_the_vocabulary_is_the_same(scored, monkeypatch):
    policy, examples, scores, all_rows = scored
    monkeypatch.setattr("qpref.policy.vocabulary.TILE_ELEMENTS", {"cpu": 1000})
    reference = score_reference("run", policy, examples, all_rows)
    assert score_pairs(policy, examples, all_rows, reference).kl == pytest.approx(scores.kl, rel=1e-5)


def test_kl_at_some_positions_estimates_that_at_all(scored):
    policy, examples, scores, _ = scored
    some = kl_positions(examples, seed=3, most=5 * 20)
    assert all(len(places) == 20 == len(set(places.tolist())) for places in some)
    reference = score_reference("run", policy, examples, some)
    estimate = score_pairs(policy, examples, some, reference).kl
    assert not np.allclose(estimate, scores.kl, rtol=1e-6)
    assert estimate.mean() == pytest.approx(scores.kl.mean(), rel=0.3)


def test_positions_are_seeded_and_of_the_pairs_own_tokens(scored):
    _, examples, _, _ = scored
    again, other = kl_positions(examples, 3, 50), kl_positions(examples, 4, 50)
    assert all(torch.equal(a, b) for a, b in zip(kl_positions(examples, 3, 50), again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(again, other, strict=True))
    for places, example in zip(again, examples, strict=True):
        assert places.max() < sum(map(len, example.branches))


def test_batches_that_run_out_of_memory_are_made_smaller(scored, monkeypatch):
    from qpref.evaluation import scores as module

    policy, examples, scores, positions = scored
    real, sizes = module.completion_hidden, []

    def small_memory(policy, batch):
        sizes.append(len(batch.examples))
        if len(batch.examples) > 2:
            raise torch.AcceleratorError("CUDA error: out of memory")
        return real(policy, batch)

    monkeypatch.setattr(module, "completion_hidden", small_memory)
    reference = score_reference("run", policy, examples, positions)
    found = score_pairs(policy, examples, positions, reference)
    assert sizes[0] == 5
    assert found.policy == pytest.approx(scores.policy, abs=1e-3)
    assert found.kl == pytest.approx(scores.kl, rel=1e-3)


def test_pairs_whose_divergence_runs_out_of_memory_are_made_fewer_too(scored, monkeypatch):
    from qpref.evaluation import scores as module

    policy, examples, scores, positions = scored
    real, calls = module.token_kl, []

    def small_memory(*call):
        calls.append(call)
        if len(calls) == 2:
            raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
        return real(*call)

    reference = score_reference("run", policy, examples, positions)
    monkeypatch.setattr(module, "token_kl", small_memory)
    assert score_pairs(policy, examples, positions, reference).kl == pytest.approx(scores.kl, rel=1e-3)
    assert len(calls) > len(examples)


def test_a_float32_model_multiplies_the_weights_of_training(run):
    """The base's 4-bit weights come out rounded to bf16, as in training, and are multiplied in float32."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    policy = identify(str(run)).load("float32")
    layers = [module for module in policy.model.modules() if isinstance(module, Linear4bit)]
    assert layers
    x = torch.randn(3, layers[0].in_features)
    weight = dequantize_4bit(layers[0].weight.data, layers[0].weight.quant_state)
    assert weight.dtype == torch.bfloat16
    assert torch.equal(layers[0](x), x @ weight.float().t())
    assert policy.head.weight.dtype == torch.float32
    assert policy.plain_model.get_input_embeddings().weight.dtype == torch.float32


def test_a_model_in_its_own_dtype_is_left_unchanged(run):
    policy = identify(str(run)).load("bf16")
    assert policy.dtype == torch.bfloat16 == policy.head.weight.dtype
