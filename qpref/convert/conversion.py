"""Convert one file: read it, convert its parts, explain what is left."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qpref.aliases.alias import TOOLS, Tool
from qpref.aliases.lookup import by_key
from qpref.convert.axolotl_file import convert_axolotl_data, read_axolotl
from qpref.convert.draft import Draft
from qpref.convert.evaluation import convert_evaluation
from qpref.convert.llamafactory_file import convert_llama_factory_data, read_llama_factory
from qpref.convert.losses import convert_losses
from qpref.convert.settings import Settings, anything
from qpref.convert.sources import Folders
from qpref.convert.training import convert_training
from qpref.convert.trl_file import TRAINERS, convert_trl_data, read_trl, trainer_of
from qpref.convert.yaml_file import read_settings
from qpref.errors import RecipeError

SIGNS: dict[str, Tool] = {
    "base_model": "axolotl",
    "rl": "axolotl",
    "finetuning_type": "llamafactory",
    "stage": "llamafactory",
    "pref_beta": "llamafactory",
}
"""Keys that only one tool has, and most of its files."""

NEUTRAL = {"quantization_method": "bnb", "quantization_type": "nf4", "bnb_4bit_quant_type": "nf4"}
"""Settings without an equal whose value is what qpref does anyway."""


def convert(path: Path, target: Path, tool: Tool | None = None, trainer: str | None = None, num_gpus: int = 1) -> Draft:
    """Convert a file to a recipe.

    Args:
        path: the file.
        target: folder of the recipe, where its relative paths start.
        tool: the tool that the file is for; None finds out by its keys.
        trainer: for TRL, a key of `TRAINERS`; None finds out, or takes DPO's.
        num_gpus: the GPUs that the file was run on, a factor of the effective batch size.

    Raises:
        RecipeError: it can't be read, has values of a wrong type, or is for training that qpref doesn't do.
    """
    given = read_settings(path)
    tool = tool or next((named for key, named in SIGNS.items() if key in given), "trl")
    draft = Draft()
    folders = Folders((Path.cwd(), path.absolute().parent), target)
    class_name = None
    try:
        if tool == "trl":
            class_name = TRAINERS[trainer] if trainer else trainer_of(given, draft)
            settings = read_trl(given, class_name)
            has_heldout = convert_trl_data(settings, draft, folders)
        elif tool == "axolotl":
            settings = read_axolotl(given)
            has_heldout = convert_axolotl_data(settings, draft, folders)
        else:
            settings = read_llama_factory(given)
            has_heldout = convert_llama_factory_data(settings, draft, folders)
        convert_losses(settings, draft, class_name)
    except RecipeError as error:
        raise RecipeError(f"{path}: {error.what}", error.hint) from None
    convert_training(settings, draft, num_gpus)
    convert_evaluation(settings, draft, has_heldout)
    _reference(settings, draft)
    if settings.mistakes:
        lines = sorted(set(settings.mistakes))
        raise RecipeError(
            "\n".join([f"{path}: {len(lines)} of its values have a wrong type", *(f"  {one}" for one in lines)])
        )
    _explain_rest(settings, draft)
    return draft


def _reference(settings: Settings, draft: Draft) -> None:
    keys = settings.keys_of("reference.fill")
    if any(settings.get(key, anything) is True for key in keys):
        draft.put("reference.fill", "before", settings.origin(*keys))


def _explain_rest(settings: Settings, draft: Draft) -> None:
    """Explain the keys of the file that no conversion has read, but for those that are switched off."""
    aliases = by_key(settings.tool)
    for key, value in settings.given.items():
        alias = aliases.get(key)
        if key in settings.used and alias is not None and alias.ours is not None:
            continue
        if alias is None:
            if key not in settings.used:
                _unknown(key, value, settings, draft)
        elif alias.ours is None and key in draft.no_equal:
            continue
        elif not alias.is_lost or _is_off(value) or key in settings.used or NEUTRAL.get(key) == value:
            draft.by_itself.append(key)
        else:
            draft.no_equal[key] = alias.explanation()


def _unknown(key: str, value: Any, settings: Settings, draft: Draft) -> None:
    """A key without an alias: one that the tool has by its own classes, or a misspelt one."""
    if key in settings.defaults or (settings.tool == "trl" and _is_trls(key)):
        if not _is_off(value):
            draft.no_equal[key] = f"a setting of {TOOLS[settings.tool]} alone"
    else:
        draft.unknown.append(key)


def _is_trls(key: str) -> bool:
    from transformers import TrainingArguments

    return key in TrainingArguments.__dataclass_fields__


def _is_off(value: Any) -> bool:
    return value in (False, 0, "", "no", "none", "None") or (isinstance(value, list | Mapping) and not value)
