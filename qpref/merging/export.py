"""Export a merged model as GGUF with llama.cpp's own converter, found on this machine or named by the user.

The converter isn't bundled: it maps each architecture's tensors and tokenizer to llama.cpp's format, and a copy would
be outdated within weeks.
"""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from qpref import disk_space, fsio, opening, publish
from qpref.errors import MergeError, RecipeError
from qpref.opening import real_path

log = logging.getLogger("qpref")

CONVERTER = "convert_hf_to_gguf.py"
FOLDER_VARIABLE = "LLAMA_CPP"
BYTES = {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": 34 / 32}
"""Bytes per weight in each type; q8_0 has a scale of two bytes for 32 weights."""
AS_STORED = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
MAGIC = b"GGUF"
SHOWN_LINES = 40
"""Last lines of the converter's output shown in an error."""


def export_gguf(merged: Path, out: Path, kind: str | None = None, converter: Path | None = None) -> Path:
    """Write the model in `merged` as one GGUF file.

    Args:
        merged: a folder that `qpref merge` wrote.
        out: the file to write, which must not exist; it is renamed into place once complete.
        kind: one of `BYTES`; by default the model's stored dtype, which rounds nothing.
        converter: `CONVERTER` or its folder; by default it is searched in $LLAMA_CPP and on the PATH.

    Raises:
        RecipeError: `merged` is no merged model, `out` exists, or the converter isn't found.
        MergeError: the converter failed, or wrote no GGUF file.
        DiskError: the disk is full.
    """
    config = _config(merged)
    if out.exists() or out.is_symlink():
        raise RecipeError(f"{out}: exists already", "name another file, or remove it")
    script = find_converter(converter)
    stored = AS_STORED.get(str(config.get("dtype") or config.get("torch_dtype")))
    kind = kind or stored or "auto"
    if kind not in ("auto", "f32", stored):
        log.warning("%s rounds the weights, which are stored as %s; part of what was learned may be lost", kind, stored)
    needed = _needed_bytes(merged, BYTES.get(kind, 2.0) / BYTES.get(stored or "", 2.0))
    disk_space.refuse_full(out, needed)
    log.info("converting with %s", script)
    with publish.staged_file(out) as staged:
        # Run in the staging folder: the converter reads braces in the file's path as template fields.
        command = [sys.executable, str(script), str(real_path(merged)), "--outfile", staged.name, "--outtype", kind]
        done = subprocess.run(  # noqa: S603 - the script that the user has or names, without a shell
            command,
            cwd=staged.parent,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
        )
        if done.returncode:
            if (number := disk_space.full_by(done.stdout)) is not None:
                raise disk_space.refused_write(out, OSError(number, os.strerror(number)), needed)
            raise MergeError(f"{script} {_ending(done.returncode)}:\n{_tail(done.stdout)}", _hint(done.stdout))
        if not _is_gguf(staged):
            raise MergeError(f"{script} left no GGUF file:\n{_tail(done.stdout)}")
        fsio.make_readable(staged)
    return out


def find_converter(named: Path | None = None) -> Path:
    """Find the converter: the one named, else the one in $LLAMA_CPP, else the first on the PATH.

    Raises:
        RecipeError: it isn't found.
    """
    location, origin = named, "--converter"
    if location is None and (variable := os.environ.get(FOLDER_VARIABLE)):
        location, origin = Path(variable), f"${FOLDER_VARIABLE}"
    if location is not None:
        script = location / CONVERTER if location.is_dir() else location
        if not script.is_file():
            raise RecipeError(f"{origin} {location}: no {CONVERTER} there")
        return real_path(script)
    for folder in os.get_exec_path():
        if (Path(folder) / CONVERTER).is_file():
            return real_path(Path(folder) / CONVERTER)
    raise RecipeError(
        f"llama.cpp's {CONVERTER} is not on this machine's PATH",
        f"get llama.cpp's source, and name its folder with --converter or in ${FOLDER_VARIABLE}",
    )


def _config(merged: Path) -> dict[str, Any]:
    """Read config.json of a plain model folder.

    Raises:
        RecipeError: it is no plain model folder; the hint says how to make one.
    """
    if (merged / "run.json").is_file():
        raise RecipeError(
            f"{merged}: a run, no merged model", f"qpref merge {merged} OUT writes one; --lora exports the adapter"
        )
    if (merged / "adapter_config.json").is_file():
        raise RecipeError(f"{merged}: an adapter, no merged model", "qpref merge RUN OUT writes one")
    if not (merged / "config.json").is_file() or not any(merged.glob("*.safetensors")):
        raise RecipeError(f"{merged}: no model folder (config.json and safetensors)", "qpref merge RUN OUT writes one")
    try:
        config = opening.read_object(merged / "config.json", follow=True)
    except (OSError, ValueError) as error:
        raise RecipeError(f"{merged / 'config.json'}: cannot be read: {error}") from None
    if config.get("quantization_config"):
        raise RecipeError(f"{merged}: its weights are quantized, which llama.cpp's converter doesn't read",
                          "merge without quantizing; --type q8_0 quantizes here")  # fmt: skip
    return config


def _needed_bytes(merged: Path, factor: float) -> int:
    return int(factor * sum(shard.stat().st_size for shard in merged.glob("*.safetensors")))


def _ending(code: int) -> str:
    return f"failed with exit code {code}" if code > 0 else f"was ended by signal {-code}"


def _hint(output: str) -> str:
    missing = re.findall(r"No module named '([\w.]+)'", output)
    if missing:
        return f"the converter needs another package: pip install {missing[-1].partition('.')[0]}"
    return "a newer llama.cpp may support this model"


def _tail(output: str) -> str:
    lines = output.strip().splitlines()[-SHOWN_LINES:]
    return "\n".join(f"  {line}" for line in lines) if lines else "  (no output)"


def _is_gguf(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC
