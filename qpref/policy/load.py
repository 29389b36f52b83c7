"""Loading of a base model, quantized and frozen, with its adapters as a `Policy`."""

from __future__ import annotations

import logging
import os
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qpref.attention import register as attention
from qpref.attention.states import fork_layers
from qpref.distributed.world import World
from qpref.errors import PolicyError
from qpref.policy.adapter import add_adapters
from qpref.policy.adapter_names import layer_of
from qpref.policy.architecture import empty_model, shared_layers, text_decoder, text_modules
from qpref.policy.device import Machine, refuse_missing_kernels, why_no_gpu
from qpref.policy.experts import PackedExperts, unpacked_weights
from qpref.policy.fused import fuse_layers
from qpref.policy.head import Head
from qpref.policy.kept_base import KeptBase
from qpref.policy.layer_configs import layer_settings
from qpref.policy.matmul import check_packed, sum_in_float32, unpack_scales
from qpref.policy.nf4_loading import nf4_settings
from qpref.policy.policy import Policy
from qpref.policy.pretrained import load_pretrained, read_config
from qpref.policy.rope import separate_lengths
from qpref.policy.shard_limits import refuse_unshardable
from qpref.policy.shard_loading import ShardLoader
from qpref.policy.sharded_base import ShardedBase
from qpref.policy.source import BaseFolder
from qpref.policy.start_base import warn_of_other_base
from qpref.policy.text_part import keep_text_alone
from qpref.recipe.sections import ModelSection, Recipe

log = logging.getLogger("qpref")

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "float32": torch.float32}


def load_policy(recipe: Recipe, base: BaseFolder, sharing: World | None = None, kept: KeptBase | None = None) -> Policy:
    """Load the base by the recipe, freeze it and add the adapters.

    Args:
        sharing: the processes that share one copy of the base; None for a copy of one's own.
        kept: the base of the runs before this one in the process, which stays for those after it; None to load it for
            this run alone.

    Raises:
        PolicyError: the base cannot be read, or not trained with these settings.
    """
    device = choose_device(recipe.model.device)
    _refuse_wrong_dtype(recipe.model, device)
    if recipe.adapter.start is not None:
        warn_of_other_base(Path(recipe.adapter.start), base, recipe.model.base)
    if sharing is not None:
        refuse_unshardable(recipe.model, base)
    model, shards = _load_ready(recipe.model, base, device, sharing, kept)
    wrapped = add_adapters(model, recipe.adapter, recipe.train.seed)
    policy = _policy(model, wrapped, recipe.model, device, shards)
    _announce_experts(model, policy.dtype, policy.adapts_experts())
    _announce_shared_layers(model, policy)
    policy.starts_from_adapter = recipe.adapter.start is not None
    policy.base_is_reference = recipe.adapter.reference == "base"
    fuse_layers(policy.decoder, policy.dtype, policy.autocast, shards.gathered_around if shards else None)
    policy.recompute_layers(recomputed_layers(recipe.train.gradient_checkpointing, policy.num_layers))
    return policy


def load_plain(section: ModelSection, base: BaseFolder, kept: KeptBase | None = None) -> Policy:
    """Load a model without adapters and so without a reference, for scoring and generation alone.

    Args:
        kept: as for `load_policy`.

    Raises:
        PolicyError: it cannot be read, or its dtype doesn't run on the device.
    """
    device = choose_device(section.device)
    _refuse_wrong_dtype(section, device)
    model, _ = _load_ready(section, base, device, kept=kept)
    policy = _policy(model, model, section, device)
    _announce_experts(model, policy.dtype, adapted=False)
    return policy


def _load_ready(
    section: ModelSection,
    base: BaseFolder,
    device: torch.device,
    sharing: World | None = None,
    kept: KeptBase | None = None,
) -> tuple[Any, ShardedBase | None]:
    """Load the base, or this process's part of it, and prepare its 4-bit layers and the attention registry."""
    refuse_missing_kernels(device)
    if device.type == "cpu":
        _limit_compiled_products()
    if device.type == "cuda":
        sum_in_float32()
    attention.register()
    if sharing is None:
        load = partial(_load_whole, section, base, device)
        return load() if kept is None else kept.copied(section, base, device, load), None
    loader = ShardLoader(sharing)
    model = load_base(section, base, device, loader)
    _prepare_4bit_layers(model, DTYPES[section.dtype], loader)
    shards = ShardedBase.of(model, loader)
    keep_text_alone(model)
    return model, shards


def _load_whole(section: ModelSection, base: BaseFolder, device: torch.device) -> Any:
    model = load_base(section, base, device)
    _prepare_4bit_layers(model, DTYPES[section.dtype], None)
    keep_text_alone(model)
    return model


def _announce_experts(model: Any, dtype: torch.dtype, adapted: bool) -> None:
    """Say how fused experts are kept, which bitsandbytes doesn't take for layers, and whether they are adapted."""
    text = text_modules(model)
    modules = [module for name, module in model.named_modules() if name in text]
    ending = "with an adapter" if adapted else "and get no adapter"
    if packed := sum(module.num_weights for module in modules if isinstance(module, PackedExperts)):
        log.info("experts: %s weights are frozen in 4 bits (NF4) %s", f"{packed:,}", ending)
    if others := unpacked_weights(model, text):
        level = logging.INFO if adapted else logging.WARNING
        log.log(level, "experts: %s weights are frozen in %d bits %s", f"{others:,}", 8 * dtype.itemsize, ending)


