"""Norms, gated MLPs and rotary positions as functions: their gradients, what they keep, and what outlives them."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from fused_cases import apart, load_family, make_batch, make_family, outcome
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from qpref.dropout import Draws, TokenDropout, drawing
from qpref.policy.gated_mlp import _GatedMLP, _Layers
from qpref.policy.logprobs import completion_logprobs
from qpref.policy.lora import project, projections_of
from qpref.policy.norms import FORMULAS, RMSNorm, _RMSNorm, source_of
from qpref.policy.projections import Projections
from qpref.policy.self_attention import _Rotated

__all__ = ["make_family"]

WIDTH, INNER, ROWS = 6, 10, 4


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def linear(inputs: int, outputs: int, seed: int, bias: bool = True) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias=bias, dtype=torch.float64).requires_grad_(False)
    layer.weight.copy_(random(outputs, inputs, seed=seed))
    return layer


def norm(dtype: torch.dtype = torch.float64, formula: int = 0, width: int = WIDTH) -> RMSNorm:
    own = LlamaRMSNorm(width, eps=1e-3).to(dtype)
    own.weight.data = random(width, seed=9).to(dtype)
    return RMSNorm(own.requires_grad_(False), FORMULAS[formula])


# The norms' formulas, one by one, in float64. Their inverse is in float32 on purpose, so it is replaced here.


@pytest.mark.parametrize("formula", range(3))
@pytest.mark.parametrize("shape", [(ROWS, WIDTH), (1, ROWS, 2, WIDTH)])
def test_a_norms_gradient_is_that_of_finite_differences(formula, shape, monkeypatch):
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    module = norm(formula=formula)
    assert torch.autograd.gradcheck(lambda states: module(states), random(*shape).requires_grad_(), fast_mode=True)


@pytest.mark.parametrize("formula", range(3))
def test_a_norms_values_are_the_formulas(formula):
    module, states = norm(formula=formula), random(ROWS, WIDTH)
    scale = module.weight + (1 if formula == 1 else 0)
    wanted = scale * states / (states.square().mean(-1, keepdim=True) + 1e-3).sqrt()
    assert apart(module(states), wanted) <= 1e-6


@pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh", "relu2"])
@pytest.mark.parametrize(("dropout", "biased"), [(0.0, True), (0.4, False)])
def test_an_mlps_gradients_are_those_of_finite_differences(activation, dropout, biased):
    bases = linear(WIDTH, INNER, 1, biased), linear(WIDTH, INNER, 2, biased), linear(INNER, WIDTH, 3, biased)
    of_inner, of_outer = (
        TokenDropout(dropout, name, width) if dropout else None for name, width in (("inner", WIDTH), ("outer", INNER))
    )
    layers = _Layers(
        Projections(bases[:2], (2, 3), (0.7, 1.1), of_inner),
        Projections(bases[2:], (2,), (0.9,), of_outer),
        ACT2FN[activation],
    )
    shapes = (2, WIDTH), (INNER, 2), (3, WIDTH), (INNER, 3), (2, INNER), (WIDTH, 2)
    adapters = [random(*shape, seed=10 + index).requires_grad_() for index, shape in enumerate(shapes)]

    def under_one_mask(x: Tensor, *adapters: Tensor) -> Tensor:
        with drawing(draws_for(x)):
            return _GatedMLP.apply(x, layers, None, *adapters)

    assert torch.autograd.gradcheck(
        under_one_mask, (random(2, ROWS, WIDTH).requires_grad_(), *adapters), fast_mode=True
    )


def draws_for(x: Tensor) -> Draws:
    """Of rows that are all different tokens."""
    return Draws.of(lambda: torch.arange(x.shape[:-1].numel()).view(x.shape[:-1]), 0)


def test_rotated_gradients_are_those_of_finite_differences():
    states, positions = (
        random(1, ROWS, 2, WIDTH).requires_grad_(),
        [random(1, ROWS, WIDTH, seed=1 + i) for i in range(2)],
    )
    assert torch.autograd.gradcheck(lambda states: _Rotated.apply(states, *positions), states, fast_mode=True)


def test_rotated_values_are_those_of_transformers():
    query, key = random(1, ROWS, 2, WIDTH), random(1, ROWS, 1, WIDTH, seed=5)
    cosines, sines = (random(1, ROWS, WIDTH, seed=seed) for seed in (1, 2))
    wanted = apply_rotary_pos_emb(query.transpose(1, 2), key.transpose(1, 2), cosines, sines)
    for states, right in zip((query, key), wanted, strict=True):
        assert apart(_Rotated.apply(states, cosines, sines).transpose(1, 2), right) <= 1e-12


# Normed states and their source.


def test_states_that_were_changed_in_place_have_no_source():
    """A function that recomputed them from the norm's input would take the wrong ones."""
    layer, states = linear(WIDTH, WIDTH, 1).requires_grad_(False), random(1, ROWS, WIDTH).requires_grad_()
    normed = norm()(states)
    assert source_of(normed) is not None
    normed.mul_(2)
    assert source_of(normed) is None
    covered = projections_of([layer], normed)
    project(normed, covered)[0].sum().backward()
    wanted = torch.autograd.functional.vjp(
        lambda leaf: layer(2 * norm()(leaf)), states.detach(), torch.ones(1, ROWS, WIDTH).double()
    )
    assert apart(states.grad, wanted[1]) <= 1e-12


