"""Replay rows through a model in float32, with one decoder layer in float32 at a time.

16-bit arithmetic alone moves a margin by up to a nat, so both sides of a comparison are computed in float32; a whole
8B model would take 32 GB that way. So weights stay in their stored dtype, memory-mapped where possible; each layer's
weights are converted to float32 when the forward pass enters it and dropped when it leaves. Peak memory is one layer in
float32, the embeddings of the tokens that occur, and one batch's activations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from qpref.merging.float32_layers import ActivationRange, ToFloat32, layers_in_float32
from qpref.policy.architecture import text_decoder
from qpref.policy.head import Head
from qpref.policy.rope import for_lengths, separate_lengths

BATCH_TOKENS = 4096
"""Tokens per batch, padding included."""
TILE_WIDTH = 4096
"""Tokens of the vocabulary whose logits are in memory at a time."""


@dataclass(frozen=True, slots=True)
class ScoredRow:
    """A prompt and one response to it, as token ids."""

    prompt: tuple[int, ...]
    response: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Hidden:
    """A model's last hidden states for the rows, and its output head.

    Attributes:
        states: [S, hidden_size] float32 on the CPU, at the positions that predict the response tokens, row after row.
        head: the output head.
        head_rows: converts rows of its weight to float32; the whole weight never is in float32 at once.
        largest: largest absolute value of the inputs and outputs of all linear and decoder layers.
    """

    states: Tensor
    head: Head
    head_rows: Callable[[slice], Tensor]
    largest: float

    def columns(self) -> Iterator[slice]:
        """Split the vocabulary into slices whose weights and logits fit in memory."""
        return (slice(start, start + TILE_WIDTH) for start in range(0, self.head.weight.shape[0], TILE_WIDTH))

    def logits(self, positions: slice, columns: slice, device: torch.device) -> Tensor:
        """Compute [positions, columns] logits in float32, and return them in float64."""
        states, weight = self.states[positions].to(device), self.head_rows(columns)
        bias = None if self.head.bias is None else self.head.bias[columns].to(device).float()
        part = replace(self.head, weight=weight, bias=bias)
        return part.logits(states, 0, len(weight)).double()


@torch.no_grad()
def replay(model: Any, rows: Sequence[ScoredRow], to_float32: ToFloat32, device: torch.device) -> Hidden:
    """Run the rows through a causal language model that is on the CPU in its stored dtypes.

    Batches hold rows of similar length, padded on the right, and use the model's own attention.

    Args:
        to_float32: converts each stored parameter on the way.
        device: where the layers compute.
    """
    lengths = [len(row.prompt) + len(row.response) - 1 for row in rows]
    order = sorted(range(len(rows)), key=lengths.__getitem__)
    decoder = text_decoder(model)
    rope_lengths = separate_lengths(decoder)
    states: list[Tensor] = [torch.empty(0)] * len(rows)
    with layers_in_float32(model, to_float32, device, _tokens(rows)), ActivationRange(model) as activations:
        for batch in _batches(order, lengths):
            ids = [torch.tensor([*rows[index].prompt, *rows[index].response[:-1]]) for index in batch]
            padded = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=int(ids[0][0])).to(device)
            whole = [[lengths[index] + 1] for index in batch]
            with for_lengths(rope_lengths.choose(whole, device) if rope_lengths else None):
                hidden = decoder(input_ids=padded, use_cache=False).last_hidden_state
            for batch_index, index in enumerate(batch):
                scored = slice(len(rows[index].prompt) - 1, lengths[index])
                states[index] = hidden[batch_index, scored].cpu()
    head = Head.of(model)
    name = next(name for name, value in model.named_parameters() if value is head.weight)
    return Hidden(torch.cat(states), head, lambda rows: to_float32(name, head.weight, rows), activations.largest)


def _tokens(rows: Sequence[ScoredRow]) -> Tensor:
    """List the distinct tokens of the rows, in ascending order."""
    return torch.tensor(sorted({token for row in rows for token in (*row.prompt, *row.response)}))


def _batches(order: Sequence[int], lengths: Sequence[int]) -> Iterator[list[int]]:
    """Split row indices into batches within `BATCH_TOKENS`, padding included; a batch has at least one row."""
    batch: list[int] = []
    for index in order:  # by ascending length: the last is the longest
        if batch and lengths[index] * (len(batch) + 1) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(index)
    yield batch
