"""The device: a real quantization of a small matrix, and a bitsandbytes that is broken is a problem."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes import functional

from qpref.doctor import device


def test_nf4_works_on_this_machine():
    (found,) = device._quantization("cpu")
    assert found.status == "ok"
    assert "quantizes to NF4 on cpu" in found.message


def broken(*ignored, **options):
    raise RuntimeError("no kernel\nimage is available")


def test_a_bitsandbytes_that_raises_is_a_problem(monkeypatch):
    monkeypatch.setattr(functional, "quantize_4bit", broken)
    (found,) = device._quantization("cpu")
    assert (found.status, found.message) == (
        "problem",
        "bitsandbytes can't quantize on cpu: no kernel image is available",
    )


@pytest.mark.parametrize("wrong", [torch.zeros_like, lambda matrix: matrix * float("nan")])
def test_a_bitsandbytes_that_computes_something_else_is_a_problem(monkeypatch, wrong):
    real = functional.dequantize_4bit
    monkeypatch.setattr(functional, "dequantize_4bit", lambda *given: wrong(real(*given)))
    (found,) = device._quantization("cpu")
    assert found.status == "problem"
    assert "is off by" in found.message


def test_the_examination_leaves_the_random_state():
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    list(device._quantization("cpu"))
    assert torch.equal(before, torch.random.get_rng_state())
