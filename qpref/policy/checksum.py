"""Checksums of tensors, computed where they are: a changed byte always changes them."""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 2**20
"""Words of 8 bytes that are multiplied at a time."""
MULTIPLIERS = 0x9E3779B97F4A7C15 - 2**64, 0xBF58476D1CE4E5B9 - 2**64
"""Of the SplitMix64 generator (Steele, Lea and Flood 2014), as signed 64-bit numbers."""


def checksum(tensor: Tensor) -> int:
    """Compute a 64-bit checksum of a tensor's bytes, the same on every device.

    It is the sum of all 8-byte words, each times an odd number that depends on its position, modulo 2^64. An odd number
    has an inverse there, so a change of a single word changes the sum.
    """
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    num_words = len(flat) // 8
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, num_words, CHUNK):
        stop = min(start + CHUNK, num_words)
        total += (flat[8 * start : 8 * stop].view(torch.int64) * _factors(start, stop, tensor.device)).sum()
    tail = flat[8 * num_words :].tolist()
    last = int.from_bytes(bytes([*tail, len(tail)]), "little")
    return (int(total) + last * 0x94D049BB133111EB) % 2**64


def _factors(start: int, stop: int, device: torch.device) -> Tensor:
    """[stop - start] odd numbers of the positions."""
    mixed = torch.arange(start + 1, stop + 1, device=device) * MULTIPLIERS[0]
    mixed = (mixed ^ (mixed >> 30)) * MULTIPLIERS[1]
    return (mixed ^ (mixed >> 27)) | 1
