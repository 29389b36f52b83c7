"""Log-ratios of responses against full passes over a tiny model, and the KL that their mean estimates."""

from __future__ import annotations

import pytest
import torch
from conftest import load_worn

from benchmarks.frontier.measures import estimate, log_ratios
from benchmarks.frontier.task import Model
from qpref.policy.reference import as_reference, frozen
from qpref.sampling.decode import Draws, sample

PROMPTS = ((5, 6, 7), (12,), (40, 41, 42, 43))


@pytest.fixture(scope="module")
def model(make_base):
    tables = {
        "model": {"base": str(make_base("llama")), "quantization": "none", "dtype": "float32"},
        "adapter": {"rank": 4, "alpha": 8},
    }
    return Model(policy=load_worn(tables), tokenizer=None, ends=())


def total(model, prompt, response):
    """Log-probability of a response by one pass over prompt and response, nats."""
    logits = model.policy.plain_model(input_ids=torch.tensor([[*prompt, *response]])).logits[0].double()
    scores = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    return float(scores[range(len(response)), list(response)].sum())


def test_log_ratios_are_those_of_full_passes(model):
    responses = [(prompt, ((9, 8, 200), (11,), (30, 31))) for prompt in PROMPTS]
    found = log_ratios(model, responses)
    model.policy.share_prompts(False)
    for (prompt, branches), own in zip(responses, found, strict=True):
        with frozen(model.policy):
            after = [total(model, prompt, branch) for branch in branches]
        with as_reference(model.policy):
            before = [total(model, prompt, branch) for branch in branches]
        assert own == pytest.approx([a - b for a, b in zip(after, before, strict=True)], abs=1e-4)
    model.policy.share_prompts(True)
    assert max(abs(value) for own in found for value in own) > 0.01


def test_mean_log_ratio_of_sampled_tokens_is_the_kl(model):
    prompt, k = PROMPTS[0], 4000
    model.policy.share_prompts(False)
    drawn = sample(model.policy, [prompt], Draws(num_responses=k, max_new_tokens=1), (258,))[0]

    def scores():
        return model.policy.plain_model(input_ids=torch.tensor([prompt])).logits[0, -1].double().log_softmax(-1)

    with frozen(model.policy):
        policy = scores()
    with as_reference(model.policy):
        reference = scores()
    model.policy.share_prompts(True)
    exact = float((policy.exp() * (policy - reference)).sum())
    distinct = sorted({tuple(one) for one in drawn})
    ratio_of = dict(zip(distinct, log_ratios(model, [(prompt, distinct)])[0], strict=True))
    values = [ratio_of[tuple(one)] for one in drawn]
    deviation = float(torch.tensor(values).std()) / k**0.5
    assert exact > 0.001
    assert estimate([[value] for value in values]).value == pytest.approx(exact, abs=4 * deviation)
