"""A saved adapter as what it adds to each weight of its base."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from qpref.errors import MergeError


@dataclass(frozen=True, slots=True)
class LoraDelta:
    """The adapter's matrices by module name, as in the base model."""

    matrices: Mapping[str, tuple[Tensor, Tensor, float]]

    @property
    def modules(self) -> list[str]:
        return list(self.matrices)

    def of(self, module: str, rows: slice = slice(None)) -> Tensor:
        """[rows, in] float32: scale * B @ A (Hu et al. 2021, "LoRA", eq. 3), all output rows or some."""
        down, up, scale = self.matrices[module]
        return (up[rows].float() @ down.float()) * scale

    def shape(self, module: str) -> tuple[int, int]:
        """[out, in] of what is added."""
        down, up, _ = self.matrices[module]
        return up.shape[0], down.shape[1]

    @classmethod
    def read(cls, folder: Path) -> LoraDelta:
        """Read PEFT's format.

        Raises:
            MergeError: it cannot be read, a matrix lacks its partner or isn't finite, or all of the adapter is zero.
        """
        from peft import LoraConfig
        from peft.utils.other import get_pattern_key
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            config: Any = LoraConfig(**_lora_fields(folder))
            tensors = load_file(folder / "adapter_model.safetensors")
        except (OSError, ValueError, SafetensorError) as error:
            raise MergeError(f"{folder}: no LoRA adapter in PEFT's format: {error}") from error
        matrices = {}
        for key in [key for key in tensors if key.endswith(".lora_A.weight")]:
            module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            down, up = tensors.pop(key), tensors.pop(key.replace("lora_A", "lora_B"), None)
            if up is None or not bool(down.isfinite().all() & up.isfinite().all()):
                raise MergeError(f"{folder}: the adapter of {module} is {'not finite' if up is not None else 'half'}")
            alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, module), config.lora_alpha)
            rank = down.shape[0]
            matrices[module] = (down, up, alpha / (math.sqrt(rank) if config.use_rslora else rank))
        if tensors:
            raise MergeError(f"{folder}: holds more than LoRA matrices: {min(tensors)}")
        if not any(bool(up.any()) for _, up, _ in matrices.values()):
            raise MergeError(f"{folder}: every B matrix is zero; nothing was learned")
        return cls(matrices)


def _lora_fields(folder: Path) -> dict[str, Any]:
    values = json.loads((folder / "adapter_config.json").read_text())
    names = ("r", "lora_alpha", "alpha_pattern", "rank_pattern", "use_rslora")
    return {name: values[name] for name in names if values.get(name) is not None}
