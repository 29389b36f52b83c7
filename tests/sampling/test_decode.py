"""Sampled responses against a sampler without a cache, a batch or padding."""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import pytest
import torch
from conftest import load_worn
from matrix.cases import tiny_model

from qpref.errors import PolicyError
from qpref.sampling import decode
from qpref.sampling.decode import Draws, sample

STOPS = (258, *range(3, 250, 12))
PROMPTS = ([5, 6, 7, 8, 9, 10, 11], [12], [40, 41, 42, 43, 44, 45, 46, 47, 48, 49, 50, 51], [9, 9])
DRAWS = Draws(num_responses=3, max_new_tokens=20, temperature=0.8, top_p=0.95, seed=4)


@pytest.fixture(scope="module")
def policy_of(make_base):
    def load(family="llama"):
        tables = {"model": {"base": str(make_base(family)), "quantization": "none", "dtype": "float32"},
                  "adapter": {"rank": 4, "alpha": 8, "dropout": 0.3}}  # fmt: skip
        policy = load_worn(tables)
        policy.share_prompts(False)
        return policy

    return load


@torch.no_grad()
def alone(policy, prompt, number, draws):
    """The response by full passes over the prompt and what there is of the response."""
    policy.model.eval()
    uniform, new = decode._numbers(prompt, number, draws).tolist(), []
    for at in range(draws.max_new_tokens):
        logits = policy.plain_model(input_ids=torch.tensor([[*prompt, *new]]), use_cache=False).logits[0, -1].double()
        chances = (logits / draws.temperature).softmax(0)
        ordered = chances.sort(descending=True)
        kept, total = set(), 0.0
        for token, chance in zip(ordered.indices.tolist(), ordered.values.tolist(), strict=True):
            if total >= draws.top_p:
                break
            kept.add(token)
            total += chance
        left, place = uniform[at] * total, 0.0
        for token in sorted(kept):
            place += chances[token].item()
            if place > left:
                break
        new.append(token)
        if token in STOPS:
            break
    policy.model.train()
    return new


@pytest.mark.parametrize("family", ["llama", "qwen", "mistral", "gemma3"])
def test_each_response_is_that_of_a_prompt_alone(policy_of, family):
    policy = policy_of(family)
    found = sample(policy, PROMPTS, DRAWS, STOPS)
    assert found == [[alone(policy, prompt, number, DRAWS) for number in range(3)] for prompt in PROMPTS]
    assert (
        len({len(response) for responses in found for response in responses}) > 3
    )  # they left the batch at many times
    assert policy.model.training


def test_a_model_with_other_state_is_sampled_by_generate(policy_of, monkeypatch):
    policy = policy_of()
    by_cache = sample(policy, PROMPTS, DRAWS, STOPS)
    monkeypatch.setattr(decode, "_holds_keys_and_values", lambda cache: False)
    assert sample(policy, PROMPTS, DRAWS, STOPS) == by_cache


@pytest.mark.parametrize("name", ["lfm2_moe", "falcon_h1"])
def test_a_hybrid_model_draws_each_response_as_of_a_prompt_alone(name, tmp_path):
    base = tiny_model(name).write(tmp_path)
    policy = load_worn({"model": {"base": str(base), "quantization": "none", "dtype": "float32"}})
    policy.share_prompts(False)
    short = replace(DRAWS, max_new_tokens=6)
    found = sample(policy, PROMPTS, short, STOPS)
    assert found == [[alone(policy, prompt, number, short) for number in range(3)] for prompt in PROMPTS]


def test_the_most_probable_tokens_at_temperature_0(policy_of):
    policy, greedy = policy_of(), replace(DRAWS, temperature=0.0, top_p=1.0, num_responses=2)
    for prompt, (first, second) in zip(PROMPTS, sample(policy, PROMPTS, greedy, STOPS), strict=True):
        with torch.no_grad():
            ids = torch.tensor([[*prompt, *first]])
            best = policy.model.eval()(input_ids=ids).logits[0].argmax(-1).tolist()
        assert first == second == best[len(prompt) - 1 : -1]


def test_responses_dont_depend_on_what_shares_the_batch(policy_of):
    policy = policy_of()
    together = sample(policy, PROMPTS, DRAWS, STOPS)
    apart = [sample(policy, [prompt], DRAWS, STOPS)[0] for prompt in reversed(PROMPTS)]
    assert together == apart[::-1]
    assert together != sample(policy, PROMPTS, replace(DRAWS, seed=5), STOPS)


def test_a_prompt_is_computed_once_and_no_finished_response(policy_of, monkeypatch):
    policy, computed = policy_of(), []
    forward = policy.plain_model.forward

    @functools.wraps(forward)
    def counted(**inputs):
        computed.append(inputs["input_ids"].shape)
        return forward(**inputs)

    monkeypatch.setattr(policy.plain_model, "forward", counted)
    found = sample(policy, PROMPTS, replace(DRAWS, max_new_tokens=60), STOPS)
    lengths = [len(response) for responses in found for response in responses]
    assert computed[0] == (4, 12)
    growing = [sum(length > at for length in lengths) for at in range(1, max(lengths))]
    assert all(needed <= rows <= needed / decode.KEPT_SHARE + 1
               for needed, (rows, _) in zip(growing, computed[1:], strict=True))  # fmt: skip


def test_tokens_are_drawn_as_often_as_the_model_says(policy_of):
    policy, count = policy_of(), 4000
    with torch.no_grad():
        policy.model.eval()
        chances = policy.plain_model(input_ids=torch.tensor([PROMPTS[0]])).logits[0, -1].double().softmax(0)
    drawn = sample(policy, [PROMPTS[0]], Draws(num_responses=count, max_new_tokens=1), STOPS)[0]
    counts = torch.bincount(torch.tensor(drawn).flatten(), minlength=len(chances)).double()
    statistic = ((counts - count * chances) ** 2 / (count * chances)).sum().item()
    freedom = len(chances) - 1
    assert abs(statistic - freedom) < 5 * math.sqrt(2 * freedom)


def test_a_model_that_fails_is_named(policy_of, monkeypatch):
    policy = policy_of()

    def fails(cache):
        raise ValueError("no attention layer in this cache")

    monkeypatch.setattr(decode, "_holds_keys_and_values", fails)
    with pytest.raises(PolicyError, match="this llama model can't be sampled: ValueError: no attention layer"):
        sample(policy, PROMPTS, DRAWS, STOPS)
