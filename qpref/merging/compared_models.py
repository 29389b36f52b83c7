"""The two models that a verdict compares: loading them with transformers, and converting their weights to float32."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qpref.errors import MergeError
from qpref.merging.base import TrainedBase
from qpref.policy.architecture import model_class
from qpref.policy.delta import LoraDelta
from qpref.policy.matmul import check_packed
from qpref.policy.pretrained import read_config

CACHED_BYTES = 2**29
"""Bytes of dequantized weights cached between batches; weights beyond it are dequantized for every batch."""
ALL = slice(None)


def load_base(base: TrainedBase) -> Any:
    """Load the base on the CPU with every tensor in its stored dtype, memory-mapped; a 4-bit layer is read on use.

    Tensors that the model doesn't read are left in their files.

    transformers loads a model in one dtype and converts the other tensors in memory. So it is called with the dtype of
    most of the bytes, and the converted tensors are replaced with those of the files.
    """
    sizes: Counter[torch.dtype] = Counter()
    for entry in base.tensors.values():
        if entry.dtype is not None:
            sizes[entry.dtype] += math.prod(entry.shape) * entry.dtype.itemsize
    main = max(sizes, key=sizes.__getitem__, default=base.dtype)
    others = [key for key, entry in base.tensors.items() if entry.dtype not in (None, main)]
    if any(base.conversions.is_converted(key) for key in others):
        # transformers makes other tensors of these, or of several one: only the widest dtype holds all of them exactly.
        return load_causal_lm(base.path, functools.reduce(torch.promote_types, sizes, base.dtype), base.unread)
    model = load_causal_lm(base.path, main, base.unread)
    _restore_stored(model, {base.names[key]: base.original(key) for key in others})
    return model


def _restore_stored(model: Any, originals: Mapping[str, Tensor]) -> None:
    """Replace parameters and buffers, tied ones too, with these tensors; names unknown to the model are skipped."""
    known = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    replaced: dict[int, Tensor] = {}
    for name, tensor in originals.items():
        if (value := known.get(name)) is not None:
            is_parameter = isinstance(value, nn.Parameter)
            replaced[id(value)] = nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor
    for module in model.modules():
        for slots in (module._parameters, module._buffers):
            slots.update({name: replaced[id(value)] for name, value in slots.items() if id(value) in replaced})


def load_merged(folder: Path, base: TrainedBase) -> Any:
    """Load a merged model with plain transformers.

    Raises:
        MergeError: its weights are incomplete.
    """
    return load_causal_lm(folder, "auto", base.unread)


def load_causal_lm(path: Path, dtype: Any, unread: frozenset[str] = frozenset()) -> Any:
    """Load a model on the CPU, with plain linear layers in place of 4-bit ones.

    Weights stored in `dtype` are memory-mapped from their files.

    Args:
        unread: names of tensors in the base's files that the model doesn't read.

    Raises:
        MergeError: weights are missing, misshapen, or unexpected and not the base's.
    """
    model, report = model_class(read_config(path), path).from_pretrained(
        path,
        dtype=dtype,
        device_map={"": "cpu"},
        trust_remote_code=False,
        use_safetensors=True,
        output_loading_info=True,
    )
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if keys := sorted(set(map(str, report[problem])) - unread):
            raise MergeError(f"{path}: transformers reports {problem.replace('_', ' ')}, the first is {keys[0]}")
    model.eval().requires_grad_(False)
    return _with_plain_layers(model)


def _with_plain_layers(model: Any) -> Any:
    """Replace each 4-bit layer with a plain linear layer that holds the same packed weight."""
    from bitsandbytes.nn import Linear4bit

    for name, module in list(model.named_modules()):
        if isinstance(module, Linear4bit):
            plain = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
            plain._parameters["weight"], plain._parameters["bias"] = module.weight, module.bias
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, plain)
    return model


def _select(stored: Tensor, rows: slice) -> Tensor:
    """Select rows of a parameter; the only selection of one without dimensions is the whole."""
    return stored if rows == ALL else stored[rows]


def _is_packed(stored: Tensor) -> bool:
    return getattr(stored, "quant_state", None) is not None


def _dequantized(stored: Any, device: torch.device) -> Tensor:
    """Dequantize a 4-bit weight on `device`."""
    from bitsandbytes.functional import dequantize_4bit

    stored.quant_state.to(device)
    packed = stored.data.to(device)
    check_packed(packed, stored.quant_state)
    dequantized: Tensor = dequantize_4bit(packed, stored.quant_state)
    return dequantized


@dataclass(frozen=True, slots=True)
class AsStored:
    """Convert a merged model's stored weights to float32."""

    device: torch.device

    def __call__(self, name: str, stored: Tensor, rows: slice = ALL) -> Tensor:
        if _is_packed(stored):
            return _dequantized(stored, self.device)[rows].float()
        return _select(stored, rows).to(self.device).float()


@dataclass(slots=True)
class AsTrained:
    """Convert a base's weights to the float32 values that training computed with, before or after training.

    Attributes:
        delta: the learned LoRA delta to add; None for the weights before training.
        dtype: round the sum to this stored dtype; None for the exact sum.
        dequantized: cache by module, on the CPU, up to `CACHED_BYTES`.
    """

    base: TrainedBase
    delta: LoraDelta | None = None
    dtype: torch.dtype | None = None
    dequantized: dict[str, Tensor] = field(default_factory=dict)

    def after(self, delta: LoraDelta, dtype: torch.dtype | None = None) -> AsTrained:
        """Add a delta to the same base; the cache is shared."""
        return AsTrained(self.base, delta, dtype, self.dequantized)

    def __call__(self, name: str, stored: Tensor, rows: slice = ALL) -> Tensor:
        module = name.removesuffix(".weight")
        weight = self._base_weight(module, stored, rows)
        if self.delta is not None and module in self.delta.matrices:
            weight = weight.float() + self.delta.of(module, rows).to(self.base.device)
        return weight.float() if self.dtype is None else weight.to(self.dtype).float()

    def _base_weight(self, module: str, stored: Tensor, rows: slice) -> Tensor:
        base = self.base
        is_experts = module in base.experts
        if not is_experts and module not in base.quantized:
            return _select(stored, rows).to(base.device, base.dtype)
        if module not in self.dequantized:
            if _is_packed(stored):
                whole = _dequantized(stored, base.device).to(base.dtype)
            else:
                whole = base.experts_through_nf4(stored) if is_experts else base.through_nf4(stored, module)
            if sum(cached.nbytes for cached in self.dequantized.values()) + whole.nbytes > CACHED_BYTES:
                return whole[rows]
            self.dequantized[module] = whole.cpu()
        return self.dequantized[module][rows].to(base.device)
