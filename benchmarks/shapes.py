"""Generate the benchmark's models: shapes of real models with random weights, and a tokenizer for given ids.

A step's cost doesn't depend on the values of the weights, so nothing is downloaded. The tokenizer's word for token 17
is `t17`: all sides read the same text, and get exactly the given ids through their own tokenizing code.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

END = 1
"""End-of-sequence token; also the padding token, as in many real tokenizers."""
FIRST_WORD = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A Llama's sizes, by their names in config.json.

    Attributes:
        tied: the output head is the embedding's weight.
        qkv_bias: queries, keys and values have a bias, which makes it a Qwen2.
    """

    name: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    tied: bool
    qkv_bias: bool = False

    @property
    def query_width(self) -> int:
        return self.num_attention_heads * self.head_dim

    @property
    def key_width(self) -> int:
        return self.num_key_value_heads * self.head_dim

    def linear_sizes(self) -> dict[str, tuple[int, int]]:
        """List rows and columns of one layer's linear weights, by their names in the checkpoint."""
        hidden, inner, query, key = self.hidden_size, self.intermediate_size, self.query_width, self.key_width
        return {
            "self_attn.q_proj": (query, hidden),
            "self_attn.k_proj": (key, hidden),
            "self_attn.v_proj": (key, hidden),
            "self_attn.o_proj": (hidden, query),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }


def _shape(
    name: str,
    hidden: int,
    inner: int,
    layers: int,
    heads: tuple[int, int, int],
    vocab: int,
    tied: bool,
    qkv_bias: bool = False,
) -> Shape:
    return Shape(
        name=name,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        head_dim=heads[2],
        vocab_size=vocab,
        tied=tied,
        qkv_bias=qkv_bias,
    )


SHAPES = {
    shape.name: shape
    for shape in (
        _shape("tiny", 64, 128, 2, (4, 2, 16), 320, True),
        _shape("135M", 576, 1536, 30, (9, 3, 64), 49152, True),  # SmolLM2-135M
        _shape("1B", 2048, 8192, 16, (32, 8, 64), 128256, True),  # Llama-3.2-1B
        _shape("3B", 3072, 8192, 28, (24, 8, 128), 128256, True),  # Llama-3.2-3B
        _shape("7B", 3584, 18944, 28, (28, 4, 128), 152064, False, True),  # Qwen2.5-7B
        _shape("8B", 4096, 14336, 32, (32, 8, 128), 128256, False),  # Llama-3.1-8B
    )
}


def make_base(shape: Shape, folder: Path, *, nf4: bool = False, device: str = "cpu") -> Path:
    """Write a Hugging Face folder with random bf16 weights, one file per layer, to hold only one layer in memory.

    Args:
        nf4: write the layers' matrices in bitsandbytes' NF4 with double quantization, a quarter of the bytes, which
            need no quantizing when the model is loaded.
        device: where the weights are made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _write_config(shape, folder, nf4)
    _write_tokenizer(shape, folder)
    generator = torch.Generator(device).manual_seed(0)
    weight_map = _write_shard(folder, "ends", _end_weights(shape, generator))
    for layer in range(shape.num_hidden_layers):
        weights = _layer_weights(shape, layer, generator)
        weight_map |= _write_shard(folder, f"layer-{layer:03}", _in_nf4(weights) if nf4 else weights)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def _random(generator: torch.Generator, *sizes: int) -> torch.Tensor:
    return torch.empty(*sizes, dtype=torch.bfloat16, device=generator.device).normal_(std=0.02, generator=generator)


def _end_weights(shape: Shape, generator: torch.Generator) -> dict[str, torch.Tensor]:
    size = shape.vocab_size, shape.hidden_size
    weights = {"model.embed_tokens.weight": _random(generator, *size)}
    weights["model.norm.weight"] = torch.ones(shape.hidden_size, dtype=torch.bfloat16)
    return weights if shape.tied else weights | {"lm_head.weight": _random(generator, *size)}


def _layer_weights(shape: Shape, layer: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    prefix, weights = f"model.layers.{layer}.", {}
    for name, (rows, columns) in shape.linear_sizes().items():
        weights[f"{prefix}{name}.weight"] = _random(generator, rows, columns)
        if shape.qkv_bias and name.endswith(("q_proj", "k_proj", "v_proj")):
            weights[f"{prefix}{name}.bias"] = _random(generator, rows)
    for name in ("input_layernorm", "post_attention_layernorm"):
        weights[f"{prefix}{name}.weight"] = torch.ones(shape.hidden_size, dtype=torch.bfloat16)
    return weights


def _in_nf4(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Quantize the matrices as in a checkpoint of bitsandbytes: packed, their scales as further tensors."""
    from bitsandbytes.functional import quantize_4bit

    found = {}
    for name, weight in weights.items():
        if weight.dim() < 2:
            found[name] = weight
            continue
        packed, state = quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
        found[name] = packed
        found |= {f"{name}.{part}": tensor for part, tensor in state.as_dict(packed=True).items()}
    return found


def _write_shard(folder: Path, name: str, weights: dict[str, torch.Tensor]) -> dict[str, str]:
    from safetensors.torch import save_file

    file = f"{name}.safetensors"
    save_file({key: weight.cpu() for key, weight in weights.items()}, folder / file, metadata={"format": "pt"})
    return dict.fromkeys(weights, file)


def _write_config(shape: Shape, folder: Path, nf4: bool) -> None:
    sizes: dict[str, Any] = asdict(shape)
    del sizes["name"], sizes["tied"], sizes["qkv_bias"]
    config = sizes | {
        "architectures": ["Qwen2ForCausalLM" if shape.qkv_bias else "LlamaForCausalLM"],
        "model_type": "qwen2" if shape.qkv_bias else "llama",
        "tie_word_embeddings": shape.tied,
        "max_position_embeddings": 16384,
        "rope_theta": 100000.0,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "dtype": "bfloat16",
        "bos_token_id": None,
        "eos_token_id": END,
        "pad_token_id": END,
    }
    if nf4:
        config["quantization_config"] = {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": "bfloat16",
        }
    (folder / "config.json").write_text(json.dumps(config))


def word(token: int) -> str:
    """Return the tokenizer's word for a token; the end token's is no prefix of another, since special tokens are also
    matched inside words."""
    return "</s>" if token == END else f"t{token}"


def _write_tokenizer(shape: Shape, folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word(token): token for token in range(shape.vocab_size)}
    backend = Tokenizer(models.WordLevel(words, unk_token=word(0)))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=word(END), pad_token=word(END)).save_pretrained(folder)
