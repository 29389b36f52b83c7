"""Exact attention over a packed stream: each branch sees its prompt and itself, never a sibling or another group.

Registered with transformers' attention registry, so no model is patched; the stream's layout reaches the function as a
keyword through the decoder layers. No mask is made for it (a [T, T] one would cost more than it says): the function
attends segment by segment (see `segments`), with the keys and values of the prompt gathered before those of the
branch: on a GPU all in one call (see `varlen`), on a CPU with bf16 units in plain products (see `blocks`), elsewhere
one call each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qpref.attention import blocks, varlen
from qpref.attention.segments import Segment, segments
from qpref.records import Group

SEGMENTS = "qpref_segments"
"""The path that works everywhere: one call of torch's scaled dot product for each segment."""
BLOCKS = "qpref_blocks"
"""The path for CPUs with bf16 units."""
KERNELS: dict[str, varlen.Kernel] = {
    "qpref_varlen_torch": varlen.torch_kernel,
    "qpref_varlen_fa2": varlen.flash_attn_kernel,
}
"""The paths for GPUs, the preferred one first. transformers takes a name with "flash" in it for one of its own."""
COMPARED = "qpref_compared"
"""The path that computes as SEGMENTS, and notes how far another one is off in each layer."""
LAYOUT = "qpref_groups"
"""The keyword that carries the layout through the model."""

HARMLESS_KEYWORDS = frozenset(
    {"position_ids", "use_cache", "cache_position", "output_attentions", "output_hidden_states", "return_dict"}
)


Attend = Callable[[Tensor, Tensor, Tensor, Sequence[Group], float | None, int | None], Tensor]
"""query [1, heads, T, width], key and value [1, key-value heads, T, width], groups, scale, window -> [1, T, heads,
width]."""


class CannotShareError(Exception):
    """This model's attention does something that sharing a prompt would get wrong. The text says what."""


def register() -> None:
    """Make the attention known to transformers, under a name for each path; again is harmless."""
    paths: dict[str, Attend | None] = {SEGMENTS: None, BLOCKS: blocks.attend}
    paths |= {name: partial(varlen.attend, kernel) for name, kernel in KERNELS.items()}
    for name, attend in paths.items():
        ALL_ATTENTION_FUNCTIONS.register(name, partial(shared_prompt_attention, attend=attend))


def register_comparison(path: str) -> list[float]:
    """Register COMPARED for a path. Each layer that it computes adds how far the path is off there, on that layer's own
    queries, keys and values: the relative differences of its result and of its three gradients, Euclidean."""
    apart: list[float] = []
    tried, plain = (ALL_ATTENTION_FUNCTIONS[name] for name in (path, SEGMENTS))

    def compared(module: Any, *call: Any, **keywords: Any) -> tuple[Tensor, None]:
        found, expected = (_with_gradients(attend, module, *call, **keywords) for attend in (tried, plain))
        pairs = zip(found, expected, strict=True)
        for one, other in pairs:
            size = other.float().norm().clamp_min(1e-30)  # a lone key has no gradient
            apart.append(((one.float() - other.float()).norm() / size).item())
        return expected[0], None

    ALL_ATTENTION_FUNCTIONS.register(COMPARED, compared)
    return apart


def _with_gradients(attend: Callable[..., Any], module: Any, *call: Any, **keywords: Any) -> list[Tensor]:
    """Attention's result, and the gradients of queries, keys and values of a fixed random direction of it."""
    states = [each.detach().requires_grad_() for each in call[:3]]
    with torch.enable_grad():
        result, _ = attend(module, *states, *call[3:], **keywords)
    direction = torch.randn(result.shape, generator=torch.Generator().manual_seed(0)).to(result)
    with torch.autocast(result.device.type, enabled=False):  # as in training
        return [result.detach(), *torch.autograd.grad(result, states, direction)]


def sharing_paths(device: torch.device, dtype: torch.dtype) -> tuple[str, ...]:
    """Names of the paths that may work here, the fastest first. The first batch of a run says which do."""
    if device.type == "cpu" and dtype == torch.bfloat16 and blocks.has_bf16_units():
        return BLOCKS, SEGMENTS
    if device.type != "cuda" or dtype == torch.float32:
        return (SEGMENTS,)
    return (
        *(name for name in KERNELS if KERNELS[name] is not varlen.flash_attn_kernel or find_spec("flash_attn")),
        SEGMENTS,
    )


