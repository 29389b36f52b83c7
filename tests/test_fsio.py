"""Files and folders appear whole or not at all, and a refusal of the disk has an error of its own."""

import errno
import io
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qpref import fsio
from qpref.errors import DiskError

WRITERS = {
    "write_bytes": lambda path, text: fsio.write_bytes(path, text.encode()),
    "write_text": fsio.write_text,
    "write_json": fsio.write_json,
    "write_stream": lambda path, text: fsio.write_stream(path, io.BytesIO(text.encode())),
}


def mode_of(path):
    return stat.S_IMODE(path.stat().st_mode)


def python(code, **settings):
    """A Python process that runs `code`, with qpref's fsio imported and the lines of a test dedented."""
    source = "import os, resource, sys, time\nfrom pathlib import Path\nfrom qpref import fsio\n" + textwrap.dedent(
        code
    )
    return subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE, text=True, **settings)


def output_of(code):
    process = python(code, stderr=subprocess.STDOUT)
    return process.communicate()[0]


# Files.


@pytest.mark.parametrize("writer", WRITERS)
def test_a_written_file_replaces_the_old_one(tmp_path, writer):
    path = tmp_path / "file"
    path.write_text("old, and longer than the new")
    WRITERS[writer](path, "new")
    assert path.read_text() in ("new", '"new"\n')


@pytest.mark.parametrize("writer", WRITERS)
def test_a_written_file_is_alone_and_for_its_owner(tmp_path, writer):
    WRITERS[writer](tmp_path / "file", "new")
    assert {path.name: mode_of(path) for path in tmp_path.iterdir()} == {"file": 0o600}


def test_json_is_indented_and_sorted(tmp_path):
    fsio.write_json(tmp_path / "file", {"b": [1], "a": None})
    assert (tmp_path / "file").read_text() == '{\n  "a": null,\n  "b": [\n    1\n  ]\n}\n'


def test_json_that_is_none_leaves_the_old_file(tmp_path):
    fsio.write_json(tmp_path / "file", 1)
    with pytest.raises(ValueError, match="not JSON compliant"):
        fsio.write_json(tmp_path / "file", {"loss": float("nan")})
    assert {path.name: json.loads(path.read_text()) for path in tmp_path.iterdir()} == {"file": 1}


def test_tensors_come_back_with_their_metadata(tmp_path):
    whole = torch.arange(12.0).reshape(3, 4)
    fsio.write_tensors(tmp_path / "file", {"a": whole.T, "b": whole[0].clone()}, {"format": "pt"})
    read = load_file(tmp_path / "file")
    assert torch.equal(read["a"], whole.T)
    assert torch.equal(read["b"], whole[0])


def test_a_copy_is_the_same(tmp_path):
    (tmp_path / "from").write_bytes(bytes(range(256)) * 9000)
    fsio.copy_file(tmp_path / "from", tmp_path / "to")
    assert (tmp_path / "to").read_bytes() == (tmp_path / "from").read_bytes()


def failing(number):
    """A disk call that fails with an error number."""

    def fail(*arguments, **settings):
        raise OSError(number, os.strerror(number))

    return fail


HINT = "\nhint: free some space; a run continues with --resume"
REFUSALS = {
    errno.ENOSPC: (" (3 bytes needed, 5.0 KiB free)", HINT),
    errno.EDQUOT: (" (3 bytes needed)", HINT),
    errno.EFBIG: ("", "\nhint: raise the limit on the size of files (ulimit -f); a run continues with --resume"),
    errno.EIO: ("", ""),
    errno.EROFS: ("", ""),
}
"""Error number -> what the message says of the space, and its hint."""


@pytest.mark.parametrize("number", REFUSALS, ids=errno.errorcode.get)
@pytest.mark.parametrize("call", ["fsync", "open"])
def test_a_refusal_of_the_disk_names_the_file_and_keeps_the_old_one(tmp_path, monkeypatch, call, number):
    path = tmp_path / "file"
    path.write_text("old")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(9999, 4879, 5120))
    monkeypatch.setattr(os, call, failing(number))
    with pytest.raises(DiskError) as caught:
        fsio.write_text(path, "new")
    monkeypatch.undo()
    space, hint = REFUSALS[number]
    assert str(caught.value) == f"{path}: cannot be written: {os.strerror(number)}{space}{hint}"
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"file": "old"}


def test_an_interrupt_leaves_the_old_file_alone(tmp_path):
    class Interrupted(io.BytesIO):
        def read(self, size=-1):
            raise KeyboardInterrupt

    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt):
        fsio.write_stream(path, Interrupted())
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"file": "old"}


def test_a_file_that_does_not_fit_is_a_disk_error_in_a_real_process(tmp_path):
    (tmp_path / "file").write_text("old")
    printed = output_of(f"""
        from qpref.errors import DiskError
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            fsio.write_bytes(Path("{tmp_path}/file"), bytes(5000))
        except DiskError as error:
            print(error)
    """)
    assert printed == (
        f"{tmp_path}/file: cannot be written: File too large\n"
        "hint: raise the limit on the size of files (ulimit -f); a run continues with --resume\n"
    )
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"file": "old"}


