"""The adapter that every contestant starts from."""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import torch
from torch import Tensor

RANK = 16
RATE = 1e-3
"""Learning rate; high for preferences, so that a few steps move the losses by more than bf16's rounding."""


@torch.no_grad()
def start_adapter(parameters: Mapping[str, Tensor]) -> None:
    """Initialize A at random, seeded by its name, and B at 0, so that all contestants start alike up to dtype."""
    for name, parameter in parameters.items():
        if "lora_A" in name:
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[1] ** 0.5)
        else:
            parameter.zero_()
