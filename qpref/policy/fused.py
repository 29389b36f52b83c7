"""Replacement of a decoder's norms, MLPs and attention layers by fused ones, where the family's own code computes the
same.

Families write the same few formulas in their own words, and some differ in one (a multiplier, a clamp, another order of
rotary positions). So a module is recognized by its layers and then tried: the fused one must give the values and the
gradients of the family's own. What can't be tried stays as it is.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qpref.policy.gated_mlp import GatedMLP
from qpref.policy.lora import is_hooked
from qpref.policy.norms import FORMULAS, RMSNorm
from qpref.policy.self_attention import SelfAttention, recorded_attention, trial_call

Autocast = Callable[[], AbstractContextManager[Any]]
"""Makes the context of a forward pass."""
Gathered = Callable[[nn.Module], AbstractContextManager[None]]
Fuse = Callable[[Any], nn.Module]
"""Makes the fused module of a family's own."""

TRIED_SIZES = (1.0, 30.0)
"""Sizes of the tokens' states that modules are compared on, so that a clamp shows."""
TRIED_ON_NORMS = (1e-3, *TRIED_SIZES)
"""Likewise; the number that a norm adds to the mean square shows in small states alone."""
TOKENS_PER_SIZE = 3
TOLERANCE = 0.02
"""Relative difference of values or gradients from the family's own; the same sums in another order are 0.004 apart."""
UNSUITABLE = (TypeError, ValueError, RuntimeError, AttributeError, KeyError, IndexError)
"""What modules raise that are called in another way than the known ones."""


def fuse_layers(decoder: nn.Module, dtype: torch.dtype, autocast: Autocast, gathered: Gathered | None = None) -> None:
    """Replace every module of a frozen decoder that a fused one computes like the family's own.

    Args:
        dtype: of the states between layers.
        gathered: makes the weights of a module's layer whole, where processes share them.
    """
    chosen: dict[Any, Fuse | None] = {}
    for name, own in list(decoder.named_modules()):
        if not name or not (is_gated_mlp(own) or is_rms_norm(own) or is_attention(own)):
            continue
        kind = type(own), _settings(own)
        if kind not in chosen:
            with nullcontext() if gathered is None else gathered(own):
                chosen[kind] = _closest(own, dtype, autocast)
        fuse = chosen[kind]
        if fuse is not None:
            parent, _, last = name.rpartition(".")
            setattr(decoder.get_submodule(parent), last, fuse(own))


def _settings(own: Any) -> tuple[Any, ...]:
    """Collect what may tell two modules of a class apart, but for their weights and their index in the model."""
    plain = [(name, value) for name, value in vars(own).items() if isinstance(value, bool | int | float | str)]
    kinds = getattr(getattr(own, "config", None), "layer_types", None) or ()
    index = getattr(own, "layer_idx", None)
    kind = kinds[index] if isinstance(index, int) and index < len(kinds) else None
    children = tuple((name, type(child)) for name, child in own.named_children())
    return kind, repr(getattr(own, "act_fn", None)), children, *sorted(item for item in plain if item[0] != "layer_idx")


def _closest(own: nn.Module, dtype: torch.dtype, autocast: Autocast) -> Fuse | None:
    """Choose the way to fuse a module that comes closest to it in its values, then in its gradients; None where none is
    within the tolerance."""
    was_training = own.training
    own.eval()  # dropout would draw from torch's generator
    ways = list(_ways(own, dtype))
    differences = [difference(fuse, own, dtype, autocast) for fuse in ways]
    own.train(was_training)
    distance, index = min(zip(differences, range(len(ways)), strict=True), default=((torch.inf, torch.inf), 0))
    return ways[index] if max(distance) <= TOLERANCE else None


def _ways(own: Any, dtype: torch.dtype) -> Iterator[Fuse]:
    """Yield the ways to fuse a module that its layers allow."""
    if is_gated_mlp(own):
        yield GatedMLP
    if is_rms_norm(own):
        for formula in FORMULAS:
            yield partial(RMSNorm, formula=formula)
    if is_attention(own) and (keywords := _keywords(own, dtype)) is not None:
        yield partial(SelfAttention, keywords=keywords)


def is_gated_mlp(own: nn.Module) -> bool:
    """Return whether the layers are those of GatedMLP."""
    children = dict(own.named_children())
    return (
        set(children) == set(GatedMLP.CHILDREN)
        and not list(children["act_fn"].parameters())
        and not _own_tensors(own)
        and _reads_states_alone(own)
    )


