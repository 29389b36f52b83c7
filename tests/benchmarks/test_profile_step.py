"""A profiled step's seconds are counted under what they went into."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile

from benchmarks.profile_step import kind, seconds_by_kind


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("aten::addmm_", "products"),
        ("aten::mm", "products"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "fused attention"),
        ("bitsandbytes::dequantize_4bit", "dequantization"),
        ("aten::copy_", "copies and casts"),
        ("aten::mul", "elementwise and the rest"),
        ("_AdaptedLinearBackward", "Python, autograd"),
    ],
)
def test_an_operation_has_its_kind(name, expected):
    assert kind(name) == expected


def test_a_real_profile_has_its_kinds():
    x = torch.randn(1, 2, 64, 32, requires_grad=True)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        (scaled_dot_product_attention(x, x, x, is_causal=True) @ torch.randn(32, 32)).sum().backward()
    found = seconds_by_kind(seen.key_averages())
    assert {"products", "fused attention", "elementwise and the rest"} <= set(found)
