"""LLaMA-Factory's files: its defaults, and its data sets, whose files are named in `dataset_info.json`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qpref import opening
from qpref.convert.draft import Draft
from qpref.convert.settings import Settings, anything, number, whole, word, words
from qpref.convert.sources import Folders, columns_of, location, put_lengths, put_share, put_sources
from qpref.errors import RecipeError

INFO = "dataset_info.json"
DEFAULTS: dict[str, Any] = {
    "learning_rate": 5e-5,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "num_train_epochs": 3,
    "lr_scheduler_type": "linear",
    "warmup_ratio": 0.0,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "seed": 42,
    "optim": "adamw_torch_fused",
    "double_quantization": True,
    "lora_rank": 8,
    "lora_dropout": 0.0,
    "lora_target": "all",
    "cutoff_len": 2048,
    "pref_beta": 0.1,
    "simpo_gamma": 0.5,
    "kto_chosen_weight": 1.0,
    "kto_rejected_weight": 1.0,
    "save_steps": 500,
    "logging_steps": 500,
}
"""LLaMA-Factory's own defaults, and transformers' for the rest."""
COLUMNS = {
    "prompt": "prompt",
    "chosen": "chosen",
    "rejected": "rejected",
    "messages": "conversations",
    "system": "system",
    "tools": "tools",
    "response": "output",
    "kto_tag": "kto_tag",
}
"""Columns of dataset_info.json -> the name under which qpref reads them in LLaMA-Factory's layouts."""


def read_llama_factory(given: dict[str, Any]) -> Settings:
    """Take a file's values.

    Raises:
        RecipeError: it trains no LoRA adapter.
    """
    kind = given.get("finetuning_type", "lora")
    if kind != "lora":
        raise RecipeError(f"finetuning_type: {kind}: qpref trains LoRA adapters", "finetuning_type: lora has an equal")
    rank = given.get("lora_rank", DEFAULTS["lora_rank"])
    doubled = {"lora_alpha": 2 * rank} if isinstance(rank, int) else {}
    return Settings("llamafactory", given, DEFAULTS | doubled)


def convert_llama_factory_data(settings: Settings, draft: Draft, folders: Folders) -> bool:
    """Convert data sets and lengths; returns whether there are held-out rows."""
    info = _info(settings, folders)
    train = _sources(settings.get("dataset", words), info, draft, folders)
    heldout = _sources(settings.get("eval_dataset", words), info, draft, folders)
    put_sources(draft, "train", train, "dataset")
    put_sources(draft, "heldout", heldout, "eval_dataset")
    has_heldout = bool(heldout) or put_share(draft, "val_size", settings.get("val_size", number))
    put_lengths(draft, settings.get("cutoff_len", whole), None, settings.origin("cutoff_len"), "truncate")
    draft.differs.append('on_overflow = "truncate": LLaMA-Factory shortens prompt and responses in proportion')
    if template := settings.get("template", word):
        draft.differs.append(
            f"template {template}: rows are rendered with the tokenizer's own chat template, not LLaMA-Factory's; "
            "`qpref check` prints the first row"
        )
    if probabilities := settings.get("interleave_probs", anything):
        draft.differs.append(f"interleave_probs {probabilities}: give sources a weight, how often a row is trained on")
    settings.used.update(("dataset_dir", "media_dir", "mix_strategy"))
    return has_heldout


def _info(settings: Settings, folders: Folders) -> tuple[Path, Mapping[str, Any]] | None:
    """Find and read dataset_info.json; None where there is none."""
    folder = folders.find(settings.get("dataset_dir", word) or "data")
    path = folder / INFO if folder else None
    if path is None or not path.is_file():
        return None
    try:
        return path.parent, opening.read_object(path, follow=True)
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path}: cannot be read: {error}") from None


def _sources(
    names: list[str] | None, info: tuple[Path, Mapping[str, Any]] | None, draft: Draft, folders: Folders
) -> list[dict[str, Any]]:
    tables = []
    for name in names or []:
        described = info[1].get(name) if info else None
        if info and isinstance(described, Mapping):
            tables.append(_described(described, info[0], draft, folders))
            continue
        where = f"{info[0] / INFO} has no such name" if info else f"{INFO} isn't here"
        path = name if Path(name).suffix else f"{name}.json"
        draft.differs.append(f"{name}: {where}; the recipe has {path} in its place, so name the file or hf:org/name")
        tables.append({"path": path})
    return tables


def _described(described: Mapping[str, Any], folder: Path, draft: Draft, folders: Folders) -> dict[str, Any]:
    hub, file = described.get("hf_hub_url"), described.get("file_name")
    if isinstance(hub, str):
        path = location(hub, folders, described.get("subset"), described.get("split"))
    elif isinstance(file, str):
        path = folders.local(folder / file)
    else:
        path = str(described.get("ms_hub_url") or described.get("script_url") or "missing.json")
        draft.differs.append(f"{path}: of the ModelScope hub, or a script; name a file or hf:org/name in its place")
    columns = described.get("columns")
    columns = columns if isinstance(columns, Mapping) else {}
    named = {COLUMNS[key]: value for key, value in columns.items() if key in COLUMNS and value != COLUMNS[key]}
    known = {"prompt": "instruction"}  # qpref reads these by themselves
    named = {ours: theirs for ours, theirs in named.items() if known.get(ours) != theirs}
    return {"path": path} | columns_of(named)
