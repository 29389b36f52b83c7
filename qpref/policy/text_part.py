"""The text part of a loaded model, multimodal ones included: all that is trained and held in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qpref.policy.architecture import causal_model, text_modules


def keep_text_alone(model: Any) -> None:
    """Free the weights that no text is computed with, such as a vision tower's, by moving them to the meta device.

    They stay where the model needs one of them for a text without images (Gemma 3n embeds every token as an image,
    too).
    """
    others = _other_weights(model)
    if not others:
        return
    for slots, name, weight in others:
        slots[name] = nn.Parameter(torch.empty_like(weight, device="meta"), requires_grad=False)
    if not _computes_text(model):
        for slots, name, weight in others:
            slots[name] = weight


def _other_weights(model: Any) -> list[tuple[dict[str, Any], str, Tensor]]:
    """List the parameters outside the text part: the dict that holds each, its name there, and itself."""
    inside = text_modules(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    used = {id(weight) for name in inside for weight in modules[name].parameters(recurse=False)}
    return [
        (module._parameters, name, weight)
        for module in model.modules()
        for name, weight in module._parameters.items()
        if weight is not None and id(weight) not in used
    ]


@torch.no_grad()
def _computes_text(model: Any) -> bool:
    token = torch.zeros(1, 1, dtype=torch.long, device=model.get_input_embeddings().weight.device)
    try:
        logits: Tensor = causal_model(model)(input_ids=token, use_cache=False).logits
    except (RuntimeError, ValueError, TypeError, AttributeError):  # a weight on the meta device is among its reasons
        return False
    return logits.device.type != "meta"
