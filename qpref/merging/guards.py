"""Refuse, before the first byte is written, anything that would make a merge wrong."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from qpref import disk_space, fsio, publish
from qpref.errors import MergeError, PolicyError, RecipeError
from qpref.merging.base import TrainedBase
from qpref.merging.learned import LearnedTensors
from qpref.merging.request import MergeRequest
from qpref.merging.settings import tokenizer_folder
from qpref.merging.write import Weights
from qpref.opening import real_path
from qpref.policy import adapter_folder
from qpref.policy.adapter_names import plain_targets
from qpref.policy.architecture import shared_layers
from qpref.policy.delta import LoraDelta
from qpref.policy.source import BaseFolder, shard_files
from qpref.policy.tokenizer import load_tokenizer, tokenizer_difference
from qpref.recipe.document import fingerprint_of
from qpref.recipe.plan import Plan
from qpref.recipe.reopen import RecordedRun, reopen_plan
from qpref.training.base_settings import changed_settings
from qpref.training.folder import EXPORT_AGAIN, RunFolder, names_of_base


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedRun:
    """A finished run whose parts have been checked to belong together.

    Attributes:
        recorded: the run's record, which can reopen its training data too.
        plan: resolved for the held-out data alone.
        learned: deltas of the tensors in the base's files.
        tokenizer: the tokenizer used in training.
        tokenizer_files: the folder of its files.
    """

    folder: RunFolder
    facts: dict[str, Any]
    recorded: RecordedRun
    plan: Plan
    base: TrainedBase
    learned: LearnedTensors
    tokenizer: Any
    tokenizer_files: Path

    @property
    def delta(self) -> LoraDelta:
        """Deltas of the model's weights."""
        return self.learned.delta

    @property
    def base_folder(self) -> BaseFolder:
        return BaseFolder(path=self.base.path, weights=self.facts["base_weights"])


def read_run(path: Path) -> TrainedRun:
    """Read a finished run, and check its base, adapter and tokenizer against its training record.

    Raises:
        RecipeError: `path` is no finished run.
        MergeError: the base, the recipe, the adapter or the tokenizer isn't the run's.
        PolicyError: one of the base's files is missing.
    """
    folder = RunFolder(path)
    if not folder.run_json.is_file():
        raise RecipeError(f"{path}: no run of qpref (it has no run.json)")
    if not folder.adapter.is_dir():
        raise RecipeError(f"{path}: this run is not finished", "finish it with qpref train --resume")
    facts = folder.description()
    document = _recipe_of_run(folder, facts)
    if damage := folder.adapter_damage():
        raise MergeError(damage, EXPORT_AGAIN)
    shards = _base_files(facts)
    recorded = folder.recorded(document, facts)
    plan = reopen_plan(recorded, heldout_alone=True)
    base_path = Path(facts["base_path"])
    base = TrainedBase.of(base_path, shards, facts, _device(plan))
    # The model may have layers that are parts of one tensor in the files.
    layers = base.linear | {base.module_of(key) for key in base.tensors}
    if unknown := sorted(base.quantized - layers):
        raise MergeError(f"{folder.run_json}: {unknown[0]} is no layer of the base, so it wasn't quantized")
    _refuse_other_settings(folder.adapter, document["adapter"], facts)
    delta = LoraDelta.read(folder.adapter, base.layers)
    _refuse_other_layers(base, delta, folder.adapter)
    tokenizer = load_tokenizer(plan.recipe.model, BaseFolder(path=base_path, weights=facts["base_weights"]))
    _refuse_other_tokenizer(tokenizer, folder.adapter)
    return TrainedRun(
        folder=folder,
        facts=facts,
        recorded=recorded,
        plan=plan,
        base=base,
        learned=LearnedTensors.find(delta, base),
        tokenizer=tokenizer,
        tokenizer_files=tokenizer_folder(plan.recipe.model, base_path),
    )


