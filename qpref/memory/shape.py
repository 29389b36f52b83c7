"""A model's shape: the sizes that memory and time depend on, read from its config without any weights.

The model is built from its config on torch's meta device, which holds sizes alone. So the layers are the true ones of
any model that transformers can load, instead of a formula for Llamas.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qpref.errors import PolicyError
from qpref.memory.config_sizes import attention_sizes, double_quantization, rotary, window
from qpref.memory.experts import Experts, read_experts
from qpref.memory.known_shapes import FoundConfig, base_config, named_config
from qpref.recipe.sections import AdapterSection, ModelSection

READERS = (
    *("q_", "k_", "v_", "qkv", "query", "key", "value", "c_attn", "W_pack"),
    *("gate", "up", "fc1", "w1", "w3", "c_fc", "dense_h_to"),
)
"""Name prefixes of linear layers that read a layer's normed input; the others write to the residual stream."""


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear layer of a decoder layer.

    Attributes:
        name: within its decoder layer, such as `self_attn.q_proj`.
        rank: of its adapter; 0 for none.
        packed: NF4 packs it; bitsandbytes passes over classes of a family's own and over weights that layers share.
    """

    name: str
    inputs: int
    outputs: int
    rank: int
    packed: bool = True

    @property
    def numel(self) -> int:
        return self.inputs * self.outputs

    @property
    def in_attention(self) -> bool:
        return "attn" in self.name or "attention" in self.name

    @property
    def reads_residual(self) -> bool:
        """True where its input is the normed hidden states, which its siblings read too."""
        return self.name.rpartition(".")[2].startswith(READERS)


@dataclass(frozen=True, slots=True)
class Layer:
    """A decoder layer.

    Attributes:
        experts: its experts, where NF4 packs them or they have an adapter; others count as `other_parameters`.
        norms: for each norm the numbers that it normalizes per token, and the groups that they fall into.
        fuses_norms: the norms keep 16-bit inputs.
        reads_norms: attention and MLP read fused norms, from whose inputs theirs are recomputed.
        fuses_mlp: the MLP is a gated one that keeps the outputs of gate and up alone.
    """

    linears: tuple[Linear, ...]
    norms: tuple[tuple[int, int], ...]
    fuses_norms: bool = True
    reads_norms: bool = True
    fuses_mlp: bool = True
    experts: Experts | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Sizes and properties of a model that costs depend on.

    Attributes:
        origin: source of the config, for messages.
        hidden: width of the residual stream.
        query_width, key_width: width of all queries, and of all keys (and of all values), of one token.
        head_rank: rank of the head's adapter; 0 for none.
        layers: the decoder layers.
        embeddings: parameters of embeddings and head; a tied head counts once.
        other_parameters: parameters outside embeddings, head, linear layers and packed experts, never quantized: norms,
            biases, routers.
        unpacked_experts: of `other_parameters`, those of experts.
        rotary: numbers per token in the cosine and sine tables.
        window: positions that a layer with a sliding window sees; None without such layers.
        shares_prompts: prompts can be computed once for all their branches.
        plain_attention: attention scores are soft-capped or have sinks, which no fused kernel computes.
        double_quantization: of a base that is stored in 4 bit, whether its scales are quantized too; None for any
            other base.
        against_sharding: why processes can't share a base of this architecture; None where they can.
    """

    origin: str
    hidden: int
    query_width: int
    key_width: int
    heads: int
    vocabulary: int
    head_rank: int
    layers: tuple[Layer, ...]
    embeddings: int
    other_parameters: int
    unpacked_experts: int
    rotary: int
    window: int | None
    shares_prompts: bool
    plain_attention: bool
    double_quantization: bool | None
    against_sharding: str | None = None

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def linears(self) -> list[Linear]:
        return [linear for layer in self.layers for linear in layer.linears]

    @property
    def experts(self) -> list[Experts]:
        return [layer.experts for layer in self.layers if layer.experts]

    @property
    def matmul_parameters(self) -> int:
        """Weights of the decoder layers that a token is multiplied with."""
        return self._linear_weights + sum(each.used * sum(each.numels) for each in self.experts)

    @property
    def parameters(self) -> int:
        experts = sum(each.num_weights for each in self.experts)
        return self._linear_weights + experts + self.embeddings + self.other_parameters

    @property
    def _linear_weights(self) -> int:
        return sum(linear.numel for linear in self.linears)

    @property
    def adapter_sizes(self) -> list[int]:
        """Number of weights of each of the adapter's matrices, A and B apart."""
        experts = [each.count * size for each in self.experts for pair in each.adapter_sizes for size in pair]
        return self._linear_adapter_sizes + experts

    @property
    def adapter_weights_of_token(self) -> int:
        """Weights of the adapter that a token is multiplied with."""
        experts = sum(each.used * sum(map(sum, each.adapter_sizes)) for each in self.experts)
        return sum(self._linear_adapter_sizes) + experts

    @property
    def expert_adapter_parameters(self) -> int:
        return sum(each.adapter_weights for each in self.experts)

    @property
    def _linear_adapter_sizes(self) -> list[int]:
        head = [(self.head_rank, self.hidden, self.vocabulary)]
        layers = [(linear.rank, linear.inputs, linear.outputs) for linear in self.linears]
        return [rank * width for rank, *widths in layers + head if rank for width in widths]


