"""KL of whole sampled responses, against a sum over every token of the vocabulary in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import load_worn, make_example

from qpref.evaluation import sequence_kl as module
from qpref.evaluation.sequence_kl import sequence_kl
from qpref.policy.reference import as_base, as_start


@torch.no_grad()
def by_hand(policy, example):
    """The KL of each response from the base."""
    found = []
    for branch in example.branches:
        ids = torch.tensor([[*example.prompt, *branch]])
        start = len(example.prompt) - 1
        own = policy.plain_model(input_ids=ids).logits[0, start:-1].double().log_softmax(-1)
        with as_base(policy):
            base = policy.plain_model(input_ids=ids).logits[0, start:-1].double().log_softmax(-1)
        found.append((own.exp() * (own - base)).sum().item())
    return found


def test_it_is_the_sum_over_the_vocabulary_at_each_token(make_base, monkeypatch):
    policy = load_worn({"model": {"base": str(make_base()), "quantization": "none", "dtype": "float32"}})
    policy.model.eval()
    policy.share_prompts(False)
    examples = [make_example(line, 4 + line, 5, 9, 1) for line in range(5)]
    monkeypatch.setitem(module.MOST_TOKENS, "cpu", 40)  # several batches
    (found,) = sequence_kl(policy, examples, [as_base])
    assert found == pytest.approx(np.array([by_hand(policy, example) for example in examples]), rel=1e-4)
    assert found.min() > 0.01
    (none,) = sequence_kl(policy, examples, [as_start])  # of a new adapter the start is the base
    assert np.array_equal(none, found)
