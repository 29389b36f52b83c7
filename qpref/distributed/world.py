"""The processes of one run, one for each GPU, and what they tell each other.

Every process has a rank, and all of them call the same collectives in the same order, each under a name that is
compared before. Facts travel as JSON between the hosts, tensors between the devices (by NCCL between GPUs, by gloo
between CPUs). A run of one process has no groups, and its collectives return what they were given.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from qpref.distributed.peers import Peers

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """This process's view of all processes of a run.

    Every collective raises PeerError where another process has failed, died, hangs, or came to another collective. Its
    `what` says what it is for, such as "the gradients", and is the same in all processes.

    Attributes:
        rank: of this process, from 0; rank 0 writes the run's files.
        size: number of processes.
        local_rank: of this process among those of its host, which is the index of its GPU.
        hosts: group over which facts travel, by gloo; None for one process.
        devices: group over which tensors on the run's device travel; None for one process. Tensors that a GPU's run
            has on the CPU, such as a paged optimizer's state, travel between the hosts.
        peers: the other processes' signs of life; None for one process.
        moved_bytes: payload that this process brought to the collectives so far, by kind.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    hosts: dist.ProcessGroup | None = None
    devices: dist.ProcessGroup | None = None
    peers: Peers | None = None
    moved_bytes: Counter[str] = field(default_factory=Counter)

    @property
    def is_first(self) -> bool:
        """True for the process that writes the run's files, and for a process alone."""
        return self.rank == 0

    def begin(self, stage: str) -> None:
        """Begin a stage that all processes go through, such as "step 12"; its collectives are named by it."""
        if self.peers is not None:
            self.peers.begin(stage)

    def note(self, where: str) -> None:
        """Note where this process alone is: a new note counts as progress for those that wait for it."""
        if self.peers is not None:
            self.peers.note(where)

    def noted(self, items: Sequence[T], what: str) -> Iterator[T]:
        """Yield items of this process's work, and note each: a long step is progress to those that wait for it."""
        for number, item in enumerate(items, start=1):
            self.note(f"{what} {number}/{len(items)}")
            yield item

    def stops(self, requested: Sequence[int]) -> Sequence[int]:
        """Share the signals that ask this process to stop.

        Args:
            requested: filled by signal handlers.

        Returns:
            Signals of any process, filled at a collective, and so equal in all processes between two of them.
        """
        if self.peers is None:
            return requested
        self.peers.requested = requested
        return self.peers.stops

    def add(self, tensors: Sequence[Tensor], what: str) -> None:
        """Add tensors of one dtype and device to those of the other processes, in place, all in one message.

        The sums are the same to the bit in every process.
        """
        if self.devices is None or not tensors:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        self._enter("add", what, flat, same_length=True)
        self._run(lambda: dist.all_reduce(flat, group=self._group_of(flat), async_op=True), what, flat.is_cuda)
        for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(total.view_as(tensor))

    def copy_first(self, tensors: Sequence[Tensor], what: str) -> None:
        """Overwrite tensors of one dtype and device by those of rank 0, in place, all in one message."""
        if self.devices is None or not tensors:
            return
        flat = torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
        self._enter("copy", what, flat, same_length=True)
        group = self._group_of(flat)
        self._run(lambda: dist.broadcast(flat, group_src=0, group=group, async_op=True), what, flat.is_cuda)
        with torch.no_grad():
            for tensor, first in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
                tensor.copy_(first.view_as(tensor))

    def gather(self, values: Tensor, what: str) -> list[Tensor]:
        """Collect one tensor [n] of each process, in the order of ranks; n may differ and be 0, the dtype may not.

        No gradient flows through it.
        """
        if self.devices is None:
            return [values]
        return self._gather(values.detach(), "gather", what)

    def exchange(self, fact: Any, what: str) -> list[Any]:
        """Collect a fact (of what JSON can hold) of each process, in the order of ranks."""
        if self.hosts is None:
            return [fact]
        encoded = torch.frombuffer(bytearray(json.dumps(fact).encode()), dtype=torch.uint8)
        return [json.loads(each.numpy().tobytes()) for each in self._gather(encoded, "exchange", what)]

    def share(self, fact: Any, what: str) -> Any:
        """Return rank 0's fact (of what JSON can hold); the others' are ignored."""
        return self.exchange(fact if self.is_first else None, what)[0]

    def share_tensors(self, tensors: Mapping[str, Tensor] | None, what: str) -> dict[str, Tensor]:
        """Return rank 0's tensors by name, on the CPU; the others' are ignored."""
        if self.hosts is None:
            return dict(tensors or {})
        mine = {name: each.detach().cpu().contiguous() for name, each in (tensors or {}).items()}
        facts = self.share([[name, str(each.dtype), list(each.shape)] for name, each in mine.items()], what)
        found = {}
        for name, dtype, shape in facts:
            own = torch.empty(shape, dtype=getattr(torch, dtype.removeprefix("torch.")))
            found[name] = mine[name] if self.is_first else own
            self._send_bytes(found[name].view(-1).view(torch.uint8), f"{what}: {name}")
        return found

    def wait(self, what: str) -> None:
        """Wait until every process has come here."""
        if self.peers is not None:
            self.peers.enter(what, 0)

    def _send_bytes(self, content: Tensor, what: str) -> None:
        self._enter("share", what, content, same_length=True)
        self._run(lambda: dist.broadcast(content, group_src=0, group=self.hosts, async_op=True), what)

    def _group_of(self, tensor: Tensor) -> dist.ProcessGroup | None:
        """Return the group over which a tensor travels: NCCL takes none that is on the CPU."""
        return self.devices if tensor.is_cuda else self.hosts

    def _gather(self, values: Tensor, kind: str, what: str) -> list[Tensor]:
        """Gather tensors [n] of different lengths, padded to the longest."""
        counts = self._enter(kind, what, values)
        padded = values.new_zeros(max(counts))
        padded[: len(values)] = values
        gathered = [torch.empty_like(padded) for _ in counts]
        if len(padded):
            group = self._group_of(padded)
            self._run(lambda: dist.all_gather(gathered, padded, group=group, async_op=True), what, padded.is_cuda)
        return [each[:count] for each, count in zip(gathered, counts, strict=True)]

    def _enter(self, kind: str, what: str, values: Tensor, same_length: bool = False) -> list[int]:
        """Come to a collective with all other processes; returns the number of elements that each of them brings.

        Raises:
            PeerError: with `same_length`, these differ.
        """
        assert self.peers is not None
        lengths = self.peers.enter(what, values.numel(), f"{kind} {values.dtype}")
        if same_length and len(set(lengths)) > 1:
            brought = ", ".join(f"rank {rank} {length:,}" for rank, length in enumerate(lengths))
            raise self.peers.report(
                f"the processes bring different numbers of elements to {self.peers.named(what)}: {brought}"
            )
        self.moved_bytes[kind] += values.nbytes
        return lengths

    def _run(self, begin: Callable[[], Any], what: str, on_gpu: bool = False) -> None:
        """Run a collective that all processes have come to, and wait for it on the host."""
        assert self.peers is not None
        self.peers.finish(begin, what, on_gpu)


ALONE = World()
"""The world of a run of one process."""
