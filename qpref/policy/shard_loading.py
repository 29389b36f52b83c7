"""A process's part of the frozen base, kept as soon as a weight is read and quantized.

transformers loads and quantizes one weight at a time. Each process reads all of them and keeps its own rows, so that
it never holds more than its part and one whole weight. The checksum of the whole weight is kept with it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from qpref.distributed.world import World
from qpref.errors import PolicyError
from qpref.policy.architecture import decoder_layers
from qpref.policy.checksum import checksum
from qpref.policy.experts import PackedExperts
from qpref.policy.matmul import check_packed, unpack_scales

SCALES = "scales"
"""Name, in its layer, of the parameter with the scales of a 4-bit weight."""


@dataclass(frozen=True, slots=True)
class Whole:
    """A tensor of which each process has rows.

    Attributes:
        checksum: of all rows.
    """

    shape: torch.Size
    checksum: int


@dataclass
class ShardLoader:
    """Keeps this process's rows of a base's weights: of all 4-bit weights in decoder layers, and of the head.

    Attributes:
        model: on the meta device until its weights are loaded; set by the loader.
        wholes: by the name of the parameter that has the rows.
        shared: checksums of what every process keeps of a quantization, by the name of its weight.
    """

    world: World
    model: Any = None
    wholes: dict[str, Whole] = field(default_factory=dict)
    shared: dict[str, int] = field(default_factory=dict)

    @cached_property
    def _layers(self) -> tuple[str, ...]:
        """Prefixes of the names of parameters in decoder layers."""
        layers = {id(layer) for layer in decoder_layers(self.model)}
        return tuple(f"{name}." for name, module in self.model.named_modules() if id(module) in layers)

    def is_in_layer(self, name: str) -> bool:
        """Return whether a parameter is one of a decoder layer."""
        return name.startswith(self._layers)

    def is_vocabulary(self, name: str) -> bool:
        """Return whether a parameter is the output head's weight, or the table of token embeddings that it is tied
        to."""
        module, _, own = name.rpartition(".")
        shared = [self.model.get_output_embeddings()]
        if name in self.model.all_tied_weights_keys.values():
            shared.append(self.model.get_input_embeddings())
        return own == "weight" and any(self.model.get_submodule(module) is each for each in shared)

    def keep_rows(self, name: str, whole: Tensor) -> nn.Parameter:
        """Keep own rows of [rows, ...], which are divided as torch.chunk does: the last processes may have fewer."""
        self.world.note(f"loading {name}")
        start, stop = own_range(self.world, len(whole))
        self.wholes[name] = Whole(whole.shape, checksum(whole))
        return nn.Parameter(whole.detach()[start:stop].clone(), requires_grad=False)

    def keep_linear(self, name: str, weight: Any) -> nn.Parameter:
        """Keep own rows of a layer's 4-bit weight and of its scales, which the result has in its `quant_state`."""
        state = weight.quant_state
        if weight.device.type == "cpu":
            unpack_scales(state)
        check_packed(weight, state)
        self.shared[name] = shared_checksum(state)
        state.absmax = self.keep_rows(f"{name.rpartition('.')[0]}.{SCALES}", state.absmax)
        kept = self.keep_rows(name, weight.data)
        kept.quant_state = state  # type: ignore[attr-defined]
        return kept

    def keep_experts(self, name: str, experts: PackedExperts) -> None:
        """Keep own experts of a layer's projection, and their scales."""
        for own, parameter in list(experts.named_parameters()):
            setattr(experts, own, self.keep_rows(f"{name}.{own}", parameter))

    def compare(self) -> None:
        """Check that every process has read and quantized the same weights.

        Raises:
            PolicyError: one has others.
        """
        own = {name: str(whole.checksum) for name, whole in self.wholes.items()}
        own |= {f"{name} (quantization)": str(value) for name, value in self.shared.items()}
        digest = hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()
        if len(set(self.world.exchange(digest, "the base's digest"))) == 1:
            return
        for rank, others in enumerate(self.world.exchange(own, "the base's checksums")):
            if differing := [name for name in sorted({*own, *others}) if own.get(name) != others.get(name)]:
                raise PolicyError(
                    f"ranks {self.world.rank} and {rank} read {len(differing)} weights of the base differently, the "
                    f"first is {differing[0]}",
                    "use the same files, the same versions of torch and bitsandbytes and one kind of GPU everywhere",
                )


def own_range(world: World, num_rows: int) -> tuple[int, int]:
    """Find this process's rows: the first, and one past the last."""
    size = -(-num_rows // world.size)
    return min(world.rank * size, num_rows), min((world.rank + 1) * size, num_rows)


def shared_checksum(state: Any) -> int:
    """Compute the checksum of the small tensors of a quantization, which every process keeps: its code, and those of
    nested scales."""
    parts = [state.code] + ([state.state2.absmax, state.state2.code, state.offset] if state.nested else [])
    return checksum(torch.cat([part.detach().float().reshape(-1) for part in parts]))
