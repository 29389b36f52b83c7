"""The processes of one run, one for each GPU, and what they tell each other.

Every process has a rank, and all of them call the same collectives in the same order. Facts travel as JSON between the
hosts, tensors between the devices (by NCCL between GPUs, by gloo between CPUs). A run of one process has no groups, and
its collectives return what they were given.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """This process's view of all processes of a run.

    Attributes:
        rank: of this process, from 0; rank 0 writes the run's files.
        size: number of processes.
        local_rank: of this process among those of its host, which is the index of its GPU.
        hosts: group over which facts travel, by gloo; None for one process.
        devices: group over which tensors on the run's device travel; None for one process.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    hosts: dist.ProcessGroup | None = None
    devices: dist.ProcessGroup | None = None

    @property
    def is_first(self) -> bool:
        """True for the process that writes the run's files, and for a process alone."""
        return self.rank == 0

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Add tensors of one dtype and device to those of the other processes, in place, all in one message.

        The sums are the same to the bit in every process.
        """
        if self.devices is None or not tensors:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(flat, group=self.devices)
        for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(total.view_as(tensor))

    def gather(self, values: Tensor) -> list[Tensor]:
        """Collect one tensor [n] of each process, in the order of ranks; n may differ and be 0, the dtype may not.

        No gradient flows through it.
        """
        if self.devices is None:
            return [values]
        return _gather(values.detach(), self.devices, self.size)

    def exchange(self, fact: Any) -> list[Any]:
        """Collect a fact (of what JSON can hold) of each process, in the order of ranks."""
        if self.hosts is None:
            return [fact]
        encoded = torch.frombuffer(bytearray(json.dumps(fact).encode()), dtype=torch.uint8)
        return [json.loads(each.numpy().tobytes()) for each in _gather(encoded, self.hosts, self.size)]

    def share(self, fact: Any) -> Any:
        """Return rank 0's fact (of what JSON can hold); the others' are ignored."""
        return self.exchange(fact if self.is_first else None)[0]

    def share_tensors(self, tensors: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        """Return rank 0's tensors by name, on the CPU; the others' are ignored."""
        if self.hosts is None:
            return dict(tensors or {})
        names = sorted(tensors or {})
        mine = [(tensors or {})[name].detach().cpu().contiguous() for name in names]
        facts = [[name, str(each.dtype), list(each.shape)] for name, each in zip(names, mine, strict=True)]
        found = {}
        for index, (name, dtype, shape) in enumerate(self.share(facts)):
            if not self.is_first:
                mine.append(torch.empty(shape, dtype=getattr(torch, dtype.removeprefix("torch."))))
            content = mine[index].reshape(-1).view(torch.uint8)
            dist.broadcast(content, group_src=0, group=self.hosts)
            found[name] = mine[index]
        return found

    def wait(self) -> None:
        """Wait until every process has come here."""
        self.exchange(None)


ALONE = World()
"""The world of a run of one process."""


def _gather(values: Tensor, group: dist.ProcessGroup, size: int) -> list[Tensor]:
    """Gather tensors [n] of different lengths: their lengths first, then all of them padded to the longest."""
    length = torch.tensor([len(values)], device=values.device)
    lengths = [torch.empty_like(length) for _ in range(size)]
    dist.all_gather(lengths, length, group=group)
    counts = torch.cat(lengths).tolist()
    padded = values.new_zeros(max(counts))
    padded[: len(values)] = values
    gathered = [torch.empty_like(padded) for _ in range(size)]
    dist.all_gather(gathered, padded, group=group)
    return [each[:count] for each, count in zip(gathered, counts, strict=True)]
