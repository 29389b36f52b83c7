"""Source of a base's config without its weights: this machine, a table of commonly trained models, or the hub.

The table holds the entries of each model's public config.json that costs depend on, so planning for these models needs
no download. A test compares every entry with the model's published number of parameters.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qpref import fsio, pypi
from qpref.errors import PolicyError
from qpref.hooks.hub import hub_failure
from qpref.policy.foreign_files import read_by_library
from qpref.policy.model_config import read_model_config
from qpref.policy.quantized import is_prequantized, refuse_quantized_name
from qpref.recipe.sections import ModelSection

Config = dict[str, Any]


def _config(family: str, layers: int, widths: tuple[int, int], heads: tuple[int, int, int], head: tuple[int, bool],
            **more: Any) -> Config:  # fmt: skip
    """widths: hidden, intermediate; heads: heads, key-value heads, head_dim; head: vocabulary, tied."""
    return {
        "model_type": family,
        "num_hidden_layers": layers,
        "hidden_size": widths[0],
        "intermediate_size": widths[1],
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "head_dim": heads[2],
        "vocab_size": head[0],
        "tie_word_embeddings": head[1],
        **more,
    }


KNOWN_SHAPES: dict[str, Config] = {
    "Llama-3.1-8B": _config("llama", 32, (4096, 14336), (32, 8, 128), (128256, False)),
    "Llama-3.1-70B": _config("llama", 80, (8192, 28672), (64, 8, 128), (128256, False)),
    "Llama-3.2-1B": _config("llama", 16, (2048, 8192), (32, 8, 64), (128256, True)),
    "Llama-3.2-3B": _config("llama", 28, (3072, 8192), (24, 8, 128), (128256, True)),
    "Qwen2.5-0.5B": _config("qwen2", 24, (896, 4864), (14, 2, 64), (151936, True)),
    "Qwen2.5-1.5B": _config("qwen2", 28, (1536, 8960), (12, 2, 128), (151936, True)),
    "Qwen2.5-3B": _config("qwen2", 36, (2048, 11008), (16, 2, 128), (151936, True)),
    "Qwen2.5-7B": _config("qwen2", 28, (3584, 18944), (28, 4, 128), (152064, False)),
    "Qwen2.5-14B": _config("qwen2", 48, (5120, 13824), (40, 8, 128), (152064, False)),
    "Qwen2.5-32B": _config("qwen2", 64, (5120, 27648), (40, 8, 128), (152064, False)),
    "Qwen2.5-72B": _config("qwen2", 80, (8192, 29568), (64, 8, 128), (152064, False)),
    "Qwen3-0.6B": _config("qwen3", 28, (1024, 3072), (16, 8, 128), (151936, True)),
    "Qwen3-1.7B": _config("qwen3", 28, (2048, 6144), (16, 8, 128), (151936, True)),
    "Qwen3-4B": _config("qwen3", 36, (2560, 9728), (32, 8, 128), (151936, True)),
    "Qwen3-8B": _config("qwen3", 36, (4096, 12288), (32, 8, 128), (151936, False)),
    "Qwen3-14B": _config("qwen3", 40, (5120, 17408), (40, 8, 128), (151936, False)),
    "Qwen3-30B-A3B": _config(
        "qwen3_moe",
        48,
        (2048, 6144),
        (32, 4, 128),
        (151936, False),
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=768,
        norm_topk_prob=True,
    ),
    "gpt-oss-20b": _config(
        "gpt_oss",
        24,
        (2880, 2880),
        (64, 8, 64),
        (201088, False),
        num_local_experts=32,
        num_experts_per_tok=4,
        sliding_window=128,
    ),
    "Mistral-7B-v0.1": _config("mistral", 32, (4096, 14336), (32, 8, 128), (32000, False), sliding_window=4096),
    "Mistral-7B-v0.3": _config("mistral", 32, (4096, 14336), (32, 8, 128), (32768, False), sliding_window=None),
    "gemma-2-2b": _config("gemma2", 26, (2304, 9216), (8, 4, 256), (256000, True)),
    "gemma-2-9b": _config("gemma2", 42, (3584, 14336), (16, 8, 256), (256000, True), query_pre_attn_scalar=224),
    "Phi-3-mini": _config("phi3", 32, (3072, 8192), (32, 32, 96), (32064, False)),
    "Phi-4-mini": _config("phi3", 32, (3072, 8192), (24, 8, 128), (200064, True), partial_rotary_factor=0.75),
    "SmolLM2-135M": _config("llama", 30, (576, 1536), (9, 3, 64), (49152, True)),
    "SmolLM2-360M": _config("llama", 32, (960, 2560), (15, 5, 64), (49152, True)),
    "SmolLM2-1.7B": _config("llama", 24, (2048, 8192), (32, 32, 64), (49152, True)),
    "TinyLlama-1.1B": _config("llama", 22, (2048, 5632), (32, 4, 64), (32000, False)),
}

ALSO_CALLED = {
    "Llama-3-70B": "Llama-3.1-70B",
    "Llama-3.3-70B": "Llama-3.1-70B",
    "Mistral-7B": "Mistral-7B-v0.3",
    "Mistral-7B-Instruct-v0.1": "Mistral-7B-v0.1",
    "Phi-3.5-mini": "Phi-3-mini",
}
"""Alias -> name in KNOWN_SHAPES."""


def known_shape(text: str) -> str | None:
    """Find the longest known name that occurs whole in a base's name: 7B doesn't match 72B."""
    names = {name: name for name in KNOWN_SHAPES} | ALSO_CALLED
    text = text.replace("_", "-")
    found = [name for name in names if re.search(rf"(?i)(?<![a-z0-9]){re.escape(name)}(?![a-z0-9]|\.[0-9])", text)]
    return names[max(found, key=len)] if found else None


@dataclass(frozen=True, slots=True)
class FoundConfig:
    """A transformers config and its source, for messages."""

    config: Any
    origin: str


def named_config(named: str) -> FoundConfig:
    """Read the config that `--shape` names.

    Raises:
        PolicyError: it is neither a folder with a config nor a known shape.
    """
    folder = Path(named).expanduser()
    if (folder / "config.json").is_file():
        return FoundConfig(_read_config(folder), str(folder))
    known = _known_config(named)
    if known is None:
        raise PolicyError(f"--shape {named}: neither a folder with config.json nor a known shape", _hint())
    return FoundConfig(known[1], f"known shape {known[0]}")


def base_config(model: ModelSection) -> FoundConfig:
    """Read the config of a recipe's base: its own if it is on this machine, else a known shape's, else the hub's.

    Raises:
        PolicyError: none of them has it, or the base is quantized by another method than bitsandbytes'.
    """
    found = _base_config(model)
    is_prequantized(found.config.to_dict(), found.origin)
    return found


def _base_config(model: ModelSection) -> FoundConfig:
    if folder := local_base(model):
        return FoundConfig(_read_config(folder), str(folder))
    if known := _known_config(known_shape(model.base) or ""):
        refuse_quantized_name(model.base)
        return FoundConfig(known[1], f"known shape {known[0]}, by the base's name")
    if model.base.endswith(".gguf") and Path(model.base).is_file():
        return FoundConfig(_read_config(Path(model.base).parent, gguf_file=Path(model.base).name), model.base)
    if model.base.startswith("pypi:") or Path(model.base).is_absolute():
        raise PolicyError(f"{model.base}: is not on this machine, and its name is no known shape", _hint())
    return FoundConfig(_read_config(_hub_config(model)), f"config.json of {model.base} on the hub")


def local_base(model: ModelSection) -> Path | None:
    """Find the base's folder on this machine: as named, converted, or downloaded before; None where there is none."""
    path = pypi.cached_path(model.base) or Path(model.base)
    if not path.is_absolute():
        return _hub_cache(model)
    if path.is_dir():
        return path if (path / "config.json").is_file() else None
    return _converted(path, model)


