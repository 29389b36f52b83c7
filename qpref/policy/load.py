"""Loads a base model with its adapters as a `Policy`."""

from __future__ import annotations

import logging
import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qpref.attention import register as attention
from qpref.errors import PolicyError
from qpref.policy.adapter import add_adapters, is_trained
from qpref.policy.logprobs import Head
from qpref.policy.source import BaseFolder
from qpref.recipe.sections import ModelSection, Recipe

log = logging.getLogger("qpref")

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "float32": torch.float32}


@dataclass(slots=True)
class Policy:
    """A model in training, or one that is only asked.

    Attributes:
        model: the PeftModel; the plain model where there are no adapters.
        decoder: the text decoder inside it, whose output is hidden states.
        head: the frozen output head.
        device: where all of it is.
        dtype: what the base computes in.
        starts_from_adapter: the reference is a frozen copy of the start adapter, not the bare base.
        own_attention: name of the attention that the model came with.
        sharing_paths: names of the attention paths that compute each prompt once, the fastest first; none where the
            model's config speaks against it.
        attention: name of the one in use.
        has_adapters: whether there is an adapter; a model without one has no reference of its own.
    """

    model: Any
    decoder: Any
    head: Head
    device: torch.device
    dtype: torch.dtype
    starts_from_adapter: bool
    own_attention: str
    sharing_paths: tuple[str, ...]
    attention: str
    has_adapters: bool = True

    def autocast(self) -> AbstractContextManager[Any]:
        """What the forward pass runs under: LoRA's float32 weights take part in 16-bit products."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def trained_parameters(self) -> dict[str, torch.nn.Parameter]:
        """The trained adapter's tensors by name, in a fixed order."""
        return {name: value for name, value in self.model.named_parameters() if is_trained(name)}

    @property
    def shares_prompts(self) -> bool:
        """Whether batches are computed as one stream with each prompt once, else as one row for each branch."""
        return self.attention != self.own_attention

    def share_prompts(self, shared: bool) -> None:
        """Compute each prompt once, by the fastest path; or fall back to whole rows under the model's own attention."""
        self.use_attention(self.sharing_paths[0] if shared else self.own_attention)

    def use_attention(self, name: str) -> None:
        """Switch to one of the sharing paths, or to the model's own attention."""
        self.plain_model.set_attn_implementation(name)
        self.attention = name

    @property
    def plain_model(self) -> Any:
        """transformers' own model; adapters that are on take part in it."""
        return self.model.get_base_model() if self.has_adapters else self.model

    @property
    def num_layers(self) -> int:
        """Decoder layers that can be checkpointed."""
        return len(self._layers())

    @property
    def recomputed_layers(self) -> int:
        return sum(layer.gradient_checkpointing for layer in self._layers())

    def recompute_layers(self, count: int) -> None:
        """Recompute the first `count` decoder layers' activations in the backward pass; the others keep theirs."""
        if count:
            _enable_checkpointing(self.plain_model)
        for place, layer in enumerate(self._layers()):
            layer.gradient_checkpointing = place < count

    def _layers(self) -> list[Any]:
        from transformers.modeling_layers import GradientCheckpointingLayer

        return [module for module in self.decoder.modules() if isinstance(module, GradientCheckpointingLayer)]

    def quantized_modules(self) -> list[str]:
        """Names, as in the base model, of the layers whose weights are 4-bit."""
        from bitsandbytes.nn import Linear4bit

        names = [name for name, module in self.model.named_modules() if isinstance(module, Linear4bit)]
        return [name.removeprefix("base_model.model.").removesuffix(".base_layer") for name in names]


def load_policy(recipe: Recipe, base: BaseFolder) -> Policy:
    """Load the base as the recipe says, freeze it, add the adapters.

    Raises:
        PolicyError: the base cannot be read or trained like this.
    """
    device = choose_device(recipe.model.device)
    _refuse_wrong_dtype(recipe.model, device)
    model = _load_settled(recipe.model, base, device)
    policy = _policy(model, add_adapters(model, recipe.adapter, recipe.train.seed), recipe.model, device)
    policy.starts_from_adapter = recipe.adapter.start is not None
    policy.recompute_layers(recomputed_layers(recipe.train.gradient_checkpointing, policy.num_layers))
    return policy


def load_plain(section: ModelSection, base: BaseFolder) -> Policy:
    """Load a model by itself, without adapters and so without a reference: it can be scored and asked, not trained.

    Raises:
        PolicyError: it cannot be read.
    """
    device = choose_device(section.device)
    model = _load_settled(section, base, device)
    return _policy(model, model, section, device)


def _load_settled(section: ModelSection, base: BaseFolder, device: torch.device) -> Any:
    if device.type == "cpu":
        _forget_compiled_products()
    model = load_base(section, base, device)
    _settle_4bit_layers(model, DTYPES[section.dtype])
    attention.register()
    return model


def _policy(model: Any, wrapped: Any, section: ModelSection, device: torch.device) -> Policy:
    """A model and what wraps it, under the fastest attention that its config allows."""
    own = model.config._attn_implementation
    reasons = attention.reasons_against_sharing(model)
    for reason in reasons:
        log.warning("prompts are computed once for each response, not once a pair: %s", reason)
    dtype = DTYPES[section.dtype]
    policy = Policy(
        model=wrapped,
        decoder=model.get_decoder(),
        head=Head.of(model),
        device=device,
        dtype=dtype,
        starts_from_adapter=False,
        own_attention=own,
        sharing_paths=() if reasons else attention.sharing_paths(device, dtype),
        attention=own,
        has_adapters=wrapped is not model,
    )
    policy.share_prompts(not reasons)
    return policy


