"""Joining the processes of a run, which torchrun and its like tell of each other by environment variables."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from qpref.distributed.world import World


def take_gpu(setting: str) -> None:
    """Make the GPU of this process's number on its host the current one; nothing for a CPU, or a process alone.

    Args:
        setting: [model] device.
    """
    if setting != "cpu" and num_processes() > 1 and torch.cuda.device_count() > 1:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))


def num_processes() -> int:
    """Return the number of processes that a launcher has told of."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def joined(device: torch.device, timeout: int) -> Iterator[World]:
    """Join the processes that a launcher started, and leave them at the end; alone where none did.

    Args:
        device: of this process.
        timeout: seconds to wait for the other processes, here and in each collective.
    """
    size = num_processes()
    if size == 1:
        yield World()
        return
    dist.init_process_group("gloo", timeout=timedelta(seconds=timeout))
    try:
        hosts = dist.new_group(backend="gloo")
        devices = hosts if device.type == "cpu" else dist.new_group(backend="nccl")
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        yield World(rank=dist.get_rank(), size=size, local_rank=local_rank, hosts=hosts, devices=devices)
    finally:
        dist.destroy_process_group()
