"""LoRA adapters: fresh or started from an existing PEFT folder, always float32, always without biases."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qpref.dropout import TokenDropout
from qpref.errors import PolicyError
from qpref.policy import adapter_folder
from qpref.policy.adapter_names import LayerNames, plain_parameters, plain_targets
from qpref.policy.experts_lora import adaptable_experts, add_to_experts, matching_experts, peft_target_parameters
from qpref.policy.targets import matches, peft_target_modules, target_layers
from qpref.recipe.sections import AdapterSection

TRAINED = "default"
"""PEFT's name for the adapter that is trained."""
REFERENCE = "reference"
"""PEFT's name for the frozen copy of a start adapter."""
SAME_INPUT = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
"""Layers that read the input of another one beside them: dropout is the same for both, computed together or not."""


def add_adapters(model: Any, adapter: AdapterSection, seed: int) -> Any:
    """Wrap the frozen base in a PeftModel with the adapter to train, and with its frozen copy where it has a start.

    Raises:
        PolicyError: a target matches no linear layer of the text model, experts are to be adapted that it lacks, or the
            start adapter cannot be used.
    """
    if adapter.start is None:
        wrapped = _add_fresh(model, adapter, seed)
    else:
        wrapped = _add_started(model, Path(adapter.start), adapter, seed)
    _drop_by_content(wrapped)
    for name, parameter in wrapped.named_parameters():
        parameter.requires_grad_(is_trained(name))
        if "lora_" in name:
            parameter.data = parameter.data.float()
    return wrapped


def is_trained(parameter: str) -> bool:
    """Return whether a parameter of a PeftModel, by its name, belongs to the trained adapter."""
    return "lora_" in parameter and f".{TRAINED}." in parameter


def load_adapter_tensors(model: Any, tensors: dict[str, Tensor], name: str, origin: str) -> None:
    """Load PEFT-format tensors into the adapter `name`, checking that they are exactly its own.

    Raises:
        PolicyError: a key is missing or unknown, a shape differs, or a value isn't finite.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    expected = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    missing, unknown = sorted(set(expected) - set(tensors)), sorted(set(tensors) - set(expected))
    if missing or unknown:
        first = f"lacks {missing[0]}" if missing else f"has {unknown[0]}"
        raise PolicyError(
            f"{origin}: not an adapter for this base: it {first} ({len(missing)} missing, {len(unknown)} unknown)"
        )
    for key, tensor in tensors.items():
        if tensor.shape != expected[key].shape:
            raise PolicyError(f"{origin}: {key} is {tuple(tensor.shape)}, the base needs {tuple(expected[key].shape)}")
        if not bool(tensor.isfinite().all()):
            raise PolicyError(f"{origin}: {key} has values that are not finite")
    if lost := set_peft_model_state_dict(model, tensors, adapter_name=name).unexpected_keys:
        raise PolicyError(f"{origin}: PEFT loads a tensor of it under the name {lost[0]}, which this model lacks")


def _add_fresh(model: Any, adapter: AdapterSection, seed: int) -> Any:
    from peft import LoraConfig

    layers = target_layers(model, adapter.targets)
    experts = adaptable_experts(model) if adapter.experts else []
    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=peft_target_modules(model, layers),
        use_rslora=adapter.rslora,
        init_lora_weights="gaussian" if adapter.init == "gaussian" else True,
        bias="none",
        task_type="CAUSAL_LM",
    )
    wrapped = _wrap(model, config, (TRAINED,), seed)
    _refuse_other_layers(wrapped, layers)
    _adapt_experts(wrapped, experts)
    return wrapped


def _add_started(model: Any, start: Path, adapter: AdapterSection, seed: int) -> Any:
    settings, tensors = adapter_folder.read_settings(start), adapter_folder.read_tensors(start)
    if settings.get("peft_type") != "LORA":
        raise PolicyError(f"{start}: a {settings.get('peft_type')} adapter; only LoRA can be trained on from")
    if name := adapter_folder.unsupported_setting(settings):
        raise PolicyError(f"{start}: the adapter uses {name}, so it is no plain LoRA delta on the base")
    names = LayerNames.of(model)
    settings = settings | {"target_modules": plain_targets(settings.get("target_modules") or [], names)}
    tensors = names.translated_keys(tensors)
    experts = _started_experts(model, start, plain_parameters(settings.pop("target_parameters", None) or [], names))
    _refuse_unfit_start(start, adapter, experts)
    config = adapter_folder.lora_config(settings, lora_dropout=adapter.dropout, bias="none", task_type="CAUSAL_LM")
    wrapped = _wrap(model, config, (TRAINED, REFERENCE), seed)
    _adapt_experts(wrapped, experts)
    for name in (TRAINED, REFERENCE):
        load_adapter_tensors(wrapped, tensors, name, origin=str(start))
    wrapped.base_model.set_adapter(TRAINED)
    return wrapped


def _started_experts(model: Any, start: Path, targets: list[str]) -> list[str]:
    try:
        return matching_experts(model, targets)
    except PolicyError as error:
        raise PolicyError(f"{start}: {error.what}") from error


def _refuse_unfit_start(start: Path, adapter: AdapterSection, experts: Collection[str]) -> None:
    """Refuse a recipe that asks more of a start adapter's experts than it has, or can have."""
    if adapter.experts and not experts:
        raise PolicyError(
            f"[adapter] experts: {start} has no adapter on experts, and a start adapter's own targets apply",
            "leave [adapter] experts out, or [adapter] start",
        )
    if adapter.dropout and experts:
        raise PolicyError(
            f"[adapter] dropout: {start} is on experts, where PEFT has no dropout", "set [adapter] dropout = 0"
        )


