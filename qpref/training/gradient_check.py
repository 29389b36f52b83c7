"""Check of the first step's gradients: an adapter without one would silently stay untrained."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qpref.data.pack import pack
from qpref.errors import PolicyError
from qpref.policy.logprobs import completion_logprobs
from qpref.policy.policy import Policy
from qpref.records import TokenizedExample
from qpref.training.invariants import shortened

log = logging.getLogger("qpref")


def check_gradients(policy: Policy, example: TokenizedExample) -> None:
    """S2: check that every B matrix has a gradient after the first backward pass (A's is 0 while B is).

    A layer whose output doesn't reach the logits in the base itself is said, and stays as it is.

    Args:
        example: any, to see by which layers the base's logits depend on.

    Raises:
        PolicyError: others have none: those layers would silently stay untrained.
    """
    names, norms = [], []
    for name, parameter in policy.trained_parameters().items():
        if "lora_B" in name:
            names.append(name.partition(".lora_B")[0].removeprefix("base_model.model."))
            norms.append(
                torch.zeros((), device=policy.device) if parameter.grad is None else parameter.grad.abs().amax()
            )
    dead = [name for name, norm in zip(names, torch.stack(norms).tolist(), strict=True) if norm == 0]
    if not dead:
        return
    faulty = [name for name in dead if name not in _without_effect(policy, dead, shortened(example))]
    if faulty:
        raise PolicyError(
            f"{len(faulty)} of {len(names)} adapted layers get no gradient, the first is {faulty[0]}",
            "take them out of [adapter] targets, or report the model",
        )
    log.warning(
        "%d of %d adapted layers learn nothing, as this base's logits don't depend on them; the first is %s",
        len(dead),
        len(names),
        dead[0],
    )


def _without_effect(policy: Policy, layers: Sequence[str], example: TokenizedExample) -> set[str]:
    """Find the layers whose input is 0 or on whose output the logits don't depend, in whole rows under the model's own
    attention."""
    calls: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in layers}
    hooks = [
        policy.plain_model.get_submodule(name).register_forward_hook(partial(_keep_call, kept))
        for name, kept in calls.items()
    ]
    path, training = policy.attention, policy.model.training
    policy.use_attention(policy.own_attention)
    policy.model.eval()
    try:
        with torch.enable_grad():
            score = completion_logprobs(policy, pack([example], policy.device)).values.sum()
            return {name for name, kept in calls.items() if not any(_has_effect(score, *call) for call in kept)}
    finally:
        policy.model.train(training)
        policy.use_attention(path)
        for hook in hooks:
            hook.remove()


def _keep_call(kept: list[tuple[Tensor, Tensor]], layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """Keep a layer's input and output, but where the model itself keeps no gradients, as beside a choice of positions;
    the model, which may change the output in place, goes on with a copy."""
    if torch.is_grad_enabled():
        kept.append((inputs[0], output))
    return output.clone()


def _has_effect(score: Tensor, read: Tensor, output: Tensor) -> bool:
    """Return whether the score depends on a layer's output; an output that was cut off from its graph tells nothing."""
    if not output.requires_grad:
        return True
    if not bool(read.any()):
        return False
    (grad,) = torch.autograd.grad(score, output, retain_graph=True, allow_unused=True)
    return grad is not None and bool(grad.any())
