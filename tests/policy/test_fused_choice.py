"""Only a module that computes the known formula is fused; all others, and the process around them, stay as they are."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fused_cases import load_family, make_batch, make_family, num_fused, outcome
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qpref.policy.fused import fuse_layers
from qpref.policy.gated_mlp import GatedMLP
from qpref.policy.norms import FORMULAS, RMSNorm
from qpref.policy.self_attention import RECORDED, SelfAttention, _Rotated

__all__ = ["make_family"]

WIDTH = 32


def fused_kind(module: nn.Module, dtype: torch.dtype = torch.float32) -> type:
    """The type of the module in a decoder whose layers have been fused."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.2)
    decoder = nn.ModuleDict({"layer": module.to(dtype)}).requires_grad_(False)
    fuse_layers(decoder, dtype, nullcontext)
    return type(decoder["layer"])


class Norm(nn.Module):
    """Llama's."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))
        self.eps = 1e-5

    def forward(self, states: Tensor) -> Tensor:
        return self.weight * self.normed(states.float()).to(states.dtype)

    def normed(self, states: Tensor) -> Tensor:
        return states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + self.eps)


class PlainRMSNorm(Norm):
    pass


class CenteredRMSNorm(Norm):
    def normed(self, states: Tensor) -> Tensor:
        return super().normed(states - states.mean(-1, keepdim=True))


class SumRMSNorm(Norm):
    def normed(self, states: Tensor) -> Tensor:
        return states * torch.rsqrt(states.pow(2).sum(-1, keepdim=True) + self.eps)


class OtherEpsilonRMSNorm(Norm):
    """It adds another number than the one in its `eps`."""

    def normed(self, states: Tensor) -> Tensor:
        return states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + 2e-5)


class OutsideEpsilonRMSNorm(Norm):
    def normed(self, states: Tensor) -> Tensor:
        return states / (states.pow(2).mean(-1, keepdim=True).sqrt() + self.eps**0.5)


class TwoOffsetRMSNorm(Norm):
    def forward(self, states: Tensor) -> Tensor:
        return (2 + self.weight) * self.normed(states)


class ClampedRMSNorm(Norm):
    def normed(self, states: Tensor) -> Tensor:
        return super().normed(states.clamp(-20, 20))


class GatedRMSNorm(Norm):
    def forward(self, states: Tensor, gate: Tensor | None = None) -> Tensor:
        return super().forward(states) if gate is None else super().forward(states) * gate


class BiasedRMSNorm(Norm):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(WIDTH))


class NamelessRMSNorm(Norm):
    """Its number has a name that nobody knows."""

    def __init__(self) -> None:
        super().__init__()
        self.tiny = self.eps
        del self.eps

    def normed(self, states: Tensor) -> Tensor:
        return states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + self.tiny)


class SteepRMSNorm(Norm):
    """Its gradients aren't numbers, where a fused one's are."""

    def normed(self, states: Tensor) -> Tensor:
        return super().normed(states) + (0 * states).abs().sqrt()


def test_a_plain_norm_is_fused():
    assert fused_kind(PlainRMSNorm()) is RMSNorm


@pytest.mark.parametrize(
    "kind",
    [
        CenteredRMSNorm,
        SumRMSNorm,
        OtherEpsilonRMSNorm,
        OutsideEpsilonRMSNorm,
        TwoOffsetRMSNorm,
        ClampedRMSNorm,
        GatedRMSNorm,
        BiasedRMSNorm,
        NamelessRMSNorm,
        SteepRMSNorm,
    ],
)
def test_another_norm_is_left_alone(kind):
    assert fused_kind(kind()) is kind


def test_torchs_own_norm_is_left_alone_where_its_epsilon_follows_the_dtype():
    assert fused_kind(nn.RMSNorm(WIDTH)) is nn.RMSNorm


@pytest.mark.parametrize("formula", FORMULAS)
def test_a_norms_order_of_rounding_is_recognized(formula):
    class FamilyRMSNorm(Norm):
        def forward(self, states: Tensor) -> Tensor:
            weight = self.weight.float() + formula.weight_offset
            if formula.rounds_first:
                return self.weight * self.normed(states.float()).to(states.dtype)
            return (weight * self.normed(states.float())).to(states.dtype)

    decoder = nn.ModuleDict({"layer": FamilyRMSNorm().bfloat16()}).requires_grad_(False)
    fuse_layers(decoder, torch.bfloat16, nullcontext)
    assert decoder["layer"].formula == formula


class MLP(nn.Module):
    def __init__(self, activation: str = "silu") -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(WIDTH, 2 * WIDTH, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(2 * WIDTH, WIDTH, bias=False)
        self.act_fn = ACT2FN[activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class MultipliedMLP(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return 0.9 * super().forward(x)


class ClampedMLP(MLP):
    def forward(self, x: Tensor) -> Tensor:
        gate = self.act_fn(self.gate_proj(x).clamp(max=7))
        return self.down_proj(gate * self.up_proj(x).clamp(-7, 7))


class SwappedMLP(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.gate_proj(x) * self.act_fn(self.up_proj(x)))


class DetachedMLP(MLP):
    """Its values are the known ones; its gradients aren't."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)).detach() * self.up_proj(x))


