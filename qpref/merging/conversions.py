"""Tensors of the base's files that are other tensors in the model: experts, and layers that are stored as one.

transformers makes one weight of several tensors of the files, mostly of one for each expert, or several weights of one
tensor. A weight is quantized, and adapted, as the model holds it. So tensors are converted as transformers converts
them, rounded there, and converted back; so is what was learned.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qpref.errors import MergeError
from qpref.policy.experts import fused_experts, projections_of

KEPT = 2
"""Groups of a kind, rounded or learned, that are kept: files list the two projections of a layer expert by expert."""


@dataclass(frozen=True, slots=True)
class Source:
    """Place of a tensor of the base's files in the model that transformers loads.

    Attributes:
        name: of the weight that it becomes, becomes a part of, or the first that is made of it.
        pattern: of the converter that makes the weight; None where the tensor is the weight.
    """

    name: str
    pattern: str | None
    converter: Any = None


@dataclass(frozen=True, slots=True)
class Group:
    """Tensors of the files, and the weights that are made of them together.

    Attributes:
        keys: names of the tensors.
        names: of the weights.
    """

    keys: tuple[str, ...]
    names: tuple[str, ...]
    converter: Any


@dataclass(frozen=True, slots=True)
class Conversions:
    """Conversions of a base's tensors.

    Attributes:
        model: on the meta device.
        sources: tensor name in the files -> its place.
        shapes: tensor name in the files -> its shape.
        groups: tensor name in the files -> its group, for the tensors that are converted, and for experts.
    """

    model: Any
    sources: Mapping[str, Source]
    shapes: Mapping[str, tuple[int, ...]]
    groups: dict[str, Group] = field(default_factory=dict)
    _rounded: dict[tuple[str, ...], dict[str, Tensor]] = field(default_factory=dict)
    _learned: dict[tuple[str, ...], dict[str, Tensor]] = field(default_factory=dict)

    @classmethod
    def of(
        cls, model: Any, keys: Collection[str], shapes: Mapping[str, tuple[int, ...]], packed: Collection[str]
    ) -> Conversions:
        """Read the conversions of a model on the meta device.

        Args:
            keys: names of the tensors in the files.
            packed: those of them that are packed 4-bit weights, which aren't converted.
        """
        from transformers.core_model_loading import dot_natural_key

        found = cls(model, sources_in_model(model, list(keys)), shapes)
        modules = fused_experts(model).items()
        experts = {f"{module}.{name}" for module, layer in modules for name in projections_of(layer)}
        members: dict[str, list[str]] = {}
        for key, source in found.sources.items():
            if key not in packed and (source.converter is not None or source.name in experts):
                members.setdefault(source.name, []).append(key)
        for name, own in members.items():
            own.sort(key=dot_natural_key)
            converter = found.sources[own[0]].converter
            names = found._names(name, own, converter)
            found.groups.update(dict.fromkeys(own, Group(tuple(own), names, converter)))
        return found

    def names(self, key: str) -> tuple[str, ...]:
        """Name the weights that a tensor of the files is a part of, or has as parts."""
        return self.groups[key].names if key in self.groups else (self.sources[key].name,)

    def is_converted(self, key: str) -> bool:
        """Return whether a tensor of the files is no weight of the model as it is."""
        return key in self.groups and self.groups[key].converter is not None

    def rounded(self, key: str, read: Callable[[str], Tensor], rounding: Callable[[str, Tensor], Tensor]) -> Tensor:
        """Compute a tensor of the files as training computed with it, on the CPU.

        Args:
            read: reads a tensor of the files.
            rounding: rounds a weight of the model, by its name.

        Raises:
            MergeError: transformers can't convert the weights back.
        """
        group = self.groups[key]
        return self._back(
            self._rounded,
            group,
            lambda: {name: rounding(name, value).cpu() for name, value in self._forward(group, read).items()},
        )[key]

    def learned(self, key: str, delta: Callable[[str], Tensor]) -> Tensor:
        """Compute what a tensor of the files has learned.

        Args:
            delta: computes the delta of a weight, by its name.

        Raises:
            MergeError: as for `rounded`.
        """
        group = self.groups[key]
        return self._back(self._learned, group, lambda: {name: delta(name) for name in group.names})[key]

    def _names(self, name: str, keys: list[str], converter: Any) -> tuple[str, ...]:
        """Name the weights of a group; of several by a conversion without values."""
        if converter is None or len(converter.target_patterns) == 1:
            return (name,)
        group = Group(tuple(keys), (name,), converter)
        return tuple(self._forward(group, lambda key: torch.empty(self.shapes[key], device="meta")))

    def _forward(self, group: Group, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        if group.converter is None:
            return {group.names[0]: read(group.keys[0])}
        converter = deepcopy(group.converter)
        for key in group.keys:
            converter.add_tensor(group.names[0], key, self.sources[key].pattern, read(key))
        return self._converted(converter, group.names[0])

    def _back(
        self,
        kept: dict[tuple[str, ...], dict[str, Tensor]],
        group: Group,
        weights: Callable[[], Mapping[str, Tensor]],
    ) -> dict[str, Tensor]:
        """Convert the weights back into the tensors of the files, unless they are kept."""
        if group.keys not in kept:
            while len(kept) >= KEPT:
                del kept[next(iter(kept))]
            kept[group.keys] = self._reversed(group, weights())
        return kept[group.keys]

    def _reversed(self, group: Group, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        from transformers.core_model_loading import dot_natural_key, rename_source_key

        if group.converter is None:
            return dict(zip(group.keys, weights.values(), strict=True))
        back = deepcopy(group.converter).reverse_transform()
        for name, value in weights.items():
            target, pattern = rename_source_key(name, [], [back])
            back.add_tensor(target, name, pattern, value)
        parts = self._converted(back, target)
        found = [parts[part].contiguous() for part in sorted(parts, key=dot_natural_key)]
        if [tuple(part.shape) for part in found] != [self.shapes[key] for key in group.keys]:
            raise MergeError(f"{group.names[0]}: transformers doesn't convert it back into the tensors of the files")
        return dict(zip(group.keys, found, strict=True))

    def _converted(self, converter: Any, name: str) -> dict[str, Tensor]:
        found = converter.convert(name, model=self.model, config=self.model.config)
        return {part: value[0] if isinstance(value, list) else value for part, value in found.items()}


def sources_in_model(model: Any, keys: list[str]) -> dict[str, Source]:
    """Find the place of each tensor of the files in the model that transformers loads."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    of_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    shapes = model.state_dict()
    sources = {}
    for key in keys:
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, shapes)
        if name not in shapes and key in shapes:
            name, pattern = key, None
        sources[key] = Source(name, pattern, of_pattern.get(pattern))
    return sources
