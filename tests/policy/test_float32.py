"""A policy that is switched to float32 leaves the attention that only 16 bits have."""

from __future__ import annotations

import pytest
import torch
from conftest import load_worn

from qpref.attention.register import BLOCKS, SEGMENTS
from qpref.policy.float32 import compute_in_float32


@pytest.mark.parametrize("shared", [True, False], ids=["prompts once", "whole rows"])
def test_float32_tries_no_path_of_16_bits(make_base, shared):
    model = {"base": str(make_base(dtype=torch.bfloat16)), "quantization": "none", "dtype": "bf16"}
    policy = load_worn({"model": model, "adapter": {"rank": 4, "alpha": 8}})
    policy.sharing_paths = (BLOCKS, SEGMENTS)
    policy.share_prompts(shared)
    compute_in_float32(policy)
    assert policy.sharing_paths == (SEGMENTS,)
    assert policy.attention == (SEGMENTS if shared else policy.own_attention)