class TwoInputsMLP(MLP):
    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return super().forward(x) + residual


class ScaledMLP(MLP):
    """With a trained scale of its own, 1 as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * super().forward(x)


class OtherResultMLP(MLP):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x), None


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_pytorch_tanh", "relu2"])
def test_a_plain_gated_mlp_is_fused(activation):
    assert fused_kind(MLP(activation)) is GatedMLP


@pytest.mark.parametrize(
    "kind", [MultipliedMLP, ClampedMLP, SwappedMLP, DetachedMLP, TwoInputsMLP, ScaledMLP, OtherResultMLP]
)
def test_another_mlp_is_left_alone(kind):
    assert fused_kind(kind()) is kind


@pytest.mark.parametrize("watch", ["hook", "forward"])
def test_a_module_that_is_watched_before_is_left_alone(watch):
    mlp = MLP()
    if watch == "hook":
        mlp.register_forward_hook(lambda *call: None)
    else:
        mlp.forward = partial(MLP.forward, mlp)  # as accelerate does
    assert fused_kind(mlp) is MLP


def test_layers_of_one_class_with_another_setting_are_tried_each():
    class ConditionalMLP(MLP):
        def __init__(self, multiplier: float) -> None:
            super().__init__()
            self.multiplier = multiplier

        def forward(self, x: Tensor) -> Tensor:
            return self.multiplier * super().forward(x)

    decoder = nn.ModuleList(ConditionalMLP(multiplier) for multiplier in (1.0, 0.5, 1.0)).requires_grad_(False)
    fuse_layers(decoder, torch.float32, nullcontext)
    assert [type(layer) for layer in decoder] == [GatedMLP, ConditionalMLP, GatedMLP]


HEADS, HEAD = 4, 8


class Attention(nn.Module):
    """Llama's, in few words."""

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.config = SimpleNamespace(_attn_implementation="sdpa", **config)
        self.q_proj, self.o_proj = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.k_proj, self.v_proj = (nn.Linear(WIDTH, WIDTH // 2) for _ in range(2))
        self.head_dim, self.layer_idx, self.scaling = HEAD, 0, 0.3

    def heads(self, states: Tensor) -> list[Tensor]:
        layers = self.q_proj, self.k_proj, self.v_proj
        return [layer(states).view(*states.shape[:-1], -1, HEAD).transpose(1, 2) for layer in layers]

    def turned(self, states: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        first, second = states.chunk(2, -1)
        return states * cosines[:, None] + torch.cat([-second, first], -1) * sines[:, None]

    def forward(
        self, hidden_states: Tensor, position_embeddings: Any, attention_mask: Tensor | None, **keywords: Any
    ) -> tuple[Tensor, None]:
        query, key, value = self.heads(hidden_states)
        query, key = (self.turned(each, *position_embeddings) for each in (query, key))
        attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        attended, _ = attend(self, query, key, value, attention_mask, scaling=self.scaling, **keywords)
        return self.o_proj(attended.reshape(*hidden_states.shape[:-1], -1)), None


class ScaledQuery(Attention):
    def turned(self, states: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        return 1.1 * super().turned(states, cosines, sines)


class Interleaved(Attention):
    def turned(self, states: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        pairs = torch.stack([-states[..., 1::2], states[..., ::2]], -1).flatten(-2)
        return states * cosines[:, None] + pairs * sines[:, None]


class Backwards(Attention):
    def turned(self, states: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        return super().turned(states, cosines, -sines)


class WithoutPositions(Attention):
    def turned(self, states: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        return states


class SinkAttention(Attention):
    """Sinks that the first layer's keywords would carry into all layers."""

    def __init__(self) -> None:
        super().__init__()
        self.sinks = nn.Parameter(torch.zeros(HEADS))


class GatedOutput(Attention):
    """Queries and a gate in one layer, as in Qwen3-Next: twice as wide."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(WIDTH, 2 * WIDTH)

    def heads(self, states: Tensor) -> list[Tensor]:
        query, *others = super().heads(states)
        self.gate = query[:, HEADS:]
        return [query[:, :HEADS], *others]


class CalledOtherwise(Attention):
    def forward(self, states: Tensor, rotary: Any) -> tuple[Tensor, None]:  # type: ignore[override]
        return super().forward(states, rotary, None)


def test_a_plain_attention_layer_is_fused():
    attention = Attention()
    assert fused_kind(attention) is SelfAttention
    assert attention.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    "kind", [ScaledQuery, Interleaved, Backwards, WithoutPositions, SinkAttention, GatedOutput, CalledOtherwise]
)
def test_another_attention_layer_is_left_alone(kind):
    assert fused_kind(kind()) is kind


def test_layers_with_and_without_a_window_get_each_its_own_keyword(make_family):
    policy = load_family(make_family("gemma3"), "gemma3")
    keywords = [module.keywords for module in policy.decoder.modules() if isinstance(module, SelfAttention)]
    assert [each["sliding_window"] for each in keywords] == [7, None]
    assert all("dropout" not in each for each in keywords)


def test_fusing_touches_neither_random_numbers_nor_the_registry_nor_the_config(make_family):
    policy = load_family(make_family("qwen3"), "qwen3", dropout=0.5)
    names, config = list(ALL_ATTENTION_FUNCTIONS), policy.plain_model.config.to_dict()
    used, state = policy.plain_model.config._attn_implementation, torch.get_rng_state()
    modes = [module.training for module in policy.model.modules()]
    for layer in policy.decoder.layers:
        layer.mlp, layer.self_attn = layer.mlp._own[0], layer.self_attn._own[0]
    fuse_layers(policy.decoder, policy.dtype, policy.autocast)
    assert num_fused(policy)[:2] == (2, 2)
    assert torch.equal(torch.get_rng_state(), state)
    assert list(ALL_ATTENTION_FUNCTIONS) == names
    assert RECORDED not in names
    assert policy.plain_model.config.to_dict() == config
    assert policy.plain_model.config._attn_implementation == used
    assert [module.training for module in policy.model.modules()] == modes
    assert all(parameter.grad is None for parameter in policy.model.parameters())


def test_float32_positions_leave_the_states_in_16_bits():
    states = torch.randn(1, 5, 2, 8).bfloat16().requires_grad_()
    positions = [torch.randn(1, 5, 8) for _ in range(2)]
    rotated = _Rotated.apply(states, *positions)
    rotated.sum().backward()
    assert (rotated.dtype, states.grad.dtype) == (torch.bfloat16, torch.bfloat16)


def test_a_family_with_float32_positions_trains_in_bf16(make_family):
    policy = load_family(make_family("olmo"), "olmo", "bf16")
    assert policy.shares_prompts
    assert outcome(policy, make_batch())["values"].isfinite().all()