def real_output(request: MergeRequest) -> MergeRequest:
    """Resolve the output to a folder that can be renamed onto: a link to its target, `.` to its full path."""
    with fsio.disk_errors(request.out):
        if not request.out.is_symlink() and request.out.name not in ("", ".."):
            return request
    return replace(request, out=real_path(request.out))


def refuse_output(request: MergeRequest) -> None:
    """Refuse an output folder that isn't empty, is inside the run, or can't be made.

    Raises:
        RecipeError: it isn't empty, is inside the run, or is a mount point.
        DiskError: it can't be made.
    """
    out = request.out
    with fsio.disk_errors(out):
        if out.is_mount():
            raise RecipeError(f"{out}: is a mount point, which no folder can be renamed onto", "name a folder in it")
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise RecipeError(f"{out}: is not empty", "name a new or empty folder")
    if real_path(out).is_relative_to(real_path(request.run)):
        raise RecipeError(f"{out}: is inside the run", "name a folder elsewhere")
    publish.try_folder(out)


def refuse_original(request: MergeRequest, base: TrainedBase) -> None:
    """Refuse `--onto original` where there are no original weights.

    Raises:
        RecipeError: the base is stored in 4 bits.
    """
    if request.onto == "original" and base.is_prequantized:
        raise RecipeError(f"--onto original: {base.path} has only 4-bit weights, no original ones", "leave it out")


def refuse_quantized(request: MergeRequest, base: TrainedBase) -> None:
    """Refuse `--quantize` where the files have linear layers in other tensors than the model: transformers converts
    tensors of plain weights alone.

    Raises:
        RecipeError: with the first such layer.
    """
    if request.quantize is None:
        return
    converted = (name for key in base.tensors if base.conversions.is_converted(key) for name in base.weights_of(key))
    if name := next((name for name in converted if name in base.packable), None):
        raise RecipeError(
            f"--quantize {request.quantize}: the base's files have {name} in other tensors than the model",
            "leave it out; transformers can quantize the merged model while it loads it",
        )


def refuse_full_disk(out: Path, weights: Weights) -> None:
    """Refuse to write weights that don't fit on the disk.

    Raises:
        DiskError: with the bytes needed and free.
    """
    disk_space.refuse_full(out, weights.num_bytes)


def _device(plan: Plan) -> torch.device:
    """Choose the kind of device that quantized the base in training: bitsandbytes may round differently on another."""
    gpu = plan.recipe.model.device != "cpu" and torch.cuda.is_available()
    return torch.device("cuda" if gpu else "cpu")


