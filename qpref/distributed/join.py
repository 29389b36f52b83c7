"""Joining the processes of a run, which torchrun and its like tell of each other by environment variables."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from qpref.distributed.agreement import refuse_differences
from qpref.distributed.environment import num_processes, number
from qpref.distributed.error_file import write_error_file
from qpref.distributed.peers import Peers
from qpref.distributed.rank_log import logged_by_rank
from qpref.distributed.world import World
from qpref.errors import PeerError, RecipeError

VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
HOSTS_LIMIT = timedelta(days=7)
"""gloo's limit for a message between hosts. `Peers` ends a wait for a process that makes no progress long before; one
that makes progress may be waited for longer than the timeout."""
DEVICES_MARGIN = timedelta(seconds=60)
"""Time by which the limit of a message between devices exceeds the timeout: NCCL kills a process that reaches it, which
then names no rank. All processes have come to such a message when it begins."""


def take_gpu(setting: str) -> None:
    """Make the GPU of this process's number on its host the current one; nothing for a CPU, or a process alone.

    A launcher that shows each process its own GPU alone has chosen already.

    Args:
        setting: [model] device.

    Raises:
        RecipeError: this host has more processes than GPUs.
    """
    count = torch.cuda.device_count()
    if setting == "cpu" or num_processes() == 1 or count < 2:
        return
    local_rank = number("LOCAL_RANK", 0)
    if local_rank >= count:
        raise RecipeError(f"process {local_rank} of this machine has no GPU: it has {count}", "start one process a GPU")
    torch.cuda.set_device(local_rank)


@contextmanager
def joined(device: torch.device, timeout: int) -> Iterator[World]:
    """Join the processes that a launcher started, and leave them at the end; alone where none did.

    A process group that this process has joined before, as in a Ray worker, is used and stays.

    Args:
        device: of this process.
        timeout: seconds to wait for the other processes, here and in each collective.

    Raises:
        PeerError: the others can't be reached; or one of them has failed, died or hangs.
        RecipeError: the launcher's variables are incomplete.
    """
    if num_processes() == 1 and not (dist.is_initialized() and dist.get_world_size() > 1):
        yield World()
        return
    is_ours = not dist.is_initialized()
    store = _rendezvous(timeout) if is_ours else distributed_c10d._get_default_store()
    groups = [_hosts_group(is_ours)]
    world, failed = _world(store, groups[0], timeout, hosts_store=is_ours), True
    try:
        refuse_differences(world, {"device": device.type}, "devices")
        backend = "nccl" if device.type == "cuda" else "gloo"
        groups.append(dist.new_group(backend=backend, timeout=timedelta(seconds=timeout) + DEVICES_MARGIN))
        world = replace(world, devices=groups[1])
        with logged_by_rank(world):
            yield world
            world.wait("the end of the run")
        failed = False
    except BaseException as error:
        settled = _settled(world, error)
        if settled is error:
            raise
        raise settled from error
    finally:
        assert world.peers is not None
        world.peers.close()
        _leave(groups, is_ours, failed)


def _world(store: Any, hosts: dist.ProcessGroup, timeout: int, *, hosts_store: bool) -> World:
    rank, size = dist.get_rank(), dist.get_world_size()
    peers = Peers(
        store=PrefixStore(f"{_attempt()}/{hosts.group_name}", store.clone()),
        rank=rank,
        size=size,
        hosts=hosts,
        timeout=timeout,
        hosts_store=hosts_store and rank == 0,
    )
    peers.start()
    local_rank = number("LOCAL_RANK", 0)
    return World(rank=rank, size=size, local_rank=local_rank, hosts=hosts, devices=hosts, peers=peers)


def _rendezvous(timeout: int) -> Any:
    """Meet the other processes where the launcher says, and make the default group; returns the store of the meeting.

    Raises:
        PeerError: not all of them came within the timeout.
        RecipeError: the launcher's variables are incomplete, or have odd values.
    """
    if missing := [name for name in VARIABLES if name not in os.environ]:
        raise RecipeError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, without {' and '.join(missing)}",
            "start the processes with torchrun, or unset WORLD_SIZE for a run of one process",
        )
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    limit = timedelta(seconds=timeout)
    try:
        store, rank, size = next(rendezvous("env://", timeout=limit))
        dist.init_process_group("gloo", store=PrefixStore(_attempt(), store), rank=rank, world_size=size, timeout=limit)
    except ValueError as error:
        raise RecipeError(f"the launcher's variables: {error}", "start the processes with torchrun") from None
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise PeerError(
            f"rank {os.environ['RANK']}: the {num_processes()} processes of the run didn't meet at {address} within "
            f"{timeout} s: {reason}",
            "check that all were started, and that this machine reaches that address",
        ) from None
    return store


def _hosts_group(is_ours: bool) -> dist.ProcessGroup:
    """Make the group of the hosts.

    Raises:
        PeerError: a process has left since they met.
    """
    try:
        group: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=HOSTS_LIMIT)
    except RuntimeError as error:
        if is_ours:
            dist.destroy_process_group()
        raise PeerError(
            f"rank {os.environ.get('RANK', '?')}: the processes of the run met, and then couldn't connect: "
            f"{str(error).splitlines()[0]}",
            "look for the first error of another process; check that the machines reach each other",
        ) from None
    return group


def _attempt() -> str:
    """Name what this start of the processes keeps in the store, which may outlive them: torchrun's does."""
    return f"qpref/{number('TORCHELASTIC_RESTART_COUNT', 0)}"


def _settled(world: World, error: BaseException) -> BaseException:
    assert world.peers is not None
    settled = world.peers.settle(error)
    write_error_file(settled)
    return settled


def _leave(groups: list[dist.ProcessGroup], is_ours: bool, failed: bool) -> None:
    """Leave the groups that were made here; after a failure that of the devices is aborted, where NCCL would wait."""
    if failed:
        for group in groups[1:]:
            with suppress(RuntimeError):  # the failure is what there is to report
                distributed_c10d._abort_process_group(group)
        del groups[1:]
    if is_ours:
        dist.destroy_process_group()
        return
    for group in groups:
        dist.destroy_process_group(group)