def _converted(path: Path, model: ModelSection) -> Path | None:
    """Find the folder that a GGUF file was converted to earlier."""
    from qpref.policy.convert import VERSION
    from qpref.policy.source import cached_sha256

    digest = model.sha256 or (cached_sha256(path) if path.is_file() else None)
    if path.suffix != ".gguf" or digest is None:
        return None
    folders = sorted((fsio.cache_folder() / "models").glob(f"{path.stem}-{digest[:16]}-v{VERSION}*"))
    return next((folder for folder in folders if (folder / "config.json").is_file()), None)


def _hub_cache(model: ModelSection) -> Path | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(model.base, "config.json", revision=model.revision)
    except HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None


def _hub_config(model: ModelSection) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    transport_error: Any = HfHubHTTPError.__bases__[0]
    try:
        return Path(hf_hub_download(model.base, "config.json", revision=model.revision)).parent
    except HFValidationError:
        raise PolicyError(f"{model.base}: neither a path that exists nor a hub id", _hint()) from None
    except (transport_error, OSError) as error:
        failure = hub_failure(error, "model", model.revision)
        raise PolicyError(f"{model.base}: no config.json: {failure.what}", f"{failure.hint}; or {_hint()}") from error


def _read_config(folder: Path, **options: str) -> Any:
    from transformers import AutoConfig

    try:
        if not options:
            read_model_config(folder)
        with read_by_library(folder, "no config that transformers can read"):
            return AutoConfig.from_pretrained(folder, trust_remote_code=False, **options)
    except PolicyError as error:
        raise PolicyError(error.what, error.hint or _hint()) from error


def _known_config(name: str) -> tuple[str, Any] | None:
    """Look up a shape by its exact name, in any case; returns its own spelling and its transformers config."""
    from transformers import AutoConfig

    name = {known.lower(): known for known in KNOWN_SHAPES}.get(name.lower(), "")
    return (name, AutoConfig.for_model(**KNOWN_SHAPES[name])) if name else None


def _hint() -> str:
    """Way out where no config is found."""
    return f"give its size: --shape FOLDER (with a config.json), or one of --shape {', '.join(KNOWN_SHAPES)}"