def test_a_killed_writer_leaves_the_old_file_and_one_leftover(tmp_path):
    (tmp_path / "file").write_text("old")
    process = python(f"""
        class Slow:
            def read(self, size):
                print("half", flush=True)
                time.sleep(60)
        fsio.write_stream(Path("{tmp_path}/file"), Slow())
    """)
    assert process.stdout.readline() == "half\n"
    process.kill()
    process.communicate()
    leftovers = [path.name for path in tmp_path.iterdir() if path.name != "file"]
    assert ((tmp_path / "file").read_text(), [fsio.staged_name(name) for name in leftovers]) == ("old", ["file"])


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    events = []
    fsync, rename = os.fsync, Path.rename

    def note_fsync(descriptor):
        events.append(f"fsync {Path(f'/proc/self/fd/{descriptor}').readlink().name}")
        fsync(descriptor)

    def note_rename(self, target):
        events.append(f"rename {self.name}")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(Path, "rename", note_rename)
    fsio.write_text(tmp_path / "file", "new")
    staged = events[0].removeprefix("fsync ")
    assert fsio.staged_name(staged) == "file"
    assert events == [f"fsync {staged}", f"rename {staged}", f"fsync {tmp_path.name}"]


def test_sha256_is_of_the_whole_file(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-4, B.1
    assert fsio.sha256_file(tmp_path / "file") == expected


# Folders.


def test_a_made_folder_is_for_its_owner(tmp_path):
    fsio.make_folder(tmp_path / "runs" / "tiny")
    assert mode_of(tmp_path / "runs" / "tiny") == 0o700


def test_a_folder_in_the_place_of_a_file_is_a_disk_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DiskError, match=re.escape(f"{tmp_path}/file/run: cannot be written: Not a directory")):
        fsio.make_folder(tmp_path / "file" / "run")


def test_removing_a_link_to_a_folder_leaves_the_folder(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine").touch()
    (tmp_path / "link").symlink_to("folder")
    fsio.remove_tree(tmp_path / "link")
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["folder", "folder/mine"]


def test_a_staging_name_is_never_the_same(tmp_path):
    # Not even in one process: another container has processes of the same ids.
    assert len({fsio.staging_name(tmp_path / "final") for _ in range(50)}) == 50


@pytest.mark.parametrize(
    ("name", "final"),
    [
        (".tmp-run.json-0123456789abcdef", "run.json"),
        (".tmp-step-000012-0123456789abcdef", "step-000012"),
        (".tmp-step-000012-0123456789abcdef.lock", "step-000012"),
        (".tmp-adapter-12", None),
        (".tmp-notes", None),
        ("adapter-0123456789abcdef", None),
        (".tmp-adapter-0123456789abcdeF", None),
        (".tmp-adapter-0123456789abcdef.txt", None),
    ],
)
def test_a_staged_name_is_known_by_its_form(name, final):
    assert fsio.staged_name(name) == final


@pytest.mark.parametrize(
    ("environment", "folder"),
    [
        ({"QPREF_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"QPREF_CACHE": "~/a"}, "/home/me/a"),
        ({"QPREF_CACHE": "", "XDG_CACHE_HOME": "/b"}, "/b/qpref"),
        ({"XDG_CACHE_HOME": ""}, "/home/me/.cache/qpref"),
        ({}, "/home/me/.cache/qpref"),
    ],
    ids=str,
)
def test_the_cache_is_where_the_user_says(monkeypatch, environment, folder):
    for name in ("QPREF_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"HOME": "/home/me"} | environment).items():
        monkeypatch.setenv(name, value)
    assert str(fsio.cache_folder()) == folder


# AppendLog.


def test_lines_are_there_as_soon_as_they_are_appended(tmp_path):
    log = fsio.AppendLog(tmp_path / "log")
    log.append_line("one")
    assert (tmp_path / "log").read_text() == "one\n"
    log.append_line("zwei: ü")
    assert (tmp_path / "log").read_text(encoding="utf-8") == "one\nzwei: ü\n"
    log.close()


def test_the_size_of_a_log_is_in_bytes(tmp_path):
    log = fsio.AppendLog(tmp_path / "log")
    log.append_line("ü")
    assert log.size == 3
    log.close()


def test_a_log_is_for_its_owner(tmp_path):
    fsio.AppendLog(tmp_path / "log").close()
    assert mode_of(tmp_path / "log") == 0o600


@pytest.mark.parametrize(
    ("keep", "content"),
    [(None, "one\ntwo\nthr+"), (11, "one\ntwo\nthr+"), (8, "one\ntwo\n+"), (4, "one\n+"), (0, "+")],
)
def test_a_log_goes_on_after_the_bytes_it_is_to_keep(tmp_path, keep, content):
    (tmp_path / "log").write_text("one\ntwo\nthr")
    log = fsio.AppendLog(tmp_path / "log", keep)
    log.append_line("+")
    log.close()
    assert (tmp_path / "log").read_text() == content + "\n"


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_log_that_cannot_be_opened_is_closed_again(tmp_path, monkeypatch, error):
    opened = []

    def fsync(descriptor):
        opened.append(descriptor)
        raise error

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises((DiskError, KeyboardInterrupt)):
        fsio.AppendLog(tmp_path / "log")
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(opened[0])


def test_a_log_in_a_folder_that_is_not_there_is_a_disk_error(tmp_path):
    with pytest.raises(DiskError, match=re.escape(f"{tmp_path}/none/log: cannot be written: No such file")):
        fsio.AppendLog(tmp_path / "none" / "log")


def test_a_line_that_does_not_fit_is_a_disk_error(tmp_path, monkeypatch):
    log = fsio.AppendLog(tmp_path / "log")
    monkeypatch.setattr(os, "fsync", failing(errno.ENOSPC))
    with pytest.raises(DiskError) as caught:
        log.append_line("one")
    log.close()
    needed = "cannot be written: No space left on device (4 bytes needed, "
    assert str(caught.value).startswith(f"{tmp_path}/log: {needed}")


def test_a_log_is_cut_and_goes_on(tmp_path):
    log = fsio.AppendLog(tmp_path / "log")
    log.append_line("one")
    log.append(b"tw", durable=False)
    log.cut(4)
    log.append_line("two")
    log.close()
    assert (tmp_path / "log").read_text() == "one\ntwo\n"
