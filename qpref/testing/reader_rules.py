"""Rules of readers: rows as the core needs them, the same in every pass, and damaged files refused in a sentence."""

from __future__ import annotations

import gc
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qpref.errors import QprefError
from qpref.hooks.border import described, is_interrupt
from qpref.hooks.contract import SeenSources, row_problem, value_problem
from qpref.hooks.process_state import ProcessState
from qpref.hooks.reader import Reader, ReaderContext
from qpref.records import Finding, Row
from qpref.testing.calls import BrokenRule, NotApplicable

NO_SAMPLE = "needs a sample of its data"
CUTS = (0.25, 0.5, 0.75, 1.0)
_DESCRIPTORS = Path("/dev/fd")


@dataclass(frozen=True, slots=True)
class SampledReader:
    """A reader with its options and, where its author has one, a sample that it reads.

    Attributes:
        sample: a file, a folder, or the name that a reader of names takes.
    """

    record: Reader
    options: Any
    sample: Path | None
    folder: Path

    def items(self, path: Path) -> Iterator[Row | Finding]:
        """Read as the core does; any exception but those that a reader may raise breaks the rule."""
        before = ProcessState.now()
        try:
            yield from self._items(path)
        except (OSError, QprefError, GeneratorExit):
            raise
        except BrokenRule:
            raise
        except BaseException as error:
            if is_interrupt(error):
                raise
            advice = "raise DataError, or yield a Finding for the line"
            raise BrokenRule(f"reading {path.name} raised {described(error)}; {advice}") from error
        finally:
            changed = before.restore()
        if changed:
            raise BrokenRule(f"reading changed {', '.join(changed)}")

    def _items(self, path: Path) -> Iterator[Row | Finding]:
        if self.record.options is None:
            found = self.record.read(path)
        else:
            found = self.record.read(path, ReaderContext(options=self.options, folder=self.folder))
        for item in found:
            if problem := row_problem(item):
                raise BrokenRule(f"it yields {problem}")
            yield item

    @property
    def own_sample(self) -> Path:
        if self.sample is None:
            raise NotApplicable(NO_SAMPLE)
        return self.sample

    @contextmanager
    def copied(self) -> Iterator[Path]:
        """Copy the sample file, or the folder, to a folder of its own, to damage it there."""
        sample = self.own_sample
        if self.record.takes == "name":
            raise NotApplicable("it reads a name, not a file")
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / sample.name
            if sample.is_dir():
                shutil.copytree(sample, copy)
            else:
                shutil.copy(sample, copy)
            yield copy

    @contextmanager
    def damaged(self, content: Callable[[bytes], bytes]) -> Iterator[Path]:
        """Copy the sample and change each of its files."""
        with self.copied() as copy:
            for file in [copy] if copy.is_file() else [path for path in copy.rglob("*") if path.is_file()]:
                file.write_bytes(content(file.read_bytes()))
            yield copy

    def outcome(self, path: Path) -> list[Row | Finding] | None:
        """Read to the end; None where the reader refuses the file."""
        try:
            return list(self.items(path))
        except (OSError, QprefError):
            return None


def check_record(reader: SampledReader) -> None:
    """Fields of the record have the right types, and an existing sample is named if any is."""
    is_path = reader.sample is not None and reader.record.takes != "name"
    if is_path and reader.sample is not None and not reader.sample.exists():
        raise BrokenRule(f"there is no sample {reader.sample}")


def check_rows(reader: SampledReader) -> None:
    """The sample has rows, of JSON's values, no two of which have the same source."""
    try:
        items = list(reader.items(reader.own_sample))
    except (OSError, QprefError) as error:
        raise BrokenRule(f"reading the sample raised {described(error)}") from error
    rows, seen = [item for item in items if isinstance(item, Row)], SeenSources()
    if not rows:
        raise BrokenRule("the sample has no row")
    for row in rows:
        if not seen.is_new(row.source):
            raise BrokenRule(f"two rows have the source {row.source}")
        for name, value in row.values.items():
            if problem := value_problem(value, name):
                raise BrokenRule(f"the row at {row.source}: {problem}")


