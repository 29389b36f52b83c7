"""Run a model on the CPU in its stored dtypes with one decoder layer in float32 at a time, on the compute device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qpref.policy.architecture import text_decoder


class ToFloat32(Protocol):
    """Conversion of a stored parameter to the float32 values that the forward pass uses."""

    def __call__(self, name: str, stored: Tensor, rows: slice = ...) -> Tensor:
        """Convert rows of the parameter `name`, all by default, to float32 on the compute device."""


@contextmanager
def layers_in_float32(model: Any, to_float32: ToFloat32, device: torch.device, tokens: Tensor) -> Iterator[None]:
    """Convert each decoder layer to float32 while it computes, and the modules outside the layers throughout.

    Of the input embeddings only the rows of `tokens` are converted, so token ids are looked up among them.
    """
    decoder, embeddings = text_decoder(model), model.get_input_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    layers = _decoder_layers(model)
    in_layers = {id(part) for layer in layers for part in layer.modules()}
    outside = [part for part in decoder.modules() if id(part) not in in_layers and part is not embeddings]

    def embeddings_to_float32(name: str, stored: Tensor, rows: slice = slice(None)) -> Tensor:
        return to_float32(name, stored[tokens][rows])

    def to_compact_ids(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return torch.searchsorted(tokens.to(inputs[0].device), inputs[0]), *inputs[1:]

    throughout = [
        _Float32Swap(outside, names, to_float32, device),
        _Float32Swap([embeddings], names, embeddings_to_float32, device),
    ]
    per_layer = [_Float32Swap(list(layer.modules()), names, to_float32, device) for layer in layers]
    hooks: list[Any] = [embeddings.register_forward_pre_hook(to_compact_ids)]
    for layer, swap in zip(layers, per_layer, strict=True):
        hooks += [layer.register_forward_pre_hook(swap.enter), layer.register_forward_hook(swap.leave)]
    # The padding index only masks gradients, and may lie beyond the converted rows.
    padding, embeddings.padding_idx = getattr(embeddings, "padding_idx", None), None
    try:
        for swap in throughout:
            swap.enter()
        yield
    finally:
        embeddings.padding_idx = padding
        for hook in hooks:
            hook.remove()
        for swap in (*throughout, *per_layer):
            swap.leave()


class ActivationRange:
    """Context that records the largest absolute value entering or leaving a linear layer or a decoder layer."""

    def __init__(self, model: Any) -> None:
        self.largest = 0.0
        linear = [module for module in text_decoder(model).modules() if isinstance(module, nn.Linear)]
        self._modules = linear + _decoder_layers(model)
        self._hooks: list[Any] = []

    def __enter__(self) -> ActivationRange:
        self._hooks = [module.register_forward_hook(self._record) for module in self._modules]
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _record(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        for value in (*inputs, *(output if isinstance(output, tuple) else (output,))):
            if isinstance(value, Tensor) and value.is_floating_point() and value.numel():
                low, high = value.aminmax()
                self.largest = max(self.largest, -float(low), float(high))


class _Float32Swap:
    """Swap some modules' own parameters for float32 copies and their buffers to the device, and back."""

    def __init__(
        self, modules: list[nn.Module], names: dict[int, str], to_float32: ToFloat32, device: torch.device
    ) -> None:
        self._modules, self._names, self._to_float32, self._device = modules, names, to_float32, device
        self._stored: list[tuple[dict[str, Any], str, Tensor]] = []

    def enter(self, *hook: object) -> None:
        for module in self._modules:
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    converted = self._to_float32(f"{self._names[id(module)]}.{name}", parameter)
                    self._replace(module._parameters, name, nn.Parameter(converted, requires_grad=False))
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    self._replace(module._buffers, name, buffer.to(self._device))

    def leave(self, *hook: object) -> None:
        for slots, name, value in self._stored:
            slots[name] = value
        self._stored.clear()

    def _replace(self, slots: dict[str, Any], name: str, value: Tensor) -> None:
        self._stored.append((slots, name, slots[name]))
        slots[name] = value


def _decoder_layers(model: Any) -> list[nn.Module]:
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in text_decoder(model).modules() if isinstance(module, GradientCheckpointingLayer)]
