"""Replacement of a model's norms and gated MLPs by the fused ones, where the family's own code computes the same.

Families write the same few formulas in their own words, and some differ in one (a multiplier, a clamp). So a module is
recognized by its layers and then tried: the fused one must give the values and gradients of the family's own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qpref.policy.gated_mlp import GatedMLP
from qpref.policy.norms import FORMULAS, RMSNorm

Fuse = Callable[[Any], nn.Module]
"""Makes the fused module of a family's own."""

TRIED_SIZES = (1.0, 30.0)
"""Sizes of the states that modules are compared on, so that a clamp shows."""
TOLERANCE = 0.02
"""Relative difference of values or gradients from the family's own; the same sums in another order are 0.004 apart."""


def fuse_layers(decoder: nn.Module, dtype: torch.dtype, autocast: Callable[[], AbstractContextManager[Any]]) -> None:
    """Replace every norm and gated MLP of a frozen decoder that a fused one computes like the family's own.

    Args:
        dtype: of the states between layers.
        autocast: makes the context of a forward pass.
    """
    chosen: dict[Any, Fuse | None] = {}
    for name, own in list(decoder.named_modules()):
        kind = type(own), _settings(own)
        if kind not in chosen:
            chosen[kind] = _closest(own, dtype, autocast)
        fuse = chosen[kind]
        if fuse is not None:
            parent, _, last = name.rpartition(".")
            setattr(decoder.get_submodule(parent), last, fuse(own))


def _closest(own: nn.Module, dtype: torch.dtype, autocast: Callable[[], AbstractContextManager[Any]]) -> Fuse | None:
    """Choose the way to fuse a module that comes closest to it; None where none is within the tolerance."""
    ways = [(difference(fuse, own, dtype, autocast), index, fuse) for index, fuse in enumerate(_ways(own))]
    distance, _, fuse = min(ways, default=(torch.inf, 0, None))
    return fuse if distance <= TOLERANCE else None


def _ways(own: nn.Module) -> Iterator[Fuse]:
    """Yield the ways to fuse a module that its layers allow."""
    children, parameters = dict(own.named_children()), [name for name, _ in own.named_parameters()]
    if set(children) == set(GatedMLP.CHILDREN) and not list(children["act_fn"].parameters()):
        yield GatedMLP
    if type(own).__name__.endswith("RMSNorm") and not children and parameters == ["weight"]:
        for formula in FORMULAS:
            yield partial(RMSNorm, formula=formula)


def _settings(own: nn.Module) -> tuple[Any, ...]:
    """Collect what may tell two modules of a class apart, but for their weights and their position in the model."""
    plain = [(name, value) for name, value in vars(own).items() if isinstance(value, bool | int | float | str)]
    return *sorted(item for item in plain if item[0] != "layer_idx"), repr(getattr(own, "act_fn", None))


def difference(
    fuse: Fuse, own: nn.Module, dtype: torch.dtype, autocast: Callable[[], AbstractContextManager[Any]]
) -> float:
    """Compare a fused module with the family's own on random states: values, and gradients of states and adapters.

    Returns:
        The greatest relative Euclidean difference.
    """
    was_training, trained = own.training, [each for each in own.parameters() if each.requires_grad]
    random = torch.Generator().manual_seed(0)
    if not list(own.children()):  # a norm of ones doesn't show how the weight is multiplied on
        own = copy.deepcopy(own)
        own.weight.data = torch.rand(own.weight.shape, generator=random).to(own.weight)
    shape = 3, 4, _width(own)
    states, direction = (torch.randn(shape, generator=random) for _ in range(2))
    worst = 0.0
    for size in TRIED_SIZES:
        leaf = (size * states).to(next(own.parameters()).device, dtype).requires_grad_()
        outcomes = [_outcome(module.eval(), leaf, direction, trained, autocast) for module in (own, fuse(own))]
        worst = max(worst, *(_apart(*pair) for pair in zip(*outcomes, strict=True)))
    own.train(was_training)
    return worst


def _width(own: Any) -> int:
    """Return the width of the states that a module reads."""
    width: int = own.gate_proj.in_features if list(own.children()) else len(own.weight)
    return width


def _outcome(
    module: nn.Module,
    leaf: Tensor,
    direction: Tensor,
    trained: list[nn.Parameter],
    autocast: Callable[[], AbstractContextManager[Any]],
) -> list[Tensor]:
    """Compute a module's values, and the gradients of its input and its trained parameters along a direction."""
    with torch.enable_grad():
        with autocast():
            values = module(leaf)
        gradients = torch.autograd.grad(values, [leaf, *trained], direction.to(values), materialize_grads=True)
    return [values.detach(), *gradients]


def _apart(own: Tensor, other: Tensor) -> float:
    scale = own.float().norm().clamp_min(1e-30)  # an adapter's A has no gradient while its B is 0
    return float((other.float() - own.float()).norm() / scale)
