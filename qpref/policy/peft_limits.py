"""Layers that PEFT (0.21) doesn't adapt in a model, or whose saved adapters it wouldn't find again."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import nn

from qpref.policy.adapter_names import WRAPPED


def foreign_to_peft(config: Any, layers: Iterable[str]) -> set[str]:
    """Names, by their last parts, of the layers that PEFT doesn't adapt in such a model.

    It takes some names in models with experts to mean the experts, and refuses some in state space models. A lone layer
    of the name tells.
    """
    return {name for name in set(map(last_part, layers)) if not _is_adapted(config, name)}


def misread_by_peft(model: Any, layers: Collection[str]) -> set[str]:
    """Full names of the layers whose saved adapters PEFT would look for under other names.

    While it loads an adapter, it renames the tensors as transformers renames those of the checkpoint. Some of these
    renamings match the model's own names too: Laguna's turns `shared_experts.` into `shared_experts..`.
    """
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers

    keys = {f"{WRAPPED}{layer}.lora_A.weight": layer for layer in layers}
    read = convert_peft_adapter_state_dict_for_transformers(
        model, LoraConfig(), {key: torch.empty(1, 1) for key in keys}
    )
    return {layer for key, layer in keys.items() if key not in read}


def last_part(name: str) -> str:
    """The last part of a layer's name, with those before it that it needs to be more than a number."""
    before, _, last = name.rpartition(".")
    return f"{last_part(before)}.{last}" if last.isdigit() and before else last


def cannot_adapt(config: Any, names: Iterable[str]) -> str:
    """Describe layers that PEFT doesn't adapt."""
    return f"PEFT can't adapt layers of the names {', '.join(sorted(names))} in a {config.model_type} model"


def cannot_read(config: Any, layers: Iterable[str]) -> str:
    """Describe layers whose adapters PEFT misreads."""
    endings = sorted({".".join(layer.split(".")[-2:]) for layer in layers})
    return f"PEFT would load adapters on {', '.join(endings)} under other names in a {config.model_type} model"


def _is_adapted(config: Any, name: str) -> bool:
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners import lora

    lone = _Lone(config, name)
    try:
        with warnings.catch_warnings(action="ignore"):  # that no layer was found
            inject_adapter_in_model(LoraConfig(target_modules=[name]), lone)
    except ValueError:
        return False
    return isinstance(lone.get_submodule(name), lora.Linear)


class _Lone(nn.Module):
    """A model with a config and one small linear layer."""

    def __init__(self, config: Any, name: str) -> None:
        super().__init__()
        self.config = config
        parent: nn.Module = self
        *outer, last = name.split(".")
        for part in outer:
            inner = nn.Module()
            parent.add_module(part, inner)
            parent = inner
        parent.add_module(last, nn.Linear(1, 1, device="meta"))
