"""Power fails while checkpoints are saved: no damaged one is taken, and no save that has returned is lost.

A disk may lose all that was not fsynced: a file's data (all, its end, or zeros in its place) and a folder's names (of
files made, renamed and removed). Saves are recorded operation by operation, and disks are built as a power loss before
or after each of them may leave them. Losing half of a rename is harsher than file systems are.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from qpref import fsio, publish
from qpref.errors import CheckpointError
from qpref.training.checkpoint import Checkpoint, load_newest, save_checkpoint

NUM_IMAGES = 2000
ROOT = 0
"""Number of the folder itself."""


def state_of(step: int) -> Checkpoint:
    """A small checkpoint, whose content is its step."""
    tensors = {"adapter": {"a": torch.full((64,), float(step))}, "optimizer": {"m": torch.full((16,), -float(step))}}
    return Checkpoint(step=step, state={"best": None, "fingerprints": {}}, tensors=tensors)


@dataclass
class Disk:
    """What a folder holds, and what of it is on the disk; files and folders are numbered, since names change.

    Attributes:
        names, durable_names: folder's number -> name -> number.
        data, durable_data: file's number -> content.
        returned: step of the last save that has returned.
    """

    names: dict[int, dict[str, int]] = field(default_factory=lambda: {ROOT: {}})
    durable_names: dict[int, dict[str, int]] = field(default_factory=dict)
    data: dict[int, bytes] = field(default_factory=dict)
    durable_data: dict[int, bytes] = field(default_factory=dict)
    count: int = ROOT
    returned: int = 0

    def look(self, folder: Path, number: int = ROOT) -> None:
        """Number what is new below a folder, and read its files."""
        names = self.names[number]
        for entry in folder.iterdir():
            if entry.name not in names:
                self.count += 1
                names[entry.name] = self.count
            own = names[entry.name]
            if entry.is_dir():
                self.names.setdefault(own, {})
                self.look(entry, own)
            else:
                self.data[own] = entry.read_bytes()

    def place(self, parts: tuple[str, ...]) -> int:
        """Number of a folder or file, by the parts of its path below the root."""
        number = ROOT
        for part in parts:
            number = self.names[number][part]
        return number

    def sync(self, number: int) -> None:
        """Put a file's data, or a folder's names, on the disk."""
        if number in self.names:
            self.durable_names[number] = dict(self.names[number])
        else:
            self.durable_data[number] = self.data[number]

    def write_image(self, target: Path, draw: random.Random, number: int = ROOT) -> None:
        """Write what a power loss may leave."""
        target.mkdir()
        now, before = self.names[number], self.durable_names.get(number, {})
        for name in sorted(now.keys() | before.keys()):
            chosen = draw.choice([now.get(name), before.get(name)])
            if chosen in self.names:
                self.write_image(target / name, draw, chosen)
            elif chosen is not None:
                (target / name).write_bytes(self._data_left(chosen, draw))

    def _data_left(self, number: int, draw: random.Random) -> bytes:
        data, durable = self.data[number], self.durable_data.get(number, b"")
        if data == durable:
            return data
        cut = draw.randrange(len(data) + 1)
        return draw.choice([data, durable, data[:cut], bytes(len(data)), data[:cut] + bytes(len(data) - cut)])


@contextmanager
def recorded(root: Path, states: list[Disk]) -> Iterator[Disk]:
    """Record the disk before and after each operation below a folder whose present content is on the disk."""
    disk = Disk()
    disk.look(root)
    for number in (*disk.names, *disk.data):
        disk.sync(number)

    def parts(path: Any) -> tuple[str, ...]:
        path = Path(f"/proc/self/fd/{path}").readlink() if isinstance(path, int) else Path(path)
        return path.relative_to(root).parts

    def fsync(path: Any) -> None:
        disk.sync(disk.place(parts(path)))

    def remove(path: Any) -> None:
        *folder, name = parts(path)
        del disk.names[disk.place(tuple(folder))][name]

    def rename(old: Any, new: Any) -> None:
        *folder, name = parts(old)
        number = disk.names[disk.place(tuple(folder))].pop(name)
        *folder, name = parts(new)
        disk.names[disk.place(tuple(folder))][name] = number

    def counted(real: Callable[..., Any], note: Callable[..., None]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            disk.look(root)
            states.append(deepcopy(disk))
            result = real(*arguments, **options)
            note(*arguments)
            states.append(deepcopy(disk))
            return result

        return call

    with pytest.MonkeyPatch.context() as patch:
        notes = {"fsync": fsync, "rename": rename, "unlink": remove, "rmdir": remove}
        for name, note in notes.items():
            patch.setattr(os, name, counted(getattr(os, name), note))
        patch.setattr(shutil, "_use_fd_functions", False)  # so that paths are whole
        yield disk


def recorded_saves(folder: Path) -> list[Disk]:
    """Save steps 1 to 3, then record the saves of 4 and 5, of which each removes the oldest."""
    for step in (1, 2, 3):
        save_checkpoint(folder, state_of(step), keep=2)
    states: list[Disk] = []
    with recorded(folder, states) as disk:
        disk.returned = 3
        for step in (4, 5):
            save_checkpoint(folder, state_of(step), keep=2)
            disk.returned = step
    return states


def faults_of(states: list[Disk], folder: Path, num_images: int) -> list[str]:
    """Build that many images, over all states alike, and say what is wrong with the checkpoints that are loaded."""
    faults = []
    for number in range(num_images):
        disk, image = states[number * len(states) // num_images], folder / f"image-{number}"
        disk.write_image(image, random.Random(number))
        try:
            saved = load_newest(image, {})
        except CheckpointError as error:
            faults.append(f"{number}: {error}")
        else:
            if saved is None or saved.step < disk.returned:
                faults.append(f"{number}: {saved and saved.step} though {disk.returned} was saved")
            elif saved.tensors["adapter"]["a"].unique().tolist() != [saved.step]:
                faults.append(f"{number}: a damaged checkpoint of step {saved.step} is taken")
        shutil.rmtree(image)
    return faults


def test_a_power_loss_leaves_every_save_that_has_returned(tmp_path, tally):
    states = recorded_saves(tmp_path / "checkpoints")
    assert len(states) > 60
    tally["images of a disk after a power loss"] += NUM_IMAGES
    assert faults_of(states, tmp_path, NUM_IMAGES) == []


@pytest.mark.parametrize("name", ["fsync_tree", "fsync_folder"])
def test_a_save_that_leaves_an_fsync_out_is_found(tmp_path, monkeypatch, name):
    if name == "fsync_tree":  # nor each file as it is written
        monkeypatch.setattr(fsio, "fsync_file", lambda path: None)
    monkeypatch.setattr(publish, name, lambda path: None)
    states = recorded_saves(tmp_path / "checkpoints")
    assert faults_of(states, tmp_path, 150)
