"""A run's folder: its files, its lock, and cleaning up after a run that never began."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qpref import fsio
from qpref.errors import RecipeError

if TYPE_CHECKING:
    from qpref.recipe.reopen import RecordedRun

ENTRIES = ("run.json", "recipe.lock.toml", "data.json", "metrics.jsonl", "checkpoints", "adapter", "result.json",
           "report.html")  # fmt: skip
REQUIRED: Mapping[str, type] = {
    "base": str,
    "base_path": str,
    "base_weights": dict,
    "created": str,
    "double_quantization": bool,
    "dtype": str,
    "examples": dict,
    "fingerprints": dict,
    "quantized_modules": list,
    "versions": dict,
}
"""Keys of run.json that every reader relies on, and the JSON type of each. Only a merge needs `base_config`."""
DTYPE_NAMES = ("bf16", "fp16", "float32")
REQUIRED_WITHIN: Mapping[str, tuple[str, ...]] = {
    "examples": ("train", "heldout"),
    "fingerprints": ("recipe", "training data", "held-out data", "start adapter"),
}


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Paths of one run's files."""

    path: Path

    @property
    def run_json(self) -> Path:
        return self.path / "run.json"

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.lock.toml"

    @property
    def data_json(self) -> Path:
        return self.path / "data.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def result(self) -> Path:
        return self.path / "result.json"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    def description(self) -> dict[str, Any]:
        """Read run.json; every key of `REQUIRED` is in it.

        Raises:
            RecipeError: it cannot be read, or is no run of this qpref.
        """
        try:
            facts = json.loads(self.run_json.read_text())
        except (OSError, ValueError, RecursionError) as error:
            raise RecipeError(f"{self.run_json}: cannot be read: {error}", "restore it, or train again") from None
        if not isinstance(facts, dict):
            raise RecipeError(f"{self.run_json}: expected a JSON object; not a run of this qpref")
        if missing := _missing_key(facts):
            raise RecipeError(f"{self.run_json}: lacks '{missing}': not a run of this qpref")
        return facts

    def recorded(self, document: Mapping[str, Any], facts: Mapping[str, Any]) -> RecordedRun:
        """Collect the records by which the run's data can be read again.

        Args:
            document: recipe.lock.toml.
            facts: run.json.
        """
        try:
            report = json.loads(self.data_json.read_text())
        except (OSError, ValueError, RecursionError):
            report = {}
        from qpref.recipe.reopen import RecordedRun  # imports pydantic, which reports do without

        return RecordedRun(
            path=self.path, document=document, facts=facts, report=report if isinstance(report, dict) else {}
        )

    def clear(self) -> None:
        """Remove the run but keep the lock. run.json goes first: without it there is no run."""
        for path in [self.run_json, *self.path.iterdir()]:
            if path.name != "LOCK" and (path.exists() or path.is_symlink()):
                fsio.remove_tree(path)

    def remove_leftovers(self) -> None:
        """Remove files that a killed process left half-written."""
        fsio.remove_staging(self.path)
        if self.checkpoints.is_dir():
            fsio.remove_staging(self.checkpoints)


def _missing_key(facts: Mapping[str, Any]) -> str | None:
    """Find the first required key that is missing, or that no run of this version has such a value of."""
    for name, kind in REQUIRED.items():
        if not isinstance(facts.get(name), kind):
            return name
    if facts["dtype"] not in DTYPE_NAMES:
        return "dtype"
    if not all(isinstance(name, str) for name in facts["quantized_modules"]):
        return "quantized_modules"
    within = ((name, key) for name, keys in REQUIRED_WITHIN.items() for key in keys if key not in facts[name])
    return next((f"{name}.{key}" for name, key in within), None)


@contextmanager
def claimed(path: Path, resume: bool, overwrite: bool) -> Iterator[RunFolder]:
    """Lock a run folder for this process.

    A folder that was made here and holds no run at the end is removed. Leftovers of a start that was killed are no run
    and are ignored.

    Raises:
        RecipeError: the folder holds a run and neither `resume` nor `overwrite` is set, or it holds other files.
        RunLockedError: another process holds it.
    """
    folder = RunFolder(path)
    if resume and overwrite:
        raise RecipeError("--resume and --overwrite exclude each other")
    if path.exists() and not path.is_dir():
        raise RecipeError(f"{path}: is a file; a run needs a folder")
    existed = path.is_dir()
    found = {entry.name for entry in path.iterdir()} if existed else set()
    if "run.json" not in found and _foreign_files(found, overwrite):
        raise RecipeError(f"{path}: holds files and no run", "name another folder with --output")
    if "run.json" in found and not (resume or overwrite):
        raise RecipeError(
            f"{path}: holds a run", "continue with --resume, replace it with --overwrite, or use --output"
        )
    fsio.make_folder(path)
    with fsio.locked(path):
        try:
            yield folder
        finally:
            if not existed and not folder.run_json.exists():
                fsio.remove_tree(path)


def _foreign_files(found: set[str], overwrite: bool) -> set[str]:
    """Select the files that aren't leftovers of a run killed before its run.json; with --overwrite, of any run."""
    ours = {"LOCK", *(ENTRIES if overwrite else ("recipe.lock.toml", "data.json"))}
    return {name for name in found - ours if not name.startswith(fsio.STAGING_PREFIX)}