def model_shape(model: ModelSection, adapter: AdapterSection, named: str | None = None) -> ModelShape:
    """Read the shape of a recipe's base with its adapter; fetches a config.json at most.

    Args:
        named: value of `--shape`: a folder with config.json, or a known shape's name; wins over the base.

    Raises:
        PolicyError: no config can be found or read, or the adapter doesn't fit it.
    """
    found = named_config(named) if named else base_config(model)
    return read_shape(found, adapter)


def read_shape(found: FoundConfig, adapter: AdapterSection) -> ModelShape:
    """Build a config's model on the meta device and read its shape.

    Raises:
        PolicyError: it is no causal language model that transformers knows, or it lacks the adapter's targets.
    """
    from qpref.attention.register import reasons_against_sharing
    from qpref.policy.architecture import empty_model, text_decoder, text_modules
    from qpref.policy.experts import unpacked_weights
    from qpref.policy.layer_configs import layer_settings
    from qpref.policy.shard_limits import reason_against_sharding

    model = empty_model(found.config, found.origin)
    decoder = text_decoder(model)
    config = model.config.get_text_config()
    heads, head_dim, query, key = attention_sizes(config)
    ranks = _ranks(model, adapter)
    layers = _layers(model, ranks, query)
    output = model.get_output_embeddings()
    embedding, head = model.get_input_embeddings().weight, output.weight
    embeddings = embedding.numel() + (0 if head is embedding else head.numel())
    linear = sum(linear.numel for layer in layers for linear in layer.linears)
    experts = sum(layer.experts.num_weights for layer in layers if layer.experts)
    text = {id(value): value.numel() for part in (decoder, output) for value in part.parameters()}
    return ModelShape(
        origin=found.origin,
        hidden=int(config.hidden_size),
        query_width=query,
        key_width=key,
        heads=heads,
        vocabulary=head.shape[0],
        head_rank=max((ranks.get(name, 0) for name, module in model.named_modules() if module is output), default=0),
        layers=layers,
        embeddings=embeddings,
        other_parameters=sum(text.values()) - embeddings - linear - experts,
        unpacked_experts=unpacked_weights(model, text_modules(model)) - experts,
        rotary=rotary(config, head_dim),
        window=window(config),
        shares_prompts=not reasons_against_sharing(decoder),
        plain_attention=any(layer_settings(config, "attn_logit_softcapping")) or _has_sinks(decoder),
        double_quantization=double_quantization(found.config),
        against_sharding=reason_against_sharding(model),
    )


def _has_sinks(decoder: Any) -> bool:
    """Return whether attention has sinks: a learned score for each head, under the name that all families give it."""
    return any(name.endswith(".sinks") for name, _ in decoder.named_parameters())


