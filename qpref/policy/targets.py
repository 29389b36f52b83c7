"""Layers of a model that [adapter] `targets` names."""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch
from torch import nn

from qpref.errors import PolicyError
from qpref.policy.architecture import text_decoder
from qpref.policy.forward_errors import KINDS
from qpref.policy.peft_limits import cannot_adapt, cannot_read, foreign_to_peft, last_part, misread_by_peft

log = logging.getLogger("qpref")


def target_layers(model: Any, targets: str | list[str]) -> set[str]:
    """Find the full names of the linear layers to adapt.

    Only layers inside the text decoder count, since a vision tower gets no gradient, and the output head where the
    list names it. A string stands for all of the decoder's linear layers that PEFT can adapt.

    Raises:
        PolicyError: a target matches no linear layer, or layers that PEFT can't adapt.
    """
    decoder, head = text_decoder(model), model.get_output_embeddings()
    inside = {id(module) for module in decoder.modules() if module is not head}
    linear = [name for name, module in model.named_modules() if is_linear(module)]
    candidates = [name for name in linear if id(model.get_submodule(name)) in inside]
    foreign = foreign_to_peft(model.config, candidates)
    misread = misread_by_peft(model, candidates)
    adaptable = [name for name in candidates if last_part(name) not in foreign and name not in misread]
    if not candidates:
        raise PolicyError(f"this {model.config.model_type} model has no linear layers", "train another model")
    if not adaptable:
        what = cannot_adapt(model.config, foreign) if foreign else cannot_read(model.config, misread)
        raise PolicyError(what, "train another model")
    if isinstance(targets, str):
        if foreign:
            log.warning("%s; they stay as they are", cannot_adapt(model.config, foreign))
        if misread:
            log.warning("%s; they stay as they are", cannot_read(model.config, misread))
        return set(adaptable)
    with_head = adaptable + [name for name in linear if model.get_submodule(name) is head]
    known = ", ".join(sorted(set(map(last_part, with_head))))
    candidates += with_head[len(adaptable) :]
    layers: set[str] = set()
    for target in targets:
        matching = [name for name in candidates if matches(name, target)]
        if not matching:
            raise PolicyError(f"[adapter] targets: '{target}' names no linear layer; it has {known}")
        if impossible := foreign & set(map(last_part, matching)):
            raise PolicyError(f"[adapter] targets: {cannot_adapt(model.config, impossible)}; it can adapt {known}")
        if wrong := misread.intersection(matching):
            raise PolicyError(
                f"[adapter] targets: {cannot_read(model.config, wrong)}",
                'targets = "all-linear" leaves them out, and so do full names of other layers',
            )
        layers.update(matching)
    return layers


def is_linear(module: nn.Module) -> bool:
    """Return whether a module computes what a linear layer does, not only is one by its class: some routers derive
    from it and return several tensors, Falcon's layers compute the same by other operations."""
    from bitsandbytes.nn import Linear4bit
    from transformers.pytorch_utils import Conv1D

    if type(module).forward in (nn.Linear.forward, Linear4bit.forward, Conv1D.forward):
        return True
    return isinstance(module, nn.Linear) and _computes_linear(module)


def matches(name: str, target: str) -> bool:
    """Return whether a target means the layer: by its full name, or by the last parts of it."""
    return name == target or name.endswith(f".{target}")


def peft_target_modules(model: Any, layers: set[str]) -> list[str]:
    """Name the layers for PEFT: by their last parts where those match no other module, else by full names."""
    endings = set(map(last_part, layers))
    matching = {name for name, _ in model.named_modules() if any(matches(name, ending) for ending in endings)}
    return sorted(endings if matching == layers else layers)


def _computes_linear(module: nn.Linear) -> bool:
    """Return whether a class's own forward pass is x W^T + b, as tried with a small weight and bias."""
    random = torch.Generator().manual_seed(0)
    weight, bias, x = (torch.randn(size, generator=random) for size in ((5, 3), (5,), (2, 7, 3)))
    tried = copy.copy(module)
    tried._parameters = {"weight": nn.Parameter(weight), "bias": None if module.bias is None else nn.Parameter(bias)}
    tried.in_features, tried.out_features = 3, 5
    try:
        with torch.no_grad():
            found = tried(x)
    except KINDS:
        return False
    expected = nn.functional.linear(x, weight, tried.bias)
    return isinstance(found, torch.Tensor) and found.shape == expected.shape and torch.allclose(found, expected)
