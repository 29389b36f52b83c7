"""LoRA adapters: made fresh or from an existing PEFT folder, always float32, always without biases."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qpref.errors import PolicyError
from qpref.recipe.sections import AdapterSection

TRAINED = "default"
"""PEFT's name for the adapter that is trained."""
REFERENCE = "reference"
"""PEFT's name for the frozen copy of a start adapter."""

COPIED_FIELDS = ("r", "lora_alpha", "target_modules", "exclude_modules", "use_rslora", "rank_pattern", "alpha_pattern")
NOT_PLAIN_FIELDS = (
    "use_dora",
    "modules_to_save",
    "layers_to_transform",
    "trainable_token_indices",
    "alora_invocation_tokens",
)
INITS_THAT_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""PEFT writes one of these only where the adapter was saved without its conversion to a delta on the plain base."""


def add_adapters(model: Any, adapter: AdapterSection, seed: int) -> Any:
    """Wrap the frozen base in a PeftModel with the adapter that is trained, and its frozen copy where it has a start.

    Raises:
        PolicyError: a target matches no linear layer of the text model, or the start adapter cannot be used.
    """
    from peft import get_peft_model

    from qpref.policy.lora import CUSTOM_MODULES

    tensors: dict[str, torch.Tensor] = {}
    if adapter.start is None:
        layers = _target_layers(model, adapter.targets)
        config = _fresh_config(adapter, _target_names(model, layers))
    else:
        config, tensors = _read_adapter(Path(adapter.start), adapter.dropout)
    _refuse_tied_head(model, config)
    config._register_custom_module(CUSTOM_MODULES)
    torch.manual_seed(seed)
    try:
        wrapped = get_peft_model(model, config, adapter_name=TRAINED)
        if adapter.start is not None:
            wrapped.add_adapter(REFERENCE, config)
    except ValueError as error:
        raise PolicyError(f"the adapter doesn't fit the base: {error}") from error
    if adapter.start is None:
        _refuse_other_layers(wrapped, layers)
    else:
        for name in (TRAINED, REFERENCE):
            load_adapter_tensors(wrapped, tensors, name, origin=adapter.start)
        wrapped.base_model.set_adapter(TRAINED)
    for name, parameter in wrapped.named_parameters():
        parameter.requires_grad_(is_trained(name))
        if "lora_" in name:
            parameter.data = parameter.data.float()
    return wrapped


def is_trained(parameter: str) -> bool:
    """Whether a parameter of a PeftModel, by its name, belongs to the trained adapter."""
    return "lora_" in parameter and f".{TRAINED}." in parameter


def load_adapter_tensors(model: Any, tensors: dict[str, torch.Tensor], name: str, origin: str) -> None:
    """Put PEFT-format tensors into the adapter `name`; every key has to have its place, and every place its key.

    Raises:
        PolicyError: keys are missing, unknown or of another shape, or a value isn't finite.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    wanted = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    missing, unknown = sorted(set(wanted) - set(tensors)), sorted(set(tensors) - set(wanted))
    if missing or unknown:
        first = f"lacks {missing[0]}" if missing else f"has {unknown[0]}"
        raise PolicyError(
            f"{origin}: not an adapter for this base: it {first} ({len(missing)} missing, {len(unknown)} unknown)"
        )
    for key, tensor in tensors.items():
        if tensor.shape != wanted[key].shape:
            raise PolicyError(f"{origin}: {key} is {tuple(tensor.shape)}, the base needs {tuple(wanted[key].shape)}")
        if not bool(tensor.isfinite().all()):
            raise PolicyError(f"{origin}: {key} has values that are not finite")
    set_peft_model_state_dict(model, tensors, adapter_name=name)


def _fresh_config(adapter: AdapterSection, names: list[str]) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=names,
        use_rslora=adapter.rslora,
        init_lora_weights="gaussian" if adapter.init == "gaussian" else True,
        bias="none",
        task_type="CAUSAL_LM",
    )


def _target_layers(model: Any, asked: str | list[str]) -> set[str]:
    """Whole names of the layers to adapt.

    Only linear layers inside the text decoder count, for a vision tower has no gradient; and the output head, where it
    is named.
    """
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    inside = {id(module) for module in decoder.modules()}
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    of_text = [name for name in linear if id(model.get_submodule(name)) in inside]
    if isinstance(asked, str):
        return set(of_text)
    of_text += [name for name in linear if model.get_submodule(name) is head]
    known = sorted({name.rpartition(".")[2] for name in of_text})
    layers: set[str] = set()
    for ending in asked:
        matching = [name for name in of_text if name == ending or name.endswith(f".{ending}")]
        if not matching:
            raise PolicyError(f"[adapter] targets: '{ending}' names no linear layer; it has {', '.join(known)}")
        layers.update(matching)
    return layers


def _target_names(model: Any, layers: set[str]) -> list[str]:
    """What PEFT is told: short endings where they name just these layers, else whole names."""
    endings = {name.rpartition(".")[2] for name in layers}
    hit = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in endings}
    return sorted(endings if hit == layers else layers)


def _refuse_other_layers(model: Any, layers: set[str]) -> None:
    """PEFT takes some names of mixture-of-experts models to mean their stacked experts (0.21: dots1, deepseek_v3)."""
    adapted = {name.partition(".lora_")[0] for name, _ in model.base_model.model.named_parameters() if ".lora_" in name}
    if adapted != layers:
        missed = sorted(layers - adapted) or sorted(adapted - layers)
        raise PolicyError(
            f"PEFT adapts other layers of this model than were asked for, the first is {missed[0]}",
            'name layers of the attention alone in [adapter] targets, for example targets = ["q_proj", "v_proj"]',
        )


def _refuse_tied_head(model: Any, config: Any) -> None:
    head = model.get_output_embeddings()
    names = [name for name, module in model.named_modules(remove_duplicate=False) if module is head]
    asked = [config.target_modules] if isinstance(config.target_modules, str) else config.target_modules
    hit = any(name == target or name.endswith(f".{target}") for name in names for target in asked)
    if hit and head.weight is model.get_input_embeddings().weight:
        raise PolicyError(
            "the adapter is on an output head that shares its weight with the embeddings; merged, it would change both",
            "leave the head out of [adapter] targets",
        )


def _read_adapter(folder: Path, dropout: float) -> tuple[Any, dict[str, torch.Tensor]]:
    """A PEFT folder's LoRA settings, copied field by field, and its tensors."""
    from peft import LoraConfig
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        values = json.loads((folder / "adapter_config.json").read_text())
        tensors = load_file(folder / "adapter_model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise PolicyError(f"{folder}: no adapter in PEFT's format with safetensors: {error}") from error
    if values.get("peft_type") != "LORA":
        raise PolicyError(f"{folder}: a {values.get('peft_type')} adapter; only LoRA can be trained on from")
    moving = [key for key in NOT_PLAIN_FIELDS if values.get(key)]
    if values.get("bias", "none") != "none":
        moving.append("bias")
    if str(values.get("init_lora_weights")).lower().startswith(INITS_THAT_CHANGE_THE_BASE):
        moving.append("init_lora_weights")
    if moving:
        raise PolicyError(f"{folder}: the adapter uses {moving[0]}, so it is no plain LoRA delta on the base")
    copied = {key: values[key] for key in COPIED_FIELDS if values.get(key) is not None}
    return LoraConfig(**copied, lora_dropout=dropout, bias="none", task_type="CAUSAL_LM"), tensors
