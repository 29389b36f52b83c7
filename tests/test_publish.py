"""Folders appear whole or not at all, beside any number of other processes, and say when they no longer are."""

from __future__ import annotations

import errno
import os
import re
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from qpref import fsio, publish
from qpref.errors import DiskError


def mode_of(path):
    return stat.S_IMODE(path.stat().st_mode)


def python(code, **settings):
    """A Python process that runs `code`, with qpref's publish imported and the lines of a test dedented."""
    source = "import os, sys\nfrom pathlib import Path\nfrom qpref import publish\n" + textwrap.dedent(code)
    return subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE, text=True, **settings)


def failing(number):
    """A disk call that fails with an error number."""

    def fail(*arguments, **settings):
        raise OSError(number, os.strerror(number))

    return fail


def test_a_staged_folder_is_not_there_before_it_is_complete(tmp_path):
    final = tmp_path / "runs" / "adapter"
    with publish.staged_folder(final) as staging:
        (staging / "one").write_text("1")
        assert not final.exists()
    assert {path.name: path.read_text() for path in final.iterdir()} == {"one": "1"}
    assert [path.name for path in final.parent.iterdir()] == ["adapter"]


def test_a_staged_folder_is_for_its_owner(tmp_path):
    with publish.staged_folder(tmp_path / "adapter"):
        pass
    assert mode_of(tmp_path / "adapter") == 0o700


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_error_removes_the_staged_folder(tmp_path, error):
    def fill():
        with publish.staged_folder(tmp_path / "adapter") as staging:
            (staging / "one").write_text("1")
            raise error

    with pytest.raises(error):
        fill()
    assert list(tmp_path.iterdir()) == []


def test_a_staged_folder_takes_the_place_of_an_empty_one(tmp_path):
    (tmp_path / "adapter").mkdir()
    with publish.staged_folder(tmp_path / "adapter") as staging:
        (staging / "one").write_text("1")
    assert [path.name for path in (tmp_path / "adapter").iterdir()] == ["one"]


def test_a_staged_folder_never_replaces_a_full_one(tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "old").touch()

    def fill():
        with publish.staged_folder(tmp_path / "adapter") as staging:
            (staging / "new").touch()

    with pytest.raises(DiskError, match=re.escape(f"{tmp_path}/adapter: cannot be written: Directory not empty")):
        fill()
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["adapter", "adapter/old"]


def test_a_discarded_folder_is_gone_at_once_even_if_another_process_has_discarded_it(tmp_path, monkeypatch):
    final = tmp_path / "base"
    final.mkdir()
    (final / "config.json").touch()
    real, seen = Path.rename, []

    def rename(path, target):
        seen.append(sorted(file.name for file in final.iterdir()))
        real(path, target)
        real(path, target)  # another process's, which finds nothing

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        publish.discard(final)
    assert seen == [["config.json"]]  # never half of it
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fails_at_the_end_leaves_no_folder(tmp_path, monkeypatch):
    def fill():
        with publish.staged_folder(tmp_path / "adapter") as staging:
            (staging / "one").touch()
            monkeypatch.setattr(os, "fsync", failing(errno.ENOSPC))

    with pytest.raises(DiskError, match="No space left on device"):
        fill()
    assert list(tmp_path.iterdir()) == []


def test_a_staged_folder_reaches_the_disk_file_by_file(tmp_path, monkeypatch):
    synced = []
    fsync = os.fsync

    def note(descriptor):
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        fsync(descriptor)

    with publish.staged_folder(tmp_path / "adapter") as staging:
        (staging / "sub").mkdir()
        for name in ("one", "sub/two"):
            (staging / name).touch()
        monkeypatch.setattr(os, "fsync", note)
    assert sorted(synced) == sorted(["one", "sub", "two", staging.name, tmp_path.name])


def test_a_staged_file_is_not_there_before_it_is_complete(tmp_path):
    final = tmp_path / "new" / "model.gguf"
    with publish.staged_file(final) as path:
        path.write_text("whole")
        assert path.suffix == ".gguf"
        assert not final.exists()
    assert [entry.name for entry in final.parent.iterdir()] == ["model.gguf"]
    assert final.read_text() == "whole"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_error_removes_the_staged_file(tmp_path, error):
    def fill():
        with publish.staged_file(tmp_path / "file") as path:
            path.write_text("half")
            raise error

    with pytest.raises(error):
        fill()
    assert list(tmp_path.iterdir()) == []


