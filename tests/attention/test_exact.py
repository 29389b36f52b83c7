"""Kernels are judged by their distance from float32, beside that of rounding alone; attention sinks included."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qpref.attention import blocks, exact, register, sdpa
from qpref.attention.exact import AttentionCall, attention_and_gradients
from qpref.attention.layout import Layout, laid_out
from qpref.attention.register import COMPARED, KernelError, register_comparison, shared_prompt_attention
from qpref.attention.segments import segments
from qpref.records import Group

HEADS, KEY_HEADS, WIDTH = 6, 2, 32
GROUPS = (Group(start=0, prompt=70, branches=(90, 60)), Group(start=220, prompt=30, branches=(0, 40)))
NUM_TOKENS = 290
WINDOW = 40
LAYER = SimpleNamespace(config=SimpleNamespace(layer_types=None), layer_idx=0)


@pytest.fixture(autouse=True)
def _registry():
    register.register()
    before = dict(ALL_ATTENTION_FUNCTIONS._global_mapping)
    yield
    ALL_ATTENTION_FUNCTIONS._global_mapping.clear()
    ALL_ATTENTION_FUNCTIONS._global_mapping.update(before)


def states(sink: float, dtype: torch.dtype, heads_with_sink: int = 1) -> list[Tensor]:
    """Queries, keys and values; the first key heads' queries have a logit of about `sink` at each prompt's start."""
    generator = torch.Generator().manual_seed(3)
    query, key, value = (
        torch.randn(1, heads, NUM_TOKENS, WIDTH, generator=generator) for heads in (HEADS, KEY_HEADS, KEY_HEADS)
    )
    if sink:
        axis = torch.randn(WIDTH, generator=generator)
        axis /= axis.norm()
        for group in GROUPS:
            key[:, :heads_with_sink, group.start] = axis * sink * WIDTH**0.5 / 4
        query[:, : heads_with_sink * HEADS // KEY_HEADS] += 4 * axis
    return [each.to(dtype) for each in (query, key, value)]


@pytest.mark.parametrize("window", [None, WINDOW])
@pytest.mark.parametrize("max_scores", [1, exact.MAX_SCORES], ids=["a head at a time", "all heads"])
def test_the_formulas_are_attention_and_its_gradients(window, max_scores, monkeypatch):
    monkeypatch.setattr(exact, "MAX_SCORES", max_scores)
    given = states(15, torch.float32)
    leaves = [each.clone().requires_grad_() for each in given]
    result = sdpa.attend(*leaves, GROUPS, 0.3, window)
    direction = torch.randn(result.shape, generator=torch.Generator().manual_seed(1))
    wanted = [result.detach(), *torch.autograd.grad(result, leaves, direction)]
    call = AttentionCall(
        query=given[0], key=given[1], value=given[2], groups=GROUPS, scale=0.3, window=window, direction=direction
    )
    for one, other in zip(attention_and_gradients(call)[0], wanted, strict=True):
        assert ((one - other).norm() / other.norm()).item() < 2e-5


def judged(
    attend: Callable[..., Tensor], sink: float, window: int | None, dtype=torch.bfloat16, heads_with_sink: int = 1
) -> list[KernelError]:
    """The errors of a layer under a kernel."""
    ALL_ATTENTION_FUNCTIONS.register("kernel", partial(shared_prompt_attention, attend=attend))
    errors = register_comparison("kernel")
    compared = ALL_ATTENTION_FUNCTIONS[COMPARED]
    with torch.autocast("cpu", dtype=dtype), laid_out(Layout(GROUPS)):  # as a policy computes
        compared(LAYER, *states(sink, dtype, heads_with_sink), None, sliding_window=window)
    return errors


class _Flash(torch.autograd.Function):
    """What FlashAttention-2 rounds (Dao 2023, algorithms 1 and 2): the softmax and its gradient for products, and the
    result, from which the backward pass takes each query's sum of the softmax's gradient."""

    @staticmethod
    def forward(ctx, query, key, value, seen):
        scores = query.float() @ key.float().transpose(-1, -2) * WIDTH**-0.5
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).to(query.dtype)
        result = (weights.float() @ value.float()).to(query.dtype)
        ctx.save_for_backward(query, key, value, weights, result)
        return result

    @staticmethod
    def backward(ctx, incoming):
        query, key, value, weights, result = (each.float() for each in ctx.saved_tensors)
        incoming = incoming.float()
        weights_grad = incoming @ value.transpose(-1, -2)
        scores_grad = weights * (weights_grad - (incoming * result).sum(-1, keepdim=True))
        scores_grad = scores_grad.to(ctx.saved_tensors[0].dtype).float() * WIDTH**-0.5
        grads = scores_grad @ key, scores_grad.transpose(-1, -2) @ query, weights.transpose(-1, -2) @ incoming
        return *(each.to(ctx.saved_tensors[0].dtype) for each in grads), None


def flash(query, key, value, groups, scaling, window):
    repeated = (each.repeat_interleave(HEADS // KEY_HEADS, 1) for each in (key, value))
    seen = torch.zeros(NUM_TOKENS, NUM_TOKENS, dtype=torch.bool)
    for segment in segments(groups):
        indices = torch.cat([torch.arange(span.start, span.stop) for span in segment.spans])
        own = torch.arange(len(indices))[-(segment.queries.stop - segment.queries.start) :, None]
        later = torch.arange(len(indices)) > own
        far = own - torch.arange(len(indices)) >= (window or len(indices))
        seen[segment.queries.start : segment.queries.stop, indices] = ~(later | far)
    with torch.autocast("cpu", enabled=False):
        return _Flash.apply(query, *repeated, seen).transpose(1, 2)


def cpu_kernel(query: Tensor, key: Tensor, value: Tensor, groups, scaling, window) -> Tensor:
    """torch's own 16-bit kernel for CPUs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sdpa, "_without_cpu_bf16", lambda states: states)
        return sdpa.attend(query, key, value, groups, scaling, window)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [None, WINDOW])
