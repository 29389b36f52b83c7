"""A model's shape: all that memory and time depend on, read from its config without a weight.

The config's model is built on torch's meta device, which holds sizes alone, so whatever transformers can load has its
true layers here, not those of a formula for Llamas.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qpref.errors import PolicyError
from qpref.memory.known_shapes import FoundConfig, base_config, named_config
from qpref.recipe.sections import AdapterSection, ModelSection

READERS = (
    *("q_", "k_", "v_", "qkv", "query", "key", "value", "c_attn", "W_pack"),
    *("gate", "up", "fc1", "w1", "w3", "c_fc", "dense_h_to"),
)
"""How linear layers that read a layer's normed input are called; the others write to the residual stream."""


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear layer of a decoder layer.

    Attributes:
        name: within its decoder layer, such as `self_attn.q_proj`.
        rank: of its adapter; 0 for none.
    """

    name: str
    inputs: int
    outputs: int
    rank: int

    @property
    def numel(self) -> int:
        return self.inputs * self.outputs

    @property
    def in_attention(self) -> bool:
        return "attn" in self.name or "attention" in self.name

    @property
    def reads_residual(self) -> bool:
        """Whether it reads the same normed hidden states as its siblings do."""
        return self.name.rpartition(".")[2].startswith(READERS)


@dataclass(frozen=True, slots=True)
class Layer:
    """A decoder layer.

    Attributes:
        norms: of each norm, how many numbers a token it normalizes, and in how many groups of their own.
    """

    linears: tuple[Linear, ...]
    norms: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """What costs depend on.

    Attributes:
        origin: where the config came from, for people.
        hidden: width of the residual stream.
        query, key: width of all queries, and of all keys (as of all values), of one token.
        intermediate: width inside the MLP.
        tied: the head is the embedding's weight.
        head_rank: of the head's adapter; 0 for none.
        layers: the decoder layers.
        ends: parameters of the embeddings and the head, a tied one once.
        rest: all other parameters outside the linear layers of `layers`: norms, biases, what isn't quantized.
        rotary: numbers a token in the cosine and sine tables.
        window: positions that a layer with a sliding window sees; None without such layers.
        shares_prompts: whether prompts can be computed once for all their branches.
        capped: scores are capped, which needs an attention that keeps them all.
        quantized: the base is 4-bit already: whether with double quantization; None where it isn't.
    """

    origin: str
    hidden: int
    query: int
    key: int
    heads: int
    intermediate: int
    vocabulary: int
    tied: bool
    head_rank: int
    layers: tuple[Layer, ...]
    ends: int
    rest: int
    rotary: int
    window: int | None
    shares_prompts: bool
    capped: bool
    quantized: bool | None

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def linears(self) -> list[Linear]:
        return [linear for layer in self.layers for linear in layer.linears]

    @property
    def matmul_parameters(self) -> int:
        """Weights of the linear layers of the blocks."""
        return sum(linear.numel for linear in self.linears)

    @property
    def parameters(self) -> int:
        return self.matmul_parameters + self.ends + self.rest

    @property
    def adapter_sizes(self) -> list[int]:
        """Weights of each of the adapter's matrices."""
        ends = [(self.head_rank, self.hidden, self.vocabulary)]
        layers = [(linear.rank, linear.inputs, linear.outputs) for linear in self.linears]
        return [rank * width for rank, *widths in layers + ends if rank for width in widths]


def model_shape(model: ModelSection, adapter: AdapterSection, named: str | None = None) -> ModelShape:
    """The shape of a recipe's base, with its adapter. Nothing but a config.json is ever fetched.

    Args:
        named: `--shape`: a folder with config.json, or a known shape's name; wins over the base.

    Raises:
        PolicyError: no config can be found or read, or the adapter doesn't fit it.
    """
    found = named_config(named) if named else base_config(model)
    return read_shape(found, adapter)


