"""A disk that fails at one operation: every call that writes, flushes, renames or removes is counted, and one fails.

The core writes through `os` and `os.fdopen`, and through safetensors' `save_file`; PEFT and tokenizers through `open`.
"""

from __future__ import annotations

import builtins
import errno
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
from safetensors import SafetensorError

KINDS = ("crash", "ENOSPC", "EIO", "short")
CALLS = ("open", "fsync", "rename", "mkdir", "rmdir", "unlink", "truncate", "ftruncate", "utime")
TAKES_SPACE = frozenset({"open", "fsync", "rename", "mkdir", "write"})
"""Operations that a full disk refuses; it still lets files be removed and cut."""


class Killed(BaseException):
    """The process dies here."""


class FaultyDisk:
    """Counts the operations below a folder, and fails at one of them.

    Args:
        root: the folder.
        at: number of the operation that fails, from 1; 0 for none.
        kind: "crash", after which every operation dies; "ENOSPC", which lasts for `lasts` operations that take space;
            "EIO"; "short", a write of which half is on the disk when it is refused, or else as EIO; "SIGKILL", which
            this process, a fork, dies of after half a write.
    """

    def __init__(self, root: Path, at: int = 0, kind: str = "crash", lasts: int = 1) -> None:
        self.root, self.at, self.kind, self.lasts = root, at, kind, lasts
        self.count, self.names, self._dead = 0, [], False
        self._opened: list[int] = []

    def meets(self, name: str, write_half: Callable[[], object] = lambda: None) -> None:
        """Count an operation; raises where it is the one that fails."""
        self.count += 1
        self.names.append(name)
        if self._dead:
            raise Killed
        if self.kind == "ENOSPC":
            if self.at and self.at <= self.count and name in TAKES_SPACE and self.lasts > 0:
                self.lasts -= 1
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        elif self.count == self.at:
            if self.kind == "SIGKILL":
                write_half()
                os.kill(os.getpid(), signal.SIGKILL)
            if self.kind == "crash":
                write_half()
                self._dead = True
                raise Killed
            if self.kind == "short":
                write_half()
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def holds(self, path: Any, options: dict[str, Any]) -> bool:
        """Return whether an operation's path or descriptor is below the folder."""
        descriptor = path if isinstance(path, int) else options.get("dir_fd")
        if descriptor is not None:
            path = Path(f"/proc/self/fd/{descriptor}").readlink()
        return Path(path).is_relative_to(self.root)

    @contextmanager
    def installed(self) -> Iterator[FaultyDisk]:
        """Put the disk in the place of the real one."""
        with pytest.MonkeyPatch.context() as patch:
            for name in CALLS:
                patch.setattr(os, name, self._counted(name, getattr(os, name)))
            patch.setattr(os, "fdopen", self._fdopen(os.fdopen))
            patch.setattr(builtins, "open", self._open(builtins.open))
            patch.setattr(safetensors.torch, "save_file", self._save_file(safetensors.torch.save_file))
            patch.setattr(shutil, "_use_fd_functions", False)  # so that paths are whole
            try:
                yield self
            finally:
                self._close_all()

    def _close_all(self) -> None:
        """Close what a process that died had open, its locks with them."""
        for descriptor in self._opened if self._dead else ():
            with suppress(OSError):
                if self.holds(descriptor, {}):
                    os.close(descriptor)

    def _counted(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *arguments: Any, **options: Any) -> Any:
            writes = name != "open" or (arguments[:1] and arguments[0] & (os.O_WRONLY | os.O_RDWR))
            if writes and self.holds(path, options):
                self.meets(name)
            result = real(path, *arguments, **options)
            if name == "open" and writes:
                self._opened.append(result)
            return result

        return call

    def _fdopen(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def fdopen(descriptor: int, mode: str = "r", *arguments: Any, **options: Any) -> Any:
            file = real(descriptor, mode, *arguments, **options)
            return _File(file, self) if mode[0] in "wa" and self.holds(descriptor, {}) else file

        return fdopen

    def _open(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def opened(path: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
            is_ours = isinstance(path, str | Path) and set(mode) & set("wax") and self.holds(path, {})
            if is_ours:
                self.meets("open")
            file = real(path, mode, *arguments, **options)
            return _File(file, self) if is_ours else file

        return opened

    def _save_file(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def save_file(tensors: Any, path: Any, *arguments: Any, **options: Any) -> None:
            if not self.holds(path, {}):
                real(tensors, path, *arguments, **options)
                return

            def write_half() -> None:
                content = safetensors.torch.save(tensors)
                Path(path).write_bytes(content[: len(content) // 2])

            try:
                self.meets("write", write_half)
            except OSError as error:  # as safetensors words it
                raise SafetensorError(f"I/O error: {error.strerror} (os error {error.errno})") from None
            real(tensors, path, *arguments, **options)

        return save_file


class _File:
    """A file whose writes are counted."""

    def __init__(self, file: Any, disk: FaultyDisk) -> None:
        self._file, self._disk = file, disk

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *raised: object) -> None:
        self._file.close()

    def write(self, data: Any) -> Any:
        self._disk.meets("write", lambda: self._file.write(data[: len(data) // 2]))
        return self._file.write(data)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def truncate(self, size: int) -> None:
        self._disk.meets("truncate")
        self._file.truncate(size)
