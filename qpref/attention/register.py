"""Exact attention over a packed stream: each branch sees its prompt and itself, never a sibling or another group.

Registered with transformers' attention registry, so no model is patched; the stream's layout reaches the function as
context (see `layout`). It makes no [T, T] mask, which would be nearly empty, but attends segment by segment
(see `segments`), with the keys and values of the prompt gathered before those of the branch: on a GPU in one call for
all (see `varlen`), on a CPU with bf16 units in plain products (see `blocks`), elsewhere in a call each (see `sdpa`).
Layers with capped scores or with sinks are computed by their formula on every path (see `plain`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qpref.attention import blocks, plain, sdpa, varlen
from qpref.attention.errors import CannotShareError as CannotShareError
from qpref.attention.exact import AttentionCall, attention_and_gradients
from qpref.attention.layout import current
from qpref.attention.states import layers_with_state
from qpref.records import Group

SEGMENTS = "qpref_segments"
"""The path that works everywhere: a call of torch's scaled dot product for each segment."""
BLOCKS = "qpref_blocks"
"""The path for CPUs with bf16 units."""
KERNELS: dict[str, varlen.Kernel] = {
    "qpref_varlen_torch": varlen.torch_kernel,
    "qpref_varlen_fa2": varlen.flash_attn_kernel,
}
"""The paths for GPUs, the preferred one first. transformers treats a name with "flash" in it as its own."""
COMPARED = "qpref_compared"
"""The path that computes in float32 and records the error of another path in each layer."""

ROUNDING_FACTOR, ROUNDING_FLOOR = 2.0, 0.01
"""Multiple of the formulas' own rounding error that a kernel's relative error may be, and a share beside it."""
SHARED_KINDS = frozenset({"full_attention", "sliding_attention", "attention", "moe", "mlp"})
"""Kinds of layers, in configs, whose only company is what attention sees."""
PLAIN_KEYWORDS = ("softcap", "s_aux")
"""Keywords of layers whose scores no kernel computes."""
HARMLESS_KEYWORDS = frozenset(
    {"position_ids", "use_cache", "cache_position", "output_attentions", "output_hidden_states", "return_dict"}
)


Attend = Callable[[Tensor, Tensor, Tensor, Sequence[Group], float | None, int | None], Tensor]
"""query [1, heads, T, width], key and value [1, key-value heads, T, width], groups, scale, window -> [1, T, heads,
width]."""


def register() -> None:
    """Register the attention with transformers, under a name for each path; repeated calls are harmless."""
    paths: dict[str, Attend | None] = {SEGMENTS: None, BLOCKS: blocks.attend}
    paths |= {name: partial(varlen.attend, kernel) for name, kernel in KERNELS.items()}
    for name, attend in paths.items():
        ALL_ATTENTION_FUNCTIONS.register(name, partial(shared_prompt_attention, attend=attend))


@dataclass(frozen=True, slots=True)
class KernelError:
    """Relative Euclidean errors of a layer's result or of one gradient.

    Attributes:
        kernel: of the path.
        rounding: of the formulas with a 16-bit kernel's rounding, see `exact`.
    """

    kernel: float
    rounding: float

    @property
    def is_rounding(self) -> bool:
        """True where rounding explains the kernel's error; no single limit on that would do, see `exact`."""
        return self.kernel <= ROUNDING_FACTOR * self.rounding + ROUNDING_FLOOR


def register_comparison(path: str) -> list[KernelError]:
    """Register COMPARED for a path and return its errors against float32, filled as layers are computed.

    Each layer that a kernel computes adds four, on its own queries, keys and values: that of the result and those of
    the three gradients. One layer's copies are in memory at a time.
    """
    errors: list[KernelError] = []
    tried = ALL_ATTENTION_FUNCTIONS[path]

    def compared(module: Any, *states: Tensor, **keywords: Any) -> tuple[Tensor, None]:
        if any(keywords.get(name) is not None for name in PLAIN_KEYWORDS):
            result: tuple[Tensor, None] = tried(module, *states, **keywords)
            return result  # in float32 itself, by no kernel
        found, direction = _with_gradients(tried, module, *states, **keywords)
        query, key, value = (each.detach() for each in states[:3])
        scale = keywords.get("scaling") or query.shape[-1] ** -0.5
        layout = current()
        assert layout is not None
        call = AttentionCall(query=query, key=key, value=value, groups=layout.groups, scale=scale,
                             window=keywords.get("sliding_window"), direction=direction)  # fmt: skip
        with torch.autocast(query.device.type, enabled=False):  # it would compute in 16 bits
            exact, rounded = attention_and_gradients(call)
        for kernel, rounding, right in zip(found, rounded, exact, strict=True):
            errors.append(KernelError(_relative(kernel, right), _relative(rounding, right)))
        return exact[0].to(query.dtype).contiguous(), None

    ALL_ATTENTION_FUNCTIONS.register(COMPARED, compared)
    return errors


