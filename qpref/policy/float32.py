"""Computation of a loaded model in float32, with its weights rounded to its own 16-bit dtype as in training.

Two models whose weights differ by a small delta differ by less than the rounding of 16-bit products; in float32 only
the difference of their weights remains. A 4-bit layer is still dequantized to the dtype that it was trained in, a layer
at a time, so its weights are those of training and memory doesn't grow.
"""

from __future__ import annotations

import torch
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn

from qpref.attention.register import sharing_paths
from qpref.policy.policy import Policy
from qpref.policy.projections import dense_weight


class Float32Linear4bit(Linear4bit):  # type: ignore[misc]  # bitsandbytes has no types
    """A 4-bit layer whose weight is rounded as in training and multiplied in float32."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return nn.functional.linear(x, dense_weight(self, x.dtype), bias)


def compute_in_float32(policy: Policy) -> None:
    """Switch a policy to float32, for scoring alone: it can't be trained afterwards."""
    if policy.dtype == torch.float32:
        return
    for tensor in (*policy.model.parameters(), *policy.model.buffers()):
        if tensor.dtype in (torch.bfloat16, torch.float16):
            tensor.data = tensor.data.float()
    for module in policy.model.modules():
        if type(module) is Linear4bit:
            module.__class__ = Float32Linear4bit  # the same layer, its state as it is
            module.compute_dtype = torch.float32
    policy.dtype = torch.float32
    if policy.sharing_paths:
        policy.sharing_paths = sharing_paths(policy.device, torch.float32)
        policy.share_prompts(policy.shares_prompts)
