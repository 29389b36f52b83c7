"""What is said of a disk that is full: the path, what the write needs, and what there is."""

from __future__ import annotations

import errno
import os
import shutil

import pytest
from safetensors import SafetensorError

from qpref import disk_space, fsio
from qpref.errors import DiskError


@pytest.mark.parametrize(
    ("count", "shown"),
    [(0, "0 bytes"), (1023, "1023 bytes"), (1024, "1.0 KiB"), (5 * 2**19, "2.5 MiB"), (3 * 2**40, "3072.0 GiB")],
)
def test_bytes_are_shown_in_their_largest_unit(count, shown):
    assert disk_space.shown_bytes(count) == shown


def test_the_free_space_of_a_path_that_is_not_there_yet_is_its_disks(tmp_path):
    assert disk_space.free_bytes(tmp_path / "a/b/c") == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.1)


def test_a_disk_that_cannot_be_asked_refuses_nothing(tmp_path, monkeypatch):
    def usage(folder: object) -> None:
        raise OSError(errno.ENOSYS, "no such call")

    monkeypatch.setattr(shutil, "disk_usage", usage)
    assert disk_space.free_bytes(tmp_path) is None
    disk_space.refuse_full(tmp_path, 2**60)


def test_an_error_of_rusts_is_explained_as_the_systems_own(tmp_path):
    error = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    shown = disk_space.refused_write(tmp_path / "x", error, 2048).what
    assert shown.startswith(f"{tmp_path}/x: cannot be written: No space left on device (2.0 KiB needed, ")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT], ids=errno.errorcode.get)
def test_a_full_disk_is_recognized_in_another_programs_output(number):
    assert disk_space.full_by(f"ERROR: [Errno {number}] {os.strerror(number)}: 'x.whl'") == number
    assert disk_space.full_by("ERROR: no matching distribution") is None


def test_a_cache_that_may_only_be_read_is_warned_of_once(tmp_path, said, monkeypatch):
    monkeypatch.setenv("QPREF_CACHE", str(tmp_path))
    for name in ("hash", "tokens", "reference"):
        fsio.warn_unwritable(f"{name} is not cached", refusal(errno.EROFS))
    assert said == ["hash is not cached: /c: cannot be written: Read-only file system"]


def test_other_refusals_of_the_cache_are_warned_of_one_by_one(said):
    for name in ("hash", "tokens"):
        fsio.warn_unwritable(f"{name} is not cached", refusal(errno.EIO))
    assert len(said) == 2


def test_a_file_that_nothing_goes_on_without_names_the_way_out():
    with pytest.raises(DiskError) as caught, fsio.needing_cache():
        raise refusal(errno.EROFS)
    assert caught.value.hint == "free some space, or set QPREF_CACHE to a folder on another disk"


def refusal(number: int) -> DiskError:
    error = DiskError(f"/c: cannot be written: {os.strerror(number)}")
    error.__cause__ = OSError(number, os.strerror(number))
    return error
