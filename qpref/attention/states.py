"""Layers with a state over a packed stream: each prompt is computed once, its branches from the state at its end.

transformers gives a layer of linear attention, of a state space or of a short convolution its state as a cache, and
takes the new one from it. A cache that keeps the graph makes branches a function of their prompt, with exact gradients,
by the family's own code. Attention and all that computes tokens apart see the stream as ever.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

from qpref.attention.layout import current
from qpref.attention.prompts import States
from qpref.dropout import drawing_selected

CACHE = "cache"
"""The parameter through which a layer gets its state, since transformers 5.21."""
TRIED_TOKENS = 3
UNSUITABLE = (TypeError, ValueError, RuntimeError, AttributeError, LookupError)
"""What layers raise that are called in another way than one with a state and nothing else."""


class StateCache:
    """Stands in for transformers' Cache in one layer's call: holds its states with their graph, and never in place."""

    def __init__(self, start: States | None = None) -> None:
        self.states: dict[tuple[str, int], Tensor] = dict(start or {})

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return self.states.get(("conv", state_idx))

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return self.states.get(("recurrent", state_idx))

    def update_conv_state(
        self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, conv_kernel_size: int | None = None
    ) -> Tensor:
        """Return a convolution's inputs [batch, width, time] with those before them, of which the last are kept."""
        before = self.get_conv_state(layer_idx, state_idx)
        whole = conv_states if before is None else torch.cat([before, conv_states], dim=-1)
        kept = whole.shape[-1] if conv_kernel_size is None else conv_kernel_size
        whole = nn.functional.pad(whole, (max(0, kept - whole.shape[-1]), 0))
        self.states["conv", state_idx] = whole[..., -kept:]
        return whole

    def update_recurrent_state(self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0) -> Tensor:
        self.states["recurrent", state_idx] = recurrent_states
        return recurrent_states

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return bool(self.states)

    def is_recording_past(self, layer_idx: int) -> bool:
        return False


class ForkedLayer(nn.Module):
    """A family's layer with a state, whose pass over a packed stream computes the prompts first and then their
    branches. Whole rows are computed as ever."""

    def __init__(self, own: nn.Module) -> None:
        super().__init__()
        # The same dicts: a child or a weight that is replaced is so in both.
        self._modules, self._parameters, self._buffers = own._modules, own._parameters, own._buffers
        self._own = (own,)  # in a tuple, so that its layers have one name alone
        self.layer_idx = getattr(own, "layer_idx", None)
        self.training = own.training

    def train(self, mode: bool = True) -> ForkedLayer:
        self._own[0].training = mode
        return super().train(mode)

    def forward(self, *args: Any, **call: Any) -> Tensor:
        layout, own = current(), self._own[0]
        if layout is None:
            return cast(Tensor, own(*args, **call))
        stream: Tensor = (args[0] if args else call["hidden_states"])[0]
        fork = layout.fork(stream.device)
        outputs, finals = [], []
        for indices in fork.prompts:
            cache = StateCache()
            with drawing_selected(indices):
                outputs.append(own(stream[indices], cache=cache).flatten(0, 1))
            finals.append(cache.states)
        names = finals[0] if finals else {}
        ends: States = {name: torch.cat([final[name] for final in finals]) for name in names}
        if layout.prompts is not None:
            ends = layout.prompts.ends(own, ends)
        for indices, origins in zip(fork.branches, fork.origins, strict=True):
            start = {name: state.index_select(0, origins) for name, state in ends.items()}
            with drawing_selected(indices):
                outputs.append(own(stream[indices], cache=StateCache(start)).flatten(0, 1))
        return torch.cat(outputs).index_select(0, fork.order)[None]


def fork_layers(decoder: Any) -> None:
    """Replace every layer of a text decoder that keeps a state and can continue from one by a forked one."""
    for name, own, continues in layers_with_state(decoder):
        if continues:
            parent, _, last = name.rpartition(".")
            setattr(decoder.get_submodule(parent), last, ForkedLayer(own))


def layers_with_state(decoder: Any) -> Iterator[tuple[str, nn.Module, bool]]:
    """Find the innermost layers of a text decoder that keep a state in the cache that they are called with.

    A call of a few tokens tells, on the meta device too. Each class is tried once.

    Yields:
        Name within the decoder, layer, and whether it continues from a given state.
    """
    tried: dict[type, bool | None] = {}
    found: list[str] = []
    for name, module in reversed(list(decoder.named_modules())):
        if not name or CACHE not in inspect.signature(module.forward).parameters:
            continue
        if any(inner.startswith(f"{name}.") for inner in found):
            continue
        if type(module) not in tried:
            tried[type(module)] = _continues(module, decoder)
        if (continues := tried[type(module)]) is not None:
            found.append(name)
            yield name, module, continues


def _continues(own: nn.Module, decoder: Any) -> bool | None:
    """Return whether a layer's output depends on every state that it starts from, and its states on its input, as
    autograd sees it; None for a layer without a state."""
    weight = next(own.parameters())
    width = decoder.config.get_text_config().hidden_size
    was_training = own.training
    own.eval()  # dropout would draw from torch's generator
    try:
        with torch.enable_grad(), _autocast(weight.device, decoder.dtype):
            inputs = torch.ones(1, TRIED_TOKENS, width, dtype=decoder.dtype, device=weight.device, requires_grad=True)
            first = StateCache()
            own(inputs, cache=first)
            start = {name: state.detach().requires_grad_() for name, state in first.states.items()}
            output = own(inputs.detach(), cache=StateCache(start))
            if not start or not isinstance(output, Tensor):
                return None
            reached = torch.autograd.grad(output.float().sum(), list(start.values()), allow_unused=True)
    except UNSUITABLE:
        return None
    finally:
        own.train(was_training)
    return all(each is not None for each in reached) and all(each.requires_grad for each in first.states.values())


def _autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    if device.type == "meta" or dtype == torch.float32:
        return nullcontext()
    return torch.autocast(device.type, dtype=dtype)
