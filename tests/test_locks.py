"""One writer per run folder, whatever its holder's end; a link in the lock's place is not followed."""

from __future__ import annotations

import errno
import logging
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from qpref import locks
from qpref.errors import DiskError, RunLockedError
from qpref.linux import fcntl

HOLD = """
import sys
import time
from pathlib import Path
from qpref import locks
with locks.locked(Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""


def hold_lock(folder):
    """A process that holds the folder's lock until its input ends."""
    command = [sys.executable, "-c", HOLD, str(folder)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "locked\n"
    return process


@pytest.fixture
def holder(tmp_path):
    process = hold_lock(tmp_path)
    yield process
    process.kill()
    process.communicate()


def test_a_second_process_is_refused_and_the_first_is_named(tmp_path, holder):
    with pytest.raises(RunLockedError) as caught, locks.locked(tmp_path):
        pass
    assert str(caught.value) == (
        f"{tmp_path}: another process is writing this run (pid {holder.pid} on {os.uname().nodename})"
    )


def test_a_refused_process_leaves_the_lock_held(tmp_path, holder):
    for _ in range(2):
        with pytest.raises(RunLockedError), locks.locked(tmp_path):
            pass


def test_a_look_at_a_lock_refuses_as_the_lock_does_and_takes_nothing(tmp_path, holder):
    name = re.escape(f"(pid {holder.pid} on {os.uname().nodename})")
    with pytest.raises(RunLockedError, match=name):
        locks.refuse_held(tmp_path)
    holder.kill()
    holder.communicate()
    locks.refuse_held(tmp_path)
    assert (tmp_path / "LOCK").read_text().startswith(f"pid {holder.pid} ")


def test_a_look_at_a_folder_without_a_lock_makes_none(tmp_path):
    locks.refuse_held(tmp_path / "none")
    locks.refuse_held(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", [fcntl.LOCK_SH, fcntl.LOCK_EX], ids=["a look", "a start that fails at once"])
def test_a_lock_that_is_held_for_a_moment_refuses_nobody(tmp_path, monkeypatch, kind):
    (tmp_path / "LOCK").touch()
    with (tmp_path / "LOCK").open("r+") as other:
        fcntl.flock(other, kind)
        monkeypatch.setattr(time, "sleep", lambda seconds: fcntl.flock(other, fcntl.LOCK_UN))
        with locks.locked(tmp_path):
            pass


def test_a_refused_start_imports_no_torch(tmp_path, holder):
    code = (
        "import sys; from qpref.cli import main\n"
        f"sys.argv[1:] = ['train', 'recipe.toml', '--output', {str(tmp_path)!r}]\n"
        "try: main()\n"
        "except SystemExit as ended: print(ended.code, 'torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "7 False\n", done.stderr


@pytest.mark.parametrize("ended", [signal.SIGKILL, signal.SIGTERM, None], ids=["kill -9", "kill", "done"])
def test_the_lock_is_free_however_its_holder_ended(tmp_path, holder, ended):
    if ended:
        holder.send_signal(ended)
    holder.communicate()
    with locks.locked(tmp_path):
        assert (tmp_path / "LOCK").read_text() == f"pid {os.getpid()} on {os.uname().nodename}\n"


def test_an_error_inside_frees_the_lock(tmp_path):
    with pytest.raises(KeyError), locks.locked(tmp_path):
        raise KeyError
    with locks.locked(tmp_path):
        pass


def test_the_lock_is_for_its_owner(tmp_path):
    with locks.locked(tmp_path):
        assert (tmp_path / "LOCK").stat().st_mode & 0o777 == 0o600


def test_a_lock_that_was_removed_while_it_was_opened_is_taken_again(tmp_path, monkeypatch):
    """The holder of a folder that never held a run removes it, perhaps between our look and our lock."""
    real, seen = locks.open_plain, []

    def open_then_lose(path, *flags, **folder):
        descriptor = real(path, *flags, **folder)
        if not seen:
            (tmp_path / path).unlink()
        seen.append(path)
        return descriptor

    monkeypatch.setattr(locks, "open_plain", open_then_lose)
    with locks.locked(tmp_path):
        assert (tmp_path / "LOCK").read_text() == f"pid {os.getpid()} on {os.uname().nodename}\n"


def test_a_folder_that_is_replaced_before_its_lock_is_opened_gets_no_lock(tmp_path, monkeypatch):
    """Whoever may write beside it can swap it for a link at any moment."""
    real, run, outside = locks.open_folder, tmp_path / "run", tmp_path / "outside"
    outside.mkdir()

    def open_then_swap(path):
        descriptor = real(path)
        if not run.is_symlink():
            run.rename(tmp_path / "aside")
            run.symlink_to(outside)
            os.lchown(run, 12345, 12345)
        return descriptor

    monkeypatch.setattr(locks, "open_folder", open_then_swap)
    with pytest.raises(DiskError, match="it is a link that another user has made"), locks.locked(run):
        pass
    assert not list(outside.iterdir())


def test_a_folder_that_is_not_there_is_made(tmp_path):
    with locks.locked(tmp_path / "runs" / "run"):
        assert (tmp_path / "runs" / "run").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("kind", ["link", "dangling link", "hard link", "FIFO", "folder"])
def test_what_is_no_file_of_its_own_is_never_written(tmp_path, kind):
    outside, lock = tmp_path / "outside", tmp_path / "run" / "LOCK"
    lock.parent.mkdir()
    outside.write_text("mine")
    {
        "link": lambda: lock.symlink_to(outside),
        "dangling link": lambda: lock.symlink_to(tmp_path / "new"),
        "hard link": lambda: os.link(outside, lock),
        "FIFO": lambda: os.mkfifo(lock),
        "folder": lock.mkdir,
    }[kind]()
    with pytest.raises(DiskError, match=re.escape(f"{lock}: cannot be locked: it ")), locks.locked(lock.parent):
        pass
    assert outside.read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["outside", "run"]


def without_locks(number):
    def flock(descriptor, operation):
        if number:
            raise OSError(number, os.strerror(number))

    return flock


@pytest.mark.parametrize("number", [0, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_on_which_locks_do_not_hold_is_named(tmp_path, monkeypatch, caplog, number):
    """Some have no locks, and some take a lock from anybody."""
    monkeypatch.setattr(fcntl, "flock", without_locks(number))
    with caplog.at_level(logging.WARNING, "qpref"), locks.locked(tmp_path):
        pass
    assert caplog.messages == [
        f"{tmp_path}: locks don't hold on this file system; start no second process in this folder"
    ]


def test_a_lock_that_holds_is_not_talked_about(tmp_path, caplog):
    with locks.locked(tmp_path):
        assert caplog.messages == []


@pytest.mark.parametrize("call", ["ftruncate", "pwrite"])
def test_a_lock_that_a_full_disk_refuses_is_a_disk_error(tmp_path, monkeypatch, call):
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    with pytest.raises(DiskError, match="LOCK: cannot be written: No space left on device"), locks.locked(tmp_path):
        pass


def test_a_lock_that_is_removed_at_the_end_lets_one_process_in_at_a_time(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from qpref.locks import in_turn\n"
        "for number in range(20):\n"
        "    with in_turn(Path(sys.argv[1]) / 'lock', 'works', removed=True):\n"
        "        (Path(sys.argv[1]) / 'inside').mkdir(); time.sleep(0.002); (Path(sys.argv[1]) / 'inside').rmdir()\n"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]  # mkdir fails where another is inside
    assert list(tmp_path.iterdir()) == []