def recomputed_layers(setting: bool | int | str, num_layers: int) -> int:
    """How many layers the recipe's setting means; all of them where it leaves the choice to the memory."""
    if isinstance(setting, bool | str):
        return num_layers if setting else 0
    return min(setting, num_layers)


def load_base(section: ModelSection, base: BaseFolder, device: torch.device) -> Any:
    """The frozen base model on its device, quantized as the recipe or the base itself says, its dropouts off.

    Raises:
        PolicyError: transformers can't load it, or a weight is missing.
    """
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(base.path, trust_remote_code=False)
        _silence_dropout(config)
        model, report = AutoModelForCausalLM.from_pretrained(
            base.path,
            config=config,
            quantization_config=_quantization(section, base),
            dtype=DTYPES[section.dtype],
            device_map={"": device},
            attn_implementation=_own_attention(config),
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (ValueError, KeyError, OSError, RuntimeError, ImportError, SafetensorError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise PolicyError(f"{base.path}: transformers can't load this model: {error}") from error
    refuse_missing_weights(report, base.path)
    model.requires_grad_(False)
    return model


def refuse_missing_weights(report: Any, path: Path) -> None:
    """Stop where transformers' loading report names weights that it made up: it fills them at random and goes on.

    Raises:
        PolicyError: names the first of them.
    """
    if missing := sorted(report["missing_keys"]):
        raise PolicyError(f"{path}: it lacks {len(missing)} of its model's weights, the first is {missing[0]}")


def choose_device(asked: str) -> torch.device:
    """The device that a recipe means.

    Raises:
        PolicyError: it wants a GPU and there is none.
    """
    if asked == "cuda" and not torch.cuda.is_available():
        raise PolicyError("[model] device is cuda, and torch sees no GPU", 'set device = "auto", or mend the driver')
    if asked == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def is_prequantized(base: BaseFolder) -> bool:
    """Whether the base is one that bitsandbytes has made 4-bit already.

    Raises:
        PolicyError: it is quantized in another way.
    """
    settings = base.config.get("quantization_config")
    if settings is None:
        return False
    if settings.get("quant_method") != "bitsandbytes" or not settings.get("load_in_4bit"):
        method = settings.get("quant_method", "an unknown method")
        raise PolicyError(f"{base.path}: quantized by {method}; only bitsandbytes' 4-bit bases can be trained")
    return True


def _enable_checkpointing(model: Any) -> None:
    # Renamed during transformers 5; drop the older name when the floor in pyproject has the newer.
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable({"use_reentrant": False})
    else:
        model.gradient_checkpointing_enable({"use_reentrant": False})


def _quantization(section: ModelSection, base: BaseFolder) -> Any:
    if is_prequantized(base) or section.quantization == "none":
        return None
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=section.double_quantization,
        bnb_4bit_compute_dtype=DTYPES[section.dtype],
    )


def _own_attention(config: Any) -> str | None:
    """Eager attention for capped scores: before transformers 5.23, sdpa left the cap out without a word."""
    return "eager" if getattr(config.get_text_config(), "attn_logit_softcapping", None) else None


def _refuse_wrong_dtype(section: ModelSection, device: torch.device) -> None:
    if section.dtype == "fp16" and device.type == "cpu":
        raise PolicyError("[model] dtype: fp16 doesn't train on a CPU", 'set dtype = "bf16" or "float32"')
    if (
        section.dtype == "bf16"
        and device.type == "cuda"
        and not torch.cuda.is_bf16_supported(including_emulation=False)
    ):
        raise PolicyError("[model] dtype: this GPU has no bf16", 'set dtype = "fp16"')


def _forget_compiled_products() -> None:
    """Let oneDNN keep the products of one micro-batch, not 1,024.

    It compiles a product for each shape, about 0.3 MB apiece, and every packed batch has a length of its own. Two
    caches hold them: oneDNN's, and that of torch's layer above it. Both sizes are read once, at the process's first
    product; whoever has set one is left alone.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, "64")


def _silence_dropout(config: Any) -> None:
    """Switch the base's own dropouts off: they would only add noise to a difference of two log-probabilities."""
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        for name, value in vars(part).items():
            if isinstance(value, float) and (name.endswith(("dropout", "_pdrop")) or name == "dropout_rate"):
                setattr(part, name, 0.0)


def _settle_4bit_layers(model: Any, dtype: torch.dtype) -> None:
    """Compute in the recipe's type, whatever an already quantized base says, and never repack weights.

    On CPUs with AVX512-BF16 Linear4bit repacks its weight in place at the first forward pass in eval mode; the 4-bit
    product has no gradient from then on, and LoRA's gradients come out wrong without an error (bitsandbytes 0.50.2;
    bitsandbytes#1804). Drop this when the repacked product has a backward pass.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.compute_dtype = dtype
            module.support_avx512bf16_for_cpu = False
            if module.weight.device.type == "cpu":
                _unpack_scales(module.weight.quant_state)


def _unpack_scales(state: Any) -> None:
    """Hold a 4-bit weight's scales in float32 for good, with the values that double quantization gave them.

    On a CPU, unpacking them in each pass takes a third of the time of unpacking the weight; half a bit a weight is
    less dear there than on a GPU.
    """
    from bitsandbytes.functional import dequantize_blockwise

    if state.nested:
        state.absmax = (dequantize_blockwise(state.absmax, state.state2) + state.offset).float()
        state.nested, state.state2, state.offset = False, None, None
