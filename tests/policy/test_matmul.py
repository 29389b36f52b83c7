"""Products are rounded once; what kernels on a GPU take by address is checked before the call."""

from __future__ import annotations

from copy import copy

import pytest
import torch
from bitsandbytes.functional import quantize_4bit

from qpref.policy import matmul
from qpref.policy.matmul import check_packed, float32_mm

BF16 = torch.bfloat16


@pytest.mark.parametrize(
    ("left", "right"), [(torch.float32, BF16), (BF16, torch.float32), (torch.float16, BF16), (torch.float32,) * 2]
)
def test_a_product_rounded_to_nothing_takes_one_16_bit_dtype(left, right):
    with pytest.raises(AssertionError):
        float32_mm(torch.ones(2, 3, dtype=left), torch.ones(3, 2, dtype=right))


@pytest.mark.parametrize("nested", [False, True], ids=["scales", "double quantization"])
def test_a_4_bit_weight_is_checked_with_its_scales(nested):
    packed, state = quantize_4bit(torch.randn(64, 128), compress_statistics=nested, quant_type="nf4")
    check_packed(packed, state)
    faults = {"absmax": state.absmax.to("meta"), "code": state.code.to("meta"), "shape": (64, 256)}
    if nested:
        faults["offset"] = state.offset.to("meta")
    for name, value in faults.items():
        wrong = copy(state)
        setattr(wrong, name, value)
        with pytest.raises(AssertionError):
            check_packed(packed, wrong)
    with pytest.raises(AssertionError):
        check_packed(packed[::2], state)


@pytest.mark.parametrize("has_units", [True, False])
def test_a_bf16_product_is_that_of_float32_rounded_once(has_units, monkeypatch):
    monkeypatch.setattr(matmul, "_has_bf16_units", lambda: has_units)
    generator = torch.Generator().manual_seed(0)
    left, right, start = (torch.randn(*shape, generator=generator).bfloat16() for shape in ((5, 64), (64, 7), (5, 7)))
    exact = left.double() @ right.double()
    step = torch.finfo(torch.bfloat16).eps
    torch.testing.assert_close(matmul.product(left, right).double(), exact, rtol=step, atol=1e-4)
    total = start.clone()
    matmul.add_product(total, left, right)
    torch.testing.assert_close(total.double(), start.double() + exact, rtol=step, atol=1e-4)