def _drop_by_content(wrapped: Any) -> None:
    """Replace PEFT's dropout, which draws from torch's generator."""
    from peft.tuners.lora import LoraLayer

    for name, layer in wrapped.named_modules():
        for adapter, own in (layer.lora_dropout if isinstance(layer, LoraLayer) else {}).items():
            if isinstance(own, torch.nn.Dropout):
                parent, _, last = name.rpartition(".")
                reads = f"{parent}.{SAME_INPUT.get(last, last)}"
                layer.lora_dropout[adapter] = TokenDropout(own.p, reads, layer.in_features, layer.weight.device)


def _adapt_experts(wrapped: Any, parameters: Collection[str]) -> None:
    """Add every adapter of the PeftModel to these experts too, and record them in its config as PEFT does."""
    if not parameters:
        return
    model = wrapped.base_model.model
    targets = peft_target_parameters(model, parameters)
    for name, config in wrapped.peft_config.items():
        try:
            add_to_experts(model, parameters, config, name)
        except ValueError as error:
            raise PolicyError(f"the adapter doesn't fit the base's experts: {error}") from error
    for config in wrapped.peft_config.values():
        config.target_parameters = targets


def _wrap(model: Any, config: Any, names: tuple[str, ...], seed: int) -> Any:
    """Wrap the model in a PeftModel with an adapter of each name, its layers the fused ones."""
    from peft import get_peft_model
    from transformers.pytorch_utils import Conv1D

    from qpref.policy.lora import CUSTOM_MODULES

    _refuse_tied_head(model, config)
    config._register_custom_module(CUSTOM_MODULES)
    config.fan_in_fan_out = any(isinstance(module, Conv1D) for module in model.modules())
    torch.manual_seed(seed)
    try:
        wrapped = get_peft_model(model, config, adapter_name=names[0])
        for name in names[1:]:
            wrapped.add_adapter(name, config)
    except ValueError as error:
        raise PolicyError(f"the adapter doesn't fit the base: {error}") from error
    return wrapped


def _refuse_other_layers(model: Any, layers: set[str]) -> None:
    """Refuse a model where PEFT adapts other layers than the recipe's."""
    adapted = {name.partition(".lora_")[0] for name, _ in model.base_model.model.named_parameters() if ".lora_" in name}
    if adapted != layers:
        differing = sorted(layers - adapted) or sorted(adapted - layers)
        raise PolicyError(
            f"PEFT adapts other layers of this model than [adapter] targets names, the first is {differing[0]}",
            "leave it out of [adapter] targets",
        )


def _refuse_tied_head(model: Any, config: Any) -> None:
    head = model.get_output_embeddings()
    names = [name for name, module in model.named_modules(remove_duplicate=False) if module is head]
    targets = [config.target_modules] if isinstance(config.target_modules, str) else config.target_modules
    is_target = any(matches(name, target) for name in names for target in targets)
    if is_target and head.weight is model.get_input_embeddings().weight:
        raise PolicyError(
            "the adapter is on an output head that shares its weight with the embeddings; merged, it would change both",
            "leave the head out of [adapter] targets",
        )
