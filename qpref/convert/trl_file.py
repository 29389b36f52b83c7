"""TRL's files, read by TRL's own config classes: names, types and defaults are those of the installed version.

The classes' argument parser is used without making the configs, since `TrainingArguments` looks for a GPU, opens files
that it names and starts processes; and without TRL's file reading, which sets environment variables.
"""

from __future__ import annotations

import argparse
import contextlib
import enum
import io
from collections.abc import Mapping
from typing import Any

from qpref.aliases.loss_names import DEFAULT_LOSS_TYPES
from qpref.convert.draft import Draft
from qpref.convert.settings import Settings, anything, number, whole, word
from qpref.convert.sources import Folders, columns_of, location, put_lengths, put_share, put_sources
from qpref.errors import RecipeError

TRAINERS = {"dpo": "DPOTrainer", "kto": "KTOTrainer", "orpo": "ORPOTrainer", "cpo": "CPOTrainer"}


def trainer_of(given: Mapping[str, Any], draft: Draft) -> str:
    """Guess the trainer from the keys that only one has; DPO's where nothing tells."""
    types = given.get("loss_type")
    named = {types} if isinstance(types, str) else set(types) if isinstance(types, list) else set()
    if {"desirable_weight", "undesirable_weight"} & set(given) or named & {"kto", "apo_zero_unpaired"}:
        return "KTOTrainer"
    if {"simpo_gamma", "cpo_alpha"} & set(given) or named & {"simpo", "alphapo"}:
        return "CPOTrainer"
    if not named:
        draft.differs.append("TRL's files don't name their trainer; this one is read as DPO's: --trainer for others")
    return "DPOTrainer"


def read_trl(given: dict[str, Any], trainer: str) -> Settings:
    """Parse a file's values with TRL's classes.

    Raises:
        RecipeError: TRL refuses a value, or isn't installed.
    """
    from qpref.testing.trl_trainers import trainer_classes

    _, config = trainer_classes(trainer)
    from trl import ModelConfig, ScriptArguments, TrlParser
    from trl.scripts.utils import DatasetMixtureConfig

    parser = TrlParser([ScriptArguments, config, ModelConfig, DatasetMixtureConfig])
    defaults = vars(_parse(parser))
    ours = {key: value for key, value in given.items() if key != "env"}
    parser.set_defaults_with_config(**ours)
    parsed = vars(_parse(parser))
    known = {key: parsed[key] for key in ours if key in parsed}
    return Settings("trl", {**given, **known}, {key: value for key, value in defaults.items() if key not in given})


def _parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            found, _ = argparse.ArgumentParser.parse_known_args(parser, [])
    except SystemExit:
        raise RecipeError(f"TRL refuses it: {said.getvalue().strip().rpartition('error: ')[2]}") from None
    plain = {key: value.value if isinstance(value, enum.Enum) else value for key, value in vars(found).items()}
    return argparse.Namespace(**plain)


def convert_trl_data(settings: Settings, draft: Draft, folders: Folders) -> bool:
    """Convert the data of a TRL file; returns whether there are held-out rows."""
    evaluates = settings.get("eval_strategy", word) not in (None, "no")
    split, test = settings.get("dataset_train_split", word), settings.get("dataset_test_split", word)
    name, config = settings.get("dataset_name", word), settings.get("dataset_config", word)
    mixture = settings.get("datasets", anything)
    heldout = False
    if mixture:
        tables = [_source(one, draft, folders) for one in mixture if isinstance(one, Mapping)]
        put_sources(draft, "train", tables, "datasets")
        heldout = evaluates and put_share(draft, "test_split_size", settings.get("test_split_size", number))
    elif name:
        draft.put("data.train", location(name, folders, config, None if split == "train" else split), "dataset_name")
        if evaluates and test:
            draft.put("data.heldout", location(name, folders, config, test), settings.origin("dataset_test_split"))
            heldout = True
    settings.used.update(("test_split_size", "dataset_test_split"))
    put_lengths(
        draft,
        settings.get("max_length", whole),
        settings.get("max_prompt_length", whole),
        settings.origin("max_length"),
        "truncate",
    )
    if draft.get("data.max_length"):
        draft.differs.append(
            'on_overflow = "truncate": TRL cuts the end of a long row, qpref the oldest turns of its prompt first'
        )
    settings.used.add("truncation_mode")
    return heldout


def _source(one: Mapping[str, Any], draft: Draft, folders: Folders) -> dict[str, Any]:
    files = one.get("data_files")
    path = files if isinstance(files, str) else str(one.get("path", ""))
    split = str(one.get("split") or "train")
    if "[" in split:
        draft.differs.append(f"datasets: {split} is a part of a split; qpref takes whole splits")
        split = split.partition("[")[0]
    columns = one.get("columns")
    table = {"path": location(path, folders, one.get("name"), None if split == "train" else split)}
    if isinstance(columns, list) and columns:
        draft.differs.append("datasets: columns lists the ones to keep; qpref reads those that it needs")
    return table | (columns_of(columns) if isinstance(columns, Mapping) else {})


def default_trainers() -> list[str]:
    assert set(TRAINERS.values()) == set(DEFAULT_LOSS_TYPES)
    return list(TRAINERS)
