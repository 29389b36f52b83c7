"""Architectures of the matrix: those that transformers maps to a causal or an image-text model, each made tiny."""

from __future__ import annotations

from typing import Any

from conftest import VOCABULARY
from tiny_models import SIZES, TinyModel, config_has

# Left out, by reason. An architecture that qpref refuses isn't left out: its row has the refusal's words.
NEEDS_IMAGE = "its forward pass requires an image, audio, a language or an encoder's output"
NOT_INSTALLED = "its code requires a package that isn't installed here"
NO_TEXT_DECODER = "it has no decoder of text that a configuration alone makes"
NOT_SMALL = "the sizes of its parts can't all be set, or its settings must fit each other in ways that small ones don't"
NOT_RUN = "its tiny model doesn't run in transformers itself"
LEFT_OUT: dict[str, str] = {
    **dict.fromkeys(("blip", "kosmos-2", "pix2struct", "pp_formulanet", "xmod"), NEEDS_IMAGE),
    **dict.fromkeys(("fast_vlm", "gemma3n", "perception_lm", "inkling_mm_model"), NOT_INSTALLED),
    **dict.fromkeys(
        ("chameleon", "evolla", "git", "idefics", "mistral4", "musicgen", "musicgen_melody"), NO_TEXT_DECODER
    ),
    **dict.fromkeys(("pi0", "prophetnet", "t5gemma2", "udop", "vision-encoder-decoder"), NO_TEXT_DECODER),
    **dict.fromkeys(("apertus1p5", "blenderbot", "blip-2", "blt", "deepseek_vl_hybrid", "ernie4_5_vl_moe"), NOT_SMALL),
    **dict.fromkeys(("florence2", "gemma4_assistant", "gemma4_unified_assistant", "glm5_next", "inkling2"), NOT_SMALL),
    **dict.fromkeys(("inkling2_loop", "instructblip", "instructblipvideo", "janus", "molmo2", "dots3_note"), NOT_SMALL),
    **dict.fromkeys(("moss_transcribe_diarize", "muse_glimmer", "muse_spark", "nemotron_h_omni", "ovis2"), NOT_SMALL),
    **dict.fromkeys(("phi4_multimodal", "qwen2_5_omni_thinker", "qwen3_omni_moe_thinker", "unlimited_ocr"), NOT_SMALL),
    **dict.fromkeys(("cohere_compass", "cohere_compass_text", "dbrx", "deepseek_ocr2", "emu3"), NOT_RUN),
    **dict.fromkeys(
        ("granite4_vision", "hunyuan_vl", "jetmoe", "reformer", "diffusion_gemma", "step3p7", "xlnet", "zamba2"),
        NOT_RUN,
    ),
}

FULL_AND_SLIDING = ["sliding_attention", "full_attention"]
CHANGES: dict[str, dict[str, Any]] = {
    "codegen": {"rotary_dim": 16},
    "falcon_h1": {"lm_head_multiplier": 0.5},
    "gemma3_text": {"layer_types": FULL_AND_SLIDING, "query_pre_attn_scalar": 16},
    "gemma4_text": {"layer_types": FULL_AND_SLIDING, "global_head_dim": 32},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 16},
    "gptj": {"rotary_dim": 16},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "inkling2_loop_text": {"unpadded_vocab_size": VOCABULARY},
    "inkling2_text": {"unpadded_vocab_size": VOCABULARY},
    "kimi_linear": {"linear_head_dim": 16, "linear_num_heads": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "plbart": {"encoder_attention_heads": 4, "decoder_attention_heads": 4},
    "qwen3_5_moe_text": {"num_hidden_layers": 4},
    "qwen3_5_text": {"num_hidden_layers": 4},
    "qwen3_next": {"num_hidden_layers": 4},
    "whisper": {"encoder_attention_heads": 4, "decoder_attention_heads": 4},
    "zamba": {"num_hidden_layers": 4, "layer_types": ["mamba", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1},
}
"""Settings of text models whose defaults don't fit small sizes, or would leave out a kind of their layers."""
OWN: dict[str, tuple[str, ...]] = {
    "gemma4_text": ("num_experts", "num_experts_per_tok", "moe_intermediate_size"),
    "xlstm": ("v_head_dim",),
}
"""Sizes that keep the architecture's default."""
TEXT: dict[str, dict[str, Any]] = {
    "gemma3": {"layer_types": FULL_AND_SLIDING, "query_pre_attn_scalar": 16},
    "qwen3_5": {"num_hidden_layers": 4},
    "qwen3_5_moe": {"num_hidden_layers": 4},
}
"""Settings of the text parts of multimodal models."""
WHOLE: dict[str, dict[str, Any]] = {"gemma3": {"mm_tokens_per_image": 4}}
"""Settings of multimodal models beside their parts."""
ROTATED: dict[str, float] = {
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "paddleocr_vl"), 1.0),
    **dict.fromkeys(("glm4v", "glm46v", "glm_ocr", "glmga", "glm4v_moe"), 0.5),
}
"""Share of a head that rotates, of models without RoPE settings whose code falls back to large sections."""


def architectures() -> list[str]:
    """Names of transformers' model types in the matrix."""
    return sorted((_causal().keys() | _image_text().keys()) - LEFT_OUT.keys())


def tiny_model(name: str) -> TinyModel:
    """The tiny random model of an architecture."""
    from transformers import CONFIG_MAPPING

    kind = CONFIG_MAPPING[name]
    if name in _image_text() and "text_config" in getattr(kind, "sub_configs", {}):
        default = kind()
        text = _fitting(type(default.text_config), ROTATED.get(name)) | TEXT.get(name, {})
        return TinyModel(
            model_type=name,
            class_name=_image_text()[name],
            text=text,
            config=_small_token_ids(default) | WHOLE.get(name, {}),
        )
    return TinyModel(model_type=name, config=_fitting(kind) | CHANGES.get(name, {}), own=OWN.get(name, ()))


def _causal() -> dict[str, str]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def _image_text() -> dict[str, str]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    return dict(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)


def _fitting(kind: Any, rotated: float | None = None) -> dict[str, Any]:
    """Settings of a text model that depend on its other sizes."""
    default, changes = kind(), {}
    if config_has(default, "kv_lora_rank"):
        changes["num_key_value_heads"] = SIZES["num_attention_heads"]
    rope = getattr(default, "rope_parameters", None)
    if rotated is not None:
        rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": rotated, "mrope_section": []}
    if isinstance(rope, dict) and "mrope_section" in rope:
        changes["rope_parameters"] = rope | {"mrope_section": _sections(rope)}
    return changes


def _sections(rope: dict[str, Any]) -> list[int]:
    """Split half of a rotating head between time, height and width."""
    half = int(SIZES["head_dim"] * rope.get("partial_rotary_factor", 1)) // 2
    side = half * 3 // 8
    return [half - 2 * side, side, side]


def _small_token_ids(default: Any) -> dict[str, int]:
    """Ids of a multimodal model's own tokens, inside the small vocabulary."""
    names = sorted(name for name in vars(default) if name.endswith(("_token_id", "_token_index")))
    free = range(VOCABULARY - len(names), VOCABULARY)
    return {name: token for name, token in zip(names, free, strict=True) if name not in SIZES}