def read_shape(found: FoundConfig, adapter: AdapterSection) -> ModelShape:
    """The shape of a config's model, built without memory.

    Raises:
        PolicyError: it is no causal language model that transformers knows, or the adapter's targets aren't in it.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from qpref.attention.register import reasons_against_sharing

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(found.config, trust_remote_code=False)
    except (ValueError, KeyError, TypeError, ImportError, RuntimeError) as error:
        raise PolicyError(f"{found.origin}: transformers can't build this model: {error}") from error
    config = model.config.get_text_config()
    heads = int(config.num_attention_heads)
    width = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    ranks = _ranks(model, adapter)
    layers = _layers(model, ranks, heads * width)
    output = model.get_output_embeddings()
    embedding, head = model.get_input_embeddings().weight, output.weight
    tied = bool(config.tie_word_embeddings)
    ends = embedding.numel() + (0 if tied else head.numel())
    linear = sum(linear.numel for layer in layers for linear in layer.linears)
    total = sum(value.numel() for value in model.parameters())
    capped = bool(getattr(config, "attn_logit_softcapping", None))
    return ModelShape(
        origin=found.origin,
        hidden=int(config.hidden_size),
        query=heads * width,
        key=int(getattr(config, "num_key_value_heads", None) or heads) * width,
        heads=heads,
        intermediate=int(getattr(config, "intermediate_size", None) or 4 * config.hidden_size),
        vocabulary=head.shape[0],
        tied=tied,
        head_rank=max((ranks.get(name, 0) for name, module in model.named_modules() if module is output), default=0),
        layers=layers,
        ends=ends,
        rest=total - ends - linear,
        rotary=_rotary(config, width),
        window=_window(config),
        shares_prompts=not capped and not reasons_against_sharing(model),
        capped=capped,
        quantized=_quantized(found.config),
    )


def _layers(model: Any, ranks: Mapping[str, int], query: int) -> tuple[Layer, ...]:
    from torch import nn
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = []
    for place, layer in model.named_modules():
        if not isinstance(layer, GradientCheckpointingLayer):
            continue
        linears = [
            Linear(name, module.in_features, module.out_features, ranks.get(f"{place}.{name}", 0))
            for name, module in layer.named_modules()
            if isinstance(module, nn.Linear)
        ]
        norms = [
            _norm(name.rpartition(".")[2], module, linears, query)
            for name, module in layer.named_modules()
            if "Norm" in type(module).__name__ and getattr(module, "weight", None) is not None
        ]
        layers.append(Layer(tuple(linears), tuple(norms)))
    return tuple(layers)


def _norm(name: str, norm: Any, linears: list[Linear], query: int) -> tuple[int, int]:
    """How many numbers a token a norm normalizes, and in how many groups: those of queries and keys go by heads."""
    size = norm.weight.numel()
    if not name.startswith(("q_", "k_")):
        return size, 1
    own = [linear.outputs for linear in linears if linear.name.endswith(f"{name[:2]}proj")]
    total = own[0] if own else query
    return total, total // size


def _ranks(model: Any, adapter: AdapterSection) -> dict[str, int]:
    """Rank of the adapter of each linear layer that gets one, by the layer's whole name."""
    from qpref.policy import adapter_folder
    from qpref.policy.targets import matches, target_layers

    if adapter.start is None:
        return dict.fromkeys(target_layers(model, adapter.targets), adapter.rank)
    start = adapter_folder.read_settings(Path(adapter.start))
    try:
        rank, targets = int(start["r"]), start["target_modules"]
    except (ValueError, KeyError, TypeError) as error:
        raise PolicyError(f"{adapter.start}: no adapter in PEFT's format: {error!r}") from error
    layers = target_layers(model, "all-linear")
    if isinstance(targets, str) and targets != "all-linear":
        layers = {name for name in layers if re.fullmatch(targets, name)}
    elif isinstance(targets, list):
        layers = {name for name in layers if any(matches(name, target) for target in targets)}
    return dict.fromkeys(layers, rank)


def _rotary(config: Any, width: int) -> int:
    """Numbers in one token's cosines and sines, of each kind of layer that has its own."""
    parameters = getattr(config, "rope_parameters", None) or {}
    kinds = [value for value in parameters.values() if isinstance(value, dict)] or [parameters]
    return sum(2 * int(width * float(kind.get("partial_rotary_factor") or 1)) for kind in kinds)


def _window(config: Any) -> int | None:
    kinds = getattr(config, "layer_types", None)
    if kinds and "sliding_attention" not in kinds:
        return None
    window = getattr(config, "sliding_window", None)
    return int(window) if window and getattr(config, "use_sliding_window", True) else None


def _quantized(config: Any) -> bool | None:
    settings = getattr(config, "quantization_config", None)
    if not isinstance(settings, dict) or not settings.get("load_in_4bit"):
        return None
    return bool(settings.get("bnb_4bit_use_double_quant"))
