"""Log-probabilities by plain transformers, bitsandbytes and PEFT: nothing here imports qpref."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from conftest import SPECIAL_TOKENS

Pair = dict[str, Any]


def model_classes(folder: Path) -> tuple[Any, Any]:
    """The class that config.json names, and the one that AutoModelForCausalLM takes where it takes any."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    (name,) = json.loads((folder / "config.json").read_text())["architectures"]
    named = getattr(transformers, name)
    mapped = type(config) in transformers.AutoModelForCausalLM._model_mapping
    return named, transformers.AutoModelForCausalLM if mapped else named


def load(kind: Any, folder: Path, *, nf4: bool, dtype: torch.dtype = torch.float32) -> Any:
    """Load a model with transformers; in NF4, bitsandbytes' own layers dequantize it in each product."""
    from transformers import BitsAndBytesConfig

    settings = {}
    if nf4:
        settings["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    model = kind.from_pretrained(folder, dtype=dtype, device_map={"": "cpu"}, **settings).eval()
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # such a layer computes in bf16, whatever its inputs
    return model


def fused_experts(model: Any) -> list[torch.nn.Parameter]:
    """Weights of all experts of a layer in one tensor, which bitsandbytes passes over."""
    return [weight for name, weight in model.named_parameters() if "expert" in name and weight.dim() == 3]


def has_expert_layers(model: Any) -> bool:
    """Tell whether experts are layers of their own, which bitsandbytes quantizes."""
    return any("experts." in name and hasattr(module, "weight") for name, module in model.named_modules())


@torch.no_grad()
def round_experts(model: Any) -> None:
    """Round fused experts through NF4, matrix by matrix."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    for weight in fused_experts(model):
        for matrix in weight:
            packed = quantize_4bit(matrix.contiguous(), quant_type="nf4", compress_statistics=True)
            matrix.copy_(dequantize_4bit(*packed))


@torch.no_grad()
def logprobs(model: Any, tokenizer: Any, pairs: Sequence[Pair]) -> torch.Tensor:
    """Log-probabilities of all responses' tokens, each response in a row of its own without padding.

    Returns:
        [S] float32, chosen before rejected, pair after pair.
    """
    pieces = []
    for pair in pairs:
        for side in ("chosen", "rejected"):
            prompt, response = token_ids(tokenizer, pair, side)
            ids = torch.tensor([prompt + response])
            model(input_ids=ids[:, :5], use_cache=False)  # resets a RoPE that a longer row has changed
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0, :-1]
            scored = logits.float().log_softmax(-1).gather(1, ids[0, 1:, None])
            pieces.append(scored[len(prompt) - 1 :, 0])
    return torch.cat(pieces)


def token_ids(tokenizer: Any, pair: Pair, side: str) -> tuple[list[int], list[int]]:
    """Token ids of a pair's prompt, with the header of the answer, and of one response with its end of turn."""
    messages = [{"role": "user", "content": pair["prompt"]}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    return prompt, tokenizer(pair[side] + SPECIAL_TOKENS[2], add_special_tokens=False)["input_ids"]


def totals(values: torch.Tensor, tokenizer: Any, pairs: Sequence[Pair]) -> tuple[float, float]:
    """Means over the pairs of the chosen and of the rejected responses' log-probabilities."""
    lengths = [len(token_ids(tokenizer, pair, side)[1]) for pair in pairs for side in ("chosen", "rejected")]
    sums = [piece.double().sum().item() for piece in values.split(lengths)]
    return sum(sums[::2]) / len(pairs), sum(sums[1::2]) / len(pairs)


def runs_on_text(model: Any) -> bool:
    """Tell whether a multimodal class runs on text; some of some versions of transformers can only be loaded."""
    try:
        with torch.no_grad():
            model(input_ids=torch.tensor([[1, 2, 3]]), use_cache=False)
    except (AttributeError, TypeError, ValueError, RuntimeError):
        return False
    return True


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder's safetensors files."""
    from safetensors.torch import load_file

    return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}