def _layers(model: Any, ranks: Mapping[str, int], query: int) -> tuple[Layer, ...]:
    from qpref.policy.architecture import decoder_layers, text_modules
    from qpref.policy.fused import is_gated_mlp, is_rms_norm
    from qpref.policy.targets import is_linear

    layers, text, config = [], text_modules(model), model.config.get_text_config()
    stored = double_quantization(model.config) is not None  # whose 4-bit layers are bitsandbytes' linear ones alone
    blocks, packed = {id(layer) for layer in decoder_layers(model)}, _packed_layers(model)
    for prefix, layer in model.named_modules():
        if prefix not in text or id(layer) not in blocks:
            continue
        linears = [
            Linear(name, *_widths(module), ranks.get(f"{prefix}.{name}", 0), f"{prefix}.{name}" in packed)
            for name, module in layer.named_modules()
            if is_linear(module)
        ]
        norms = [
            _norm(name.rpartition(".")[2], module, linears, query)
            for name, module in layer.named_modules()
            if "Norm" in type(module).__name__ and getattr(module, "weight", None) is not None
        ]
        fuses_norms = all(is_rms_norm(module) for module in layer.modules() if "Norm" in type(module).__name__)
        layers.append(
            Layer(
                linears=tuple(linears),
                norms=tuple(norms),
                fuses_norms=fuses_norms,
                reads_norms=fuses_norms and hasattr(layer, "input_layernorm"),  # OLMo 2 norms outputs instead
                fuses_mlp=any(is_gated_mlp(module) for module in layer.modules()),
                experts=read_experts(layer, config, _inside(prefix, ranks), packed=not stored),
            )
        )
    return tuple(layers)


def _packed_layers(model: Any) -> set[str]:
    """Names of the linear layers that bitsandbytes packs: by their class itself, and none with a shared weight."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    from qpref.policy.architecture import shared_layers

    plain = [name for name, module in model.named_modules() if type(module) in (nn.Linear, Conv1D)]
    return set(plain).difference(shared_layers(model, plain))


def _inside(prefix: str, ranks: Mapping[str, int]) -> dict[str, int]:
    """Ranks inside a module, by names within it."""
    return {name.removeprefix(f"{prefix}."): rank for name, rank in ranks.items() if name.startswith(f"{prefix}.")}


def _widths(linear: Any) -> tuple[int, int]:
    """Inputs and outputs of a linear layer; a Conv1D has its weight transposed."""
    if hasattr(linear, "in_features"):
        return linear.in_features, linear.out_features
    inputs, outputs = linear.weight.shape
    return inputs, outputs


def _norm(name: str, norm: Any, linears: list[Linear], query: int) -> tuple[int, int]:
    """Numbers per token that a norm normalizes, and their groups: norms of queries and keys have one per head."""
    size = norm.weight.numel()
    if not name.startswith(("q_", "k_")):
        return size, 1
    own = [linear.outputs for linear in linears if linear.name.endswith(f"{name[:2]}proj")]
    total = own[0] if own else query
    return total, total // size


def _ranks(model: Any, adapter: AdapterSection) -> dict[str, int]:
    """Rank of the adapter of each linear layer that gets one, by the layer's whole name, and of each parameter with
    experts."""
    from qpref.policy import adapter_folder
    from qpref.policy.adapter_names import LayerNames, plain_parameters, plain_targets
    from qpref.policy.experts_lora import adaptable_experts, matching_experts
    from qpref.policy.targets import matches, target_layers

    if adapter.start is None:
        experts = adaptable_experts(model) if adapter.experts else []
        return dict.fromkeys([*target_layers(model, adapter.targets), *experts], adapter.rank)
    start = adapter_folder.read_settings(Path(adapter.start))
    try:
        rank, targets = int(start["r"]), start["target_modules"]
    except (ValueError, KeyError, TypeError) as error:
        raise PolicyError(f"{adapter.start}: no adapter in PEFT's format: {error!r}") from error
    layers, names = target_layers(model, "all-linear"), LayerNames.of(model)
    experts = matching_experts(model, plain_parameters(start.get("target_parameters") or [], names))
    targets = plain_targets(targets, names)
    if isinstance(targets, str) and targets != "all-linear":
        layers = {name for name in layers if re.fullmatch(targets, name)}
    elif isinstance(targets, list):
        layers = {name for name in layers if any(matches(name, target) for target in targets)}
    return dict.fromkeys([*layers, *experts], rank)
