"""A mistake as an edit of the source, and the tests that have to fail on it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True)
class Edit:
    """A text of one file, which occurs there once, and what takes its place."""

    file: str
    old: str
    new: str

    def problem(self, root: Path = ROOT) -> str | None:
        """Say why the edit doesn't apply; None where it does."""
        path = root / self.file
        if not path.is_file():
            return f"{self.file} is no file"
        count = path.read_text(encoding="utf-8").count(self.old)
        return None if count == 1 else f"{self.file} has {self.old!r} {count} times"

    def apply(self, root: Path) -> None:
        """Change the file below `root`."""
        path = root / self.file
        path.write_text(path.read_text(encoding="utf-8").replace(self.old, self.new), encoding="utf-8")


@dataclass(frozen=True, slots=True)
class Mutant:
    """One mistake.

    Attributes:
        bug: its number in the catalogue, C1 to C60, or the figure that it would spoil, G1 to G20.
        mistake: what the edited code does wrong.
        edits: made together.
        tests: pytest's ids; one of them has to fail.
    """

    bug: str
    mistake: str
    edits: tuple[Edit, ...]
    tests: tuple[str, ...]

    def problems(self, root: Path = ROOT) -> Iterator[str]:
        """Yield why edits don't apply."""
        yield from (f"{self.bug}: {problem}" for edit in self.edits if (problem := edit.problem(root)))


def mutant(bug: str, mistake: str, file: str, old: str, new: str, *tests: str) -> Mutant:
    """Make a mutant of a single edit."""
    return Mutant(bug, mistake, (Edit(file, old, new),), tests)