def check_repeatable(reader: SampledReader) -> None:
    """Every pass yields the same, also while another one is under way."""
    path = reader.own_sample
    first = list(reader.items(path))
    under_way = reader.items(path)
    started = [next(under_way)] if first else []
    again = list(reader.items(path))
    if first != again or started + list(under_way) != first:
        raise BrokenRule(f"passes over the sample yield {len(first)} rows and findings, then {len(again)} others")


def check_empty(reader: SampledReader) -> None:
    """An empty file, or an empty folder, has no row."""
    if reader.record.takes == "name":
        raise NotApplicable("it reads a name, not a file")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"empty.{reader.record.name}"
        if reader.record.takes == "folder":
            path.mkdir()
        else:
            path.touch()
        if any(isinstance(item, Row) for item in reader.outcome(path) or ()):
            raise BrokenRule("an empty file has a row")


def check_missing(reader: SampledReader) -> None:
    """A path that isn't there is refused."""
    if reader.record.takes == "name":
        raise NotApplicable("it reads a name, not a file")
    with tempfile.TemporaryDirectory() as folder:
        if reader.outcome(Path(folder) / f"gone.{reader.record.name}") is not None:
            raise BrokenRule("a file that isn't there is read without an error; let the OSError through")


def check_truncated(reader: SampledReader) -> None:
    """A file that ends too early gives rows, findings or a DataError."""
    for share in CUTS:
        with reader.damaged(lambda content, share=share: content[: max(0, int(share * len(content)) - 1)]) as path:  # type: ignore[misc]
            reader.outcome(path)


def check_not_text(reader: SampledReader) -> None:
    """Bytes that are no text of any encoding give findings or a DataError; no letter is replaced without a word."""
    noise = random.Random(0).randbytes(4096)
    with reader.damaged(lambda content: noise) as path:
        reader.outcome(path)
    sample = reader.own_sample
    if not sample.is_file() or not _is_text(sample.read_bytes()):
        return
    texts = [value for item in reader.items(sample) if isinstance(item, Row) for value in item.values.values()]
    known = [text.encode() for text in texts if isinstance(text, str) and len(text) > 1 and text.isascii()]
    content = sample.read_bytes()
    at = next((content.index(text) for text in known if text in content), None)
    if at is None:
        return
    with reader.damaged(lambda content: content[: at + 1] + b"\xff" + content[at + 1 :]) as path:
        items = reader.outcome(path)
        if items is not None and not any(isinstance(item, Finding) for item in items):
            raise BrokenRule("a file with a byte that isn't UTF-8 is read as if it were whole; open it without errors=")


def check_untouched(reader: SampledReader) -> None:
    """Nothing is written: neither into the sample nor beside it."""
    with reader.copied() as path:
        before = _contents(path.parent)
        reader.outcome(path)
        if _contents(path.parent) != before:
            raise BrokenRule("reading changes the folder of the data")


def check_closes(reader: SampledReader) -> None:
    """Files are closed after the last row, and when reading is given up before it."""
    if not _DESCRIPTORS.is_dir():
        raise NotApplicable("this system doesn't list open files")
    with reader.copied() as path:
        reader.outcome(path)  # what is opened once, such as a library's, is open from here on
        gc.collect()
        before = _num_open()
        reader.outcome(path)
        items = reader.items(path)
        next(items, None)
        items.close()  # type: ignore[attr-defined]
        del items
        gc.collect()
        if (left := _num_open() - before) > 0:
            raise BrokenRule(f"{left} files stay open; open them in a with statement")


def _num_open() -> int:
    return len(list(_DESCRIPTORS.iterdir()))


def _is_text(content: bytes) -> bool:
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return b"\0" not in content


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


READER_RULES: Mapping[str, Callable[[SampledReader], None]] = {
    "record": check_record,
    "rows": check_rows,
    "repeatable": check_repeatable,
    "empty": check_empty,
    "missing": check_missing,
    "truncated": check_truncated,
    "not_text": check_not_text,
    "untouched": check_untouched,
    "closes": check_closes,
}