def is_rms_norm(own: nn.Module) -> bool:
    """Return whether a module is, by its name and its tensors, a norm of the kind that RMSNorm computes."""
    return (
        type(own).__name__.endswith("RMSNorm")
        and isinstance(getattr(own, "weight", None), nn.Parameter)
        and not list(own.children())
        and [(name, tensor.ndim) for name, tensor in _own_tensors(own)] == [("weight", 1)]
        and any(isinstance(vars(own).get(name), float) for name in RMSNorm.EPSILONS)
        and _reads_states_alone(own)
    )


def is_attention(own: Any) -> bool:
    """Return whether the layers are those of SelfAttention: with norms of each head, or without."""
    children = dict(own.named_children())
    norms = [children[name] for name in SelfAttention.NORMS if name in children]
    return (
        set(children) - set(SelfAttention.NORMS) == set(SelfAttention.LINEARS)
        and len(norms) in (0, 2)
        and isinstance(getattr(own, "head_dim", None), int)
        and all([tuple(tensor.shape) for _, tensor in _own_tensors(norm)] == [(own.head_dim,)] for norm in norms)
        and not _own_tensors(own)  # for example a sink of each head
        and not is_hooked(own)
    )


def _own_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """List a module's parameters and buffers, without those of its children."""
    return [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]


def _reads_states_alone(own: nn.Module) -> bool:
    """Return whether a module's forward pass has one argument, and a call of it is that pass and nothing else."""
    return len(inspect.signature(own.forward).parameters) == 1 and not is_hooked(own)


def _keywords(own: Any, dtype: torch.dtype) -> dict[str, Any] | None:
    """Record the keywords that an attention layer calls transformers' registry with; None where it can't be called in
    the common way."""
    states = torch.zeros(1, 1, _width(own), dtype=dtype, device=next(own.parameters()).device)
    with recorded_attention(own.config) as keywords, torch.no_grad():
        try:
            trial_call(own, states, own.head_dim)
        except UNSUITABLE:
            return None
    return keywords


def _width(own: Any) -> int:
    """Return the width of the states that a module reads."""
    children = dict(own.named_children())
    reader = children.get("gate_proj", children.get("q_proj"))
    return len(own.weight) if reader is None else int(reader.in_features)


def difference(fuse: Fuse, own: Any, dtype: torch.dtype, autocast: Autocast) -> tuple[float, float]:
    """Compare a fused module with the family's own, in eval mode, on random states.

    Returns:
        The greatest relative Euclidean difference of a token's values, and of gradients (of a token's states, of an
        adapter's tensor); infinite where a module can't be called in the common way.
    """
    random = torch.Generator().manual_seed(0)
    sizes: tuple[float, ...] = TRIED_SIZES
    if not list(own.children()):
        own, sizes = copy.deepcopy(own), TRIED_ON_NORMS
        # A norm of ones doesn't show how the weight is multiplied on.
        own.weight.data = torch.rand(own.weight.shape, generator=random).to(own.weight)
    shape, device = (1, TOKENS_PER_SIZE * len(sizes), _width(own)), next(own.parameters()).device
    states, direction = (torch.randn(shape, generator=random) for _ in range(2))
    states *= torch.tensor(sizes).repeat_interleave(TOKENS_PER_SIZE)[:, None]
    leaf = states.to(device, dtype).requires_grad_()
    try:
        outcomes = [_outcome(own, module, leaf, direction, autocast) for module in (own, fuse(own))]
    except UNSUITABLE:
        return torch.inf, torch.inf
    values, *gradients = (_apart(*pair) for pair in zip(*outcomes, strict=True))
    return values, max(gradients)


def _outcome(own: Any, module: nn.Module, leaf: Tensor, direction: Tensor, autocast: Autocast) -> list[Tensor]:
    """Compute a module's values [T, width], and the gradients of its input [T, width] and of its trained parameters, as
    one row each, along a direction."""
    trained = [each for each in own.parameters() if each.requires_grad]
    with torch.enable_grad():
        if hasattr(own, "q_proj"):
            with autocast(), recorded_attention(own.config):
                values = trial_call(module, leaf, own.head_dim)
        else:
            with autocast():
                values = module(leaf)
        of_states, *others = torch.autograd.grad(values, [leaf, *trained], direction.to(values), materialize_grads=True)
    return [values[0].detach(), of_states[0], *(each.reshape(1, -1) for each in others)]


def _apart(own: Tensor, other: Tensor) -> float:
    """Compute the greatest relative difference of a row; infinite where it isn't a number."""
    scale = own.float().norm(dim=-1).clamp_min(1e-30)  # an adapter's A has no gradient while its B is 0
    return float(((other.float() - own.float()).norm(dim=-1) / scale).nan_to_num(torch.inf).max())
