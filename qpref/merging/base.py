"""The base's tensors as the run's forward pass used them, file by file.

The base of a QLoRA run is not the original model but its NF4 rounding, dequantized, and the adapter has learned to
correct that. So 4-bit layers are dequantized as in training; other tensors stay unchanged. Tensors that aren't the
language model's are none of the run's: a merged model has them byte for byte.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qpref.merging.conversions import Conversions
from qpref.policy.architecture import empty_model, other_modules, text_modules
from qpref.policy.delta import AdaptableLayers
from qpref.policy.experts import through_nf4
from qpref.policy.load import DTYPES
from qpref.policy.pretrained import read_config
from qpref.policy.targets import is_linear

QUANTIZED_STATE = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state.bitsandbytes__nf4",
                   "quant_state.bitsandbytes__fp4")  # fmt: skip


FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Floating-point dtypes by their names in a safetensors header."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor of the base, from its file's header.

    Attributes:
        shape: its shape in the model, also for a packed 4-bit weight.
        dtype: its floating-point dtype; None for integers and packed 4-bit weights.
        is_packed: it is a packed 4-bit weight.
    """

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype | None
    is_packed: bool = False

    @property
    def is_float(self) -> bool:
        """True where its values are floating-point numbers, after dequantizing."""
        return self.is_packed or self.dtype is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedBase:
    """The base's weights as the run's forward pass used them.

    Attributes:
        names: tensor name in the files -> its name in the loaded model; transformers renames some. Of several weights
            the first one's.
        layers: names and layouts in the loaded model, for adapters.
        tensors: tensor name in the files -> its description, in file order, without quantization state.
        kept: names of the tensors in the files that the language model doesn't compute with.
        unread: names, in the files or in the model, of the kept tensors that transformers doesn't read.
        quantization_state: tensor name -> file, for the scales and tables stored beside 4-bit weights.
        linear: names of the language model's linear layers except the output head.
        head: the output head's name.
        others: names of the outermost modules outside the language model.
        quantized: modules that were 4-bit in training, by their name in the model.
        dtype: the compute dtype of training.
        device: where weights are quantized and dequantized.
        experts: names of the parameters with experts that were 4-bit in training.
        conversions: of tensors that are other ones in the model.
    """

    path: Path
    names: Mapping[str, str]
    layers: AdaptableLayers
    tensors: Mapping[str, Stored]
    kept: frozenset[str]
    unread: frozenset[str]
    quantization_state: Mapping[str, Path]
    linear: frozenset[str]
    head: str
    others: frozenset[str]
    quantized: frozenset[str]
    dtype: torch.dtype
    double_quantization: bool
    device: torch.device
    experts: frozenset[str]
    conversions: Conversions

    @classmethod
    def of(cls, path: Path, shards: list[Path], facts: Mapping[str, Any], device: torch.device) -> TrainedBase:
        """Read the headers of a base's files.

        Args:
            facts: the run's run.json.
        """
        model = empty_model(read_config(path), path)
        layers, text = AdaptableLayers.of(model), text_modules(model)
        shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        headers = {key: header for shard in shards for key, header in _headers(shard).items()}
        keys = [key for key in headers if not key.endswith(QUANTIZED_STATE)]
        packed = {key for key in keys if f"{key}.absmax" in headers}
        conversions = Conversions.of(model, keys, {key: header.shape for key, header in headers.items()}, packed)
        names = {key: conversions.names(key)[0] for key in keys}
        unread = {key for key, name in names.items() if name not in shapes}
        outside = {key for key, name in names.items() if name.rpartition(".")[0] not in text}
        linear = {name for name in text if is_linear(model.get_submodule(name))}
        return cls(
            path=path,
            names=names,
            tensors={
                key: Stored(
                    headers[key].file,
                    shapes[name] if key in packed else headers[key].shape,
                    FLOATS.get(headers[key].kind),
                    key in packed,
                )
                for key, name in names.items()
            },
            layers=layers,
            kept=frozenset((unread | outside) - packed),
            unread=frozenset(unread | {names[key] for key in unread}),
            quantization_state={key: header.file for key, header in headers.items() if key not in names},
            linear=frozenset(linear - {layers.names.head}),
            head=layers.names.head,
            others=frozenset(other_modules(model)),
            quantized=frozenset(facts["quantized_modules"]),
            dtype=DTYPES[facts["dtype"]],
            double_quantization=facts["double_quantization"],
            device=device,
            experts=frozenset(facts.get("quantized_experts", ())),
            conversions=conversions,
        )

    @property
    def is_prequantized(self) -> bool:
        return bool(self.quantization_state)

    @property
    def packable(self) -> frozenset[str]:
        """Names of the modules that requantizing packs: those of training, or all linear layers."""
        return self.quantized or self.linear

    def module_of(self, key: str) -> str:
        """Name the module whose weight a tensor is."""
        return self.weight_name(self.names[key])

    def weights_of(self, key: str) -> list[str]:
        """Name what an adapter's delta of a tensor is of: modules, and parameters with experts."""
        return [self.weight_name(name) for name in self.conversions.names(key)]

    def weight_name(self, name: str) -> str:
        """Turn the name of a weight of the model into an adapter's: its module's, or a parameter's with experts."""
        return name.removesuffix(".weight")

    def as_trained(self, key: str) -> Tensor:
        """Read a tensor as training computed with it, on the CPU: in the run's dtype, 4-bit weights dequantized."""
        tensor = self.original(key)
        if self.tensors[key].is_packed:
            from bitsandbytes.functional import dequantize_4bit

            dequantized: Tensor = dequantize_4bit(tensor.to(self.device), self._stored_state(key))
            return dequantized.to(self.dtype).cpu()
        if not tensor.is_floating_point():
            return tensor
        if key in self.conversions.groups and self.quantized.union(self.experts).intersection(self.weights_of(key)):
            return self.conversions.rounded(key, self.original, self._rounded)
        return self._rounded(self.names[key], tensor).cpu()

    def _rounded(self, name: str, weight: Tensor) -> Tensor:
        """Round a weight of the model as in training."""
        if name in self.experts:
            return self.experts_through_nf4(weight)
        module = self.weight_name(name)
        return self.through_nf4(weight, module) if module in self.quantized else weight.to(self.dtype)

    def through_nf4(self, weight: Tensor, module: str) -> Tensor:
        """Quantize a module's 16- or 32-bit weight to NF4 and back on `device`, as bitsandbytes does in training."""
        if module in self.layers.transposed:
            return self._through_nf4(weight.t().contiguous()).t()
        return self._through_nf4(weight)

    def _through_nf4(self, weight: Tensor) -> Tensor:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        # The same call on the same values as in Linear4bit when a weight is moved to its device.
        packed, state = quantize_4bit(
            weight.to(self.device, self.dtype), compress_statistics=self.double_quantization, quant_type="nf4"
        )
        dequantized: Tensor = dequantize_4bit(packed, state)
        return dequantized.to(self.dtype)

    def experts_through_nf4(self, weights: Tensor) -> Tensor:
        """Quantize [experts, rows, columns] weights to NF4 and back on `device`, expert by expert, as in training."""
        return through_nf4(weights.to(self.device, self.dtype), self.double_quantization)

    def original(self, key: str) -> Tensor:
        """Read a tensor as stored in its file."""
        return _read(self.tensors[key].file, key)

    def _stored_state(self, key: str) -> Any:
        """Read the quantization state that a bitsandbytes checkpoint stores beside a 4-bit weight."""
        from bitsandbytes.functional import QuantState

        names = [name for name in (f"{key}.{part}" for part in QUANTIZED_STATE) if name in self.quantization_state]
        return QuantState.from_dict({name: _read(self.quantization_state[name], name) for name in names}, self.device)


def _read(file: Path, key: str) -> Tensor:
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        tensor: Tensor = opened.get_tensor(key)
        return tensor


@dataclass(frozen=True, slots=True)
class _Header:
    file: Path
    shape: tuple[int, ...]
    kind: str


def _headers(shard: Path) -> dict[str, _Header]:
    from safetensors import safe_open

    found = {}
    with safe_open(shard, "pt") as file:
        for key in file.keys():  # noqa: SIM118 - no mapping
            part = file.get_slice(key)
            found[key] = _Header(shard, tuple(part.get_shape()), part.get_dtype())
    return found
