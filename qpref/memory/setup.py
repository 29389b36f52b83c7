"""Settings of a run that change its memory beside the model's shape and the data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qpref.memory.shape import ModelShape
from qpref.recipe.sections import Recipe

Device = Literal["cpu", "cuda"]
FLASH_CAPABILITY = (8, 0)
"""Least compute capability of variable-length flash kernels, torch's and flash-attn's; bf16 needs the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """Device, precision, and other settings that costs depend on.

    Attributes:
        dtype_bytes: bytes of a number in the dtype that the base computes in.
        double_quantization: whether NF4's scales are quantized too; None where the base isn't quantized.
        has_start: a frozen copy of a start adapter is kept as the reference.
        in_blocks: attention runs in blocks (see `qpref.attention.blocks`) on the CPU.
        widens_products: a CPU without bf16 units multiplies in float32 (see `qpref.policy.matmul.product`).
        has_flash: attention on a GPU in 16 bits is one variable-length call a layer (see `qpref.attention.varlen`), not
            a call for each segment.
    """

    device: Device
    dtype_bytes: int = 2
    double_quantization: bool | None = True
    dropout: float = 0.0
    optimizer: str = "adamw"
    has_start: bool = False
    in_blocks: bool = False
    widens_products: bool = False
    has_flash: bool = True
    num_shards: int = 1

    @classmethod
    def of(cls, recipe: Recipe, device: Device, shape: ModelShape, capability: tuple[int, int] | None = None) -> Setup:
        """Read a recipe's settings for a device. A base that is stored in 4 bit keeps its own quantization.

        Args:
            capability: the GPU's compute capability; None for an unknown one, which is taken to have flash attention.
        """
        import torch

        from qpref.attention.blocks import has_bf16_units
        from qpref.policy.matmul import widens_products

        model = recipe.model
        requested = model.double_quantization if model.quantization == "nf4" else None
        stored = shape.double_quantization
        return cls(
            device=device,
            dtype_bytes=4 if model.dtype == "float32" else 2,
            double_quantization=_packs_scales(requested if stored is None else stored, device),
            dropout=recipe.adapter.dropout,
            optimizer=recipe.train.optimizer,
            has_start=recipe.adapter.start is not None,
            in_blocks=device == "cpu" and model.dtype == "bf16" and has_bf16_units(),
            widens_products=model.dtype == "bf16" and widens_products(torch.bfloat16, device),
            has_flash=capability is None or capability >= FLASH_CAPABILITY,
        )


def _packs_scales(requested: bool | None, device: Device) -> bool | None:
    """Return whether double quantization holds on the device: a CPU unpacks the scales (see `qpref.policy.load`)."""
    return requested if device == "cuda" or requested is None else False
