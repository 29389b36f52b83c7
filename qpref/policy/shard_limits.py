"""Models that processes can't share a base of, refused by their config before any weight is read."""

from __future__ import annotations

from typing import Any

from qpref.attention.states import layers_with_state
from qpref.errors import PolicyError
from qpref.policy.architecture import decoder_layers, empty_model, shared_layers, text_decoder
from qpref.policy.pretrained import read_config
from qpref.policy.source import BaseFolder
from qpref.recipe.sections import ModelSection

HINT = "set [distributed] shard_base = false, with a GPU that holds the whole base, or take another base"


def refuse_unshardable(section: ModelSection, base: BaseFolder) -> None:
    """Refuse a base that can't be divided between processes layer by layer.

    Raises:
        PolicyError: it can't; the message says why.
    """
    if base.is_prequantized:
        raise PolicyError(
            "[distributed] shard_base: the files of this base are in 4 bits already, which transformers reads whole",
            "name the original model with 16-bit weights: each process quantizes it and keeps its part",
        )
    if section.quantization == "none":
        raise PolicyError(
            "[distributed] shard_base: processes share 4-bit bases alone", 'set [model] quantization = "nf4"'
        )
    config = read_config(base.path)
    if (reason := reason_against_sharding(empty_model(config, base.path))) is not None:
        raise PolicyError(f"[distributed] shard_base: this {config.model_type} model {reason}", HINT)


def reason_against_sharding(model: Any) -> str | None:
    """Say why a model on the meta device can't be sharded; None where it can."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers, decoder = decoder_layers(model), text_decoder(model)
    if not all(isinstance(layer, GradientCheckpointingLayer) for layer in layers) or not layers:
        return "has no decoder layers that transformers knows as such"
    names = {id(module): name for name, module in model.named_modules()}
    inside = [f"{names[id(layer)]}.{name}" for layer in layers for name, _ in layer.named_modules() if name]
    if shared := shared_layers(model, inside):
        return f"has layers that share their weights, the first is {shared[0]}"
    if state := next(layers_with_state(decoder), None):
        return (
            f"has layers with a state, the first is {state[0]}: qpref computes them in parts, which FSDP2 can't follow"
        )
    return None
