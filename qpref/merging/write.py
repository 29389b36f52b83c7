"""Write merged weights as safetensors shards and their index, one shard in memory at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qpref import fsio
from qpref.merging.base import TrainedBase
from qpref.merging.learned import LearnedTensors
from qpref.merging.rounding import rounded

SHARD_BYTES = 5 * 10**9
"""Maximum shard size, as in the hub's own tools."""
NF4_BYTES = 0.6
"""Upper bound in bytes for a packed value with its share of the scales and tables."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """The merged weights, computed on demand.

    Attributes:
        learned: their deltas.
        dtype: the stored dtype.
        original: add to the base's own weights instead of the dequantized ones that were trained on.
        packed: modules to requantize to NF4.
    """

    base: TrainedBase
    learned: LearnedTensors
    dtype: torch.dtype
    original: bool = False
    packed: frozenset[str] = frozenset()

    def merged(self, key: str) -> dict[str, Tensor]:
        """Compute the tensors to store for a tensor of the base: itself, and a 4-bit weight's quantization state."""
        if key in self.base.kept:
            return {key: self.base.original(key)}
        source = self.base.original(key) if self.original else self.base.as_trained(key)
        if not source.is_floating_point():
            return {key: source}
        stored = rounded(source, self.learned.of_tensor(key), self.dtype)
        return self._packed(key, stored) if self.is_packed(key) else {key: stored}

    def size(self, key: str) -> int:
        """Bytes of a stored tensor; an upper bound for a 4-bit one."""
        stored = self.base.tensors[key]
        num_elements = math.prod(stored.shape)
        if key in self.base.kept and stored.dtype is not None:
            return num_elements * stored.dtype.itemsize
        if self.is_packed(key):
            return int(num_elements * NF4_BYTES) + 4096
        return num_elements * (self.dtype.itemsize if stored.is_float else 8)

    @property
    def num_bytes(self) -> int:
        return sum(self.size(key) for key in self.base.tensors)

    def shards(self) -> list[list[str]]:
        """Assign the tensors to files, in the base's order."""
        shards: list[list[str]] = [[]]
        size = 0
        for key in self.base.tensors:
            if shards[-1] and size + self.size(key) > SHARD_BYTES:
                shards.append([])
                size = 0
            shards[-1].append(key)
            size += self.size(key)
        return shards

    def is_packed(self, key: str) -> bool:
        """Return whether a tensor is requantized to NF4."""
        return key.endswith(".weight") and self.base.module_of(key) in self.packed

    def _packed(self, key: str, weight: Tensor) -> dict[str, Tensor]:
        from bitsandbytes.functional import quantize_4bit

        if self.base.module_of(key) in self.base.layers.transposed:
            weight = weight.t().contiguous()
        values, state = quantize_4bit(
            weight.to(self.base.device), compress_statistics=self.base.double_quantization, quant_type="nf4"
        )
        parts = {f"{key}.{name}": part.cpu() for name, part in state.as_dict(packed=True).items()}
        return {key: values.cpu()} | parts


def remove_weights(folder: Path) -> None:
    """Remove the files that `write_weights` wrote to a folder, if any."""
    for old in folder.glob("model*.safetensors*"):
        fsio.remove_tree(old)


def write_weights(weights: Weights, folder: Path) -> None:
    """Write all tensors to an existing folder without weights.

    Raises:
        DiskError: the disk is full or not writable.
    """
    shards = weights.shards()
    weight_map: dict[str, str] = {}
    total = 0
    for number, keys in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
        tensors = dict(_shard_tensors(weights, keys))
        fsio.write_tensors(folder / name, tensors, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
        total += sum(tensor.nbytes for tensor in tensors.values())
        del tensors
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        fsio.write_json(folder / "model.safetensors.index.json", index)


def _shard_tensors(weights: Weights, keys: list[str]) -> Iterator[tuple[str, Tensor]]:
    for key in keys:
        yield from weights.merged(key).items()
