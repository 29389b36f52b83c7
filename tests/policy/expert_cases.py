"""Mixtures of experts, and the same models with dense weights by transformers alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from tiny_models import TinyModel

from qpref.policy.experts import packed_names, through_nf4

TOKENS = torch.arange(60).view(3, 20) % 200
KINDS = {
    "mixtral": TinyModel(model_type="mixtral"),
    "qwen3_moe": TinyModel(model_type="qwen3_moe"),
    "olmoe": TinyModel(model_type="olmoe", config={"norm_topk_prob": True}),
    "gpt_oss": TinyModel(model_type="gpt_oss"),  # transposed and interleaved, biases, an activation with a limit
    "nemotron_h": TinyModel(model_type="nemotron_h"),  # no gate
}


@torch.no_grad()
def dense(base: Path, packed: Any, double_quantization: bool) -> Any:
    """The same model by transformers alone, with the rounded experts and linear layers of `packed` in float32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval().requires_grad_(False)
    for name in packed_names(packed):
        weights = model.get_parameter(name)
        weights.copy_(through_nf4(weights, double_quantization))
    for name, module in packed.named_modules():
        if hasattr(module, "support_avx512bf16_for_cpu") and hasattr(module.weight, "quant_state"):
            module.support_avx512bf16_for_cpu = False
            plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
            model.get_submodule(plain).weight.copy_(dequantize_4bit(module.weight, module.weight.quant_state))
    return model
