"""A frozen base that the processes of a run share: each has a part, and a decoder layer is whole while it is computed.

torch's FSDP2 gathers a layer before its forward pass, its recomputation and its backward pass, and drops it after. It
shards 4-bit weights as the bytes that they are: as 16-bit words, some would be NaNs, which a copy may change
(bitsandbytes#1945). A layer's norms, its biases and the small tensors of its quantization are whole in every process,
and so are the adapters. The vocabulary's tables are never gathered, see `sharded_vocabulary`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

from qpref.distributed.world import World
from qpref.errors import PolicyError
from qpref.policy.architecture import decoder_layers, text_decoder
from qpref.policy.checksum import checksum
from qpref.policy.shard_loading import SCALES, ShardLoader, Whole, shared_checksum
from qpref.policy.sharded_vocabulary import HostEmbedding, ShardedEmbedding, ShardedHead, VocabularyRows

DAMAGED = "memory or a transfer has changed it: run the memory test of this machine's RAM and GPUs, and resume"


@dataclass(frozen=True, slots=True)
class Piece:
    """A parameter of a layer that is sharded.

    Attributes:
        name: as in the base model.
        module: holds it under `own`.
        checksum: of the whole parameter when the base was loaded.
    """

    name: str
    module: nn.Module
    own: str
    checksum: int


@dataclass(slots=True)
class ShardedBase:
    """The base's layers under FSDP2, and what they have to be when they are gathered.

    Attributes:
        layers: FSDP modules in the order in which they are computed.
        pieces: sharded parameters of each layer.
        shared: [layers] checksums of quantizations, by the module that has them.
        rows: what this process has of the head and of the table of embeddings, with its checksum, by name.
        table: the module that looks tokens up.
    """

    world: World
    layers: list[Any]
    pieces: list[list[Piece]]
    shared: dict[Any, tuple[str, int]]
    rows: dict[str, tuple[Tensor, int]]
    table: nn.Module
    _layer_of: dict[int, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, model: Any, loader: ShardLoader) -> ShardedBase:
        """Shard a model of whose weights the loader has kept rows, and check every layer once.

        Raises:
            PolicyError: processes have read different weights, or a gathered layer isn't as it was quantized.
        """
        loader.compare()
        assert loader.world.devices is not None
        device = next(model.parameters()).device
        mesh = DeviceMesh.from_group(loader.world.devices, device.type)
        rows = _shard_vocabulary(model, loader)
        names = {id(module): name for name, module in model.named_modules()}
        shared = _register_scales(model, loader)
        layers = decoder_layers(model)
        pieces = [_shard_layer(layer, names[id(layer)], loader, mesh) for layer in layers]
        decoder = text_decoder(model)
        fully_shard(decoder, mesh=mesh, ignored_params=set(decoder.parameters()))
        layer_of = {id(module): layer for layer in layers for module in layer.modules()}
        base = cls(loader.world, layers, pieces, shared, rows, model.get_input_embeddings(), layer_of)
        base._restore_quantization()
        base.verify()
        return base

    @contextmanager
    def gathered(self, layer: Any) -> Iterator[None]:
        """Make a layer whole inside; all processes have to."""
        layer.unshard()
        try:
            yield
        finally:
            layer.reshard()

    def gathered_around(self, module: nn.Module) -> AbstractContextManager[None]:
        """Make the layer that a module is in whole inside, if it is in one; all processes have to."""
        layer = self._layer_of.get(id(module))
        return nullcontext() if layer is None else self.gathered(layer)

    def join(self, *, backward: bool) -> None:
        """Take part in the collectives of other processes' pass through the decoder."""
        if not backward:
            if isinstance(self.table, ShardedEmbedding):
                self.table(torch.empty(0, dtype=torch.int64, device=self.table.weight.device))
            for layer in self.layers:
                with self.gathered(layer):
                    pass
            return
        for layer in reversed(self.layers[self.first_trained() :]):
            with self.gathered(layer):
                pass

    def order_gathering(self) -> None:
        """Fix which layers the backward pass gathers, and when: each layer asks for the one before it, down to the
        first with a trained parameter.

        By default FSDP2 looks it up in the order of all passes since the last backward pass, which may differ between
        processes; and collectives of different layers would be taken for each other.
        """
        first = self.first_trained()
        for index, layer in enumerate(self.layers):
            layer.set_modules_to_backward_prefetch([self.layers[max(index - 1, first)] if index > first else layer])

    def first_trained(self) -> int:
        """Index of the first layer with a trained parameter: the backward pass ends there."""
        is_trained = [any(each.requires_grad for each in layer.parameters()) for layer in self.layers]
        return is_trained.index(True) if True in is_trained else len(self.layers)

    def verify(self) -> None:
        """Gather every layer once and compare it with its checksum at loading; all processes have to.

        Raises:
            PolicyError: a weight has changed, in any process.
        """
        faults = [name for name, (rows, before) in self.rows.items() if checksum(rows) != before]
        for layer, pieces in zip(self.layers, self.pieces, strict=True):
            with self.gathered(layer):
                faults += [each.name for each in pieces if checksum(getattr(each.module, each.own)) != each.checksum]
                faults += [
                    f"{name} (quantization)"
                    for module, (name, before) in self.shared.items()
                    if self._layer_of[id(module)] is layer and shared_checksum(module.weight.quant_state) != before
                ]
        for rank, found in enumerate(self.world.exchange(faults, "the check of the base")):
            if found:
                raise PolicyError(
                    f"the base has changed since it was loaded: rank {rank} finds {len(found)} weights that aren't as "
                    f"they were quantized, the first is {found[0]}",
                    DAMAGED,
                )

    def _restore_quantization(self) -> None:
        """Give each gathered 4-bit weight bitsandbytes' description of it, with gathered scales.

        A gathered parameter is one object as long as the process lives, of which FSDP2 frees and fills the storage.
        """
        for layer in self.layers:
            with self.gathered(layer):
                for module in layer.modules():
                    if isinstance(module, Linear4bit):
                        module.weight.quant_state = module.quant_state
                        module.quant_state.absmax = getattr(module, SCALES)


