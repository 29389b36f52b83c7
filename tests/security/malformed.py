"""Malformed versions of a file, and commands run on each in a process of its own, a fork of this one."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PLACEHOLDER = "@malformed@"
VALUES = {
    "null": "null",
    "true": "true",
    "-1": "-1",
    "zero": "0",
    "half": "0.5",
    "infinite": "1e400",
    "NaN": "NaN",
    "huge": "1" + "0" * 400,
    "ten million": "10000000",
    "empty text": '""',
    "text": '"x"',
    "surrogate": '"\\ud800"',
    "escape": '"\\u001b[31m"',
    "empty list": "[]",
    "list": '[null, "x", -1]',
    "empty object": "{}",
    "object": '{"x": {"y": []}}',
    "deep": "[" * 100_000 + "]" * 100_000,
    "deep enough to be read": "[" * 400 + "]" * 400,
}
"""JSON texts to stand for any value."""


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of each value inside a JSON value; of a long list its first two."""
    inner = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    for key, each in inner:
        yield (*path, key)
        yield from places(each, (*path, key))


def with_value(document: Any, path: tuple[Any, ...], text: str) -> str:
    changed = copy.deepcopy(document)
    inside = changed
    for key in path[:-1]:
        inside = inside[key]
    inside[path[-1]] = PLACEHOLDER
    return json.dumps(changed).replace(f'"{PLACEHOLDER}"', text)


def whole_files(text: bytes) -> dict[str, bytes]:
    """Malformed versions of any text file."""
    return {
        "empty": b"",
        "blank": b" \n",
        "half": text[: len(text) // 2],
        "less the last byte": text.rstrip()[:-1],
        "binary": bytes(range(256)) * 4,
        "zeros": b"\0" * 64,
        "BOM": b"\xef\xbb\xbf" + text,
        "UTF-16": text.decode(errors="replace").encode("utf-16"),
        "latin-1": text + "é".encode("latin-1"),
        "twice": text + text,
        "a list": b"[" + text + b"]",
        "null": b"null",
        "a text": b'"x"',
        "deep": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    }


def malformed_json(path: Path, only: Callable[[tuple[Any, ...]], bool] = lambda _: True) -> Iterator[tuple[str, bytes]]:
    """Name and content of each malformed version of a JSON file."""
    content = path.read_bytes()
    yield from whole_files(content).items()
    document = json.loads(content)
    for place in places(document):
        if only(place):
            label = ".".join(map(str, place))
            for name, text in VALUES.items():
                yield f"{label} = {name}", with_value(document, place, text).encode()
            inside = document
            for key in place[:-1]:
                inside = inside[key]
            if isinstance(inside, dict):
                lacking = copy.deepcopy(document)
                outer = lacking
                for key in place[:-1]:
                    outer = outer[key]
                del outer[place[-1]]
                yield f"without {label}", json.dumps(lacking).encode()


@dataclass(frozen=True)
class Ended:
    """How a forked command ended; the code is -1 where it took too long."""

    code: int
    output: str
    seconds: float

    @property
    def problem(self) -> str | None:
        """What is wrong with this end, or None."""
        if self.code == -1:
            return "hangs"
        if self.code < 0 or self.code == 1 or "Traceback" in self.output:
            lines = self.output.strip().splitlines()
            frames = [line.strip() for line in lines if line.strip().startswith("File ") and "/qpref" in line]
            return f"exit {self.code}: {lines[-1][:200] if lines else ''} at {frames[-1] if frames else '?'}"
        if "\x1b" in self.output:
            return "prints an escape sequence"
        return None


def forked(work: Callable[[], object], seconds: float = 10) -> Ended:
    """Run `work` in a fork of this process, which has torch loaded, and return how it ended."""
    started = time.monotonic()
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(read)
            os.dup2(write, 1)
            os.dup2(write, 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            try:
                work()
                code = 0
            except SystemExit as done:
                code = done.code if isinstance(done.code, int) else 1
            except BaseException:  # noqa: BLE001  a traceback is what is looked for
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)
    os.close(write)
    output, deadline = b"", started + seconds
    while True:
        ready, _, _ = select.select([read], [], [], max(0, deadline - time.monotonic()))
        if not ready:
            os.kill(child, signal.SIGKILL)
            break
        part = os.read(read, 1 << 16)
        if not part:
            break
        output += part
    os.close(read)
    _, status = os.waitpid(child, 0)
    took = time.monotonic() - started
    code = os.waitstatus_to_exitcode(status)
    late = took >= seconds and code == -signal.SIGKILL
    return Ended(-1 if late else code, output.decode(errors="replace"), took)


@contextlib.contextmanager
def replaced(path: Path, content: bytes) -> Iterator[None]:
    """Give a file another content for a while."""
    before = path.read_bytes()
    path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(before)