def _announce_shared_layers(model: Any, policy: Policy) -> None:
    """Say before the work is done that an adapter on layers with shared weights can't be merged: each layer learns its
    own change of the weight."""
    adapted = dict.fromkeys(layer_of(name) for name in policy.trained_parameters())
    if shared := shared_layers(model, adapted):
        log.warning(
            "%d adapted layers share their weights with other layers, the first is %s: qpref merge can't merge this "
            "adapter, PEFT can use it on the base",
            len(shared),
            shared[0],
        )


def _policy(
    model: Any, wrapped: Any, section: ModelSection, device: torch.device, shards: ShardedBase | None = None
) -> Policy:
    """Make a Policy of a model and its adapter wrapper, under the fastest attention that its config allows."""
    decoder = text_decoder(model)
    own = decoder.config._attn_implementation
    if shards is None:
        reasons = attention.reasons_against_sharing(decoder)
        if not reasons:
            fork_layers(decoder)
    else:  # tried on an empty model, since a layer's own call would gather it; none of these has a state to fork
        reasons = attention.reasons_against_sharing(text_decoder(empty_model(model.config, section.base)))
    for reason in reasons:
        log.warning("prompts are computed once for each response, not once a pair: %s", reason)
    dtype = DTYPES[section.dtype]
    policy = Policy(
        model=wrapped,
        decoder=decoder,
        head=Head.of(model),
        device=device,
        dtype=dtype,
        starts_from_adapter=False,
        own_attention=own,
        sharing_paths=() if reasons else attention.sharing_paths(device, dtype),
        attention=own,
        has_adapters=wrapped is not model,
        rope_lengths=separate_lengths(decoder),
    )
    policy.share_prompts(not reasons)
    if shards is not None:
        policy.share_base(shards)
    return policy


def recomputed_layers(setting: bool | int | str, num_layers: int) -> int:
    """Count the layers that the recipe's setting means; all of them where it leaves the number to the memory left."""
    if isinstance(setting, bool | str):
        return num_layers if setting else 0
    return min(setting, num_layers)


def load_base(section: ModelSection, base: BaseFolder, device: torch.device, loader: ShardLoader | None = None) -> Any:
    """Load the frozen base model on its device, quantized by the recipe or as its files are.

    Args:
        loader: keeps a part of each weight; None keeps all.

    Raises:
        PolicyError: transformers can't load it, or a weight is missing.
    """
    config = read_config(base.path)
    model = load_pretrained(
        base.path,
        config=config,
        quantization_config=_quantization(section, base, loader),
        dtype=DTYPES[section.dtype],
        device_map={"": device},
        attn_implementation=_own_attention(config),
        use_safetensors=True,
    )
    model.requires_grad_(False)
    return model


def choose_device(setting: str) -> torch.device:
    """Resolve the recipe's device; "auto" prefers a GPU.

    Raises:
        PolicyError: the recipe requires a GPU and torch sees none.
    """
    if setting == "cuda" and not torch.cuda.is_available():
        found = why_no_gpu(Machine.found())
        reason, remedy = found or ("torch sees no GPU", 'set device = "auto"')
        raise PolicyError(f"[model] device is cuda: {reason}", remedy)
    if setting == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def _quantization(section: ModelSection, base: BaseFolder, loader: ShardLoader | None) -> Any:
    if base.is_prequantized or section.quantization == "none":
        return None
    return nf4_settings(DTYPES[section.dtype], section.double_quantization, loader)


def _own_attention(config: Any) -> str | None:
    """Name eager attention for capped scores: before transformers 5.23, sdpa left the cap out silently."""
    return "eager" if any(layer_settings(config.get_text_config(), "attn_logit_softcapping")) else None


def _refuse_wrong_dtype(section: ModelSection, device: torch.device) -> None:
    if section.dtype == "fp16" and device.type == "cpu":
        raise PolicyError("[model] dtype: a CPU doesn't compute in fp16", 'set dtype = "bf16" or "float32"')
    if (
        section.dtype == "bf16"
        and device.type == "cuda"
        and not torch.cuda.is_bf16_supported(including_emulation=False)
    ):
        raise PolicyError(
            "[model] dtype: this GPU has no bf16",
            'set dtype = "fp16"; a model without a recipe takes a GPU with bf16, or a CPU (CUDA_VISIBLE_DEVICES=)',
        )


def _limit_compiled_products() -> None:
    """Limit oneDNN's cache of compiled products to those of one micro-batch, from 1,024.

    It compiles a product for each shape, about 0.3 MB apiece, and every packed batch has a length of its own. Two
    caches hold them: oneDNN's, and that of torch's layer above it. Both sizes are read once, at the process's first
    product; a size that the user has set stays.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, "64")


def _prepare_4bit_layers(model: Any, dtype: torch.dtype, loader: ShardLoader | None) -> None:
    """Make 4-bit layers compute in the recipe's dtype, whatever a prequantized base names, and never repack weights.

    On CPUs with AVX512-BF16 Linear4bit repacks its weight in place at the first forward pass in eval mode; the 4-bit
    product has no gradient from then on, and LoRA's gradients come out wrong without an error (bitsandbytes 0.50.2;
    bitsandbytes#1804). Drop this when the repacked product has a backward pass.
    """
    from bitsandbytes.nn import Linear4bit

    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            module.compute_dtype = dtype
            module.support_avx512bf16_for_cpu = False
            if loader is not None and f"{name}.weight" in loader.wholes:
                continue  # prepared while it was whole
            if module.weight.device.type == "cpu":
                unpack_scales(module.weight.quant_state)
            check_packed(module.weight, module.weight.quant_state)