def test_an_input_that_was_changed_in_place_is_an_error_not_a_wrong_gradient():
    states = random(ROWS, WIDTH).requires_grad_()
    copied = states * 1
    normed = norm()(copied)
    copied.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        normed.sum().backward()


@pytest.mark.parametrize("grad", [False, True])
def test_normed_states_and_their_source_are_freed_with_the_last_name(grad):
    gc.disable()  # by reference counts alone
    try:
        states = random(ROWS, WIDTH).requires_grad_()
        with torch.set_grad_enabled(grad):
            normed = norm()(states * 1)
        source = source_of(normed)
        assert (source is not None) == grad
        alive = [weakref.ref(normed), *([weakref.ref(source.states), weakref.ref(source.inverse)] if source else [])]
        if grad:
            normed.sum().backward()
        del normed, source
        assert [each() for each in alive] == [None] * len(alive)
    finally:
        gc.enable()


# What is kept.


def kept(work: Any, *known: Tensor) -> int:
    """Bytes that autograd keeps of a call, but for known tensors."""
    sizes, alive = {}, []
    addresses = {tensor.untyped_storage().data_ptr() for tensor in known}

    def note(tensor: Tensor) -> Tensor:
        alive.append(tensor)  # so that no address is given out twice
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in addresses:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        alive.append(work())
    return sum(sizes.values())


def test_a_norm_keeps_its_16_bit_input_and_one_number_a_row():
    module, states = norm(torch.bfloat16, width=64), torch.randn(100, 64).bfloat16().requires_grad_()
    assert kept(lambda: module(states), states, module.weight) == 4 * 100
    own = LlamaRMSNorm(64).bfloat16().requires_grad_(False)
    assert kept(lambda: own(states), states, own.weight) >= 4 * 100 * 64


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_layer_keeps_what_is_counted(dropout, make_family):
    """In numbers a token: both norms' inputs, queries, keys and values, gate and up, the low-rank products."""
    policy = load_family(make_family("llama"), "llama", "bf16", dropout=dropout)
    layer, num_tokens, hidden, inner, rank = policy.decoder.layers[0], 300, 64, 128, 4
    states = torch.randn(1, num_tokens, hidden).bfloat16().requires_grad_()

    def mlp() -> Tensor:
        with policy.autocast(), drawing(draws_for(states)):
            return layer.mlp(layer.post_attention_layernorm(states))

    numbers = num_tokens * (2 * inner + 3 * rank)
    cast = 2 * rank * hidden + 2 * rank * inner + rank * (inner + hidden)
    known = [states, *policy.model.parameters()]
    assert kept(mlp, *known) == 2 * (numbers + cast) + 4 * num_tokens


def test_recomputed_layers_keep_nothing_between_forward_and_backward(make_family):
    """Everything that is large and alive after the forward pass is a layer's input; nothing hides in a context."""
    policy, batch = load_family(make_family("qwen3"), "qwen3", "bf16", recomputed=True, dropout=0.3), make_batch()
    completion_logprobs(policy, batch).total.sum().backward()
    gc.collect()
    before = {id(each) for each in alive_tensors()}
    scores = completion_logprobs(policy, batch).total
    gc.collect()
    num_tokens = len(batch.input_ids)
    made = [each for each in alive_tensors() if id(each) not in before and num_tokens * 2 <= each.numel()]
    wide = [tuple(each.shape) for each in made if each.numel() > num_tokens * 64]
    assert wide == []
    assert sum(each.shape[-1:] == (64,) for each in made) <= 5  # of both layers, the final norm, the head
    scores.sum().backward()
    del scores, made
    policy.model.zero_grad(set_to_none=True)
    left = [each for each in alive_tensors() if id(each) not in before and each.numel() >= num_tokens * 2]
    assert left == []


def alive_tensors() -> list[Tensor]:
    """Of real numbers; activation checkpointing keeps the states of random generators, which are bytes."""
    return [each for each in gc.get_objects() if type(each) in (Tensor, nn.Parameter) and each.is_floating_point()]


def test_a_recomputed_layer_with_dropout_draws_its_masks_again():
    layer = linear(WIDTH, INNER, 1)
    projections = Projections((layer,), (2,), (1.0,), TokenDropout(0.5, "layer", WIDTH))
    adapters = [random(2, WIDTH, seed=3).requires_grad_(), random(INNER, 2, seed=4).requires_grad_()]
    module, found = norm(), []

    def work(states: Tensor) -> Tensor:
        return project(module(states), (projections, adapters, torch.float64))[0]

    for run in (work, lambda states: checkpoint(work, states, use_reentrant=False)):
        states = random(ROWS, WIDTH).requires_grad_()
        with drawing(draws_for(states)):
            found.append(torch.autograd.grad(run(states).square().sum(), [states, *adapters]))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_a_step_leaves_no_cycle_of_tensors(make_family):
    policy, batch = load_family(make_family("llama"), "llama"), make_batch()
    outcome(policy, batch)
    gc.collect()
    gc.disable()
    try:
        before = len(alive_tensors())
        for _ in range(3):
            outcome(policy, batch)
        assert len(alive_tensors()) <= before
    finally:
        gc.enable()


def test_the_norm_function_is_the_one_that_is_used():
    assert norm()(random(ROWS, WIDTH).requires_grad_()).grad_fn.name() == f"{_RMSNorm.__name__}Backward"
