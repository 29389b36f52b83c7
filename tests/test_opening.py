"""What is opened is a regular file: no link is followed, no FIFO waited for, no device touched."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

import pytest

from qpref.opening import NotPlainError, kind_of, open_folder, open_plain, read_bytes, read_object, read_text

KINDS = {
    "link": "a symbolic link",
    "dangling link": "a symbolic link",
    "link to itself": "a symbolic link",
    "folder": "a folder",
    "FIFO": "a FIFO",
    "socket": "a socket",
}


@pytest.fixture
def make(tmp_path):
    def made(kind):
        path = tmp_path / "it"
        if kind == "socket":
            with socket.socket(socket.AF_UNIX) as listening:
                listening.bind(os.path.relpath(path))
            return path
        {
            "file": lambda: path.write_text("content"),
            "link": lambda: path.symlink_to("/etc/passwd"),
            "dangling link": lambda: path.symlink_to("nothing"),
            "link to itself": lambda: path.symlink_to("it"),
            "folder": path.mkdir,
            "FIFO": lambda: os.mkfifo(path),
        }[kind]()
        return path

    return made


@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_WRONLY, os.O_RDWR | os.O_CREAT | os.O_APPEND], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_but_a_file_is_opened(make, kind, flags, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # a socket's name is short
    path, start = make(kind), time.monotonic()
    with pytest.raises(NotPlainError) as caught:
        open_plain(path, flags)
    assert caught.value.strerror == f"it is {KINDS[kind]}, not a regular file"
    assert kind_of(path) == KINDS[kind]
    assert time.monotonic() - start < 1


@pytest.mark.parametrize("device", ["/dev/zero", "/dev/tty", "/dev/full"])
def test_a_device_is_not_opened(device):
    with pytest.raises(NotPlainError, match="it is a device"):
        read_bytes(Path(device), follow=True)


@pytest.mark.parametrize("kind", ["FIFO", "folder"])
def test_what_a_link_leads_to_is_looked_at_too(make, tmp_path, kind):
    make(kind)
    (tmp_path / "link").symlink_to("it")
    with pytest.raises(NotPlainError, match=f"it is {KINDS[kind]}"):
        read_bytes(tmp_path / "link", follow=True)


def test_a_file_that_the_user_names_by_a_link_is_read(make, tmp_path):
    make("file")
    (tmp_path / "link").symlink_to("it")
    assert read_text(tmp_path / "link", follow=True) == "content"


def test_a_file_that_becomes_a_link_after_the_first_look_is_refused(make, monkeypatch):
    path = make("link")
    monkeypatch.setattr("qpref.opening.kind_of", lambda path, follow, folder: None)
    with pytest.raises(NotPlainError, match="it is not a regular file"):
        open_plain(path)


def test_a_file_that_becomes_a_fifo_after_the_first_look_holds_nobody_up(make, monkeypatch):
    path = make("FIFO")
    monkeypatch.setattr("qpref.opening.kind_of", lambda path, follow, folder: None)
    for flags in (os.O_RDONLY, os.O_WRONLY):
        with pytest.raises(NotPlainError, match="it is not a regular file"):
            open_plain(path, flags)


def test_a_file_with_a_second_name_is_read_and_not_written(make, tmp_path):
    path = make("file")
    os.link(path, tmp_path / "second")
    assert read_text(path) == "content"
    with pytest.raises(NotPlainError, match="a second name"):
        open_plain(path, os.O_RDWR)


@pytest.mark.parametrize(("limit", "fits"), [(7, True), (6, False)])
def test_a_file_is_read_up_to_the_limit(make, limit, fits):
    path = make("file")
    if fits:
        assert read_bytes(path, limit) == b"content"
    else:
        with pytest.raises(NotPlainError, match="it is larger than 0 MiB"):
            read_bytes(path, limit)


@pytest.mark.parametrize(
    "text", ["[1]", "1", "{", "", "[" * 100_000, '{"a": ' * 100_000, "{}{}"], ids=lambda text: text[:6]
)
def test_what_is_no_object_is_a_value_error(tmp_path, text):
    (tmp_path / "it").write_text(text)
    with pytest.raises(ValueError):  # noqa: PT011  its words are JSON's
        read_object(tmp_path / "it")


def test_what_is_no_text_is_a_value_error(tmp_path):
    (tmp_path / "it").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(ValueError, match="utf-8"):
        read_object(tmp_path / "it")


def is_opened(path, folder) -> bool:
    descriptor = open_folder(path)
    try:
        return os.path.samestat(os.fstat(descriptor), folder.stat())
    finally:
        os.close(descriptor)


def test_a_folder_is_opened_through_own_links_alone(tmp_path):
    folder, near, far = tmp_path / "folder", tmp_path / "near", tmp_path / "far"
    folder.mkdir()
    near.symlink_to("folder")
    far.symlink_to(near)
    assert all(is_opened(path, folder) for path in (folder, near, far))
    os.lchown(near, 12345, 12345)
    for path in (near, far):
        with pytest.raises(NotPlainError, match="it is a link that another user has made"):
            open_folder(path)


@pytest.mark.parametrize(
    ("kind", "words"), [("file", "not a folder"), ("link", "not a folder"), ("link to itself", "in a circle")]
)
def test_what_is_no_folder_is_not_opened_as_one(make, kind, words):
    with pytest.raises(NotPlainError, match=words):
        open_folder(make(kind))


def test_what_is_opened_in_a_folder_is_in_it_whatever_has_its_name_by_then(tmp_path):
    folder, other = tmp_path / "folder", tmp_path / "other"
    folder.mkdir()
    other.mkdir()
    descriptor = open_folder(folder)
    folder.rename(tmp_path / "aside")
    folder.symlink_to(other)
    os.close(open_plain(Path("it"), os.O_RDWR | os.O_CREAT, folder=descriptor))
    (tmp_path / "aside/link").symlink_to("it")
    with pytest.raises(NotPlainError, match="it is a symbolic link"):
        open_plain(Path("link"), folder=descriptor)
    os.close(descriptor)
    assert (tmp_path / "aside/it").is_file()
    assert not list(other.iterdir())
