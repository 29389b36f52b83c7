"""Checksums of tensors, computed where they are: a changed byte always changes them."""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 2**20
"""Words of 8 bytes that are mixed at a time."""
STEP, FIRST, SECOND = (each - 2**64 for each in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
"""Odd numbers of SplitMix64 (Steele, Lea and Flood 2014, "Fast Splittable Pseudorandom Number Generators"), as signed
64-bit ones."""


def checksum(tensor: Tensor) -> int:
    """Compute a 64-bit checksum of a tensor's bytes, the same on every device.

    It is the sum over all 8-byte words of a hash of the word and its position, modulo 2^64. For each position the hash
    is a bijection, so a change of a single word always changes the sum.
    """
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    if flat.storage_offset() % 8:
        flat = flat.clone()  # torch reads words of 8 bytes at multiples of 8 alone
    num_words = len(flat) // 8
    tail = flat[8 * num_words :].tolist()
    last = int.from_bytes(bytes([*tail, len(tail)]), "little")
    total = _hashed(torch.tensor([last], device=tensor.device), 0)
    for start in range(0, num_words, CHUNK):
        total += _hashed(flat[8 * start : 8 * min(start + CHUNK, num_words)].view(torch.int64), start + 1)
    return int(total) % 2**64


def _hashed(words: Tensor, start: int) -> Tensor:
    """Sum the hashes of words at positions from `start`, by the generator's finalizer."""
    mixed = words + torch.arange(start, start + len(words), device=words.device) * STEP
    mixed = (mixed ^ _shifted(mixed, 30)) * FIRST
    mixed = (mixed ^ _shifted(mixed, 27)) * SECOND
    total: Tensor = (mixed ^ _shifted(mixed, 31)).sum()
    return total


def _shifted(words: Tensor, bits: int) -> Tensor:
    """Shift right without the sign, which torch fills in."""
    shifted: Tensor = (words >> bits) & (2 ** (64 - bits) - 1)
    return shifted
