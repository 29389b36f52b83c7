"""An adapter as a GGUF file that llama.cpp applies to a base: `llama-cli -m BASE.gguf --lora ADAPTER.gguf`.

The names of tensors are gguf's own; of an architecture's weights, only llama's queries and keys have another order of
rows in GGUF than in safetensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from qpref import fsio, publish
from qpref.errors import MergeError, RecipeError
from qpref.policy import adapter_folder

ARCHITECTURES = {
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "llama": "llama",
    "mistral": "llama",
    "phi3": "phi3",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
}
"""transformers' model type -> GGUF's architecture, for those whose linear layers llama.cpp stores as they are, but for
the order of rows below."""
ROTARY_ROWS = {"llama": {"self_attn.q_proj": "num_attention_heads", "self_attn.k_proj": "num_key_value_heads"}}
"""Architecture -> layer whose rows llama.cpp stores in its own rotary order -> the config's number of heads."""
PREFIX = "base_model.model."


def export_lora(adapter: Path, config: Mapping[str, Any], out: Path) -> Path:
    """Write a PEFT adapter as one GGUF file, in float32: nothing is rounded.

    Args:
        adapter: PEFT's folder.
        config: the base's config.json.
        out: the file to write, which must not exist.

    Raises:
        RecipeError: `out` exists.
        MergeError: the adapter isn't a plain LoRA of linear layers, or llama.cpp's names for them aren't known here.
        DiskError: the disk is full.
    """
    import gguf

    if out.exists() or out.is_symlink():
        raise RecipeError(f"{out}: exists already", "name another file, or remove it")
    kind = str(config.get("model_type"))
    if kind not in ARCHITECTURES:
        raise MergeError(
            f"{adapter}: no GGUF names are known here for {kind} models",
            "llama.cpp's convert_lora_to_gguf.py may know them; or merge, and export the merged model",
        )
    architecture = ARCHITECTURES[kind]
    settings = adapter_folder.read_settings(adapter)
    tensors = dict(_renamed(adapter, config, architecture))
    with publish.staged_file(out) as staged, fsio.disk_errors(out, sum(each.nbytes for each in tensors.values())):
        writer = gguf.GGUFWriter(staged, architecture)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, _alpha(adapter, settings))
        for name, values in tensors.items():
            writer.add_tensor(name, values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        fsio.make_readable(staged)
    return out


def _alpha(adapter: Path, settings: Mapping[str, Any]) -> float:
    """Return the alpha by which llama.cpp's scale, alpha / rank, is PEFT's.

    Raises:
        MergeError: layers have scales of their own, or the adapter isn't a plain LoRA.
    """
    other = adapter_folder.unsupported_setting(settings)
    other = other or next(
        (key for key in ("rank_pattern", "alpha_pattern", "target_parameters") if settings.get(key)), None
    )
    if other:
        raise MergeError(f"{adapter}: the adapter uses {other}, which GGUF's LoRA doesn't have",
                         "merge, and export the merged model")  # fmt: skip
    factor = math.sqrt(settings["r"]) if settings.get("use_rslora") else 1.0
    return float(settings["lora_alpha"] * factor)


def _renamed(adapter: Path, config: Mapping[str, Any], architecture: str) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Yield the tensors under GGUF's names, rows in llama.cpp's order.

    Raises:
        MergeError: a layer has no name in GGUF.
    """
    import gguf

    (number,) = (key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(number, int(config["num_hidden_layers"]))
    for key, tensor in sorted(adapter_folder.read_tensors(adapter).items()):
        layer, _, matrix = key.removeprefix(PREFIX).removesuffix(".weight").rpartition(".lora_")
        name = names.get_name(layer)
        if name is None or matrix not in ("A", "B"):
            raise MergeError(f"{adapter}: {layer} has no name in GGUF's {architecture}",
                             "merge, and export the merged model")  # fmt: skip
        yield f"{name}.weight.lora_{matrix.lower()}", _stored(tensor, layer, matrix, config, architecture)


def _stored(
    tensor: Tensor, layer: str, matrix: str, config: Mapping[str, Any], architecture: str
) -> NDArray[np.float32]:
    values: NDArray[np.float32] = tensor.float().numpy()
    heads = ROTARY_ROWS.get(architecture, {}).get(".".join(layer.split(".")[-2:]))
    if heads is None or matrix == "A":
        return values
    count = config.get(heads) or config["num_attention_heads"]
    halves = values.reshape(count, 2, len(values) // count // 2, -1)
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(values.shape))
