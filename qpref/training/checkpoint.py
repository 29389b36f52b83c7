"""Checkpoints: safetensors and JSON, verified by hash, published by one rename, the newest two or more kept.

A checkpoint is trusted only if every file matches its MANIFEST, which is written last. safetensors alone would take a
flipped bit for a weight.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qpref import disk_space, fsio, opening, publish
from qpref.errors import CheckpointError, DiskError

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger("qpref")

FORMAT = 3
SPACE_FACTOR = 1.5
"""Free space to ask for before a save, as a multiple of its size."""
NAME = re.compile(r"step-(\d{6,})")
STEMS = frozenset({"adapter", "optimizer", "reference", "heldout", "losses"})
STATE, MANIFEST = "state.json", "MANIFEST.json"
MAX_COUNT = 2**53
"""Largest count in a state; JSON's numbers are exact up to here."""


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value <= MAX_COUNT


def _is_number(value: object) -> bool:
    return type(value) in (int, float)


def _is_hex(value: object) -> bool:
    try:
        return isinstance(value, str) and float.fromhex(value) is not None
    except (ValueError, OverflowError):
        return False


def _table_of(accepts: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, dict) and all(map(accepts, value.values()))


def _are_sizes(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_count, value))


BEST = _table_of(_is_number)
STATE_VALUES: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("step", "tokens", "nonfinite", "budget", "recomputed_layers", "metrics_bytes"), _is_count),
    "seconds": lambda value: _is_number(value) and 0 <= value < MAX_COUNT,
    "sizes": lambda value: isinstance(value, list) and all(map(_are_sizes, value)),
    "asked_sizes": lambda value: isinstance(value, list),
    "sums": _table_of(_is_hex),
    "counts": _table_of(_is_number),
    "optimizer": _table_of(_is_number),
    "scaler": _table_of(_is_number),
    "best": lambda value: value is None or (BEST(value) and value.keys() == {"step", "value", "waited"}),
    "fingerprints": _table_of(lambda value: isinstance(value, str)),
}
"""Keys of a state, and what each accepts."""
FILES = frozenset({STATE, MANIFEST, *(f"{stem}.safetensors" for stem in STEMS)})


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A saved state, from which a run resumes as if it had never stopped.

    Attributes:
        step: optimizer steps done.
        state: JSON values: counters, running averages, fingerprints, run.json's values, length and SHA-256 of the
            metrics file.
        tensors: file stem -> tensors: adapter, optimizer, reference, the scores of held-out examples, and the losses'
            state.
    """

    step: int
    state: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]]


def save_checkpoint(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write a checkpoint under `folder`, then drop the oldest beyond `keep`, never the last two nor the best.

    Raises:
        DiskError: it couldn't be written, or the disk has no space for it and half as much again, which metrics and
            the adapter will need; all older checkpoints are still there.
    """
    final = path_of(folder, checkpoint.step)
    disk_space.refuse_full(final, int(SPACE_FACTOR * num_bytes(checkpoint)))
    if final.exists():
        fsio.remove_tree(final)
    with publish.staged_folder(final) as staging:
        assert checkpoint.tensors.keys() <= STEMS
        for stem, tensors in checkpoint.tensors.items():
            fsio.write_tensors(staging / f"{stem}.safetensors", tensors)
        fsio.write_json(staging / STATE, {"format": FORMAT, "step": checkpoint.step} | checkpoint.state)
        files = publish.manifest(staging)
        fsio.write_json(staging / MANIFEST, {"format": FORMAT, "step": checkpoint.step, "files": files})
    _rotate(folder, checkpoint, keep)
    return final


def num_bytes(checkpoint: Checkpoint) -> int:
    """Return the bytes of a checkpoint's tensors."""
    return sum(tensor.nbytes for named in checkpoint.tensors.values() for tensor in named.values())


def _rotate(folder: Path, newest: Checkpoint, keep: int) -> None:
    best = newest.state.get("best")
    for old in _folders(folder)[max(2, keep) :]:
        if best is None or old != path_of(folder, best["step"]):
            try:
                fsio.remove_tree(old)
            except DiskError as error:  # the newest is saved all the same
                log.warning("an old checkpoint stays: %s", error.what)


def path_of(folder: Path, step: int) -> Path:
    """Return the folder of a step's checkpoint."""
    return folder / f"step-{step:06}"


