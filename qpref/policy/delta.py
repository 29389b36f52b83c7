"""A saved adapter as the delta that it adds to each weight of its base."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from qpref.errors import MergeError, PolicyError
from qpref.policy import adapter_folder
from qpref.policy.adapter_names import LayerNames, plain_parameters
from qpref.policy.experts import fused_experts, projections_of
from qpref.policy.grouped_product import ExpertAdapter
from qpref.policy.targets import is_linear, matches

ALL = slice(None)


@dataclass(frozen=True, slots=True)
class AdaptableLayers:
    """Layers of a base, by which an adapter's deltas take its names and layouts.

    Attributes:
        names: in the loaded model, for an adapter that was trained under another class of its checkpoint.
        transposed: names of the linear layers whose weights are [inputs, outputs], as GPT-2's are.
        experts: names of the modules with fused experts -> the modules.
    """

    names: LayerNames
    transposed: frozenset[str]
    experts: Mapping[str, Any]

    @classmethod
    def of(cls, model: Any) -> AdaptableLayers:
        """Read the layers of a plain model."""
        import torch

        modules = dict(model.named_modules())
        linear = {name for name, module in modules.items() if is_linear(module)}
        transposed = {name for name in linear if not isinstance(modules[name], torch.nn.Linear)}
        return cls(LayerNames.of(model), frozenset(transposed), fused_experts(model))


@dataclass(frozen=True, slots=True)
class LowRank:
    """A low-rank delta of a weight: scale * B @ A (Hu et al. 2021, "LoRA", eq. 3).

    Attributes:
        down: A [rank, in]; of experts [experts * rank, in].
        up: B [out, rank]; of experts [out, rank * experts].
        num_experts: of a weight with all experts of a layer; None for a linear layer's.
        is_transposed: the base has the weight, or each expert's, as [in, out].
    """

    down: Tensor
    up: Tensor
    scale: float
    num_experts: int | None = None
    is_transposed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the delta, as the base has the weight."""
        outer, inner = self.up.shape[0], self.down.shape[1]
        matrix = (inner, outer) if self.is_transposed else (outer, inner)
        return matrix if self.num_experts is None else (self.num_experts, *matrix)

    def rows(self, rows: slice) -> Tensor:
        """Compute a range of the delta's first dimension, in float32."""
        down, up = self.down, self.up
        if self.num_experts is None:
            left, right = (down.t(), up.t()) if self.is_transposed else (up, down)
            return (left[rows].float() @ right.float()) * self.scale
        down, up = ExpertAdapter(down, up, self.scale).factors(self.num_experts)
        delta = (up[rows].float() @ down[rows].float()) * self.scale
        return delta.mT if self.is_transposed else delta


@dataclass(frozen=True, slots=True)
class LoraDelta:
    """Low-rank deltas of a base's weights.

    Attributes:
        matrices: name in the base -> its delta; of a linear layer the module's name, of experts the parameter's.
    """

    matrices: Mapping[str, LowRank]

    @property
    def modules(self) -> list[str]:
        """Names of the adapted linear layers."""
        return [name for name, delta in self.matrices.items() if delta.num_experts is None]

    @property
    def experts(self) -> list[str]:
        """Names of the adapted parameters with experts."""
        return [name for name, delta in self.matrices.items() if delta.num_experts is not None]

    def of(self, name: str, rows: slice = ALL) -> Tensor:
        """[rows, in] float32 delta of a weight, or as the base has it; for all rows, or a range."""
        return self.matrices[name].rows(rows)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a weight's delta, as the base has it."""
        return self.matrices[name].shape

    @classmethod
    def read(cls, folder: Path, base: AdaptableLayers) -> LoraDelta:
        """Read an adapter folder in PEFT's format.

        Raises:
            MergeError: it cannot be read, a matrix lacks its partner or isn't finite, or the whole adapter is zero.
        """
        try:
            config = adapter_folder.lora_config(adapter_folder.read_settings(folder))
            tensors = adapter_folder.read_tensors(folder)
        except PolicyError as error:
            raise MergeError(error.what) from error
        except ValueError as error:
            raise MergeError(f"{folder}: no LoRA adapter in PEFT's format: {error}") from error
        experts = dict(_expert_layers(config, base))
        pairs = _pairs(folder, tensors)
        names = zip(pairs, base.names.translated_keys(pairs), strict=True)
        matrices = {}
        for trained, layer in names:
            if layer in experts:
                module, projection = experts.pop(layer)
                name = f"{module}.{projection}"
                matrices[name] = _expert_delta(config, pairs[trained], name, base.experts[module], projection)
            else:
                down, up = pairs[trained]
                scale = _scale(config, trained, down.shape[0])
                matrices[layer] = LowRank(down, up, scale, is_transposed=layer in base.transposed)
        if experts:
            raise MergeError(f"{folder}: has no matrices for its target {'.'.join(next(iter(experts.values())))}")
        if not any(bool(delta.up.any()) for delta in matrices.values()):
            raise MergeError(f"{folder}: every B matrix is zero; nothing was learned")
        return cls(matrices)


def _pairs(folder: Path, tensors: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Pair the matrices: layer, as the adapter names it -> A and B."""
    pairs = {}
    for key in [key for key in tensors if key.endswith(".lora_A.weight")]:
        layer = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        down, up = tensors.pop(key), tensors.pop(key.replace("lora_A", "lora_B"), None)
        if up is None:
            raise MergeError(f"{folder}: the adapter of {layer} lacks its B matrix")
        if down.dim() != 2 or up.dim() != 2 or not 0 < down.shape[0] == up.shape[1]:
            sizes = f"{tuple(down.shape)} and {tuple(up.shape)}"
            raise MergeError(f"{folder}: A and B of {layer} are {sizes}, which have no rank in common")
        if not bool(down.isfinite().all() & up.isfinite().all()):
            raise MergeError(f"{folder}: the adapter of {layer} is not finite")
        pairs[layer] = down, up
    if tensors:
        raise MergeError(f"{folder}: holds more than LoRA matrices: {min(tensors)}")
    return pairs


def _expert_layers(config: Any, base: AdaptableLayers) -> Iterator[tuple[str, tuple[str, str]]]:
    """Yield the names that PEFT gives to adapters on experts, each with its module and projection: it nests them, the
    last projection outermost."""
    targets = plain_parameters(config.target_parameters or [], base.names)
    for module, experts in base.experts.items():
        names = [name for name in projections_of(experts) if any(matches(f"{module}.{name}", each) for each in targets)]
        for depth, name in enumerate(reversed(names)):
            yield module + depth * ".base_layer", (module, name)


def _expert_delta(config: Any, pair: tuple[Tensor, Tensor], name: str, experts: Any, projection: str) -> LowRank:
    down, up = pair
    num_experts = len(getattr(experts, projection))
    if down.shape[0] % num_experts:
        raise MergeError(
            f"the adapter's A of {name} has {down.shape[0]} rows, which aren't a rank for each of {num_experts} experts"
        )
    scale = _scale(config, name, down.shape[0] // num_experts)
    return LowRank(down, up, scale, num_experts, experts.is_transposed)


def _scale(config: Any, name: str, rank: int) -> float:
    """Compute PEFT's factor on a layer's delta."""
    from peft.utils.other import get_pattern_key

    alpha: float = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, name), config.lora_alpha)
    return alpha / (math.sqrt(rank) if config.use_rslora else rank)
