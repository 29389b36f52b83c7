"""Tiny random models of any architecture that transformers knows, multimodal ones included.

An architecture's own defaults are kept but for its sizes. The weights are drawn large enough that attention, experts
and adapters change the logits: transformers' own start values make nearly every model a uniform one.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from conftest import VOCABULARY, make_tokenizer

MAX_WEIGHTS = 20_000_000
"""A config with a size that SIZES doesn't know makes a model of billions."""

# Every size under the names that configs give it; a config takes those that it has.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim"), 64),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "ffn_size", "block_ff_dim"), 128),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_global_key_value_heads"), 2),
    **dict.fromkeys(("head_dim", "global_head_dim", "v_head_dim", "qk_rope_head_dim", "qk_nope_head_dim"), 16),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 32),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 1024),
    # experts
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_intermediate_size"), 32),
    **dict.fromkeys(("num_dense_layers", "first_k_dense_replace", "num_shared_experts", "n_shared_experts"), 1),
    **dict.fromkeys(("n_group", "topk_group"), 1),
    "num_experts_per_tok": 2,
    "intermediate_size_mlp": 128,
    # recurrent and convolutional layers
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size", "mamba_dt_rank"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_chunk_size", "chunk_size"), 16),
    **dict.fromkeys(("mamba_n_groups", "n_groups"), 1),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 16),
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_d_ssm": 128,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    # Gemma-3n
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCABULARY,
    "num_kv_shared_layers": 0,
    "laurel_rank": 8,
    "altup_num_inputs": 2,
    # windows
    "sliding_window": 16,
    "attention_chunk_size": 64,
    "vocab_size": VOCABULARY,
    "bos_token_id": 257,
    "eos_token_id": 258,
    "pad_token_id": 256,
}
OPTIONAL = ("sliding_window", "q_lora_rank")
"""Sizes that an architecture switches off with None."""
VISION_SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "embed_dim", "vision_output_dim", "projector_input_dim"), 32),
    **dict.fromkeys(("intermediate_size", "out_hidden_size"), 64),
    **dict.fromkeys(("num_hidden_layers", "depth"), 1),
    **dict.fromkeys(("num_attention_heads", "num_heads"), 2),
    "projector_output_dim": 32,
    "image_size": 28,
    "patch_size": 14,
    "head_dim": 16,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [],
    "fullatt_block_indexes": [0],
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyModel:
    """A tiny random model.

    Attributes:
        model_type: transformers' name of the architecture.
        config: further settings.
        own: sizes that keep the architecture's default.
        class_name: the model's class; None for the one that AutoModelForCausalLM takes.
        text, vision: settings of a multimodal model's parts; text is None for a text model.
        written: changes to the config.json that is written.
        foreign: name -> shape of tensors in the file that aren't the model's.
        seed: of its weights.
    """

    model_type: str
    config: Mapping[str, Any] = field(default_factory=dict)
    own: Collection[str] = ()
    class_name: str | None = None
    text: Mapping[str, Any] | None = None
    vision: Mapping[str, Any] = field(default_factory=dict)
    written: Mapping[str, Any] = field(default_factory=dict)
    foreign: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    seed: int = 0

    def configuration(self) -> Any:
        from transformers import CONFIG_MAPPING

        kind = CONFIG_MAPPING[self.model_type]
        if self.text is None:
            return _small(kind, SIZES, self.config, self.own)
        default = kind()
        parts = {"text_config": _small(type(default.text_config), SIZES, self.text, self.own).to_dict()}
        if getattr(default, "vision_config", None) is not None:
            parts["vision_config"] = _small(type(default.vision_config), VISION_SIZES, self.vision).to_dict()
        return kind(**parts, **self.config)

    def make(self) -> Any:
        """The model in float32."""
        import transformers

        config = self.configuration()
        create = transformers.AutoModelForCausalLM.from_config
        if self.class_name is not None:
            create = getattr(transformers, self.class_name)
        with torch.device("meta"):
            size = sum(weight.numel() for weight in create(config).parameters())
        assert size < MAX_WEIGHTS, f"{self.model_type} has {size / 1e6:.0f} million weights"
        torch.manual_seed(self.seed)
        model = create(config).float()
        for name, weight in model.named_parameters():
            _draw(name, weight.data)
        return model

    def write(self, folder: Path) -> Path:
        """Write the model and a tokenizer of bytes to a folder."""
        self.make().save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | dict(self.written), indent=1))
        if self.foreign:
            _add_tensors(folder / "model.safetensors", self.foreign)
        return folder


def _small(kind: Any, sizes: Mapping[str, Any], changes: Mapping[str, Any], own: Collection[str] = ()) -> Any:
    """A config of a class with the sizes that it has, and changes after them."""
    default = kind()
    taken = {name: size for name, size in sizes.items() if name not in own and config_has(default, name)}
    for name in OPTIONAL:
        if name in taken and getattr(default, name) is None:
            del taken[name]
    if isinstance(getattr(kind, "head_dim", None), property):
        taken.pop("head_dim", None)
    return kind(**{**taken, **changes})


def config_has(config: Any, name: str) -> bool:
    """Tell whether a config has a setting, be it one that differs between layers."""
    try:
        return hasattr(config, name)
    except RuntimeError:  # it differs between layers
        return True


def _draw(name: str, weight: torch.Tensor) -> None:
    """Draw a weight from torch's generator, but for those whose start values mean something."""
    if weight.dim() >= 2 and "conv" not in name and "A_log" not in name:
        weight.normal_(std=0.5 if "embed" in name else 0.08)
    elif name.endswith("bias"):
        weight.normal_(std=0.05)
    elif "sinks" in name:
        weight.normal_()


def _add_tensors(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    from safetensors.torch import load_file, save_file

    added = {name: torch.randn(shape) for name, shape in shapes.items()}
    save_file(load_file(path) | added, path, metadata={"format": "pt"})