def _recipe_of_run(folder: RunFolder, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Read the run's recipe, and check it against run.json.

    A setting that both have is compared although both are hashed: the verdict replays the base by run.json's, so it
    would not see a wrong one.
    """
    try:
        document = folder.document(facts)
    except RecipeError as error:
        raise MergeError(error.what, error.hint) from error
    same_base = document["model"].get("base") == facts["base"]
    if not same_base or fingerprint_of(document) != facts["fingerprints"]["recipe"]:
        raise MergeError(
            f"{folder.recipe}: not the recipe of this run; revision, quantization or another setting was changed",
            "restore it; to train with other settings, start another run",
        )
    for name in ("dtype", "double_quantization"):
        if facts[name] != document["model"][name]:
            raise MergeError(
                f"{folder.run_json}: {name} is {facts[name]}, but the recipe's is {document['model'][name]}"
            )
    return document


def _base_files(facts: Mapping[str, Any]) -> list[Path]:
    """List the base's safetensors files, after checking their hashes against the run's.

    Cached hashes don't do: a file that a disk has damaged keeps its size and time of change, and the verdict compares
    models that both have its weights.
    """
    path = Path(facts["base_path"])
    if not path.is_dir():
        raise MergeError(f"{path}: the run's base is gone", "qpref train --resume fetches it again")
    if "base_config" not in facts:
        raise MergeError("run.json has no hash of the base's config: another version of qpref trained this run")
    if changed := changed_settings(path, facts):
        raise MergeError(changed, "restore the base as it was")
    shards = shard_files(path)
    for shard in shards:
        if facts["base_weights"].get(shard.name) != fsio.sha256_file(shard):
            raise MergeError(f"{shard}: not the file used in training; its SHA-256 differs")
    if missing := sorted(set(facts["base_weights"]) - {shard.name for shard in shards}):
        raise MergeError(f"{path}: {missing[0]} was used in training, but the index doesn't name it")
    return shards


def _refuse_other_settings(adapter: Path, recipe: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Refuse an adapter_config.json that isn't this run's: it scales the whole delta."""
    file = adapter / adapter_folder.SETTINGS
    try:
        values = adapter_folder.read_settings(adapter)
    except PolicyError as error:
        raise MergeError(error.what) from error
    if (named := values.get("base_model_name_or_path")) not in names_of_base(facts):
        raise MergeError(f"{file}: an adapter of {named}, not of {facts.get('base_name', facts['base_path'])}")
    if setting := adapter_folder.unsupported_setting(values):
        raise MergeError(f"{file}: the adapter uses {setting}, so it is not a plain LoRA delta")
    expected = {"r": "rank", "lora_alpha": "alpha", "use_rslora": "rslora"}
    if recipe.get("start") is None:
        if bool(values.get("target_parameters")) != recipe.get("experts", False):
            raise MergeError(f"{file}: target_parameters don't fit the run's [adapter] experts")
        for key, name in expected.items():
            if values.get(key) != recipe[name]:
                raise MergeError(
                    f"{file}: {key} is {values.get(key)}, but the run's [adapter] {name} is {recipe[name]}"
                )


def _refuse_other_layers(base: TrainedBase, delta: LoraDelta, adapter: Path) -> None:
    """Refuse an adapter whose deltas aren't exactly its targets', each of the shape of its weight."""
    from peft.tuners.tuners_utils import check_target_module_exists

    settings = adapter_folder.read_settings(adapter)
    plain = {"target_modules": plain_targets(settings["target_modules"], base.layers.names)}
    config = adapter_folder.lora_config(settings | plain)
    found = set(delta.modules)
    if shared := shared_layers(base.conversions.model, delta.modules):
        raise MergeError(
            f"{adapter}: adapts {shared[0]}, which shares its weight with other layers ({len(shared)} such)",
            "PEFT can use the adapter on the base",
        )
    weights = {name for key in base.tensors for name in base.weights_of(key)}
    if foreign := sorted(delta.matrices.keys() - weights):
        raise MergeError(f"{base.path}: has no weight for {foreign[0]} ({len(foreign)} missing)")
    targets = {name for name in base.linear | (found & {base.head}) if check_target_module_exists(config, name)}
    if missing := sorted(targets - found):
        raise MergeError(f"{adapter}: has no matrices for its target {missing[0]}")
    if extra := sorted(found - targets):
        raise MergeError(f"{adapter}: adapts {extra[0]}, which is not one of its targets")
    parameters = {name: f"{name}.weight" for name in delta.modules} | {name: name for name in delta.experts}
    for name, parameter in parameters.items():
        shape = tuple(base.conversions.model.get_parameter(parameter).shape)
        if delta.shape(name) != shape:
            raise MergeError(f"{adapter}: its delta of {name} is {delta.shape(name)}, the base's weight {shape}")


def _refuse_other_tokenizer(tokenizer: Any, adapter: Path) -> None:
    """Refuse a tokenizer that differs from the one saved with the adapter: its ids would mean other tokens."""
    try:
        difference = tokenizer_difference(tokenizer, adapter)
    except PolicyError as error:
        raise MergeError(f"the run's tokenizer can't be loaded: {error.what}") from error
    if difference:
        raise MergeError(f"{adapter}: its {difference} differs from the base's; one of them was changed after training")
