"""Checks of a path that computes each prompt once, on one pair, against whole rows under the model's own attention."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qpref.attention.determinism import needs_nondeterminism
from qpref.attention.register import COMPARED, SEGMENTS, CannotShareError, register_comparison
from qpref.data.pack import pack
from qpref.distributed.waiting import is_of_connection
from qpref.policy.forward_errors import KINDS
from qpref.policy.logprobs import completion_logprobs
from qpref.policy.out_of_memory import is_out_of_memory
from qpref.policy.policy import Policy
from qpref.records import PackedBatch

FLOAT32_TOLERANCE = 1e-3
"""Nats by which a token's log-probability may differ between two ways to compute it in float32."""
LAYOUT_TOLERANCE = 0.1
"""Likewise in 16-bit dtypes, as a mean over tokens, between two batch layouts (0.04 measured on SmolLM2-135M)."""
FLOAT32_GRADIENT_TOLERANCE = 1e-3
"""Relative Euclidean difference of the gradient of a response's score between two batch layouts."""
GRADIENT_TOLERANCE = 0.5
"""Likewise in 16-bit dtypes, in which a token may go to other experts (0.03 measured without)."""


@dataclass(frozen=True, slots=True)
class OwnRows:
    """Results of whole rows, one for each branch.

    Attributes:
        values: [S] log-probabilities of a batch.
        grad: [tokens, width], the gradient of a short batch's last response with respect to its row's embeddings.
    """

    values: Tensor
    grad: Tensor


def own_rows(policy: Policy, batch: PackedBatch, short: PackedBatch) -> OwnRows:
    """Compute the results that a sharing path has to give; the policy uses the model's own attention."""
    (example,), last = short.examples, slice(-1, None)
    own = replace(
        example, branches=example.branches[last], truncated=example.truncated[last], masks=example.masks[last]
    )
    row = pack([own], policy.device)
    return OwnRows(completion_logprobs(policy, batch).values, _grad_of_last(policy, row)[0])


def sharing_fault(policy: Policy, path: str, batch: PackedBatch, short: PackedBatch, rows: OwnRows) -> str | None:
    """Switch to a sharing path and describe its fault; None where its values and its gradients are right.

    Args:
        batch: an example of any length, whose values are compared.
        short: an example that leaves memory for gradients.
    """
    try:
        policy.use_attention(path)
        values = completion_logprobs(policy, batch).values
        if reason := excess(values, rows.values, policy, LAYOUT_TOLERANCE):
            return f"sharing a prompt changes log-probabilities: {reason}"
        if path != SEGMENTS and (reason := _kernel_fault(policy, batch)):
            return reason
        return _gradient_fault(policy, short, rows.grad)
    except CannotShareError as error:
        return str(error)
    except KINDS as error:
        if is_out_of_memory(error) or needs_nondeterminism(error) or is_of_connection(error):
            raise
        reason, _, _ = str(error).strip().partition("\n")
        return f"{type(error).__name__}: {reason}"


def _gradient_fault(policy: Policy, short: PackedBatch, of_row: Tensor) -> str | None:
    group = short.groups[0]
    prompt, *others, last = _grad_of_last(policy, short)[0].split([group.prompt, *group.branches])
    if any(bool(other.any()) for other in others):
        return "one response sees the other"
    grad = torch.cat([prompt, last])
    difference = ((grad - of_row[: len(grad)]).norm() / of_row.norm()).item()
    tolerance = FLOAT32_GRADIENT_TOLERANCE if policy.dtype == torch.float32 else GRADIENT_TOLERANCE
    return None if difference <= tolerance else f"sharing a prompt changes gradients by {difference:.1%}"


def _kernel_fault(policy: Policy, batch: PackedBatch) -> str | None:
    """Compare a kernel's error against float32 with that of rounding, in each layer; return its fault, or None."""
    path = policy.attention
    errors = register_comparison(path)
    policy.use_attention(COMPARED)
    completion_logprobs(policy, batch)
    policy.use_attention(path)
    faults = [each for each in errors if not each.is_rounding]
    if not faults:
        return None
    worst = max(faults, key=lambda each: (math.isnan(each.kernel), each.kernel))
    return f"a layer's result or gradients are off by {worst.kernel:.1%}, where rounding makes {worst.rounding:.1%}"


def _grad_of_last(policy: Policy, batch: PackedBatch) -> Tensor:
    """Compute the gradient of the last response's score with respect to each token's embedding.

    It is exactly 0 at the other responses' tokens if these aren't seen. The scores themselves would be no test: in a
    mixture of experts they change by rounding with the tokens beside them.

    Returns:
        [rows, tokens, width] float32; a stream is one row.
    """
    embedded: list[Tensor] = []

    def catch(*call: Any) -> Tensor:
        embedded.append(call[-1].requires_grad_())
        return embedded[-1].clone()  # some families scale them in place

    hook = policy.decoder.get_input_embeddings().register_forward_hook(catch)
    try:
        with torch.enable_grad():
            values = completion_logprobs(policy, batch).values
            (grad,) = torch.autograd.grad(values[-batch.lengths[-1] :].sum(), embedded[0])
    finally:
        hook.remove()
    return grad.float()


def excess(values: Tensor, expected: Tensor, policy: Policy, low_precision_tolerance: float) -> str | None:
    """Describe a difference beyond the tolerance; None where it is within."""
    difference = (values - expected).abs()
    if policy.dtype == torch.float32:
        worst = difference.max().item()
        return None if worst <= FLOAT32_TOLERANCE else f"a token's is {worst:.4f} nats off"
    mean = difference.mean().item()
    return None if mean <= low_precision_tolerance else f"they are {mean:.3f} nats a token off on average"
