"""One copy from the host to a GPU for several small tensors, through pinned memory.

A copy from pageable memory waits for everything that the GPU has been given before it; a copy from pinned memory is
queued behind it, and the host continues.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

ALIGNMENT = 64
"""Bytes to which each tensor is aligned in the buffer: a multiple of every dtype's size and of the kernels' loads."""


def to_device(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Copy host tensors to the device; on CUDA they are views of one buffer, so none may be modified in place.

    The pinned block is reused only after the copy has been made: torch's host allocator records that.
    """
    if device.type != "cuda":
        return [tensor.to(device) for tensor in tensors]
    starts, size = [], 0
    for tensor in tensors:
        starts.append(size)
        size += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    buffer = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    for start, tensor in zip(starts, tensors, strict=True):
        _view(buffer, start, tensor).copy_(tensor)
    moved = buffer.to(device, non_blocking=True)
    return [_view(moved, start, tensor) for start, tensor in zip(starts, tensors, strict=True)]


def _view(buffer: Tensor, start: int, like: Tensor) -> Tensor:
    """View the bytes of the buffer from `start` on in another tensor's dtype and shape."""
    return buffer[start : start + like.nbytes].view(like.dtype).view(like.shape)