def _relative(found: Tensor, exact: Tensor) -> float:
    size = exact.norm().clamp_min(1e-30)  # a lone key has no gradient
    return float((found.float() - exact).norm() / size)


def _with_gradients(
    attend: Callable[..., Any], module: Any, *call: Any, **keywords: Any
) -> tuple[list[Tensor], Tensor]:
    """Compute attention, and the gradients of queries, keys and values for a fixed random gradient of its result, which
    is returned after them."""
    states = [each.detach().requires_grad_() for each in call[:3]]
    with torch.enable_grad():
        result, _ = attend(module, *states, *call[3:], **keywords)
    direction = torch.randn(result.shape, generator=torch.Generator().manual_seed(0)).to(result)
    with torch.autocast(result.device.type, enabled=False):  # as in training
        return [result.detach(), *torch.autograd.grad(result, states, direction)], direction


def sharing_paths(device: torch.device, dtype: torch.dtype) -> tuple[str, ...]:
    """Name the paths that may work here, the fastest first. The first batch of a run decides which do."""
    if device.type == "cpu" and dtype == torch.bfloat16 and blocks.has_bf16_units():
        return BLOCKS, SEGMENTS
    if device.type != "cuda" or dtype == torch.float32:
        return (SEGMENTS,)
    return (
        *(name for name in KERNELS if KERNELS[name] is not varlen.flash_attn_kernel or find_spec("flash_attn")),
        SEGMENTS,
    )


def reasons_against_sharing(model: PreTrainedModel) -> list[str]:
    """List reasons in a model's code and config against sharing prompts; it may be on the meta device.

    The first batch of every run is compared as well.
    """
    reasons = []
    if not model._can_set_attn_implementation():
        reasons.append("its attention cannot be replaced")
    layers = [(layer, continues) for _, layer, continues in layers_with_state(model)]
    if fixed := {type(layer).__name__ for layer, continues in layers if not continues}:
        reasons.append(f"{', '.join(sorted(fixed))} can't continue from the state at a prompt's end")
    forked = {getattr(layer, "layer_idx", None) for layer, _ in layers}
    config = model.config.get_text_config()
    # Some configs of transformers before 5.23 have the older name.
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or []
    unknown = {kind for index, kind in enumerate(kinds) if index not in forked} - SHARED_KINDS
    if unknown:
        reasons.append(f"it has layers of the kind {', '.join(sorted(unknown))}")
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
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    attend: Attend | None = None,
    **keywords: Any,
) -> tuple[Tensor, None]:
    """Compute attention over one stream, with the signature of transformers' registry.

    Args:
        module: the calling attention layer.
        query: [1, heads, T, width].
        key, value: [1, key-value heads, T, width].
        attention_mask: ignored; transformers makes none for this function.
        scaling: factor on query times key; 1 / sqrt(width) where None.
        dropout: on the attention weights.
        sliding_window: positions that a token sees, itself included; None for all before it.
        is_causal: the model's own value, or None.
        softcap, s_aux: a cap on the scores and sinks, see `plain`.
        attend: computes all segments; None for `sdpa`, which alone can drop attention weights.
        keywords: any that isn't known to be harmless is refused.

    Returns:
        [1, T, heads, width] and no weights.

    Raises:
        CannotShareError: a keyword changes attention in an unsupported way (a bias), or the layer drops attention
            weights, which this path can't do.
    """
    _refuse_the_unknown(module, keywords, is_causal, sliding_window)
    layout = current()
    assert layout is not None
    groups, prompts = layout.groups, layout.prompts
    if softcap is not None or s_aux is not None:
        attend = partial(plain.attend, softcap=softcap, sinks=s_aux)
    elif attend is None:
        attend, dropout = partial(sdpa.attend, dropout=dropout), 0.0
    if dropout:
        raise CannotShareError("its attention has dropout")
    if prompts is None:
        return attend(query, key, value, groups, scaling, sliding_window), None
    states = prompts.complete(module, query, key, value)
    return prompts.own_rows(attend(*states, groups, scaling, sliding_window)), None


def _refuse_the_unknown(
    module: Any,
    keywords: dict[str, Any],
    is_causal: bool | None,
    sliding_window: int | None,
) -> None:
    unknown = [name for name, value in keywords.items() if value is not None and name not in HARMLESS_KEYWORDS]
    if unknown:
        raise CannotShareError(f"its attention uses {', '.join(sorted(unknown))}")
    if is_causal is False or getattr(module, "is_causal", True) is False:
        raise CannotShareError("its attention is not causal")
    kinds = getattr(module.config, "layer_types", None)
    if kinds and kinds[module.layer_idx] == "sliding_attention" and sliding_window is None:
        raise CannotShareError("its sliding window is in the mask alone")
