"""Fused experts as the tensors of the base's files: mostly one for each expert.

An expert's matrix is quantized, and adapted, as the model holds it, where several tensors of the files may be one. So
they are fused as transformers fuses them, rounded, and taken apart by the reverse conversion; so is what was learned.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from qpref.errors import MergeError
from qpref.policy.experts import fused_experts, projections_of

KEPT = 2
"""Parameters of a kind, rounded or learned, that are kept: files list the two projections of a layer expert by
expert."""


@dataclass(frozen=True, slots=True)
class Source:
    """Place of a tensor of the base's files in the model that transformers loads.

    Attributes:
        name: of the parameter that it becomes, or becomes a part of.
        pattern: of the converter that makes the parameter; None where the tensor is the parameter.
    """

    name: str
    pattern: str | None
    converter: Any = None


@dataclass(frozen=True, slots=True)
class FusedExperts:
    """The fused experts of a base.

    Attributes:
        model: on the meta device.
        quantized: names of the parameters that were 4-bit in training.
        sources: tensor name in the files -> its place, for the parameters with experts.
        shapes: tensor name in the files -> its shape.
    """

    model: Any
    quantized: frozenset[str]
    sources: Mapping[str, Source]
    shapes: Mapping[str, tuple[int, ...]]
    _rounded: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    _learned: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    @classmethod
    def of(
        cls, model: Any, sources: Mapping[str, Source], shapes: Mapping[str, tuple[int, ...]], names: Collection[str]
    ) -> FusedExperts:
        """Read the places of a plain model's experts.

        Args:
            names: of the parameters that were 4-bit in training.
        """
        modules = fused_experts(model).items()
        known = {f"{module}.{name}" for module, experts in modules for name in projections_of(experts)} | set(names)
        return cls(model, frozenset(names), {key: each for key, each in sources.items() if each.name in known}, shapes)

    def rounded(self, key: str, read: Callable[[str], Tensor], rounding: Callable[[Tensor], Tensor]) -> Tensor:
        """Compute a tensor of the files as training computed with it, on the CPU.

        Args:
            read: reads a tensor of the files.
            rounding: rounds [experts, rows, columns] weights.

        Raises:
            MergeError: transformers can't take the parameter apart again.
        """
        name = self.sources[key].name
        return self._parts(self._rounded, name, lambda: rounding(self._fused(name, read)).cpu())[key]

    def learned(self, key: str, delta: Callable[[str], Tensor]) -> Tensor:
        """Compute what a tensor of the files has learned.

        Args:
            delta: computes the delta of a parameter, [experts, rows, columns].

        Raises:
            MergeError: as for `rounded`.
        """
        name = self.sources[key].name
        return self._parts(self._learned, name, lambda: delta(name))[key]

    def _parts(self, kept: dict[str, dict[str, Tensor]], name: str, whole: Callable[[], Tensor]) -> dict[str, Tensor]:
        """Take the parameter apart into the tensors of the files, unless it is kept."""
        if name not in kept:
            while len(kept) >= KEPT:
                del kept[next(iter(kept))]
            kept[name] = self._apart(name, whole())
        return kept[name]

    def _keys(self, name: str) -> list[str]:
        from transformers.core_model_loading import dot_natural_key

        return sorted((key for key, source in self.sources.items() if source.name == name), key=dot_natural_key)

    def _fused(self, name: str, read: Callable[[str], Tensor]) -> Tensor:
        keys = self._keys(name)
        converter = deepcopy(self.sources[keys[0]].converter)
        if converter is None:
            return read(keys[0])
        for key in keys:
            converter.add_tensor(name, key, self.sources[key].pattern, read(key))
        return _only(self._convert(converter, name)[name])

    def _apart(self, name: str, weights: Tensor) -> dict[str, Tensor]:
        from transformers.core_model_loading import dot_natural_key

        keys = self._keys(name)
        converter = self.sources[keys[0]].converter
        parts = {name: weights} if converter is None else self._reversed(name, converter, weights)
        found = [parts[part] for part in sorted(parts, key=dot_natural_key)]
        if [tuple(part.shape) for part in found] != [self.shapes[key] for key in keys]:
            raise MergeError(f"{name}: transformers doesn't take these experts apart into the tensors of the files")
        return dict(zip(keys, found, strict=True))

    def _reversed(self, name: str, converter: Any, weights: Tensor) -> dict[str, Tensor]:
        from transformers.core_model_loading import rename_source_key

        taking = deepcopy(converter).reverse_transform()
        target, pattern = rename_source_key(name, [], [taking])
        taking.add_tensor(target, name, pattern, weights)
        return {part: _only(value) for part, value in self._convert(taking, target).items()}

    def _convert(self, converter: Any, name: str) -> dict[str, Any]:
        found: dict[str, Any] = converter.convert(name, model=self.model, config=self.model.config)
        return found


def _only(value: Any) -> Tensor:
    tensor: Tensor = value[0] if isinstance(value, list) else value
    return tensor.contiguous()


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
