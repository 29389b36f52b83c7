"""Transforms that a model applies to its logits: a factor on them, and a cap."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any

from qpref.policy.architecture import causal_model

SCALES = {"logit_scale": "*", "logits_scaling": "/", "lm_head_multiplier": "*", "output_multiplier": "*"}
"""Settings that scale logits, each with what most families do with it."""
CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


def logit_transforms(model: Any) -> tuple[float, float | None]:
    """Read the factor on a causal language model's logits, and their cap or None.

    A multimodal model may ignore settings of its text part (Aya Vision's ignores the factor), so of these only those
    count that its own code reads.
    """
    config = model.config.get_text_config()
    source = _forward_source(model)
    read = [name for name in (*SCALES, *CAPS) if name in source] if config is not model.config else [*SCALES, *CAPS]
    cap = next(filter(None, (getattr(config, name, None) for name in CAPS if name in read)), None)
    return _scale(source, {name: getattr(config, name, None) for name in SCALES if name in read}), cap


def _forward_source(model: Any) -> str:
    """Read the code that computes a model's logits; empty where there is none to read."""
    try:
        return inspect.getsource(type(causal_model(model)).forward)
    except (OSError, TypeError):
        return ""


def _scale(source: str, settings: Mapping[str, float | None]) -> float:
    """Compute the factor on a model's logits. Granite divides by a setting that HyperCLOVA X multiplies with, so the
    model's own code says which it is."""
    scale = 1.0
    for name, setting in settings.items():
        if setting is not None:
            found = re.search(rf"([*/])=? *[\w.()]*\b{name}\b", source)
            scale *= float(setting) if (found[1] if found else SCALES[name]) == "*" else 1 / float(setting)
    return scale
