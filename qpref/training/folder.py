"""A run's folder: its files, its lock, and cleaning up after a run that never began.

A run folder can come from somebody else, or be one that somebody else writes to. So its files are opened without
following links, and only what a run has written is ever deleted.
"""

from __future__ import annotations

import fnmatch
import glob
import hashlib
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qpref import fsio, locks, opening, publish, sealed
from qpref.errors import DiskError, RecipeError
from qpref.recipe.document import read_document
from qpref.training import checkpoint
from qpref.training.run_json import missing_key

if TYPE_CHECKING:
    from qpref.recipe.reopen import RecordedRun

FILES = ("run.json", "recipe.lock.toml", "data.json", "metrics.jsonl", "result.json", "report.html")
FOLDERS = ("checkpoints", "adapter", "sinks")
ENTRIES = frozenset({*FILES, *FOLDERS})
CARD = "README.md"
"""The adapter's model card, which people edit."""
ADAPTER_FILES = (
    "adapter_config.json", "adapter_model.safetensors", CARD, "tokenizer*", "chat_template.jinja",
    "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "*.tiktoken",
)  # fmt: skip
"""Names of what PEFT and transformers' tokenizers write, for a run whose own list of its adapter is damaged."""
SHOWN_FILES = 5
WRITE_AGAIN = "qpref train --resume with the run's recipe writes it again"
EXPORT_AGAIN = "qpref train --resume with the run's recipe exports the adapter again from the last checkpoint"


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Paths of one run's files.

    Attributes:
        descriptor: of the folder that this process has locked; None in a process that only reads.
    """

    path: Path
    descriptor: int | None = None

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
        """Read run.json; every key of `run_json.REQUIRED` is in it.

        Raises:
            RecipeError: it cannot be read, isn't as training wrote it, or is no run of this qpref.
        """
        try:
            facts = sealed.read_sealed(self.run_json)
        except (OSError, ValueError) as error:
            raise RecipeError(f"{self.run_json}: cannot be read: {error}", WRITE_AGAIN) from None
        if missing := missing_key(facts):
            raise RecipeError(f"{self.run_json}: lacks '{missing}': not a run of this qpref")
        return facts

    def document(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        """Read recipe.lock.toml; every table that a run needs is in it.

        Args:
            facts: run.json.

        Raises:
            RecipeError: it cannot be read, isn't as training wrote it, or isn't the recipe of a run.
        """
        if changed := self._change(self.recipe, facts):
            raise RecipeError(changed, WRITE_AGAIN)
        document = read_document(self.recipe)
        for table in ("model", "adapter", "data", "train"):
            if not isinstance(document.get(table), dict):
                raise RecipeError(f"{self.recipe}: lacks [{table}]: not the recipe of a run")
        if not isinstance(document.get("loss"), dict | list):
            raise RecipeError(f"{self.recipe}: lacks [loss]: not the recipe of a run")
        return document

    def recorded(self, document: Mapping[str, Any], facts: Mapping[str, Any]) -> RecordedRun:
        """Collect the records by which the run's data can be read again.

        Args:
            document: recipe.lock.toml.
            facts: run.json.

        Raises:
            RecipeError: data.json isn't as training wrote it; without one, all checks are repeated.
        """
        report = {}
        if self.data_json.exists():
            if changed := self._change(self.data_json, facts):
                raise RecipeError(changed, WRITE_AGAIN)
            try:
                report = opening.read_object(self.data_json)
            except (OSError, ValueError) as error:
                raise RecipeError(f"{self.data_json}: cannot be read: {error}", WRITE_AGAIN) from None
        from qpref.recipe.reopen import RecordedRun  # imports pydantic, which reports do without

        return RecordedRun(path=self.path, document=document, facts=facts, report=report)

    def changed_record(self, facts: Mapping[str, Any]) -> str | None:
        """Explain which of the records beside run.json is missing or isn't as training wrote it; None if none is."""
        changes = (self._change(path, facts) for path in (self.recipe, self.data_json))
        return next((change for change in changes if change), None)

    def _change(self, path: Path, facts: Mapping[str, Any]) -> str | None:
        """Explain how a file of `run_json.RECORDS` differs from its hash in run.json; None where it doesn't."""
        try:
            content = opening.read_bytes(path)
        except OSError as error:
            return f"{path}: cannot be read: {error}"
        if hashlib.sha256(content).hexdigest() == facts["files"][path.name]:
            return None
        return f"{path}: is not as training wrote it; its SHA-256 differs from run.json's"

    def adapter_manifest(self) -> dict[str, Any] | None:
        """Read the manifest of the adapter from result.json; None where that has none, or is damaged."""
        try:
            written = sealed.read_sealed(self.result).get("adapter_files")
        except (OSError, ValueError):
            return None
        return written if isinstance(written, dict) else None

    def adapter_damage(self) -> str | None:
        """Explain which file of the adapter, or result.json, isn't as training wrote it; None if all are."""
        written = self.adapter_manifest()
        if written is None:
            return f"{self.result}: has no manifest of the adapter that is as training wrote it"
        changed = publish.changed_file(self.adapter, {name: entry for name, entry in written.items() if name != CARD})
        return None if changed is None else f"{self.adapter / changed}: is not as training wrote it"

    def changed_metrics(self) -> str | None:
        """Explain that a finished run's metrics.jsonl isn't as training wrote it; None where it is, or isn't known."""
        try:
            written = sealed.read_sealed(self.result).get("metrics_sha256")
            is_same = written is None or fsio.sha256_file(self.metrics) == written
        except (OSError, ValueError):
            return None
        return None if is_same else f"{self.metrics}: is not as training wrote it"

    def clear(self) -> None:
        """Remove the run but keep the lock.

        run.json loses its name first: without it there is no run. It goes last, so that what a killed process leaves is
        known to be a run's.

        Raises:
            DiskError: as for `refuse_replaced`, or a file can't be removed.
        """
        self.refuse_replaced()
        if self.run_json.exists():
            fsio.rename(self.run_json, fsio.staging_name(self.run_json))
        for path in sorted(self.path.iterdir(), key=_is_staged_run_json):
            if path.name in ENTRIES or fsio.staged_name(path.name) in ENTRIES:
                fsio.remove_tree(path)

    def remove_leftovers(self) -> None:
        """Remove files that a killed process left half-written; of a run that was being removed, `clear` does.

        Raises:
            DiskError: as for `refuse_replaced`, or a file can't be removed.
        """
        self.refuse_replaced()
        for path in self.path.iterdir():
            is_being_removed = _is_staged_run_json(path) and not self.run_json.exists()
            if fsio.staged_name(path.name) in ENTRIES and not is_being_removed:
                fsio.remove_tree(path)
        if self.checkpoints.is_dir():
            checkpoint.remove_leftovers(self.checkpoints)

    def foreign_files(self) -> list[str]:
        """List what no run has written, relative to the folder: files beside the run's, in its checkpoints and in its
        adapter."""
        found = [path for path in self.path.iterdir() if path.name not in ENTRIES and path.name != locks.NAME]
        found = [path for path in found if fsio.staged_name(path.name) not in ENTRIES]
        found += checkpoint.foreign_files(self.checkpoints) if self.checkpoints.is_dir() else []
        adapter = [path for path in self.adapter.rglob("*") if not path.is_dir() or path.is_symlink()]
        written = self.adapter_manifest()
        names = ADAPTER_FILES if written is None else [glob.escape(name) for name in written]
        found += [path for path in adapter if not _is_named(path.relative_to(self.adapter).as_posix(), names)]
        return sorted(path.relative_to(self.path).as_posix() for path in found)

    def refuse_unsafe(self) -> None:
        """Refuse a folder whose entries are not what a run makes, or that somebody else can change.

        Raises:
            RecipeError: a link, FIFO or device has the name of a run's file, or the folder is another user's and
                others can write to it.
        """
        for name in (*FILES, locks.NAME):
            if kind := opening.kind_of(self.path / name):
                raise RecipeError(
                    f"{self.path / name}: is {kind}; a run's files are regular files", "use another --output"
                )
        _refuse_writable_by_others(self.path)
        for name in FOLDERS:
            path = self.path / name
            if path.is_symlink() or (path.exists() and not path.is_dir()):
                kind = opening.kind_of(path) or "a file"
                raise RecipeError(
                    f"{path}: is {kind}; qpref follows no link inside a run", "link the whole run folder instead"
                )
            if path.is_dir():
                _refuse_writable_by_others(path)

    @property
    def is_replaced(self) -> bool:
        """True where the path no longer leads to the folder that this process has locked."""
        assert self.descriptor is not None
        try:
            found = opening.open_folder(self.path)
        except OSError:
            return True
        try:
            return not os.path.samestat(os.fstat(found), os.fstat(self.descriptor))
        finally:
            os.close(found)

    def refuse_replaced(self) -> None:
        """Refuse to write or delete where another folder, or a link, has taken the name of the locked one, or of one in
        it: whoever may write beside a folder can swap it while its run trains.

        Raises:
            DiskError: one has.
        """
        if self.is_replaced:
            raise DiskError(f"{self.path}: is no longer the folder of this run", "move it back")
        for name in FOLDERS:
            if (self.path / name).is_symlink():
                raise DiskError(f"{self.path / name}: is a symbolic link; qpref follows no link inside a run")