def test_a_staged_file_never_replaces_one_that_came_meanwhile(tmp_path):
    def fill():
        with publish.staged_file(tmp_path / "file") as path:
            path.write_text("new")
            (tmp_path / "file").write_text("mine")

    with pytest.raises(DiskError, match=re.escape(f"{tmp_path}/file: cannot be written: File exists")):
        fill()
    assert [(entry.name, entry.read_text()) for entry in tmp_path.iterdir()] == [("file", "mine")]


def test_a_readable_folder_has_the_modes_of_the_users_umask(tmp_path):
    with publish.staged_folder(tmp_path / "adapter") as staging:
        (staging / "sub").mkdir(mode=0o700)
        fsio.write_text(staging / "sub" / "one", "1")
    before = os.umask(0o027)
    try:
        fsio.make_readable(tmp_path / "adapter")
    finally:
        after = os.umask(before)
    modes = [mode_of(tmp_path / "adapter" / name) for name in (".", "sub", "sub/one")]
    assert (modes, after) == ([0o750, 0o750, 0o640], 0o027)


STAGED = pytest.mark.parametrize("staged", ["staged_folder", "staged_file"])


def filler(path, staged):
    """A process that is filling `path` until its input ends or it is killed."""
    process = python(
        f"""
        with publish.{staged}(Path("{path}")) as place:
            (place / "weights" if place.is_dir() else place).write_text("half")
            print("half", flush=True)
            sys.stdin.read()
            os._exit(0)
        """,
        stdin=subprocess.PIPE,
    )
    assert process.stdout.readline() == "half\n"
    return process


