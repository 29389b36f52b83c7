"""Loading a causal language model with transformers, complete or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from qpref.errors import PolicyError


def load_pretrained(folder: Path, gguf_file: str | None = None, **options: Any) -> Any:
    """Load a model with transformers and check that its files hold every weight; transformers fills gaps at random.

    Args:
        folder: the model's folder.
        gguf_file: name of the GGUF file in it to read instead of safetensors.
        options: for transformers' `from_pretrained`.

    Raises:
        PolicyError: transformers can't load it, or a weight is missing.
        torch.OutOfMemoryError: the GPU is too small for it.
    """
    import struct

    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    path = folder / gguf_file if gguf_file else folder
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=gguf_file, output_loading_info=True, trust_remote_code=False, **options
        )
    except torch.OutOfMemoryError:
        raise
    except (ValueError, KeyError, OSError, RuntimeError, ImportError, SafetensorError, struct.error) as error:
        problem = "can't read this GGUF file" if gguf_file else "can't load this model"
        raise PolicyError(f"{path}: transformers {problem}: {error}") from error
    if missing := sorted(report["missing_keys"]):
        raise PolicyError(f"{path}: it lacks {len(missing)} of its model's weights, the first is {missing[0]}")
    return model
