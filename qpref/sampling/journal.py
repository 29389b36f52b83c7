"""Record of what has been sampled, beside the output: sampling that was killed goes on after the last prompt in it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qpref import opening
from qpref.errors import DataError
from qpref.fsio import AppendLog

SUFFIX = ".sampling"
MOST_BYTES = 4 * 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """The responses to prompt `index`; `ended` where a stop token ended one."""

    index: int
    responses: tuple[str, ...]
    ended: tuple[bool, ...]
    scores: tuple[float, ...]


class Journal:
    """Entries of `OUTPUT.sampling`, in any order, after a line with the settings that they were made with.

    Args:
        settings: JSON values that decide the responses and their scores.
        begin: leave aside what is there.

    Raises:
        DataError: the file there was made with other settings, or isn't such a file.
        DiskError: it cannot be written.
    """

    def __init__(self, output: Path, settings: Mapping[str, Any], begin: bool = False) -> None:
        self.path = output.with_name(output.name + SUFFIX)
        head = json.dumps(settings, sort_keys=True).encode()
        lines = [] if begin else self._lines()
        if lines and lines[0] != head:
            raise DataError(
                f"{self.path}: what was sampled there came from other settings: {_changed(lines[0], settings)}",
                "repeat the first command to finish it, or start over with --overwrite",
            )
        self.entries = {entry.index: entry for entry in map(self._entry, lines[1:])}
        self._file = AppendLog(self.path, keep=sum(len(line) + 1 for line in lines))
        if not lines:
            self._file.append(head + b"\n")

    def add(self, entries: Sequence[Entry]) -> None:
        """Write entries, on the disk once it returns."""
        written = [json.dumps([one.index, one.responses, one.ended, one.scores], ensure_ascii=False) for one in entries]
        self._file.append("".join(f"{line}\n" for line in written).encode())
        self.entries |= {entry.index: entry for entry in entries}

    def close(self) -> None:
        self._file.close()

    def remove(self) -> None:
        """Delete the file, once the output is complete."""
        self.close()
        self.path.unlink()

    def _lines(self) -> list[bytes]:
        """Read the whole lines; a kill can leave a part of the last one."""
        try:
            content = opening.read_bytes(self.path, MOST_BYTES)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read: {error}") from None
        return content[: content.rfind(b"\n") + 1].split(b"\n")[:-1]

    def _entry(self, line: bytes) -> Entry:
        try:
            index, responses, ended, scores = json.loads(line)
            return Entry(index=index, responses=tuple(responses), ended=tuple(ended), scores=tuple(scores))
        except (ValueError, TypeError):
            raise DataError(f"{self.path}: a line is damaged", "start over with --overwrite") from None


def _changed(head: bytes, settings: Mapping[str, Any]) -> str:
    """Name the settings that differ."""
    try:
        before = json.loads(head)
    except ValueError:
        before = None
    if not isinstance(before, dict):
        return "it isn't a file of qpref sample"
    return ", ".join(name for name in settings if before.get(name) != settings[name]) or "others"
