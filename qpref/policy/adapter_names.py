"""Names of an adapter's layers under another class of its checkpoint than the one that is loaded.

A multimodal checkpoint can be loaded by its own class or as its text model alone, and transformers has renamed parts of
the first, so the same layer is `model.layers.0...`, `model.language_model.layers.0...` or
`language_model.model.layers.0...`. Only what is before the decoder's own name differs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from qpref.policy.architecture import text_decoder

T = TypeVar("T")

WRAPPED = "base_model.model."
"""PEFT's prefix of a layer's name."""
DECODER_WORDS = frozenset({"model", "language_model", "text_model", "decoder", "transformer"})
"""Parts of the names by which models hold their text decoder; a vision tower may have layers of the same names."""


@dataclass(frozen=True, slots=True)
class LayerNames:
    """Names in a loaded model.

    Attributes:
        modules: all modules.
        decoder: the text decoder.
        head: the output head.
    """

    modules: frozenset[str]
    decoder: str
    head: str

    @classmethod
    def of(cls, model: Any) -> LayerNames:
        """Read the names of a plain model, without adapters."""
        names = {id(module): name for name, module in model.named_modules()}
        head = names.get(id(model.get_output_embeddings()), "")
        return cls(frozenset(names.values()), names[id(text_decoder(model))], head)

    def translated(self, layers: Iterable[str]) -> dict[str, str]:
        """Map an adapter's names of layers to this model's; names that mean nothing here stay as they are."""
        layers = list(layers)
        found = {layer: self._translated(layer) for layer in layers}
        is_one_to_one = len(set(found.values())) == len(found)
        return found if is_one_to_one else dict(zip(layers, layers, strict=True))

    def translated_keys(self, tensors: Mapping[str, T]) -> dict[str, T]:
        """Rename tensors of an adapter in PEFT's format, or of its parameters, as `translated` does their layers."""
        layers = {key: layer_of(key) for key in tensors}
        names = self.translated(dict.fromkeys(layers.values()))
        return {key.replace(layers[key], names[layers[key]], 1): tensor for key, tensor in tensors.items()}

    def _translated(self, layer: str) -> str:
        if layer in self.modules:
            return layer
        parts = layer.split(".")
        for start in range(1, len(parts)):
            name = f"{self.decoder}.{'.'.join(parts[start:])}"
            if name in self.modules and DECODER_WORDS.issuperset(parts[:start]):
                return name
        return self.head if parts[-1] == self.head.rpartition(".")[2] else layer


def layer_of(key: str) -> str:
    """Name the layer that a tensor of an adapter is for; of two on the same experts, PEFT calls one the other's base
    layer."""
    return key.removeprefix(WRAPPED).partition(".lora_")[0].removesuffix(".base_layer")


def plain_parameters(targets: Collection[str], names: LayerNames) -> list[str]:
    """Translate the target parameters of an adapter's settings as `plain_targets` does."""
    parts = [target.rpartition(".") for target in targets]
    layers = names.translated(dict.fromkeys(layer for layer, _, _ in parts))
    return [f"{layers[layer]}{dot}{own}" for layer, dot, own in parts]


def plain_targets(targets: str | Collection[str], names: LayerNames) -> str | list[str]:
    """Translate the targets of an adapter's settings, whole names alone: endings and patterns stay."""
    return targets if isinstance(targets, str) else list(names.translated(targets).values())
