"""The two models that a verdict compares, as transformers loads them, and how their stored weights are widened."""

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
from qpref.merge.base import TrainedBase
from qpref.policy.delta import LoraDelta

KEPT_BYTES = 2**29
"""Dequantized weights that are kept from one batch to the next; those beyond it are dequantized again."""
ALL = slice(None)


def load_base(base: TrainedBase) -> Any:
    """The base on the CPU, every tensor as its file has it, mapped, 4-bit layers unread until they are asked for.

    transformers loads a model in one type and converts whatever is of another, into memory. So it is asked for the
    type of most of the bytes, and the others are put back from their files.
    """
    sizes: Counter[torch.dtype] = Counter()
    for entry in base.tensors.values():
        if entry.dtype is not None:
            sizes[entry.dtype] += math.prod(entry.shape) * entry.dtype.itemsize
    main = max(sizes, key=sizes.__getitem__, default=base.dtype)
    others = [key for key, entry in base.tensors.items() if entry.dtype not in (None, main)]
    sources = Counter(base.names.values())
    if any(sources[base.names[key]] > 1 for key in others):
        # transformers builds one parameter of several tensors: only in the widest type are all of them exact.
        return load_causal_lm(base.path, functools.reduce(torch.promote_types, sizes, base.dtype))
    model = load_causal_lm(base.path, main)
    _put_back(model, {base.names[key]: base.original(key) for key in others})
    return model


def _put_back(model: Any, originals: Mapping[str, Tensor]) -> None:
    """Let parameters and buffers, tied ones too, be these tensors; names that the model doesn't have are left out."""
    known = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    replaced: dict[int, Tensor] = {}
    for name, tensor in originals.items():
        if (value := known.get(name)) is not None:
            is_parameter = isinstance(value, nn.Parameter)
            replaced[id(value)] = nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor
    for module in model.modules():
        for slots in (module._parameters, module._buffers):
            slots.update({name: replaced[id(value)] for name, value in slots.items() if id(value) in replaced})


def load_merged(folder: Path) -> Any:
    """A merged model as anybody would load it.

    Raises:
        MergeError: transformers doesn't find its weights complete.
    """
    return load_causal_lm(folder, "auto")


def load_causal_lm(path: Path, dtype: Any) -> Any:
    """A model on the CPU, its weights mapped from their files where they are of `dtype`, 4-bit layers made plain ones.

    Raises:
        MergeError: weights are missing, or there are more than the model has.
    """
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=dtype,
        device_map={"": "cpu"},
        trust_remote_code=False,
        use_safetensors=True,
        output_loading_info=True,
    )
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if found := sorted(map(str, report[what])):
            raise MergeError(f"{path}: transformers finds {what.replace('_', ' ')}, the first is {found[0]}")
    model.eval().requires_grad_(False)
    return _with_plain_layers(model)


def _with_plain_layers(model: Any) -> Any:
    """Put an ordinary linear layer in each 4-bit one's place, around the same packed weight."""
    from bitsandbytes.nn import Linear4bit

    for name, module in list(model.named_modules()):
        if isinstance(module, Linear4bit):
            plain = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
            plain._parameters["weight"], plain._parameters["bias"] = module.weight, module.bias
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, plain)
    return model


def _is_packed(stored: Tensor) -> bool:
    return getattr(stored, "quant_state", None) is not None


def _unpacked(stored: Any, device: torch.device) -> Tensor:
    """A 4-bit weight dequantized on `device`."""
    from bitsandbytes.functional import dequantize_4bit

    stored.quant_state.to(device)
    dequantized: Tensor = dequantize_4bit(stored.data.to(device), stored.quant_state)
    return dequantized


@dataclass(frozen=True, slots=True)
class AsStored:
    """Widen what a merged model stores."""

    device: torch.device

    def __call__(self, name: str, stored: Tensor, rows: slice = ALL) -> Tensor:
        if _is_packed(stored):
            return _unpacked(stored, self.device)[rows].float()
        return stored[rows].to(self.device).float()


@dataclass(slots=True)
class AsTrained:
    """Widen a base's weights as training computed with them, before or after training.

    Attributes:
        delta: what was learned; None for the weights before it.
        dtype: round the sum to this stored type; None for the exact sum.
    """

    base: TrainedBase
    delta: LoraDelta | None = None
    dtype: torch.dtype | None = None
    known: dict[str, Tensor] = field(default_factory=dict)

    def after(self, delta: LoraDelta, dtype: torch.dtype | None = None) -> AsTrained:
        """The same base with a delta; what is dequantized already is shared."""
        return AsTrained(self.base, delta, dtype, self.known)

    def __call__(self, name: str, stored: Tensor, rows: slice = ALL) -> Tensor:
        module = name.removesuffix(".weight")
        weight = self._trained(module, stored, rows)
        if self.delta is not None and module in self.delta.matrices:
            weight = weight.float() + self.delta.of(module, rows).to(self.base.device)
        return weight.float() if self.dtype is None else weight.to(self.dtype).float()

    def _trained(self, module: str, stored: Tensor, rows: slice) -> Tensor:
        base = self.base
        if module not in base.quantized:
            return stored[rows].to(base.device, base.dtype)
        if module not in self.known:
            whole = _unpacked(stored, base.device).to(base.dtype) if _is_packed(stored) else base.through_nf4(stored)
            if sum(kept.nbytes for kept in self.known.values()) + whole.nbytes > KEPT_BYTES:
                return whole[rows]
            self.known[module] = whole.cpu()
        return self.known[module][rows].to(base.device)
