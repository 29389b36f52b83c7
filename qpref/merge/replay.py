"""Hidden states of chosen rows in float32, with one decoder layer in float32 at a time.

16-bit arithmetic moves a margin by up to a nat by itself, so both sides of a comparison are computed in float32; a
model of 8 billion weights would take 32 GB that way. So weights stay as they are stored, mapped from their files where
torch can, and a layer's are widened when the forward pass comes to it and dropped when it leaves: memory is one layer
in float32, the embeddings of the tokens that occur, and one batch's activations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qpref.policy.head import Head

BATCH_TOKENS = 4096
"""Tokens that are computed at a time, padding included."""
TILE_WIDTH = 4096
"""Tokens of the vocabulary whose logits exist at a time."""


class Widen(Protocol):
    """Makes stored weights what is computed with."""

    def __call__(self, name: str, stored: Tensor, rows: slice = ...) -> Tensor:
        """Some rows of the parameter `name`, all by default, in float32 on the device."""


@dataclass(frozen=True, slots=True)
class ScoredRow:
    """A prompt and one response to it, as token ids."""

    prompt: tuple[int, ...]
    response: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Hidden:
    """What a model makes of the rows.

    Attributes:
        states: [S, width] float32 on the CPU, where each response token is predicted, row after row.
        head: the output head.
        head_rows: rows of its weight in float32, which is a whole vocabulary and never there at once.
        largest: of all values that go in or out of a linear layer or a decoder layer, in absolute value.
    """

    states: Tensor
    head: Head
    head_rows: Callable[[slice], Tensor]
    largest: float

    def columns(self) -> Iterator[slice]:
        """Slices of the vocabulary whose weights and logits exist at a time."""
        return (slice(start, start + TILE_WIDTH) for start in range(0, self.head.weight.shape[0], TILE_WIDTH))

    def logits(self, positions: slice, columns: slice, device: torch.device) -> Tensor:
        """[positions, columns] computed in float32, given in float64."""
        states, weight = self.states[positions].to(device), self.head_rows(columns)
        bias = None if self.head.bias is None else self.head.bias[columns].to(device).float()
        part = replace(self.head, weight=weight, bias=bias)
        return part.logits(states, 0, len(weight)).double()


@torch.no_grad()
def replay(model: Any, rows: Sequence[ScoredRow], to_float32: Widen, device: torch.device) -> Hidden:
    """Compute the rows under a causal language model that lies on the CPU in its stored types.

    Rows are computed in batches of like length, padded on the right, under the model's own attention.
    """
    lengths = [len(row.prompt) + len(row.response) - 1 for row in rows]
    order = sorted(range(len(rows)), key=lengths.__getitem__)
    states: list[Tensor] = [torch.empty(0)] * len(rows)
    with _one_layer_at_a_time(model, to_float32, device, _tokens(rows)) as largest:
        for batch in _batches(order, lengths):
            ids = [torch.tensor([*rows[place].prompt, *rows[place].response[:-1]]) for place in batch]
            padded = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=int(ids[0][0])).to(device)
            hidden = model.get_decoder()(input_ids=padded, use_cache=False).last_hidden_state
            for number, place in enumerate(batch):
                scored = slice(len(rows[place].prompt) - 1, lengths[place])
                states[place] = hidden[number, scored].cpu()
    head = Head.of(model)
    name = next(name for name, value in model.named_parameters() if value is head.weight)
    return Hidden(torch.cat(states), head, lambda rows: to_float32(name, head.weight, rows), largest[0])


def _tokens(rows: Sequence[ScoredRow]) -> Tensor:
    return torch.tensor(sorted({token for row in rows for token in (*row.prompt, *row.response)}))


def _batches(order: Sequence[int], lengths: Sequence[int]) -> Iterator[list[int]]:
    """Places in groups whose longest row times their number stays within `BATCH_TOKENS`; each has one at least."""
    batch: list[int] = []
    for place in order:  # the longest comes last
        if batch and lengths[place] * (len(batch) + 1) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(place)
    yield batch


@contextmanager
def _one_layer_at_a_time(model: Any, to_float32: Widen, device: torch.device, tokens: Tensor) -> Iterator[list[float]]:
    """Widen each decoder layer while it computes; what stands outside the layers is widened for the whole time.

    Yields the largest activation so far, a list of one.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    decoder, embeddings = model.get_decoder(), model.get_input_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    layers = [module for module in decoder.modules() if isinstance(module, GradientCheckpointingLayer)]
    inside = {id(part) for layer in layers for part in layer.modules()}
    outside = [part for part in decoder.modules() if id(part) not in inside and part is not embeddings]
    largest = [0.0]

    def note(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        for value in (*inputs, *(output if isinstance(output, tuple) else (output,))):
            if isinstance(value, Tensor) and value.is_floating_point() and value.numel():
                low, high = value.aminmax()
                largest[0] = max(largest[0], -float(low), float(high))

    def widen_embeddings(name: str, stored: Tensor, rows: slice = slice(None)) -> Tensor:
        return to_float32(name, stored[tokens][rows])

    def to_places(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return torch.searchsorted(tokens.to(inputs[0].device), inputs[0]), *inputs[1:]

    lasting = [
        _Widened(outside, names, to_float32, device),
        _Widened([embeddings], names, widen_embeddings, device),
    ]
    passing = [_Widened(list(layer.modules()), names, to_float32, device) for layer in layers]
    hooks: list[Any] = [embeddings.register_forward_pre_hook(to_places)]
    watched = [part for part in decoder.modules() if isinstance(part, nn.Linear)] + layers
    hooks += [part.register_forward_hook(note) for part in watched]
    for layer, part in zip(layers, passing, strict=True):
        hooks += [layer.register_forward_pre_hook(part.enter), layer.register_forward_hook(part.leave)]
    # It stops gradients alone, and may lie beyond the rows that are kept.
    padding, embeddings.padding_idx = getattr(embeddings, "padding_idx", None), None
    try:
        for part in lasting:
            part.enter()
        yield largest
    finally:
        embeddings.padding_idx = padding
        for hook in hooks:
            hook.remove()
        for part in (*lasting, *passing):
            part.leave()


class _Widened:
    """The own parameters and buffers of some modules, as they are stored or widened."""

    def __init__(
        self, modules: list[nn.Module], names: dict[int, str], to_float32: Widen, device: torch.device
    ) -> None:
        self._modules, self._names, self._widen, self._device = modules, names, to_float32, device
        self._stored: list[tuple[dict[str, Any], str, Tensor]] = []

    def enter(self, *hook: object) -> None:
        for module in self._modules:
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    wide = self._widen(f"{self._names[id(module)]}.{name}", parameter)
                    self._replace(module._parameters, name, nn.Parameter(wide, requires_grad=False))
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
