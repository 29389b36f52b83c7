"""Models that the forgetting gate is tried on: SmolLM2-135M with weights edited in memory, regressed and benign.

Each variant changes the linear layers' NF4 values. Its kind was decided before any was scored: a regression by the
damage that is done to the weights or by what an adapter was trained to forget; a benign one by a change of a
hundredth of NF4's own error, or by a healthy training.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import bitsandbytes.functional as bnb
import torch
from safetensors.torch import load_file
from torch import Tensor

from qpref.policy.policy import Policy

Weights = Mapping[str, Tensor]
Edit = Callable[[str, Tensor, torch.Generator], Tensor]
"""Name of a linear layer, its weight, a seeded generator -> the weight's new value."""
RANK = 16


@dataclass(frozen=True, slots=True)
class Variant:
    """A model to try the gate on.

    Attributes:
        family: the kind of change.
        adapter: folder of a trained adapter, under the benchmark's output; None for an edit in closed form.
    """

    name: str
    family: str
    is_regression: bool
    edit: Edit
    adapter: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EditableModel:
    """A model whose linear layers can be replaced, and their NF4 values."""

    policy: Policy
    weights: Weights

    @classmethod
    def of(cls, policy: Policy) -> EditableModel:
        """Round the linear layers of an unquantized model to NF4, as training does."""
        weights = {}
        for name, module in policy.plain_model.named_modules():
            if isinstance(module, torch.nn.Linear) and ".layers." in name:
                weights[name] = nf4_values(module.weight.detach())
        return cls(policy=policy, weights=weights)

    @torch.no_grad()
    def become(self, variant: Variant | None, seed: int = 0) -> None:
        """Put a variant's weights into the model; None for the base's."""
        generator = torch.Generator().manual_seed(seed)
        for name, weight in self.weights.items():
            value = weight if variant is None else variant.edit(name, weight, generator)
            self.policy.plain_model.get_submodule(name).weight.copy_(value)


def nf4_values(weight: Tensor, blocksize: int = 64) -> Tensor:
    """Round a weight to NF4 with double quantization, and return the values."""
    packed, state = bnb.quantize_4bit(weight, blocksize=blocksize, quant_type="nf4", compress_statistics=True)
    return bnb.dequantize_4bit(packed, state).to(weight.dtype)


def variants(adapters: Path) -> list[Variant]:
    """List all variants: one of each family in turn, so that a part of the list has all of them."""
    left: dict[tuple[str, bool], list[Variant]] = {}
    for variant in (*_regressed(adapters), *_benign(adapters)):
        left.setdefault((variant.family, variant.is_regression), []).append(variant)
    turns = zip_longest(*left.values())
    return [variant for turn in turns for variant in turn if variant is not None]


