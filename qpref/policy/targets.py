"""Layers of a model that [adapter] `targets` names."""

from __future__ import annotations

from typing import Any

from torch import nn

from qpref.errors import PolicyError
from qpref.policy.architecture import text_decoder


def target_layers(model: Any, targets: str | list[str]) -> set[str]:
    """Find the full names of the linear layers to adapt.

    Only layers inside the text decoder count, since a vision tower gets no gradient, and the output head where the
    list names it. A string stands for all of the decoder's linear layers.

    Raises:
        PolicyError: a target matches no linear layer.
    """
    decoder, head = text_decoder(model), model.get_output_embeddings()
    in_decoder = {id(module) for module in decoder.modules()}
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    candidates = [name for name in linear if id(model.get_submodule(name)) in in_decoder]
    if isinstance(targets, str):
        return set(candidates)
    candidates += [name for name in linear if model.get_submodule(name) is head]
    layers: set[str] = set()
    for target in targets:
        matching = [name for name in candidates if matches(name, target)]
        if not matching:
            known = ", ".join(sorted({name.rpartition(".")[2] for name in candidates}))
            raise PolicyError(f"[adapter] targets: '{target}' names no linear layer; it has {known}")
        layers.update(matching)
    return layers


def matches(name: str, target: str) -> bool:
    """Return whether a target means the layer: by its full name, or by the last parts of it."""
    return name == target or name.endswith(f".{target}")


def peft_target_modules(model: Any, layers: set[str]) -> list[str]:
    """Name the layers for PEFT: by their last parts where those match no other module, else by full names."""
    endings = {name.rpartition(".")[2] for name in layers}
    matching = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in endings}
    return sorted(endings if matching == layers else layers)
