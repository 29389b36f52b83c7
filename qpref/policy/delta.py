"""A saved adapter as the delta that it adds to each weight of its base."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from qpref.errors import MergeError, PolicyError
from qpref.policy import adapter_folder
from qpref.policy.adapter_names import LayerNames


@dataclass(frozen=True, slots=True)
class LoraDelta:
    """Low-rank deltas of a base's weights.

    Attributes:
        matrices: module name in the base -> A [rank, in], B [out, rank] and their scale.
    """

    matrices: Mapping[str, tuple[Tensor, Tensor, float]]

    @property
    def modules(self) -> list[str]:
        return list(self.matrices)

    def of(self, module: str, rows: slice = slice(None)) -> Tensor:
        """[rows, in] float32: scale * B @ A (Hu et al. 2021, "LoRA", eq. 3), for all output rows or a range."""
        down, up, scale = self.matrices[module]
        return (up[rows].float() @ down.float()) * scale

    def shape(self, module: str) -> tuple[int, int]:
        """[out, in] of a module's delta."""
        down, up, _ = self.matrices[module]
        return up.shape[0], down.shape[1]

    def in_base(self, names: LayerNames, transposed: frozenset[str]) -> LoraDelta:
        """Name the modules as a base does that was loaded by another class than the adapter was trained on.

        Args:
            transposed: modules whose weights the base has as [inputs, outputs]; their deltas become that, too.
        """
        matrices = names.translated_keys(self.matrices)
        for module in transposed & matrices.keys():
            down, up, scale = matrices[module]
            matrices[module] = (up.t(), down.t(), scale)
        return LoraDelta(matrices)

    @classmethod
    def read(cls, folder: Path) -> LoraDelta:
        """Read an adapter folder in PEFT's format.

        Raises:
            MergeError: it cannot be read, a matrix lacks its partner or isn't finite, or the whole adapter is zero.
        """
        from peft.utils.other import get_pattern_key

        try:
            config = adapter_folder.lora_config(adapter_folder.read_settings(folder))
            tensors = adapter_folder.read_tensors(folder)
        except PolicyError as error:
            raise MergeError(error.what) from error
        except ValueError as error:
            raise MergeError(f"{folder}: no LoRA adapter in PEFT's format: {error}") from error
        matrices = {}
        for key in [key for key in tensors if key.endswith(".lora_A.weight")]:
            module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            down, up = tensors.pop(key), tensors.pop(key.replace("lora_A", "lora_B"), None)
            if up is None:
                raise MergeError(f"{folder}: the adapter of {module} lacks its B matrix")
            if not bool(down.isfinite().all() & up.isfinite().all()):
                raise MergeError(f"{folder}: the adapter of {module} is not finite")
            alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, module), config.lora_alpha)
            rank = down.shape[0]
            matrices[module] = (down, up, alpha / (math.sqrt(rank) if config.use_rslora else rank))
        if tensors:
            raise MergeError(f"{folder}: holds more than LoRA matrices: {min(tensors)}")
        if not any(bool(up.any()) for _, up, _ in matrices.values()):
            raise MergeError(f"{folder}: every B matrix is zero; nothing was learned")
        return cls(matrices)