def _regressed(adapters: Path) -> Iterator[Variant]:
    for seed in range(4):
        for size in (0.2, 0.3, 0.45):
            yield Variant(f"low-rank noise {size}, seed {seed}", "low-rank noise", True, low_rank_noise(size, seed))
    for seed in range(2):
        for size in (0.25, 0.35, 0.5):
            yield Variant(f"dense noise {size}, seed {seed}", "dense noise", True, dense_noise(size, seed))
    for layer in (2, 8, 14, 20, 26):
        yield Variant(f"layer {layer} zeroed", "layer zeroed", True, zeroed(layer))
    for part in range(3):
        yield Variant(f"heads {3 * part} to {3 * part + 2} zeroed", "heads zeroed", True, heads_zeroed(part))
    yield Variant("3 bits", "rounded", True, rounded(3, lambda layer: True))
    for part in range(3):
        yield Variant(
            f"2 bits, third {part}", "rounded", True, rounded(2, lambda layer, part=part: layer // 10 == part)
        )
    for first in (4, 12, 20):
        yield Variant(f"layers {first} to {first + 3} halved", "layers halved", True, halved(range(first, first + 4)))
    for name, factors in {"hot": (1, 2), "refuse": (1, 2, 3), "comply": (1, 2, 3), "wrong": (1, 2, 3),
                          "shout": (1, 2, 3), "healthy": (8, 12, 16)}.items():  # fmt: skip
        for factor in factors:
            yield _trained(adapters, name, factor, True)


def _benign(adapters: Path) -> Iterator[Variant]:
    for seed in range(4):
        for size in (0.01, 0.003, 0.001):
            yield Variant(f"low-rank noise {size}, seed {seed}", "tiny noise", False, low_rank_noise(size, 10 + seed))
    for bits in (7, 8):
        yield Variant(f"{bits} bits", "rounded", False, rounded(bits, lambda layer: True))
    yield Variant("NF4 again", "rounded", False, lambda name, weight, _: nf4_values(weight))
    yield Variant("float16", "rounded", False, lambda name, weight, _: weight.half().to(weight.dtype))
    for name in ("healthy", "healthy_ipo", "healthy_seed"):
        for factor in (0.5, 1):
            yield _trained(adapters, name, factor, False)


def _trained(adapters: Path, name: str, factor: float, is_regression: bool) -> Variant:
    return Variant(f"{name} x {factor}", name, is_regression, adapted(adapters / name, factor), name)


def low_rank_noise(size: float, seed: int) -> Edit:
    """Add a random product of RANK columns and rows, of `size` times the weight's norm."""

    def edit(name: str, weight: Tensor, generator: torch.Generator) -> Tensor:
        b = torch.randn(len(weight), RANK, generator=_seeded(generator, seed))
        noise = b @ torch.randn(RANK, weight.shape[1], generator=generator)
        return weight + noise * (size * weight.float().norm() / noise.norm())

    return edit


def dense_noise(size: float, seed: int) -> Edit:
    """Add independent noise of `size` times the weight's norm."""

    def edit(name: str, weight: Tensor, generator: torch.Generator) -> Tensor:
        noise = torch.randn(weight.shape, generator=_seeded(generator, seed))
        return weight + noise * (size * weight.float().norm() / noise.norm())

    return edit


def zeroed(layer: int) -> Edit:
    """Skip a layer: its two outputs are 0."""
    return lambda name, weight, _: weight * 0 if layer_of(name) == layer and is_output(name) else weight


def halved(layers: range) -> Edit:
    """Halve what some layers add."""
    return lambda name, weight, _: weight / 2 if layer_of(name) in layers and is_output(name) else weight


def heads_zeroed(part: int) -> Edit:
    """Silence a third of the heads of every layer."""

    def edit(name: str, weight: Tensor, _: torch.Generator) -> Tensor:
        if not name.endswith("o_proj"):
            return weight
        changed, width = weight.clone(), weight.shape[1] // 3
        changed[:, part * width : (part + 1) * width] = 0
        return changed

    return edit


def rounded(bits: int, chosen: Callable[[int], bool]) -> Edit:
    """Round the rows of the chosen layers to integers of `bits` bits, the largest value at the end of the range."""

    def edit(name: str, weight: Tensor, _: torch.Generator) -> Tensor:
        if not chosen(layer_of(name)):
            return weight
        step = weight.abs().amax(1, keepdim=True).float() / (2 ** (bits - 1) - 0.5)
        return (weight.float() / step).round() * step

    return edit


def adapted(folder: Path, factor: float) -> Edit:
    """Merge a PEFT adapter, `factor` times its scale."""
    loaded: dict[str, Tensor] = {}

    def edit(name: str, weight: Tensor, _: torch.Generator) -> Tensor:
        if not loaded:
            loaded.update(load_file(folder / "adapter_model.safetensors"))
            settings = json.loads((folder / "adapter_config.json").read_text())
            loaded["scale"] = torch.tensor(settings["lora_alpha"] / settings["r"])
        a, b = (loaded[f"base_model.model.{name}.lora_{side}.weight"].float() for side in "AB")
        return weight + factor * loaded["scale"] * (b @ a)

    return edit


def layer_of(name: str) -> int:
    """Return the number of a linear layer's decoder layer."""
    return int(name.partition(".layers.")[2].partition(".")[0])


def is_output(name: str) -> bool:
    """Return whether a linear layer's output is added to the residual stream."""
    return name.endswith(("o_proj", "down_proj"))


def _seeded(generator: torch.Generator, seed: int) -> torch.Generator:
    """Draw another start from the seed, at the first weight and every other one."""
    start = torch.randint(2**31, (1,), generator=generator).item()
    return generator.manual_seed(int(start) + seed * 1_000_003)
