"""Adapter + base -> one plain safetensors model, onto the weights that were trained on.

The base of a QLoRA run is not the original model but its NF4 rounding, dequantized: the adapter has learned to correct
that. So the 4-bit layers are dequantized as training did, the delta is added in float32, and nothing is quantized again
(PEFT's merge on 4-bit layers re-quantizes, and a preference delta is smaller than NF4's steps). Tensor by tensor and
shard by shard, so memory stays at one shard.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qpref import fsio
from qpref.errors import DiskError, MergeError, RecipeError
from qpref.policy.delta import LoraDelta
from qpref.policy.load import DTYPES
from qpref.policy.source import cached_sha256, shard_files
from qpref.training.folder import RunFolder

log = logging.getLogger("qpref")

STORED = {"bf16": torch.bfloat16, "fp16": torch.float16, "float32": torch.float32}
ENOUGH = 0.98
"""Share of the learned change that a 16-bit type has to keep to be chosen."""
QUANTIZED_STATE = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state.bitsandbytes__nf4",
                   "quant_state.bitsandbytes__fp4")  # fmt: skip
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "README.md")


@dataclass(frozen=True, slots=True)
class MergeResult:
    """What was written.

    Attributes:
        dtype: the stored type.
        kept: for each type that was looked at, the share of the learned change that its rounding leaves: the
            projection of what is stored on what was learned, over all adapted weights; 1 is all of it.
    """

    path: Path
    dtype: str
    kept: dict[str, float]


def merge_run(run: Path, out: Path, dtype: str = "auto") -> MergeResult:
    """Write the trained model of a run to `out`, which must be new or empty.

    Args:
        run: a finished run folder.
        out: the folder to write.
        dtype: bf16, fp16 or float32; auto takes the first of them that keeps 98 % of the learned change.

    Raises:
        RecipeError: `run` is no finished run, or `out` holds something.
        MergeError: the base is not the one that was trained, or the adapter doesn't fit it.
        DiskError: there is no room.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RecipeError(f"{out}: holds something already", "name a new or empty folder")
    base = TrainedBase.of_run(RunFolder(run))
    delta = LoraDelta.read(RunFolder(run).adapter)
    places = base.places_of(delta.modules)
    retention = {name: Retention() for name in (STORED if dtype == "auto" else [dtype])}
    overflows = _measure(base, delta, places, retention) if dtype == "auto" else False
    chosen = _choose(retention, overflows) if dtype == "auto" else dtype
    _refuse_full_disk(base, out, STORED[chosen])
    with fsio.staged_folder(out) as staging:
        written = Retention()
        weight_map: dict[str, str] = {}
        total = 0
        for shard in base.shards:
            tensors = {}
            for key, weight in base.tensors(shard):
                tensors[key] = _stored(key, weight, delta, places, STORED[chosen], written)
            fsio.write_tensors(staging / shard.name, tensors, {"format": "pt"})
            weight_map |= dict.fromkeys(tensors, shard.name)
            total += sum(tensor.nbytes for tensor in tensors.values())
        if len(base.shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            fsio.write_json(staging / "model.safetensors.index.json", index)
        _copy_settings(base, RunFolder(run).adapter, staging, STORED[chosen])
        fsio.make_readable(staging)
    kept = {name: share.kept for name, share in retention.items() if share.learned} | {chosen: written.kept}
    return MergeResult(out, chosen, kept)


@dataclass(slots=True)
class Retention:
    """How much of a delta survives rounding: sums of <stored change, delta> and <delta, delta> over layers."""

    survived: float = 0.0
    learned: float = 0.0

    def add(self, weight: Tensor, delta: Tensor, stored: Tensor) -> None:
        change = stored.to(torch.float64) - weight.to(torch.float64)
        self.survived += float((change * delta).sum())
        self.learned += float(delta.to(torch.float64).square().sum())

    @property
    def kept(self) -> float:
        return self.survived / self.learned if self.learned else math.nan


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedBase:
    """The base's weights as the run's forward pass used them.

    Attributes:
        names: tensor name in the files -> its name in the loaded model; transformers renames some.
        origin: tensor name in the files -> the file.
        quantized: modules that were 4-bit in training, by their name in the model.
        dtype: what the base computed in.
    """

    path: Path
    shards: list[Path]
    names: Mapping[str, str]
    quantized: frozenset[str]
    dtype: torch.dtype
    double_quantization: bool
    device: torch.device
    origin: Mapping[str, Path]

    @classmethod
    def of_run(cls, run: RunFolder) -> TrainedBase:
        """The base that a finished run names, with every file's hash compared.

        Raises:
            RecipeError: there is no finished run.
            MergeError: the base is gone or has changed.
        """
        if not run.run_json.is_file():
            raise RecipeError(f"{run.path}: no run of qpref (it has no run.json)")
        if not run.adapter.is_dir():
            raise RecipeError(f"{run.path}: this run is not finished", "finish it with qpref train --resume")
        facts = json.loads(run.run_json.read_text())
        path = Path(facts["base_path"])
        if not path.is_dir():
            raise MergeError(f"{path}: the base that was trained is gone", "qpref train --resume fetches it again")
        shards = shard_files(path)
        for shard in shards:
            if facts["base_weights"].get(shard.name) != cached_sha256(shard):
                raise MergeError(f"{shard}: not the file that was trained on; its SHA-256 differs")
        origin = {key: shard for shard in shards for key in _keys(shard)}
        return cls(
            path=path,
            shards=shards,
            names=_names_in_model(path, list(origin)),
            quantized=frozenset(facts["quantized_modules"]),
            dtype=DTYPES[facts["dtype"]],
            double_quantization=facts["double_quantization"],
            device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
            origin=origin,
        )

    def places_of(self, modules: list[str]) -> dict[str, str]:
        """Tensor name in the files -> adapted module.

        Raises:
            MergeError: a module's weight is no tensor of its own in the files.
        """
        wanted = {f"{module}.weight": module for module in modules}
        places = {key: wanted[name] for key, name in self.names.items() if name in wanted}
        if missing := sorted(set(modules) - set(places.values())):
            raise MergeError(f"{self.path}: holds no weight for {missing[0]} ({len(missing)} missing)")
        return places

    def tensors(self, shard: Path) -> Iterator[tuple[str, Tensor]]:
        """Name and value of each tensor of a shard; 4-bit ones dequantized, their helper tensors left out."""
        from safetensors import safe_open

        with safe_open(shard, "pt") as file:
            for key in file.keys():  # noqa: SIM118 - no mapping
                if key.endswith(QUANTIZED_STATE):
                    continue
                yield key, self._as_trained(key, file.get_tensor(key))

    def _as_trained(self, key: str, tensor: Tensor) -> Tensor:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        if not tensor.is_floating_point():
            state = self._stored_state(key)
            if state is None:
                return tensor
            packed = tensor.to(self.device)
        elif self.names[key].removesuffix(".weight") in self.quantized:
            # As Linear4bit does when a weight comes to its device: the same call on the same numbers.
            weight = tensor.to(self.device, self.dtype)
            packed, state = quantize_4bit(weight, compress_statistics=self.double_quantization, quant_type="nf4")
        else:
            return tensor.to(self.dtype)
        dequantized: Tensor = dequantize_4bit(packed, state)
        return dequantized.to(self.dtype).cpu()

    def _stored_state(self, key: str) -> Any:
        """The quantization state that a bitsandbytes checkpoint keeps beside a 4-bit weight; None for other tensors."""
        from bitsandbytes.functional import QuantState
        from safetensors import safe_open

        parts = {}
        for name in (f"{key}.{part}" for part in QUANTIZED_STATE):
            if name in self.origin:
                with safe_open(self.origin[name], "pt") as file:
                    parts[name] = file.get_tensor(name)
        return QuantState.from_dict(parts, self.device) if parts else None


def _keys(shard: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(shard, "pt") as file:
        return list(file.keys())


def _names_in_model(path: Path, keys: list[str]) -> dict[str, str]:
    """How transformers names each tensor of the files once it has loaded them."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    shapes = model.state_dict()
    names = {}
    for key in keys:
        names[key], _ = rename_source_key(key, renamings, converters, model.base_model_prefix, shapes)
        if names[key] not in shapes and key in shapes:
            names[key] = key
    return names


def _measure(
    base: TrainedBase, delta: LoraDelta, places: Mapping[str, str], retention: Mapping[str, Retention]
) -> bool:
    """Add up what each type would keep; returns whether some value doesn't fit float16."""
    largest = 0.0
    for shard in base.shards:
        for key, weight in base.tensors(shard):
            if key in places:
                change = delta.of(places[key])
                exact = weight.float() + change
                largest = max(largest, float(exact.abs().max()))
                for name, share in retention.items():
                    share.add(weight, change, exact.to(STORED[name]))
            elif weight.is_floating_point():
                largest = max(largest, float(weight.abs().max()))
    return largest > torch.finfo(torch.float16).max


def _choose(retention: Mapping[str, Retention], overflows: bool) -> str:
    for name in ("bf16", "fp16"):
        if retention[name].kept >= ENOUGH and not (name == "fp16" and overflows):
            return name
    return "float32"


def _stored(
    key: str, weight: Tensor, delta: LoraDelta, places: Mapping[str, str], dtype: torch.dtype, written: Retention
) -> Tensor:
    if not weight.is_floating_point():
        return weight
    if key not in places:
        stored = weight.to(dtype)
    else:
        change = delta.of(places[key])
        stored = (weight.float() + change).to(dtype)
        written.add(weight, change, stored)
    if not bool(stored.isfinite().all()):
        raise MergeError(f"{key} doesn't fit {str(dtype).removeprefix('torch.')}", "choose --dtype bf16 or float32")
    return stored


def _refuse_full_disk(base: TrainedBase, out: Path, dtype: torch.dtype) -> None:
    from safetensors import safe_open

    needed = 0
    for shard in base.shards:
        with safe_open(shard, "pt") as file:
            for key in file.keys():  # noqa: SIM118 - no mapping
                part = file.get_slice(key)
                packed = 2 if part.get_dtype() == "U8" else 1
                needed += math.prod(part.get_shape()) * packed * dtype.itemsize
    folder = next(parent for parent in (out, *out.absolute().parents) if parent.is_dir())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DiskError(f"{out}: needs {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free")


def _copy_settings(base: TrainedBase, adapter: Path, staging: Path, dtype: torch.dtype) -> None:
    """config.json without quantization and with the stored type; the tokenizer that was trained with; generation's."""
    config = json.loads((base.path / "config.json").read_text())
    for old in ("quantization_config", "torch_dtype"):
        config.pop(old, None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    fsio.write_json(staging / "config.json", config)
    if (base.path / "generation_config.json").is_file():
        fsio.copy_file(base.path / "generation_config.json", staging / "generation_config.json")
    for file in sorted(adapter.iterdir()):
        if file.name not in ADAPTER_FILES and file.is_file():
            fsio.copy_file(file, staging / file.name)