def reasons_against_sharing(model: PreTrainedModel) -> list[str]:
    """What can be told from the config alone. The first batch of every run is compared besides."""
    config = model.config.get_text_config()
    reasons = []
    if not model._supports_attention_backend:
        reasons.append("its attention cannot be exchanged")
    # Some configs of transformers before 5.23 have the older name.
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or []
    strange = set(kinds) - {"full_attention", "sliding_attention", "attention"}
    if strange:
        reasons.append(f"it has layers of the kind {', '.join(sorted(strange))}")
    return reasons


def shared_prompt_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    attend: Attend | None = None,
    **keywords: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it, over one stream.

    Args:
        module: the attention layer that calls.
        query: [1, heads, T, width].
        key, value: [1, key-value heads, T, width].
        attention_mask: not used; transformers makes none for this function.
        scaling: factor on query times key; 1 / sqrt(width) where None.
        dropout: on the attention weights.
        sliding_window: positions that a token sees, itself included; None for all before it.
        is_causal: None, or what the model says of itself.
        attend: computes all segments; None for a call of torch's scaled dot product for each.
        keywords: must hold the layout; anything that isn't known to be harmless is refused.

    Returns:
        [1, T, heads, width] and no weights.

    Raises:
        CannotShareError: a keyword that changes attention in a way unknown here (a cap, sinks, a bias).
    """
    groups: Sequence[Group] | None = keywords.pop(LAYOUT, None)
    _refuse_the_unknown(module, keywords, groups, is_causal, sliding_window)
    assert groups is not None
    if attend is not None:
        if dropout:
            raise CannotShareError("its attention has dropout")
        return attend(query, key, value, groups, scaling, sliding_window), None
    return _attend_by_stretch(query, key, value, groups, scaling, dropout, sliding_window), None


def _attend_by_stretch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    groups: Sequence[Group],
    scaling: float | None,
    dropout: float,
    sliding_window: int | None,
) -> Tensor:
    """[1, T, heads, width]: one call of torch's fused kernel for each segment of the stream."""
    dtype = query.dtype
    query, key, value = (_widened(states) for states in (query, key, value))
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)

    def attend(segment: Segment) -> Tensor:
        # A mask only where the plain causal triangle isn't the answer.
        ends = [key[:, :, span] for span in segment.spans], [value[:, :, span] for span in segment.spans]
        k, v = (parts[0] if len(parts) == 1 else torch.cat(parts, dim=2) for parts in ends)
        q = query[:, :, segment.queries]
        plain = k.shape[2] == q.shape[2] and (sliding_window is None or sliding_window >= k.shape[2])
        mask = None if plain else _causal_mask(q.shape[2], k.shape[2], sliding_window, q.device)
        with torch.autocast("cpu", enabled=False):  # it would narrow again what was widened
            return scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=plain, scale=scaling
            )

    outputs = torch.cat([attend(segment) for segment in segments(groups)], dim=2)
    return outputs.transpose(1, 2).to(dtype).contiguous()


def _widened(states: Tensor) -> Tensor:
    """bf16 as float32 on a CPU: its bf16 kernel compiles code for every new pair of lengths and keeps it, 1.7 MB each,
    and is no faster below 1,000 tokens (torch 2.13)."""
    return states.float() if states.device.type == "cpu" and states.dtype == torch.bfloat16 else states


def _refuse_the_unknown(
    module: Any,
    keywords: dict[str, Any],
    groups: Sequence[Group] | None,
    is_causal: bool | None,
    sliding_window: int | None,
) -> None:
    if groups is None:
        raise CannotShareError("its layers don't pass keywords on to attention")
    unknown = [name for name, value in keywords.items() if value is not None and name not in HARMLESS_KEYWORDS]
    if unknown:
        raise CannotShareError(f"its attention uses {', '.join(sorted(unknown))}")
    if is_causal is False or getattr(module, "is_causal", True) is False:
        raise CannotShareError("its attention is not causal")
    kinds = getattr(module.config, "layer_types", None)
    if kinds and kinds[module.layer_idx] == "sliding_attention" and sliding_window is None:
        raise CannotShareError("its sliding window is in the mask alone")


@lru_cache(maxsize=64)
def _causal_mask(num_queries: int, num_keys: int, window: int | None, device: torch.device) -> Tensor:
    """[num_queries, num_keys], true where attended to: the queries are the last of the keys' positions."""
    query = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]
    key = torch.arange(num_keys, device=device)
    seen = key <= query
    return seen if window is None else seen & (query - key < window)