def names_of_base(facts: Mapping[str, Any]) -> set[str]:
    """Return the names that a run's adapter may have for its base: the public one, or the path of it."""
    return {facts["base_path"], facts.get("base_name") or facts["base_path"]}


def _is_named(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _is_staged_run_json(path: Path) -> bool:
    return fsio.staged_name(path.name) == "run.json"


def _refuse_writable_by_others(folder: Path) -> None:
    """Refuse another user's folder that others can write to, and another user's link to a folder."""
    own = os.geteuid()
    status = folder.stat()
    if folder.is_symlink() and folder.lstat().st_uid not in (own, 0):
        raise RecipeError(f"{folder}: is a link that another user has made", "use another --output")
    if status.st_uid != own and status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise RecipeError(
            f"{folder}: belongs to another user, and others can write to it",
            "copy the run to a folder of your own, or use another --output",
        )


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
    if existed:
        _refuse_use(folder, resume, overwrite)
    fsio.make_folder(path)
    with locks.locked(path) as descriptor:
        folder = RunFolder(path, descriptor)
        try:
            folder.refuse_unsafe()
            folder.refuse_replaced()
            yield folder
        finally:
            if not existed and not folder.run_json.exists() and not folder.is_replaced:
                fsio.remove_tree(path)


def _refuse_use(folder: RunFolder, resume: bool, overwrite: bool) -> None:
    """Refuse a folder with a run that is neither to be resumed nor overwritten, or with files that no run has made."""
    folder.refuse_unsafe()
    path = folder.path
    found = {entry.name for entry in path.iterdir()}
    if "run.json" in found and not (resume or overwrite):
        raise RecipeError(
            f"{path}: holds a run", "continue with --resume, replace it with --overwrite, or use --output"
        )
    # A run that was killed before its run.json is none, and what it left is ours; so is one that was being removed.
    is_ours = overwrite or any(map(_is_staged_run_json, path.iterdir()))
    ours = {locks.NAME, *(ENTRIES if is_ours else ("recipe.lock.toml", "data.json"))}
    if "run.json" not in found and any(name not in ours and fsio.staged_name(name) not in ENTRIES for name in found):
        raise RecipeError(f"{path}: holds files and no run", "name another folder with --output")
    if overwrite and (foreign := folder.foreign_files()):
        listed = ", ".join(foreign[:SHOWN_FILES]) + (", ..." if len(foreign) > SHOWN_FILES else "")
        raise RecipeError(
            f"{path}: holds files that this run has not written: {listed}",
            "move them elsewhere; --overwrite deletes what the run has written, and nothing else",
        )
