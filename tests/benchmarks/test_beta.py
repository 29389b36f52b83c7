"""The KL that docs/beta.md compares runs by, and the runs that it is of."""

from __future__ import annotations

import pytest
import torch
from conftest import load_worn

from benchmarks import beta
from qpref.policy.reference import as_reference

PROMPT, RESPONSES = [5, 9, 12, 7], [[11, 3, 8], [4]]


@torch.no_grad()
def next_tokens(policy, response):
    """[tokens, vocabulary] float64 log-probabilities by the model's own forward pass on one row."""
    policy.use_attention(policy.own_attention)
    logits = policy.plain_model(input_ids=torch.tensor([[*PROMPT, *response]]), use_cache=False).logits
    return logits[0, -len(response) - 1 : -1].double().log_softmax(-1)


def test_the_kl_of_a_response_is_the_sum_over_its_tokens_and_a_mean_over_responses(make_recipe):
    policy = load_worn(make_recipe({"model.dtype": "float32"}))
    policy.model.eval()
    sharing = policy.attention
    nats = 0.0
    for response in RESPONSES:
        own = next_tokens(policy, response)
        with as_reference(policy):
            reference = next_tokens(policy, response)
        nats += float((own.exp() * (own - reference)).sum())
    policy.use_attention(sharing)
    assert nats > 0.01
    assert beta.sequence_kl(policy, PROMPT, RESPONSES) == pytest.approx(nats / 2, rel=1e-3)


def test_the_runs_have_the_folders_that_their_sweeps_make():
    folders = {run.folder for run in beta.runs([0, 1])}
    assert {"betas/seed=1,beta=0.5", "rates/learning_rate=5e-6"} <= folders
    assert len(folders) == 2 * len(beta.BETAS) + len(beta.RATES)