@STAGED
def test_a_killed_process_leaves_nothing_beside_what_is_made_next(tmp_path, staged):
    killed = filler(tmp_path / "model", staged)
    killed.kill()
    killed.communicate()
    hexadecimal = "0123456789abcdef"
    kept = [".tmp-model-12", ".tmp-model-notes", f".tmp-model-b-{hexadecimal}", f".tmp-model-{hexadecimal}"]
    for name in kept:
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text("mine")
    with getattr(publish, staged)(tmp_path / "model") as place:
        (place / "weights" if place.is_dir() else place).write_text("whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*kept, "model"])


@STAGED
def test_a_folder_that_another_process_is_filling_stays(tmp_path, staged):
    other = filler(tmp_path / "model", staged)
    before = sorted(tmp_path.rglob("*"))
    with getattr(publish, staged)(tmp_path / "model") as place:
        (place / "weights" if place.is_dir() else place).write_text("whole")
    assert set(before) < set(tmp_path.rglob("*"))
    other.kill()
    other.communicate()


def test_the_loser_of_a_race_for_a_shared_folder_keeps_the_winners(tmp_path):
    with publish.shared_folder(tmp_path / "base") as mine:
        (mine / "weights").write_text("mine")
        with publish.shared_folder(tmp_path / "base") as theirs:
            (theirs / "weights").write_text("theirs")
    assert (tmp_path / "base" / "weights").read_text() == "theirs"
    assert publish.damaged_file(tmp_path / "base") is None
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_file_in_the_place_of_a_shared_folder_is_refused(tmp_path):
    def fill():
        with publish.shared_folder(tmp_path / "base") as staging:
            (staging / "weights").write_text("1")
            (tmp_path / "base").touch()

    with pytest.raises(DiskError, match="base: cannot be written: Not a directory"):
        fill()


def test_a_manifest_names_the_first_file_that_changed(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("a", "sub/b"):
        (tmp_path / name).write_text(name)
    written = publish.manifest(tmp_path)
    assert list(written) == ["a", "sub/b"]
    assert publish.changed_file(tmp_path, written) is None
    (tmp_path / "sub" / "b").write_text("sub/c")
    assert publish.changed_file(tmp_path, written) == "sub/b"
    (tmp_path / "a").unlink()
    assert publish.changed_file(tmp_path, written) == "a"


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "link", "linked/outside", "fifo", "sub", "no\0name"])
def test_a_manifest_never_vouches_for_a_file_outside(tmp_path, name):
    (tmp_path / "outside").write_text("")
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    (folder / "link").symlink_to("../outside")
    (folder / "linked").symlink_to("..")
    os.mkfifo(folder / "fifo")
    empty = {"bytes": 0, "sha256": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"}
    assert publish.changed_file(folder, {name: empty}) == name


@pytest.mark.parametrize("damage", ["a flipped bit", "a missing file", "no manifest", "a manifest of nothing"])
def test_a_shared_folder_says_which_file_is_damaged(tmp_path, damage):
    with publish.shared_folder(tmp_path / "base") as staging:
        (staging / "weights").write_text("theirs")
    manifest, weights = tmp_path / "base" / "MANIFEST.json", tmp_path / "base" / "weights"
    {
        "a flipped bit": lambda: weights.write_text("thehrs"),
        "a missing file": weights.unlink,
        "no manifest": manifest.unlink,
        "a manifest of nothing": lambda: manifest.write_text("[]"),
    }[damage]()
    assert publish.damaged_file(tmp_path / "base") == (
        "weights" if "file" in damage or "bit" in damage else manifest.name
    )


def test_a_name_that_was_taken_for_abandoned_is_given_up(tmp_path, monkeypatch):
    """Between making the lock's file and locking it, another process may lock and remove it."""
    real, taken = publish.open_plain, []

    def lose_the_first(path, flags):
        descriptor = real(path, flags)
        if flags & os.O_EXCL and not taken:
            taken.append(path)
            path.unlink()
        return descriptor

    monkeypatch.setattr(publish, "open_plain", lose_the_first)
    with publish.staged_folder(tmp_path / "base") as staging:
        assert taken[0].with_suffix("") != staging
        assert staging.with_name(f"{staging.name}.lock").is_file()


def test_without_locks_nothing_is_taken_for_abandoned(tmp_path, monkeypatch):
    other = filler(tmp_path / "model", "staged_folder")
    before = set(tmp_path.rglob("*"))
    monkeypatch.setattr("qpref.linux.fcntl.flock", lambda descriptor, operation: None)
    with publish.staged_folder(tmp_path / "model"):
        pass
    assert before < set(tmp_path.rglob("*"))
    other.kill()
    other.communicate()


RACE = """
    sys.stdin.read(1)
    for number in range(20):
        with publish.shared_folder(Path(sys.argv[1]) / f"base-{number}") as staging:
            for name in "abc":
                (staging / name).write_text(name * 1000)
        assert publish.damaged_file(Path(sys.argv[1]) / f"base-{number}") is None, number
"""


@pytest.mark.parametrize("namespaces", [False, True], ids=["one machine", "two containers"])
def test_processes_that_make_one_shared_folder_at_once_all_succeed(tmp_path, namespaces):
    """In two containers both have the same process id."""
    source = "import sys\nfrom pathlib import Path\nfrom qpref import publish\n" + textwrap.dedent(RACE)
    command = [sys.executable, "-c", source, str(tmp_path / "cache")]
    prefix = ["unshare", "--user", "--map-root-user", "--pid", "--fork"] if namespaces else []
    if namespaces and subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode:
        prefix = []  # this kernel gives no namespaces to users; the race is the same but for the ids
    racers = [
        subprocess.Popen([*prefix, *command], stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in "12"
    ]
    for racer in racers:
        racer.stdin.write("x")
        racer.stdin.flush()
    ended = [(racer.communicate(timeout=60)[1], racer.returncode) for racer in racers]
    assert ended == [("", 0)] * 2
    assert len(list((tmp_path / "cache").iterdir())) == 20


def test_a_file_that_is_a_link_in_a_circle_has_changed(tmp_path):
    (tmp_path / "a").write_text("a")
    written = publish.manifest(tmp_path)
    (tmp_path / "a").unlink()
    (tmp_path / "a").symlink_to("a")
    assert publish.changed_file(tmp_path, written) == "a"
