"""The other processes of a run: who has come to a collective, who is alive, and which of them has failed first.

A collective with a process that never comes would wait for ever, and one that some processes call and others don't
would mix up messages. So before each collective all processes exchange its name, over the hosts' group. While one
waits, it looks at the notes that every process leaves in the rendezvous store: a process that is missing and leaves no
new note for `timeout` seconds is named, and the run ends.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from qpref.distributed.waiting import DEAD_SECONDS, Sign, Silence, is_done_soon, is_of_connection
from qpref.errors import FailedElsewhere, PeerError, QprefError

log = logging.getLogger("qpref")

PERIOD = 0.5
"""Seconds between two signs of life."""
GRACE_SECONDS = 30.0
"""Most seconds that a process may take to leave by itself after another one has failed; a hanging one never would."""
FIRST_RANK_SECONDS = 1.0
"""Seconds that rank 0 gets to report an error that all ranks have."""
FAILURE = "failure"


@dataclass(frozen=True, slots=True)
class Failure:
    """The first error of a run, whose process prints it."""

    rank: int
    what: str
    exit_code: int

    def error(self) -> FailedElsewhere:
        """Make the error of a process that leaves because of this one."""
        return FailedElsewhere(f"rank {self.rank} failed: {self.what}", self.exit_code)


@dataclass(slots=True)
class Peers:
    """One process's view of the others.

    Attributes:
        store: of the rendezvous; by its own connection, which no blocking call of torch occupies.
        hosts: group over which names and lengths travel.
        timeout: seconds without progress after which a process that others wait for is lost.
        hosts_store: True for the process whose end takes the store with it.
        stops: signals that asked some process to stop, the same in all processes at each step.
        requested: signals that asked this process to stop.
    """

    store: Any
    rank: int
    size: int
    hosts: dist.ProcessGroup
    timeout: float
    hosts_store: bool
    stops: list[int] = field(default_factory=list)
    requested: Sequence[int] = ()
    failure: Failure | None = None
    _note: str = "the start"
    _stage: str = ""
    _collectives: int = 0
    _count: int = 0
    _closing: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def start(self) -> None:
        """Give the first sign of life, and one every half second from here on."""
        self._give_sign()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watch of the other processes")
        self._thread.start()

    def close(self) -> None:
        """Give no more signs of life."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join(4 * PERIOD)

    def note(self, where: str) -> None:
        """Note where this process is; every new note tells the others that it makes progress.

        Raises:
            FailedElsewhere: another process has failed.
        """
        self._note = self.named(where)
        self._refuse_failure()

    def begin(self, stage: str) -> None:
        """Begin a stage that all processes go through, such as "step 12"; its collectives have its name.

        Raises:
            FailedElsewhere: another process has failed.
        """
        self._stage, self._note = stage, stage
        self._refuse_failure()

    def enter(self, what: str, length: int, kind: str = "wait") -> list[int]:
        """Come to a collective together with all other processes.

        Args:
            what: the collective is for; with its kind and stage its name, which is the same in all processes.
            length: a number of this process that the others need, such as that of its elements.

        Returns:
            Lengths of all processes, by rank.

        Raises:
            PeerError: another process has failed, hangs, died, or came to another collective.
        """
        self._collectives += 1
        name = f"{kind} {self.named(what)}"
        stop = self.requested[0] if self.requested else 0
        mine = torch.tensor([zlib.crc32(name.encode()), length, stop])
        everyone = [torch.empty_like(mine) for _ in range(self.size)]
        self.finish(lambda: dist.all_gather(everyone, mine, group=self.hosts, async_op=True), what)
        rows: list[list[int]] = torch.stack(everyone).tolist()
        if len({row[0] for row in rows}) > 1:
            raise self.report(self._other_names(name, [row[0] for row in rows]))
        if not self.stops:
            self.stops += [row[2] for row in rows if row[2]][:1]
        return [row[1] for row in rows]

    def named(self, what: str) -> str:
        """Add the stage to what a collective is for."""
        return f"{what} of {self._stage}" if self._stage else what

    def finish(self, begin: Callable[[], Any], what: str, on_gpu: bool = False) -> None:
        """Begin a collective and wait until it is done.

        Args:
            begin: calls it, without waiting, and returns torch's handle.
            what: it is for.

        Raises:
            PeerError: as for `enter`.
        """
        name = self.named(what)
        silence = Silence(
            read=self.signs,
            name=name,
            collective=self._collectives,
            timeout=self.timeout,
            period=self.size / 100,
        )
        try:
            work = begin()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise self._broken(name, error) from None
        while True:
            try:
                if is_done_soon(work, on_gpu):
                    return
            except RuntimeError as error:
                raise self._broken(name, error) from None
            self._refuse_failure()
            if lost := silence.too_long():
                raise self.report(lost)

    def signs(self) -> list[Sign]:
        """Read the last sign of life of every process, by rank."""
        found = self.store.multi_get([f"alive/{rank}" for rank in range(self.size)])
        return [Sign(*json.loads(each)) for each in found]

    def report(self, what: str) -> PeerError:
        """Report that the processes can't continue together; returns the error to raise."""
        error = PeerError(what, "continue with --resume; it may have another number of processes")
        try:
            first = self._record(Failure(self.rank, what, error.exit_code))
        except RuntimeError:
            return error
        return error if first.rank == self.rank else first.error()

    def settle(self, error: BaseException) -> BaseException:
        """Report this process's error to the others, unless another process has failed first.

        Returns:
            The error to raise: this one, or the one that says that another process has failed.
        """
        if isinstance(error, FailedElsewhere):
            return error
        if isinstance(error, RuntimeError) and is_of_connection(error):
            error = self._broken(self._note, error)
        try:
            earlier = self._earlier_failure()
            if earlier is None:
                what = getattr(error, "what", None) or f"{type(error).__name__}: {error}"
                earlier = self._record(Failure(self.rank, what, _exit_code(error)))
        except RuntimeError:  # the store is gone, and with it the way to report
            return error
        if earlier.rank != self.rank:
            return earlier.error()
        if isinstance(error, QprefError) and not isinstance(error, PeerError) and self.rank > 0:
            error.what = f"rank {self.rank}: {error.what}"
        return error

    def _earlier_failure(self) -> Failure | None:
        """Find the failure that another process has reported; rank 0 may report an error of all ranks."""
        deadline = time.monotonic() + (FIRST_RANK_SECONDS if self.rank > 0 else 0)
        while (found := self._recorded()) is None and time.monotonic() < deadline:
            time.sleep(PERIOD / 10)
        return found

    def _record(self, mine: Failure) -> Failure:
        """Write a failure where there is none; returns the first one. The store's host waits until the others know."""
        found = self.store.compare_set(FAILURE, "", json.dumps(asdict(mine)))
        first = Failure(**json.loads(found))
        deadline = time.monotonic() + (DEAD_SECONDS if self.hosts_store else 0)
        keys = [f"knows/{rank}" for rank in range(self.size) if rank != self.rank]
        while time.monotonic() < deadline and not self.store.check(keys):
            time.sleep(PERIOD / 10)
        return first

    def _recorded(self) -> Failure | None:
        """Find the first failure; once this process knows it, the store may be gone with its host."""
        if self.failure is None and self.store.check([FAILURE]):
            return Failure(**json.loads(self.store.get(FAILURE)))
        return self.failure

    def _refuse_failure(self) -> None:
        if self.failure is not None:
            raise self.failure.error()

    def _broken(self, name: str, error: RuntimeError) -> PeerError:
        """Find out why a connection broke: which process has failed, or gives no sign of life any more."""
        if self.failure is not None:
            return self.failure.error()
        try:
            before = self.signs()
            deadline = time.monotonic() + DEAD_SECONDS
            while time.monotonic() < deadline:
                if (failure := self._recorded()) is not None:
                    return failure.error()
                time.sleep(PERIOD)
            pairs = enumerate(zip(before, self.signs(), strict=True))
            dead = [rank for rank, (old, new) in pairs if old.count == new.count and rank != self.rank]
        except RuntimeError:
            if self.failure is not None:
                return self.failure.error()
            return PeerError(f"rank 0, or the launcher's process beside it, is gone; {name} waited for it")
        if dead:
            where = "; ".join(f"rank {rank} died at {before[rank].note}" for rank in dead)
            return self.report(f"{where}; rank {self.rank} waited for it at {name}")
        return self.report(f"the connection to another process broke at {name}: {str(error).splitlines()[0]}")

    def _other_names(self, name: str, checksums: Sequence[int]) -> str:
        """Explain which ranks came to another collective than this process, and to which."""
        own = zlib.crc32(name.encode())
        self.store.set(f"name/{own}", name)
        parts = [f"rank {self.rank} came to {name}"]
        deadline = time.monotonic() + DEAD_SECONDS
        for rank, checksum in enumerate(checksums):
            if checksum == own:
                continue
            key = f"name/{checksum}"
            while not self.store.check([key]) and time.monotonic() < deadline:
                time.sleep(PERIOD / 10)
            other = self.store.get(key).decode() if self.store.check([key]) else "something else"
            parts.append(f"rank {rank} to {other}")
        return ", ".join(parts) + ": the processes of a run must do the same"

    def _watch(self) -> None:
        """Give signs of life, look for a failure, and end this process where it doesn't leave after one."""
        since = 0.0
        while not self._closing.wait(PERIOD):
            try:
                self._give_sign()
                if self.failure is None and (found := self._recorded()) is not None:
                    self.failure = found
                    self.store.set(f"knows/{self.rank}", "")
            except RuntimeError:
                self.failure = self.failure or Failure(0, "its process, or the launcher's beside it, is gone", 13)
            if self.failure is None or self.failure.rank == self.rank:
                continue
            since = since or time.monotonic()
            if time.monotonic() - since > min(GRACE_SECONDS, self.timeout):
                self._leave_at_once(self.failure)

    def _leave_at_once(self, failure: Failure) -> None:
        """End this process, whose main thread hangs: in a plugin, in a kernel, or on a GPU that waits for another."""
        if not self._closing.is_set():
            sys.stderr.write(f"rank {self.rank}: hung at {self._note} after rank {failure.rank} had left\n")
            os._exit(failure.exit_code)

    def _give_sign(self) -> None:
        self._count += 1
        self.store.set(f"alive/{self.rank}", json.dumps([self._count, self._collectives, self._note]))


def _exit_code(error: BaseException) -> int:
    if isinstance(error, QprefError):
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return 130
    return 1
