"""Fused experts that were in 4 bits in training, as the tensors of the base's files: mostly one for each expert.

An expert's matrix is quantized as the model holds it, where several tensors of the files may be one. So they are fused
as transformers fuses them, rounded, and taken apart by the reverse conversion.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from qpref.errors import MergeError

KEPT = 2
"""Rounded parameters kept: files list the two projections of a layer expert by expert."""


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
class QuantizedExperts:
    """The fused experts that were 4-bit in training.

    Attributes:
        model: on the meta device.
        names: of their parameters.
        sources: tensor name in the files -> its place, for these parameters.
    """

    model: Any = None
    names: frozenset[str] = frozenset()
    sources: Mapping[str, Source] = field(default_factory=dict)
    _rounded: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    @classmethod
    def of(cls, model: Any, sources: Mapping[str, Source], names: Collection[str]) -> QuantizedExperts:
        """Keep the sources of the named parameters."""
        return cls(model, frozenset(names), {key: source for key, source in sources.items() if source.name in names})

    def rounded(self, key: str, read: Callable[[str], Tensor], rounding: Callable[[Tensor], Tensor]) -> Tensor:
        """Compute a tensor of the files as training computed with it, on the CPU.

        Args:
            read: reads a tensor of the files.
            rounding: rounds [experts, rows, columns] weights.

        Raises:
            MergeError: transformers can't take the parameter apart again.
        """
        name = self.sources[key].name
        if name not in self._rounded:
            while len(self._rounded) >= KEPT:
                del self._rounded[next(iter(self._rounded))]
            self._rounded[name] = self._parts(name, read, rounding)
        return self._rounded[name][key]

    def _parts(
        self, name: str, read: Callable[[str], Tensor], rounding: Callable[[Tensor], Tensor]
    ) -> dict[str, Tensor]:
        from transformers.core_model_loading import dot_natural_key

        keys = sorted((key for key, source in self.sources.items() if source.name == name), key=dot_natural_key)
        converter = self.sources[keys[0]].converter
        if converter is None:
            return {keys[0]: rounding(read(keys[0])).cpu()}
        fusing = deepcopy(converter)
        for key in keys:
            fusing.add_tensor(name, key, self.sources[key].pattern, read(key))
        parts = self._apart(name, converter, rounding(_only(self._convert(fusing, name)[name])).cpu())
        found = [parts[part] for part in sorted(parts, key=dot_natural_key)]
        if [part.shape for part in found] != [read(key).shape for key in keys]:
            raise MergeError(f"{name}: transformers doesn't take these experts apart into the tensors of the files")
        return dict(zip(keys, found, strict=True))

    def _apart(self, name: str, converter: Any, weights: Tensor) -> dict[str, Tensor]:
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
