"""Quantization of a base while transformers loads it: bitsandbytes' NF4 for linear layers, and for fused experts too.

Each layer's experts are quantized as soon as transformers has read them, so that no more than one projection of one
layer is in memory in 16 bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name

from qpref.policy.experts import PackedExperts, is_experts, projections_of
from qpref.policy.experts_forward import compute_here
from qpref.policy.shard_loading import ShardLoader

METHOD = "qpref_nf4"
"""Name of this quantization in transformers' registry of quantizers."""


def nf4_settings(
    dtype: torch.dtype, double_quantization: bool, shards: ShardLoader | None = None
) -> BitsAndBytesConfig:
    """Settings for transformers' `from_pretrained` that quantize linear layers and fused experts to NF4.

    Args:
        shards: keeps this process's rows of the decoder's weights alone; None keeps all of them.
    """
    AUTO_QUANTIZER_MAPPING[METHOD] = type("Nf4Quantizer", (Nf4Quantizer,), {"shards": shards})
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quantization,
        bnb_4bit_compute_dtype=dtype,
    )
    settings.quant_method = METHOD
    return settings


class Nf4Quantizer(Bnb4BitHfQuantizer):  # type: ignore[misc]  # transformers' is untyped
    """transformers' loader of 4-bit models, extended to fused experts and to a base that processes share."""

    shards: ShardLoader | None = None

    def _process_model_before_weight_loading(self, model: Any, device_map: Any, **kwargs: Any) -> Any:
        if self.shards is not None:
            self.shards.model = model
        return super()._process_model_before_weight_loading(model, device_map, **kwargs)

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Return whether a parameter is packed, or a part of it kept, while it is loaded."""
        is_packed = _is_projection(model, param_name) or super().param_needs_quantization(model, param_name, **kwargs)
        return is_packed or (self.shards is not None and self.shards.is_vocabulary(param_name))

    def get_quantize_ops(self) -> ConversionOps:
        """Return the operation that packs a parameter."""
        linear = super().get_quantize_ops()
        return _Pack(linear, self.quantization_config.bnb_4bit_use_double_quant, self.shards)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """Replace the packed parameters with modules, and have transformers compute them with `compute_experts`."""
        for module in list(model.modules()):
            if is_experts(module):
                for name in projections_of(module):
                    packed = module._parameters.pop(name)
                    module.add_module(name, packed.experts.to(packed.device))
                compute_here(module)
        return super()._process_model_after_weight_loading(model, **kwargs)


class _Pack(ConversionOps):  # type: ignore[misc]  # transformers' is untyped
    """Pack a projection of fused experts here, and a linear layer's weight as bitsandbytes does."""

    def __init__(self, linear: ConversionOps, double_quantization: bool, shards: ShardLoader | None) -> None:
        self.linear, self.double_quantization, self.shards = linear, double_quantization, shards

    def convert(self, input_dict: dict[str, Any], model: Any = None, **kwargs: Any) -> dict[str, Any]:
        """Convert name -> weights as read to name -> parameter of the model."""
        found: dict[str, Any] = {}
        for name, value in input_dict.items():
            whole = value[0] if isinstance(value, list) else value
            if _is_projection(model, name):
                experts = PackedExperts(whole, self.double_quantization)
                if self.shards is not None and self.shards.is_in_layer(name):
                    self.shards.keep_experts(name, experts)
                found[name] = _standing_for(experts)
            elif self.shards is not None and self.shards.is_vocabulary(name):
                found[name] = self.shards.keep_rows(name, whole)
            else:
                found |= self.linear.convert({name: value}, model=model, **kwargs)
                if self.shards is not None and self.shards.is_in_layer(name):
                    found[name] = self.shards.keep_linear(name, found[name])
        return found


def _standing_for(experts: PackedExperts) -> nn.Parameter:
    """A parameter that stands for the packed experts while transformers loads the model."""
    parameter = nn.Parameter(experts.packed.detach(), requires_grad=False)
    parameter.experts = experts  # type: ignore[attr-defined]
    return parameter


def _is_projection(model: Any, name: str) -> bool:
    module, parameter = get_module_from_name(model, name)
    return is_experts(module) and parameter in projections_of(module)
