"""Conversion of a GGUF file to a plain Hugging Face folder with bf16 safetensors, once, in the cache.

Needed because transformers refuses GGUF and NF4 in one load. The tokenizer is repaired in the conversion: a GGUF file
gives its pre-tokenizer by name alone, and transformers knows only some of the names.
"""

from __future__ import annotations

import json
import logging
import struct
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from qpref import fsio, publish
from qpref.errors import PolicyError
from qpref.policy.pretrained import load_pretrained

log = logging.getLogger("qpref")

VERSION = 3
"""Part of the cache's key: raise it when a conversion comes out differently."""

PLAIN_PRE_TOKENIZERS = ("gpt-2", "default")
DIGIT_PRE_TOKENIZERS = ("smollm",)
SPECIAL_TOKENS = {"bos_token": "bos_token_id", "eos_token": "eos_token_id", "pad_token": "padding_token_id"}
"""transformers' name of a special token -> GGUF's of its id."""


def convert_gguf(path: Path, digest: str, has_own_tokenizer: bool) -> Path:
    """Return the folder of the converted model, converting the file where the cache lacks it.

    Args:
        path: the GGUF file.
        digest: its SHA-256, the cache's key.
        has_own_tokenizer: the recipe takes the tokenizer from elsewhere, so the file's needn't be readable.

    Raises:
        PolicyError: transformers can't read the file, or its tokenizer's rule for splitting text is unknown.
    """
    suffix = "" if has_own_tokenizer else "-tokenizer"
    folder = fsio.cache_folder() / "models" / f"{path.stem}-{digest[:16]}-v{VERSION}{suffix}"
    if folder.is_dir():
        if (damaged := _damaged_file(folder)) is None:
            return folder
        log.warning("%s: %s is not as it was written; converting %s again", folder, damaged, path.name)
        publish.discard(folder)
        _damaged_file.cache_clear()
    if fsio.sha256_file(path) != digest:
        raise PolicyError(
            f"{path}: its content has changed, and its size and time of change have not: a disk or a copy damaged it",
            "fetch the file again",
        )
    log.info("converting %s to safetensors, once, in %s", path.name, folder)
    with fsio.needing_cache(), publish.shared_folder(folder) as staging:
        _where_files_are_written(_convert, path, folder, staging, has_own_tokenizer)
    return folder


def _where_files_are_written(work: Callable[..., None], *args: Any) -> None:
    """Call a function that saves a model; among several processes of torch.distributed in a process of its own.

    transformers (5.24, `should_save_on_this_rank`) writes no file in one whose rank isn't 0, and rank 0 may be on
    another machine. Drop this when `is_main_process` alone decides.
    """
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized() and dist.get_rank()):
        work(*args)
        return
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        pool.submit(work, *args).result()


def _convert(path: Path, folder: Path, staging: Path, has_own_tokenizer: bool) -> None:
    """Fill the staging folder with the model of a GGUF file, and with its tokenizer unless the recipe has another."""
    import torch
    from transformers import GgufConfig

    quantization = GgufConfig(dequantize=True)
    model = load_pretrained(path.parent, path.name, quantization_config=quantization, dtype=torch.bfloat16)
    try:
        tokenizer = None if has_own_tokenizer else _tokenizer(path, model.config.max_position_embeddings)
    except (ValueError, KeyError, OSError, RuntimeError, struct.error) as error:
        raise PolicyError(f"{path}: transformers can't read this GGUF file's tokenizer: {error}") from error
    model.config._name_or_path = ""
    num_bytes = sum(parameter.nbytes for parameter in model.parameters())
    with fsio.disk_errors(folder, num_bytes):
        model.save_pretrained(staging)
        if tokenizer is not None:
            tokenizer.save_pretrained(staging)
        _drop_name(staging / "config.json")


@cache
def _damaged_file(folder: Path) -> str | None:
    """Return a file of a converted model that isn't as it was written, or None; each folder is hashed once a run."""
    return publish.damaged_file(folder)


def _tokenizer(path: Path, max_length: int) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    tokenizer.model_max_length = max_length
    fields = _tokenizer_fields(path)
    if fields.get("model") == "gpt2":
        _repair_pre_tokenizer(tokenizer, str(fields.get("pre", "default")), path)
    for token, field in SPECIAL_TOKENS.items():
        # transformers 5.17 ignores the file's end token.
        if field in fields:
            setattr(tokenizer, token, tokenizer.convert_ids_to_tokens(int(fields[field])))
    return tokenizer


def _tokenizer_fields(path: Path) -> dict[str, Any]:
    """Read the file's fields on its tokenizer, without the lists of tokens and merges."""
    import gguf

    wanted = ("model", "pre", *SPECIAL_TOKENS.values())
    fields = gguf.GGUFReader(path).fields
    found = {name: fields.get(f"tokenizer.ggml.{name}") for name in wanted}
    return {name: field.contents() for name, field in found.items() if field is not None}


def _repair_pre_tokenizer(tokenizer: Any, rule: str, path: Path) -> None:
    """Restore a splitting rule that transformers loses, keep one that it sets itself, refuse an unknown one.

    transformers replaces a rule that it doesn't know by GPT-2's, without a warning: digits then stay together where the
    model was trained on single ones, and every number in the data becomes tokens that the model never saw.
    """
    from tokenizers import pre_tokenizers

    backend = tokenizer.backend_tokenizer
    if rule in DIGIT_PRE_TOKENIZERS:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    elif isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel) and rule not in PLAIN_PRE_TOKENIZERS:
        raise PolicyError(
            f"{path}: its tokenizer splits text by the rule '{rule}', which transformers doesn't know",
            "name the original model's folder or hub id in [model] tokenizer",
        )


def _drop_name(config: Path) -> None:
    """Remove the original model's name, which the GGUF loader leaves where a path belongs."""
    values = json.loads(config.read_text())
    values.pop("_model_name_or_path", None)
    values.pop("_name_or_path", None)
    fsio.write_json(config, values)