def load_newest(
    folder: Path, fingerprints: dict[str, str], why_not: Callable[[Checkpoint], str | None] = lambda _: None
) -> Checkpoint | None:
    """Load the newest checkpoint that verifies; None where there is none at all.

    Args:
        why_not: explains why a checkpoint that verifies can't be resumed; None for one that can.

    Raises:
        CheckpointError: checkpoints exist and none can be resumed, or the newest good one belongs to another recipe,
            base or data.
    """
    folders = _folders(folder)
    reason = None
    for path in folders:
        try:
            checkpoint = _load(path)
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("%s is skipped: %s", path, error)
            continue
        _refuse_foreign(path, checkpoint.state, fingerprints)
        if (found := why_not(checkpoint)) is None:
            return checkpoint
        log.warning("%s is skipped: %s", path, found)
        reason = found
    if folders:
        what = reason or f"{folder}: none of {len(folders)} checkpoints verifies"
        raise CheckpointError(what, "restore a copy, or start over with --overwrite")
    return None


def read(path: Path) -> Checkpoint:
    """Read one checkpoint.

    Raises:
        CheckpointError: it doesn't verify.
    """
    try:
        return _load(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: not a checkpoint that verifies: {error}") from None


def remove_newer(folder: Path, step: int) -> None:
    """Remove checkpoints newer than `step`, which a run resumes from: they are bad, and rotation would count them."""
    for path in _folders(folder):
        if int(path.name.removeprefix("step-")) > step:
            fsio.remove_tree(path)


def foreign_files(folder: Path) -> list[Path]:
    """List what no run has written to its folder of checkpoints."""
    found = []
    for path in folder.iterdir():
        is_checkpoint = NAME.fullmatch(path.name) and path.is_dir() and not path.is_symlink()
        if is_checkpoint:
            found += [file for file in path.iterdir() if file.name not in FILES or not file.is_file()]
        elif not NAME.fullmatch(fsio.staged_name(path.name) or ""):
            found.append(path)
    return found


def remove_leftovers(folder: Path) -> None:
    """Remove checkpoints that a killed process left half-written."""
    for path in folder.iterdir():
        if NAME.fullmatch(fsio.staged_name(path.name) or ""):
            fsio.remove_tree(path)


def _folders(folder: Path) -> list[Path]:
    """List the checkpoints' folders, newest first."""
    found = [(int(match[1]), path) for path in folder.glob("step-*") if (match := NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def _load(path: Path) -> Checkpoint:
    from safetensors.torch import load_file

    if path.is_symlink():
        raise ValueError("it is a link")
    manifest = opening.read_object(path / MANIFEST)
    if manifest["format"] != FORMAT:
        raise ValueError(f"format {manifest['format']}, this version reads {FORMAT}")
    if not isinstance(manifest["files"], dict) or not {STATE} <= manifest["files"].keys() <= FILES:
        raise ValueError(f"{MANIFEST} doesn't list a checkpoint's files")
    if (changed := publish.changed_file(path, manifest["files"])) is not None:
        raise ValueError(f"{changed} is not as it was written")
    state = opening.read_object(path / STATE)
    if (key := _odd_key(state)) is not None:
        raise ValueError(f"{STATE}: {key} isn't what a run writes")
    if not path.name == f"step-{manifest['step']:06}" == f"step-{state['step']:06}":
        raise ValueError("its step is not the one in its name")
    stems = [Path(name).stem for name in manifest["files"] if name.endswith(".safetensors")]
    return Checkpoint(
        step=state["step"], state=state, tensors={stem: load_file(path / f"{stem}.safetensors") for stem in stems}
    )


def _odd_key(state: dict[str, Any]) -> str | None:
    """Return the first key of a state that has a value that no run writes, or None."""
    return next((key for key, accepts in STATE_VALUES.items() if key in state and not accepts(state[key])), None)


def _refuse_foreign(path: Path, state: dict[str, Any], fingerprints: dict[str, str]) -> None:
    found = state.get("fingerprints", {})
    changed = [name for name, value in fingerprints.items() if found.get(name) != value]
    if changed:
        raise CheckpointError(
            f"{path}: was made with another {' and another '.join(changed)}",
            "resume with what the run was started with (recipe.lock.toml), or start over with --overwrite",
        )