def _register_scales(model: Any, loader: ShardLoader) -> dict[Any, tuple[str, int]]:
    """Make the scales of 4-bit weights parameters of their layers; returns the names and checksums of what remains."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit) and (weight := f"{name}.weight") in loader.wholes:
            module.quant_state = module.weight.quant_state
            module.register_parameter(SCALES, module.quant_state.absmax)
            found[module] = weight, loader.shared[weight]
    return found


def _shard_layer(layer: Any, prefix: str, loader: ShardLoader, mesh: DeviceMesh) -> list[Piece]:
    """Shard a decoder layer by FSDP2, whose parameters in `loader.wholes` are own rows."""
    kept = {name: each for name, each in layer.named_parameters() if f"{prefix}.{name}" in loader.wholes}
    others = {each for name, each in layer.named_parameters() if name not in kept}
    wholes = {name: loader.wholes[f"{prefix}.{name}"] for name in kept}
    holders = {name: (layer.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in kept}
    for name, (module, own) in holders.items():
        empty = torch.empty(wholes[name].shape, dtype=kept[name].dtype, device="meta")
        module._parameters[own] = nn.Parameter(empty, requires_grad=False)
    fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=others)
    for name, (module, own) in holders.items():
        module._parameters[own] = _as_sharded(kept[name], wholes[name], mesh)
    return [Piece(f"{prefix}.{name}", *holders[name], wholes[name].checksum) for name in kept]


def _as_sharded(rows: nn.Parameter, whole: Whole, mesh: DeviceMesh) -> nn.Parameter:
    """Describe own rows as FSDP2 does, with what PEFT reads of a 4-bit weight."""
    stride = torch.empty(whole.shape, device="meta").stride()
    tensor = DTensor.from_local(rows.detach(), mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=stride)
    parameter = nn.Parameter(tensor, requires_grad=False)
    if (state := getattr(rows, "quant_state", None)) is not None:
        described: Any = parameter
        described.compress_statistics, described.quant_type = state.nested, state.quant_type
    return parameter


def _shard_vocabulary(model: Any, loader: ShardLoader) -> dict[str, tuple[Tensor, int]]:
    """Put modules that compute from shared rows in the place of the head and of a table that is tied to it; another
    table goes to the host.

    Returns:
        Name -> own rows and their checksum.
    """
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    of_table, of_head = (f"{names[id(module)]}.weight" for module in (table, head))
    if head.weight is table.weight:
        rows = VocabularyRows.of(loader.world, table.weight, loader.wholes[of_table].shape[0])
        _replace(model, names[id(table)], ShardedEmbedding(table, rows))
    else:
        rows = VocabularyRows.of(loader.world, head.weight, loader.wholes[of_head].shape[0])
        _replace(model, names[id(table)], HostEmbedding(table))
    _replace(model, names[id(head)], ShardedHead(rows, head.bias))
    held = {of_head: rows.weight, of_table: table.weight}
    return {name: (each, checksum(each)) for name, each in held.items()}


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, module)