@pytest.mark.parametrize(("sink", "heads"), [(0, 1), (15, 1), (15, 2), (25, 1), (25, 2)])
@pytest.mark.parametrize("kernel", [blocks.attend, flash, cpu_kernel], ids=["blocks", "flash", "torch's"])
def test_a_right_kernel_is_accepted_with_and_without_sinks(kernel, sink, heads, window, dtype):
    errors = judged(kernel, sink, window, dtype, heads)
    assert len(errors) == 4
    assert all(each.is_rounding for each in errors), errors


def test_a_right_kernel_may_be_far_off_where_attention_has_a_sink():
    """No fixed limit on its error would be both above this and below a wrong kernel's."""
    assert max(each.kernel for each in judged(flash, 15, None, heads_with_sink=KEY_HEADS)) > 0.05


def lone_branches(query, key, value, groups, scaling, window):
    """Branches don't see their prompt."""
    apart = []
    for group in groups:
        apart.append(Group(start=group.start, prompt=group.prompt, branches=()))
        start = group.start + group.prompt
        for length in group.branches:
            if length:
                apart.append(Group(start=start, prompt=length, branches=()))
            start += length
    return blocks.attend(query, key, value, tuple(apart), scaling, window)


def seen_sibling(query, key, value, groups, scaling, window):
    merged = tuple(Group(start=g.start, prompt=g.prompt, branches=(sum(g.branches),)) for g in groups)
    return blocks.attend(query, key, value, merged, scaling, window)


def not_causal(query, key, value, groups, scaling, window):
    right = blocks.attend(query, key, value, groups, scaling, window)
    group = groups[0]
    own = slice(group.start, group.start + group.prompt)
    keys, values = (each[:, :, own].repeat_interleave(HEADS // KEY_HEADS, 1).float() for each in (key, value))
    with torch.autocast("cpu", enabled=False):
        weights = (query[:, :, own].float() @ keys.transpose(-1, -2) * WIDTH**-0.5).softmax(-1)
        attended = (weights @ values).transpose(1, 2).to(right.dtype)
    return torch.cat([attended, right[:, own.stop :]], dim=1)


def half_gradient(query, key, value, groups, scaling, window):
    """The prompt's keys get the gradient of one branch alone."""
    result = blocks.attend(query, key, value, groups, scaling, window)
    group = groups[0]
    start = group.start + group.prompt + group.branches[0]
    last = slice(start, start + group.branches[1])
    cut = blocks.attend(query, key.detach(), value.detach(), groups, scaling, window)
    return torch.cat([result[:, : last.start], cut[:, last], result[:, last.stop :]], dim=1)


WRONG = {
    "scale": lambda q, k, v, groups, scaling, window: blocks.attend(q, k, v, groups, 1.1 * WIDTH**-0.5, window),
    "window one short": lambda q, k, v, groups, scaling, window: blocks.attend(q, k, v, groups, scaling, WINDOW - 1),
    "window one long": lambda q, k, v, groups, scaling, window: blocks.attend(q, k, v, groups, scaling, WINDOW + 1),
    "no window": lambda q, k, v, groups, scaling, window: blocks.attend(q, k, v, groups, scaling, None),
    "not causal": not_causal,
    "branch without its prompt": lone_branches,
    "branch that sees its sibling": seen_sibling,
    "prompt without a branch's gradient": half_gradient,
    "not a number": lambda q, k, v, *rest: blocks.attend(q, k, v, *rest) * torch.nan,
}


@pytest.mark.parametrize("sink", [0, 15, 25])
@pytest.mark.parametrize("kernel", WRONG)
def test_a_wrong_kernel_is_rejected_with_and_without_sinks(kernel, sink):
    window = WINDOW if "window" in kernel else None
    assert not all(each.is_rounding for each in judged(WRONG[kernel], sink, window))
