"""Self-attention of one packed stream: queries, keys and values as one autograd function, rotary positions as another.

Only a layer of linear layers, norms of heads and rotary positions (Su et al. 2021, "RoFormer") is covered; the keywords
that the family's own code gives to transformers' attention registry are recorded from it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qpref.attention.layout import Layout, current, laid_out
from qpref.attention.register import HARMLESS_KEYWORDS
from qpref.policy.lora import project, projections_of

RECORDED = "qpref_recorded"
"""Name of `recorded_attention` in transformers' registry, while it is in use."""


class _Rotated(torch.autograd.Function):
    """states [1, T, heads, width], cosines and sines [1, T, width] -> the states rotated by their positions.

    Some families (OLMo) keep cosines and sines in float32; the result has the states' dtype in any case.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        ctx.save_for_backward(cosines, sines)
        first, second = sines[:, :, None].chunk(2, -1)
        return _turned(states, cosines, first, second, 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        cosines, sines = ctx.saved_tensors
        first, second = sines[:, :, None].chunk(2, -1)
        return _turned(gradients[0], cosines, second, first, -1), None, None


def _turned(states: Tensor, cosines: Tensor, first: Tensor, second: Tensor, sign: int) -> Tensor:
    """Compute x1 cos1 - sign * x2 first and x2 cos2 + sign * x1 second of the states' halves x1 and x2, each product
    rounded before the sum as in transformers' own code, whose bits these are."""
    turned = states * cosines[:, :, None]
    (turned1, turned2), (states1, states2) = turned.chunk(2, -1), states.chunk(2, -1)
    turned1.sub_(states2 * first, alpha=sign)
    turned2.add_(states1 * second, alpha=sign)
    return turned.to(states.dtype)


class SelfAttention(nn.Module):
    """A family's attention layer with another forward pass over packed streams, which falls back to the family's for
    anything else: rows with a mask, a cache, a layer that isn't covered."""

    LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj")
    NORMS = ("q_norm", "k_norm")

    def __init__(self, own: Any, keywords: dict[str, Any]) -> None:
        super().__init__()
        self._modules = own._modules  # the same dict: a child that is replaced is so in both
        self._own, self.keywords = (own,), keywords  # in a tuple, so that its layers have one name alone
        self.training = own.training

    def train(self, mode: bool = True) -> SelfAttention:
        self._own[0].training = mode
        return super().train(mode)

    def forward(self, *args: Any, **call: Any) -> tuple[Tensor, Tensor | None]:
        layers, own = cast(Any, self), self._own[0]
        states = call.get("hidden_states")
        covered = None
        if not args and states is not None and self._is_covered(states, call):
            covered = projections_of([layers.q_proj, layers.k_proj, layers.v_proj], states)
        if covered is None or states is None:
            result: tuple[Tensor, Tensor | None] = own(*args, **call)
            return result
        heads = project(states, covered)
        query, key, value = (each.view(*each.shape[:-1], -1, own.head_dim) for each in heads)
        if hasattr(self, "q_norm"):
            query, key = layers.q_norm(query), layers.k_norm(key)
        cosines, sines = call["position_embeddings"]
        query, key = (_Rotated.apply(each, cosines, sines) for each in (query, key))  # type: ignore[no-untyped-call]
        attend = ALL_ATTENTION_FUNCTIONS[own.config._attn_implementation]
        streams = (each.transpose(1, 2) for each in (query, key, value))
        attended, weights = attend(own, *streams, None, **self.keywords)
        return layers.o_proj(attended.reshape(*states.shape[:-1], -1)), weights

    def _is_covered(self, states: Tensor, call: dict[str, Any]) -> bool:
        """Return whether the layer is called for a packed stream and for nothing else, with positions for all of a
        head's width (some families rotate a part of it)."""
        known = HARMLESS_KEYWORDS | {"hidden_states", "position_embeddings"}
        is_stream = (
            len(states) == 1 and current() is not None and all(call[name] is None for name in call.keys() - known)
        )
        positions, width = call.get("position_embeddings"), self._own[0].head_dim
        is_whole = isinstance(positions, tuple) and all(each.shape[-1] == width for each in positions)
        return is_stream and is_whole and not self._drops

    @property
    def _drops(self) -> bool:
        """True where attention weights are dropped, which only the family's own code passes on."""
        return self.training and bool(getattr(self._own[0], "attention_dropout", 0.0))


def trial_call(module: Any, states: Tensor, width: int) -> Tensor:
    """Call an attention layer, the family's or the fused one, on a stream of states [1, T, hidden] with random rotary
    positions of a width.

    The layer's config has to name RECORDED as its attention.
    """
    random = torch.Generator().manual_seed(0)
    positions = [torch.randn(1, states.shape[1], width, generator=random).to(states) for _ in range(2)]
    with laid_out(Layout(())):
        result: tuple[Tensor, Any] = module(
            hidden_states=states, position_embeddings=tuple(positions), attention_mask=None
        )
    return result[0]


@contextmanager
def recorded_attention(config: Any) -> Iterator[dict[str, Any]]:
    """Have layers with this config call a function that records its keywords, but for the dropout,
    and adds each head's query, key and value instead of attending."""
    recorded: dict[str, Any] = {}

    def mixed(_: Any, query: Tensor, key: Tensor, value: Tensor, *mask: Any, **keywords: Any) -> tuple[Tensor, None]:
        recorded.update((name, each) for name, each in keywords.items() if name != "dropout")
        repeats = query.shape[1] // key.shape[1]
        heads = query + key.repeat_interleave(repeats, 1) + value.repeat_interleave(repeats, 1)
        return heads.transpose(1, 2).contiguous(), None

    ALL_ATTENTION_FUNCTIONS[RECORDED] = mixed
    before, config._attn_implementation = config._attn_implementation, RECORDED
    try:
        yield recorded
    finally:
        config._attn_implementation = before
        del ALL_ATTENTION_FUNCTIONS[RECORDED]
