"""What a flash kernel can't take is refused before the call: by one sentence where a model or a card causes it, and by
an assert where only our own layout could."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from qpref.attention import varlen
from qpref.attention.errors import CannotShareError
from qpref.attention.varlen import KeyLayout, key_layout
from qpref.records import Group

CPU = torch.device("cpu")
LAYOUT = key_layout((Group(start=0, prompt=3, branches=(2, 1)),), CPU)
T, K = 6, 12


def check(
    width: int = 16, layout: KeyLayout = LAYOUT, multiple: int = 8, change: Callable[..., Any] = lambda *states: states
) -> None:
    query, key, value = torch.empty(T, 4, width), torch.empty(K, 2, width), torch.empty(K, 2, width)
    varlen._check_call(*change(query, key, value), layout, multiple)


def test_what_the_layout_makes_passes():
    check()


@pytest.mark.parametrize(("width", "multiple"), [(20, 8), (264, 8), (260, 1)])
def test_a_head_that_a_kernel_cannot_take_is_refused_with_its_width(width, multiple):
    with pytest.raises(CannotShareError, match=f"this model's have {width}$"):
        check(width=width, multiple=multiple)


def test_flash_attn_pads_a_width_that_torch_refuses():
    check(width=20, multiple=1)


def test_values_of_another_width_than_keys_are_refused():
    with pytest.raises(CannotShareError, match="its keys are 16 wide, its values 8, its queries 16"):
        check(change=lambda query, key, value: (query, key, value[..., :8].contiguous()))


def test_queries_in_another_dtype_than_values_are_refused():
    with pytest.raises(CannotShareError, match=r"its queries, keys and values are torch\.bfloat16, torch\.float32"):
        check(change=lambda query, key, value: (query.bfloat16(), key, value))


def strided(states: Tensor) -> Tensor:
    return states.transpose(0, 1).contiguous().transpose(0, 1)


@pytest.mark.parametrize(
    "layout",
    [
        replace(LAYOUT, query_ends=LAYOUT.query_ends.long()),
        replace(LAYOUT, key_ends=LAYOUT.key_ends.long()),
        replace(LAYOUT, key_ends=LAYOUT.key_ends.repeat_interleave(2)[::2]),
        replace(LAYOUT, query_ends=LAYOUT.query_ends.to("meta")),
        replace(LAYOUT, own=LAYOUT.own[:-1]),
        replace(LAYOUT, index=LAYOUT.index[:-1]),
        replace(LAYOUT, longest_query=0),
    ],
    ids=["int64", "int64 of keys", "strided", "elsewhere", "a query less", "a key less", "nothing"],
)
def test_a_wrong_layout_is_caught_before_the_kernel(layout):
    with pytest.raises(AssertionError):
        check(layout=layout)


@pytest.mark.parametrize("which", range(3), ids=["query", "key", "value"])
def test_strided_states_are_caught_before_the_kernel(which):
    with pytest.raises(AssertionError):
        check(change=lambda *states: [strided(each) if at == which else each for at, each in enumerate(states)])
