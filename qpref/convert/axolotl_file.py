"""Axolotl's files: its defaults, and its data sets with the columns that their types name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qpref.convert.draft import Draft
from qpref.convert.settings import Settings, anything, number, whole, word
from qpref.convert.sources import Folders, columns_of, location, put_lengths, put_share, put_sources
from qpref.errors import RecipeError

DEFAULTS: dict[str, Any] = {
    "micro_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "num_epochs": 1,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "optimizer": "adamw_torch_fused",
    "lr_scheduler": "cosine",
    "seed": 42,
    "lora_dropout": 0.0,
    "sequence_len": 512,
    "save_strategy": "epoch",
    "save_total_limit": 4,
    "rl_beta": 0.1,
    "cpo_alpha": 1.0,
    "simpo_gamma": 0.5,
    "kto_desirable_weight": 1.0,
    "kto_undesirable_weight": 1.0,
}
"""Axolotl's own defaults, and TRL's where it passes nothing on."""
PROMPT_COLUMNS = {"intel": "question", "icr": "input", "argilla": "instruction"}
"""End of a data set's type -> its prompt column; the other types have the columns that qpref reads by itself."""
WHOLE = ("argilla_chat", "ultra")
FIELDS = {"field_prompt": "prompt", "field_chosen": "chosen", "field_rejected": "rejected", "field_system": "system",
          "field_completion": "completion", "field_label": "label", "field_messages": "prompt"}  # fmt: skip
"""Keys of a data set that name columns -> qpref's columns."""
OWN_TEMPLATES = {"chatml", "llama3", "zephyr"}


def read_axolotl(given: dict[str, Any]) -> Settings:
    """Take a file's values, tables of settings flattened to `table.key`."""
    flat = {f"{table}.{key}": value for table in ("trl",) for key, value in _table(given, table).items()}
    plain = {key: value for key, value in given.items() if key != "trl"}
    if plain.get("adapter") not in ("lora", "qlora") and plain.get("adapter") is not None:
        raise RecipeError(f"adapter: {plain['adapter']}: qpref trains LoRA adapters")
    return Settings("axolotl", {**plain, **flat}, DEFAULTS)


def _table(given: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    table = given.get(name)
    return table if isinstance(table, Mapping) else {}


def convert_axolotl_data(settings: Settings, draft: Draft, folders: Folders) -> bool:
    """Convert data sets and lengths; returns whether there are held-out rows."""
    train = _sources(settings.get("datasets", anything), draft, folders)
    heldout = _sources(settings.get("test_datasets", anything), draft, folders)
    put_sources(draft, "train", train, "datasets")
    put_sources(draft, "heldout", heldout, "test_datasets")
    share = settings.get("val_set_size", number)
    has_heldout = bool(heldout) or put_share(draft, "val_set_size", share)
    strategy = settings.get("excess_length_strategy", word) or "drop"
    overflow = {"truncate": "truncate", "raise": "error"}.get(strategy, "drop")
    longest, prompt = settings.get("sequence_len", whole), settings.get("max_prompt_len", whole)
    put_lengths(draft, longest, prompt, settings.origin("sequence_len"), overflow)
    template = settings.get("chat_template", word)
    if template and not template.startswith("tokenizer_default"):
        draft.differs.append(
            f"chat_template {template}: rows are rendered with the tokenizer's own chat template, not Axolotl's; "
            "`qpref check` prints the first row"
        )
    settings.used.update(("chat_template", "field_messages"))
    if settings.has("dataset_exact_deduplication"):
        draft.differs.append("dataset_exact_deduplication: repeated rows are reported; [checks.duplicates] decides")
    settings.used.add("dataset_exact_deduplication")
    return has_heldout


def _sources(listed: Any, draft: Draft, folders: Folders) -> list[dict[str, Any]]:
    if not isinstance(listed, list):
        return []
    return [table for one in listed if isinstance(one, Mapping) for table in _source(one, draft, folders)]


def _source(one: Mapping[str, Any], draft: Draft, folders: Folders) -> list[dict[str, Any]]:
    """Convert one data set: `path` names it, or the format of its `data_files`."""
    files = one.get("data_files")
    names = [files] if isinstance(files, str) else files if isinstance(files, list) else [one.get("path")]
    split = one.get("split")
    options = _columns(one, draft)
    return [
        {
            "path": location(
                str(name),
                folders,
                one.get("name"),
                None if split in (None, "train") else str(split),
                one.get("revision"),
            )
        }
        | options
        for name in names
        if name
    ]


def _columns(one: Mapping[str, Any], draft: Draft) -> dict[str, Any]:
    kind = one.get("type")
    if isinstance(kind, Mapping):
        formats = [key for key in kind if key.endswith("_format") and kind[key] not in (None, "")]
        if formats:
            draft.differs.append(
                f"{', '.join(formats)}: texts are taken as they are and rendered with the tokenizer's chat template"
            )
        return columns_of({FIELDS[key]: value for key, value in kind.items() if key in FIELDS})
    own = columns_of({FIELDS[key]: one[key] for key in FIELDS if key in one and key != "field_messages"})
    messages = one.get("field_messages")
    if messages and messages != "messages":
        own = {"columns": {**own.get("columns", {}), "prompt": messages}}
    name, _, ending = str(kind or "").partition(".")
    if name in OWN_TEMPLATES:
        note = f"type {kind}: rows are rendered with the tokenizer's own chat template, not with Axolotl's {name}"
        if note not in draft.differs:
            draft.differs.append(note)
    column = PROMPT_COLUMNS.get(ending)
    return own or (columns_of({"prompt": column}) if column and column != "instruction" else {})
