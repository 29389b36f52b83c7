"""Write a merged model's config, tokenizer and generation settings, from the base's own files.

All files are copied byte for byte except two. transformers 4.57 misreads the config and the tokenizer config that
transformers 5 writes: without a top-level rope_theta it assumes 10000, and it doesn't know the tokenizer class
TokenizersBackend. Both files get the older keys beside the newer ones.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from qpref import fsio
from qpref.errors import MergeError
from qpref.merging.base import TrainedBase
from qpref.recipe.sections import ModelSection

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "*.jinja", "additional_chat_templates/*.jinja", "chat_template.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "*.tiktoken",
    "spiece.model", "sentencepiece.bpe.model",
)  # fmt: skip
BASE_FILES = ("generation_config.json", "preprocessor_config.json", "processor_config.json", "LICENSE*", "NOTICE*",
              "USE_POLICY*")  # fmt: skip
NEW_TOKENIZER_CLASSES = ("TokenizersBackend", "SentencePieceBackend", "PythonBackend")
"""Classes new in transformers 5; all of them load tokenizer.json, as 4.57's PreTrainedTokenizerFast does."""
LOAD_RECORD = ("backend", "is_local", "local_files_only", "name_or_path", "tokenizer_file")
"""Keys in which transformers 5 records how a tokenizer was loaded; dropped, since they don't describe the tokenizer."""


def tokenizer_folder(model: ModelSection, base: Path) -> Path:
    """Locate the files of the tokenizer that the run was trained with.

    Raises:
        MergeError: it can't be fetched from the hub.
    """
    if model.tokenizer is None:
        return base
    if Path(model.tokenizer).is_dir():
        return Path(model.tokenizer)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        wanted = [*TOKENIZER_FILES, "tokenizer_config.json"]
        return Path(snapshot_download(model.tokenizer, allow_patterns=wanted))
    except (HFValidationError, LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise MergeError(f"[model] tokenizer {model.tokenizer}: cannot be fetched: {error}") from error


def write_settings(
    base: TrainedBase, tokenizer: Path, folder: Path, dtype: torch.dtype, packed: frozenset[str]
) -> None:
    """Write all files of a merged model's folder except the weights.

    Args:
        tokenizer: the folder of the tokenizer's own files.
        packed: modules that are stored in NF4; none for a plain model.
    """
    values = json.loads((base.path / "config.json").read_text())
    fsio.write_json(folder / "config.json", patched_config(values, dtype) | _quantization(base, dtype, packed))
    own = tokenizer / "tokenizer_config.json"
    if own.is_file():
        patched = patched_tokenizer_config(json.loads(own.read_text()))
        fsio.write_json(folder / "tokenizer_config.json", patched)
    copied = [(file, tokenizer) for file in _matching(tokenizer, TOKENIZER_FILES)]
    copied += [(file, base.path) for file in _matching(base.path, BASE_FILES)]
    for file, root in copied:
        target = folder / file.relative_to(root)
        fsio.make_folder(target.parent)
        fsio.copy_file(file, target)


def _matching(folder: Path, patterns: tuple[str, ...]) -> Iterator[Path]:
    for pattern in patterns:
        yield from (file for file in sorted(folder.glob(pattern)) if file.is_file())


def patched_config(config: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Adapt a base's config to plain weights of `dtype`, with transformers 4.57's keys where they change nothing."""
    values = {key: value for key, value in config.items() if key not in ("quantization_config", "_name_or_path")}
    parts = {key: value for key, value in values.items() if isinstance(value, dict) and key.endswith("_config")}
    for key, part in parts.items():
        values[key] = _with_dtype(part, dtype) if "dtype" in part or "torch_dtype" in part else part
    values = _with_dtype(values, dtype)
    older = _with_old_rope(values | {key: _with_old_rope(values[key]) for key in parts})
    return older if _rope(older) == _rope(values) else values


def _rope(values: Mapping[str, Any]) -> Any:
    """Rotary settings of the text model that transformers reads from a config; None where it reads none."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING

    model_type = values.get("model_type")
    if model_type not in CONFIG_MAPPING:
        return None
    try:
        config = CONFIG_MAPPING[model_type].from_dict(copy.deepcopy(dict(values)))
    except (KeyError, ValueError, TypeError, AttributeError, StrictDataclassError):
        return None
    return getattr(config.get_text_config(), "rope_parameters", None)


def _with_dtype(values: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    name = str(dtype).removeprefix("torch.")
    return {**values, "dtype": name, "torch_dtype": name}


def _with_old_rope(values: Mapping[str, Any]) -> dict[str, Any]:
    """Add rope_theta and rope_scaling beside rope_parameters; existing keys stay."""
    rope = values.get("rope_parameters")
    if not isinstance(rope, dict):
        return dict(values)
    # Families that mix full and sliding attention have a table for each.
    main = rope.get("full_attention", rope)
    local = rope.get("sliding_attention")
    old = _old_rope(main) if isinstance(main, dict) else {}
    if isinstance(local, dict) and "rope_theta" in local:
        old["rope_local_base_freq"] = local["rope_theta"]
    return old | dict(values)


def _old_rope(rope: Mapping[str, Any]) -> dict[str, Any]:
    old = {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope}
    if rope.get("rope_type", "default") != "default":
        old["rope_scaling"] = {key: value for key, value in rope.items() if key not in old}
    return old


def patched_tokenizer_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Adapt a tokenizer's config to the keys and classes that transformers 4.57 knows."""
    values = {key: value for key, value in config.items() if key not in LOAD_RECORD}
    if values.get("tokenizer_class") in NEW_TOKENIZER_CLASSES:
        values["tokenizer_class"] = "PreTrainedTokenizerFast"
    extra = values.get("extra_special_tokens")
    if isinstance(extra, list):
        del values["extra_special_tokens"]
        values["additional_special_tokens"] = [*values.get("additional_special_tokens", []), *extra]
    return values


def _quantization(base: TrainedBase, dtype: torch.dtype, packed: frozenset[str]) -> dict[str, Any]:
    if not packed:
        return {}
    from transformers import BitsAndBytesConfig

    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=base.double_quantization,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=sorted({base.head} | base.others) if base.others else None,
    )
    return {"quantization_config": settings.to_dict()}
