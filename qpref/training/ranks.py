"""Agreements between the processes of a run: versions and settings, data, the adapter, and the path of computation."""

from __future__ import annotations

import logging
import platform
import socket
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from qpref.distributed.agreement import digest, refuse_differences
from qpref.distributed.rank_log import release_warnings
from qpref.distributed.world import World
from qpref.errors import PeerError, RecipeError
from qpref.installed import version_of
from qpref.policy.policy import Policy
from qpref.policy.tokenizer import tokenizer_digest
from qpref.recipe.plan import Plan
from qpref.training.prepare import Prepared
from qpref.training.snapshot import Session

log = logging.getLogger("qpref")

MOST_ROUNDING = 1e-3
"""Largest difference of two adapters, relative to the largest weight of a layer, that still counts as rounding."""
TINIEST = 1e-12

VERSIONED = ("qpref", "transformers", "peft", "bitsandbytes")
OF_EACH_PROCESS = {
    *(("model", key) for key in ("base", "tokenizer", "device", "memory")),
    *(("data", key) for key in ("train", "heldout", "cache")),
    ("adapter", "start"),
    ("plugins", "files"),
    *(("train", key) for key in ("tokens_per_microbatch", "gradient_checkpointing")),
}
"""Settings that may differ between processes: (table, key). Contents of files are compared by their digests."""


def agree_on_plan(world: World, plan: Plan) -> None:
    """Compare recipes, versions and plugins, before anything takes time.

    Raises:
        RecipeError: they differ, or two processes have one GPU.
    """
    if world.size == 1:
        return
    facts: dict[str, Any] = {}
    for table, values in plan.document.items():
        if isinstance(values, dict):
            facts |= {f"[{table}] {key}": each for key, each in values.items() if (table, key) not in OF_EACH_PROCESS}
        else:
            facts[f"[[{table}]]"] = values
    facts |= {name: version_of(name) for name in VERSIONED} | {"torch": torch.__version__}
    facts["Python"] = ".".join(platform.python_version_tuple()[:2])
    facts |= {f"plugin {offer.entry_point}": str(offer) for offer in {plugin.offer for plugin in plan.plugins}}
    facts.pop("[[sinks]]", None)  # rank 0's alone are opened
    refuse_differences(world, facts, "recipes and versions")
    _refuse_one_gpu_twice(world)


def agree_on_start(prepared: Prepared) -> None:
    """Compare what each process has read, and start all of them from rank 0's adapter.

    Raises:
        RecipeError: data, base or tokenizer differ.
        PeerError: the adapters differ all the same.
    """
    world = prepared.world
    if world.size == 1:
        return
    facts = {name: value for name, value in prepared.fingerprints.items() if name != "recipe"}
    refuse_differences(world, {"tokenizer": tokenizer_digest(prepared.tokenizer), **facts}, "data and models")
    world.copy_first(list(prepared.policy.trained_parameters().values()), "the adapter's start")
    _refuse_other_adapters(world, prepared.policy)
    release_warnings(world)


def agree_on_layout(world: World, policy: Policy) -> None:
    """Compute each prompt once in every process or in none, since the order of work depends on it."""
    if not all(world.exchange(policy.shares_prompts, "the sharing of prompts")):
        policy.share_prompts(False)


def agree_on_checkpoint(session: Session) -> None:
    """Exchange each process's sizes, which a checkpoint stores, and continue from rank 0's adapter and optimizer.

    These are equal to the bit on equal GPUs, since all processes take the same step by the same gradients. GPUs of
    different kinds may round a gradient's norm otherwise, and what they are off by then must not add up.

    Raises:
        PeerError: an adapter is off by more than rounding.
    """
    prepared, state = session.prepared, session.state
    world, where = prepared.world, f"step {state.step}"
    if world.size == 1:
        return
    adapter = list(prepared.policy.trained_parameters().values())
    facts = [digest(adapter), [state.budget, prepared.policy.recomputed_layers]]
    found = world.exchange(facts, "the adapters and sizes")
    session.sizes = [sizes for _, sizes in found]
    if len({each for each, _ in found}) == 1:
        return
    _copy_adapter(world, adapter, where)
    for kind, tensors in _state_tensors(session.optimizer).items():
        world.copy_first(tensors, f"the optimizer's {kind}")


def _copy_adapter(world: World, adapter: Sequence[Tensor], where: str) -> None:
    """Overwrite the adapter by rank 0's."""
    before = [each.detach().clone() for each in adapter]
    world.copy_first(adapter, "the adapter")
    pairs = zip(before, (each.detach() for each in adapter), strict=True)
    offsets = [float((old - new).abs().max() / new.abs().max().clamp_min(TINIEST)) for old, new in pairs]
    found = world.exchange(max(offsets), "the adapters' offsets")
    off = [f"rank {rank} (by {each:.1e})" for rank, each in enumerate(found) if not each <= MOST_ROUNDING]
    if off:
        raise PeerError(
            f"at {where} the adapter of {' and '.join(off)} isn't that of rank 0: it missed a step's update"
        )
    log.warning("at %s the processes' adapters differ by rounding (%.1e at most); all continue with rank 0's",
                where, max(found))  # fmt: skip


def _state_tensors(optimizer: Any) -> dict[str, list[Tensor]]:
    """Sort the tensors of the optimizer's state, in the order of its parameters, by dtype and device."""
    found: dict[str, list[Tensor]] = {}
    for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
        for value in optimizer.state.get(parameter, {}).values():
            if isinstance(value, Tensor):
                found.setdefault(f"{value.dtype} on {value.device.type}", []).append(value)
    return found


def _refuse_other_adapters(world: World, policy: Policy) -> None:
    """Compare the adapters that the processes start from.

    Raises:
        PeerError: they differ.
    """
    found = world.exchange(digest(policy.trained_parameters().values()), "the adapters at the start")
    if other := [f"rank {rank}" for rank, each in enumerate(found) if each != found[0]]:
        raise PeerError(f"the adapter that {' and '.join(other)} starts from isn't that of rank 0")


def _refuse_one_gpu_twice(world: World) -> None:
    """Refuse two processes on one GPU, with which NCCL can't work."""
    if dist.get_backend(world.devices) != "nccl":
        return
    own = f"{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid} of {socket.gethostname()}"
    ranks: dict[str, list[int]] = {}
    for rank, each in enumerate(world.exchange(own, "GPUs")):
        ranks.setdefault(each, []).append(rank)
    for each, twice in ranks.items():
        if len(twice) > 1:
            raise RecipeError(
                f"ranks {' and '.join(map(str, twice))} are on one GPU, {each}", "start one process for each GPU"
            )
