"""The reference's cache on disk never gives a wrong value, whatever became of its files, and a run sees what it saw."""

from __future__ import annotations

import errno
import os
import resource
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qpref.errors import DiskError
from qpref.policy import reference_cache
from qpref.policy.reference_cache import ReferenceCache, folder_of, root
from qpref.shards import HEADER, KEY_BYTES, SYNC_EVERY, shrink


def key(number: int) -> bytes:
    return bytes(range(number, number + KEY_BYTES))


ODD = [-0.0, float("nan"), -torch.inf, 2.0**-149, -0.1]
"""What a comparison of floats would not tell apart, or a conversion lose."""
ROWS = {key(1): torch.tensor([-1.5, -2.25]), key(2): torch.tensor([-3.0]), key(3): torch.tensor(ODD)}
SIZES = [HEADER.size + 4 * len(values) for values in ROWS.values()]
ENDS = [sum(SIZES[:number]) for number in range(len(SIZES) + 1)]
"""Bytes of a shard after none, one, two and all three of the rows."""


def bits(values: Tensor) -> list[int]:
    return values.view(torch.int32).tolist()


def write(folder: Path, run: str, rows: dict[bytes, Tensor]) -> Path:
    """A run that adds `rows`, one after the other, and ends; returns its shard."""
    cache = ReferenceCache.open(folder, run)
    for name, values in rows.items():
        cache.add({name: values})
    cache.close()
    return folder / f"{run}.shard"


def found(cache: ReferenceCache) -> dict[bytes, list[int]]:
    """The bits of all rows that a cache has."""
    read = {name: cache.get(name) for name in ROWS if name in cache}
    assert len(read) == len(cache)  # none under a key that nobody wrote
    return {name: bits(values) for name, values in read.items()}


def first(count: int) -> dict[bytes, list[int]]:
    return {name: bits(values) for name, values in list(ROWS.items())[:count]}


def num_whole(size: int) -> int:
    """Rows that are whole in the first `size` bytes of a shard."""
    return max(number for number, end in enumerate(ENDS) if end <= size)


# What was written is what is read.


def test_rows_come_back_to_the_bit(tmp_path, said):
    write(tmp_path, "one", ROWS)
    assert found(ReferenceCache.open(tmp_path, "two")) == first(3)
    assert said == []


def test_rows_added_at_once_come_back_as_rows_added_one_by_one(tmp_path):
    cache = ReferenceCache.open(tmp_path, "one")
    cache.add(ROWS)
    cache.close()
    assert (tmp_path / "one.shard").read_bytes() == write(tmp_path / "other", "one", ROWS).read_bytes()


def test_a_record_is_key_count_checksum_and_little_endian_floats(tmp_path):
    content = write(tmp_path, "one", {key(1): torch.tensor([-1.5, -2.25])}).read_bytes()
    assert (content[:KEY_BYTES], content[KEY_BYTES : KEY_BYTES + 4]) == (key(1), b"\2\0\0\0")
    assert content[HEADER.size :] == struct.pack("<ff", -1.5, -2.25)


def test_values_in_another_type_or_with_a_gradient_are_kept_as_float32(tmp_path):
    values = torch.tensor([-1.5, -2.25], dtype=torch.float64, requires_grad=True)
    write(tmp_path, "one", {key(1): values})
    read = ReferenceCache.open(tmp_path, "two").get(key(1))
    assert (read.dtype, read.tolist()) == (torch.float32, [-1.5, -2.25])


def test_what_is_read_can_be_changed_without_changing_the_cache(tmp_path):
    write(tmp_path, "one", ROWS)
    cache = ReferenceCache.open(tmp_path, "two")
    cache.get(key(1)).zero_()
    assert cache.get(key(1)).tolist() == [-1.5, -2.25]


def test_a_row_that_nobody_wrote_is_none(tmp_path):
    write(tmp_path, "one", ROWS)
    cache = ReferenceCache.open(tmp_path, "two")
    assert cache.get(key(9)) is None
    assert key(9) not in cache


def test_a_run_that_finds_nothing_new_leaves_no_shard(tmp_path):
    cache = ReferenceCache.open(tmp_path, "one")
    cache.add({})
    cache.close()
    assert list(tmp_path.iterdir()) == []


# What a killed process, a power cut or a bad disk leaves.


@pytest.mark.parametrize("size", range(ENDS[-1]))
def test_a_shard_cut_off_anywhere_gives_its_whole_rows_alone(tmp_path, said, size):
    shard = write(tmp_path, "one", ROWS)
    os.truncate(shard, size)
    assert found(ReferenceCache.open(tmp_path, "two")) == first(num_whole(size))
    left = size - ENDS[num_whole(size)]
    warning = f"{shard}: {left} of {size} bytes are not whole records and are ignored"
    assert said == ([warning] if left else [])


@pytest.mark.parametrize("flip", [1, 0x80, 0xFF])
@pytest.mark.parametrize("place", range(ENDS[-1]))
def test_a_flipped_byte_anywhere_gives_the_rows_before_it_alone(tmp_path, said, place, flip):
    shard = write(tmp_path, "one", ROWS)
    content = bytearray(shard.read_bytes())
    content[place] ^= flip
    shard.write_bytes(content)
    assert found(ReferenceCache.open(tmp_path, "two")) == first(num_whole(place))
    left = ENDS[-1] - ENDS[num_whole(place)]
    assert said == [f"{shard}: {left} of {ENDS[-1]} bytes are not whole records and are ignored"]


@pytest.mark.parametrize("tail", [bytes(200), b"\xff" * 200], ids=["zeros", "ones"])
def test_a_tail_that_was_never_written_is_no_row(tmp_path, said, tail):
    # A file system may have given a file its length before its content when the power went.
    shard = write(tmp_path, "one", ROWS)
    with shard.open("ab") as file:
        file.write(tail)
    assert found(ReferenceCache.open(tmp_path, "two")) == first(3)
    assert said == [f"{shard}: 200 of {ENDS[-1] + 200} bytes are not whole records and are ignored"]


def test_rows_of_two_keys_swapped_are_no_rows(tmp_path):
    # Each half is what a run wrote: only the checksum knows that they don't belong together.
    shard = write(tmp_path, "one", {key(1): torch.tensor([-1.0]), key(2): torch.tensor([-2.0])})
    content, size = shard.read_bytes(), HEADER.size + 4
    shard.write_bytes(content[size : size + KEY_BYTES] + content[KEY_BYTES:size] + content[size:])
    assert len(ReferenceCache.open(tmp_path, "two")) == 0


def test_a_bad_shard_does_not_hide_a_good_one(tmp_path):
    names = list(ROWS)
    os.truncate(write(tmp_path, "a", {names[0]: ROWS[names[0]]}), 5)
    write(tmp_path, "b", {names[1]: ROWS[names[1]]})
    assert found(ReferenceCache.open(tmp_path, "c")) == {names[1]: bits(ROWS[names[1]])}


# What a run sees.


def test_two_runs_at_once_do_not_see_each_other(tmp_path):
    one, two = ReferenceCache.open(tmp_path, "one"), ReferenceCache.open(tmp_path, "two")
    one.add({key(1): torch.tensor([-1.0])})
    two.add({key(2): torch.tensor([-2.0])})
    one.add({key(3): torch.tensor([-3.0])})
    assert (key(2) in one, key(1) in two, key(3) in two) == (False, False, False)
    one.close()
    two.close()
    third = ReferenceCache.open(tmp_path, "three")
    assert [third.get(key(number)).item() for number in (1, 2, 3)] == [-1, -2, -3]


def test_a_resumed_run_sees_the_others_as_they_were_at_its_start(tmp_path):
    write(tmp_path, "old", {key(1): torch.tensor([-1.0])})
    started = ReferenceCache.open(tmp_path, "mine")
    write(tmp_path, "old", {key(2): torch.tensor([-2.0])})  # the old run was resumed, and found more
    write(tmp_path, "new", {key(3): torch.tensor([-3.0])})
    resumed = ReferenceCache.open(tmp_path, "mine", started.store.seen)
    assert resumed.store.seen == started.store.seen == {"old.shard": HEADER.size + 4}
    assert [number for number in (1, 2, 3) if key(number) in resumed] == [1]


def test_a_run_that_saw_nothing_goes_on_seeing_nothing(tmp_path):
    started = ReferenceCache.open(tmp_path, "mine")
    write(tmp_path, "new", ROWS)
    assert len(ReferenceCache.open(tmp_path, "mine", started.store.seen)) == 0


def test_a_resumed_run_reads_all_that_it_wrote_itself(tmp_path):
    started = ReferenceCache.open(tmp_path, "mine")
    started.add(ROWS)  # and is killed: nothing closes it
    resumed = ReferenceCache.open(tmp_path, "mine", started.store.seen)
    assert found(resumed) == first(3)
    assert "mine.shard" not in resumed.store.seen
    started.close()
    resumed.close()


def test_a_runs_own_shard_is_not_among_what_it_saw(tmp_path):
    write(tmp_path, "mine", ROWS)
    resumed = ReferenceCache.open(tmp_path, "mine")
    assert resumed.store.seen == {}
    resumed.close()


@pytest.mark.parametrize("size", range(ENDS[1], ENDS[2] + 1))
def test_a_resumed_run_cuts_its_torn_row_off_and_appends(tmp_path, size):
    shard = write(tmp_path, "mine", ROWS)
    os.truncate(shard, size)
    resumed = ReferenceCache.open(tmp_path, "mine", {})
    whole = num_whole(size)
    assert found(resumed) == first(whole)
    resumed.add(dict(list(ROWS.items())[whole:]))
    resumed.close()
    assert shard.stat().st_size == ENDS[-1]
    assert found(ReferenceCache.open(tmp_path, "two")) == first(3)


def test_a_shard_that_is_gone_is_missed_with_a_warning(tmp_path, said):
    shard = write(tmp_path, "old", ROWS)
    started = ReferenceCache.open(tmp_path, "mine")
    shard.unlink()
    assert len(ReferenceCache.open(tmp_path, "mine", started.store.seen)) == 0
    assert said == [f"{shard}: {ENDS[-1]} of {ENDS[-1]} bytes are not whole records and are ignored"]


def test_a_shard_that_is_removed_while_it_is_read_can_be_read_on(tmp_path):
    shard = write(tmp_path, "old", ROWS)
    cache = ReferenceCache.open(tmp_path, "mine")
    shard.unlink()
    assert found(cache) == first(3)


def test_an_empty_shard_is_no_matter(tmp_path, said):
    (tmp_path / "old.shard").touch()
    assert len(ReferenceCache.open(tmp_path, "mine")) == 0
    assert said == []


# A disk that refuses.


@contextmanager
def no_file_longer_than(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_row_that_does_not_fit_is_warned_of_once_and_never_read(tmp_path, said):
    cache = ReferenceCache.open(tmp_path, "one")
    names = list(ROWS)
    cache.add({names[0]: ROWS[names[0]]})
    with no_file_longer_than(ENDS[1] + 10):
        cache.add({names[1]: ROWS[names[1]]})
        cache.add({names[2]: ROWS[names[2]]})
    cache.add({names[2]: ROWS[names[2]]})  # there is space again, but half a row stands before it
    cache.close()
    assert said == [f"the cache is no longer written: {tmp_path}/one.shard: cannot be written: "
                    "File too large"]  # fmt: skip
    assert (tmp_path / "one.shard").stat().st_size == ENDS[1] + 10
    assert found(ReferenceCache.open(tmp_path, "two")) == first(1)


def test_a_run_whose_disk_was_full_writes_again_after_a_resume(tmp_path, said):
    cache = ReferenceCache.open(tmp_path, "one")
    with no_file_longer_than(ENDS[1] + 10):
        cache.add(ROWS)
    cache.close()
    resumed = ReferenceCache.open(tmp_path, "one", {})
    assert found(resumed) == first(1)
    resumed.add(dict(list(ROWS.items())[1:]))
    resumed.close()
    assert found(ReferenceCache.open(tmp_path, "two")) == first(3)


def test_a_disk_that_is_full_from_the_start_is_warned_of_once(tmp_path, said, monkeypatch):
    calls, real = [], os.fsync

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) > 1:  # an empty shard can still be made
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    cache = ReferenceCache.open(tmp_path, "one")
    monkeypatch.setattr(os, "fsync", full)
    for name, values in ROWS.items():
        cache.add({name: values})
    cache.close()
    assert [line.partition(":")[0] for line in said] == ["the cache is no longer written"]
    assert "No space left on device (" in said[0]


def test_the_disk_is_waited_for_at_the_first_row_every_so_many_and_at_the_end(tmp_path, monkeypatch):
    synced, real = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (synced.append(added), real(descriptor)))
    cache, added = ReferenceCache.open(tmp_path, "one"), 0
    for number in range(2 * SYNC_EVERY + 1):
        cache.add({key(number): torch.tensor([-1.0])})
        added = number + 1
    assert synced == [0, 0, SYNC_EVERY, 2 * SYNC_EVERY]  # made, then the rows of those numbers from 0
    cache.close()
    assert synced[4:] == [2 * SYNC_EVERY + 1]


# A reference's folder.


REFERENCE = {"weights": {"a": "1"}, "config": {"b": {"c": 1.0}}, "dtype": "bf16"}


def test_a_references_folder_does_not_depend_on_the_order_of_what_describes_it():
    other = {"dtype": "bf16", "config": {"b": {"c": 1.0}}, "weights": {"a": "1"}}
    assert folder_of(REFERENCE) == folder_of(other)


@pytest.mark.parametrize(
    "change", [{"weights": {"a": "2"}}, {"config": {"b": {"c": 2.0}}}, {"config": {"b": 1.0}}, {"dtype": "float32"}]
)
def test_a_references_folder_is_another_for_another_reference(change):
    assert folder_of(REFERENCE | change) != folder_of(REFERENCE)


def test_a_references_folder_is_another_in_another_format(monkeypatch):
    before = folder_of(REFERENCE)
    monkeypatch.setattr(reference_cache, "FORMAT", reference_cache.FORMAT + 1)
    assert folder_of(REFERENCE) != before


# How much room it takes.


@pytest.fixture
def shards(tmp_path, monkeypatch) -> dict[str, Path]:
    """Four shards of two references, of 100 bytes each, used at 1, 2, 3 and 4 seconds after the epoch."""
    monkeypatch.setenv("QPREF_CACHE", str(tmp_path))
    made = {}
    for second, name in enumerate(("x/one", "y/two", "x/three", "y/four"), start=1):
        path = tmp_path / "reference" / f"{name}.shard"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(100))
        os.utime(path, (second, second))
        made[name] = path
    return made


def left(shards: dict[str, Path]) -> list[str]:
    return [name for name, path in shards.items() if path.exists()]


@pytest.mark.parametrize(
    ("limit", "freed", "names"),
    [
        (400, 0, ["x/one", "y/two", "x/three", "y/four"]),
        (399, 100, ["y/two", "x/three", "y/four"]),
        (200, 200, ["x/three", "y/four"]),
        (150, 300, ["y/four"]),
        (0, 400, []),
    ],
)
def test_what_was_used_longest_ago_goes_first_and_no_more_than_has_to(shards, limit, freed, names):
    assert shrink(root(), limit) == freed
    assert left(shards) == names


def test_the_folder_in_use_is_kept_however_old(shards):
    assert shrink(root(), 150, keep=shards["x/one"].parent) == 200
    assert left(shards) == ["x/one", "x/three"]


def test_reading_a_shard_makes_it_the_last_to_go(shards):
    write(shards["x/one"].parent, "five", ROWS)
    os.utime(shards["x/one"].with_name("five.shard"), (0, 0))
    ReferenceCache.open(shards["x/one"].parent, "reader", {"five.shard": ENDS[-1]})
    shrink(root(), ENDS[-1])
    assert left(shards) == []
    assert shards["x/one"].with_name("five.shard").exists()


def test_the_limit_is_what_the_environment_says(monkeypatch):
    monkeypatch.delenv("QPREF_REFERENCE_CACHE_BYTES", raising=False)
    assert reference_cache.size_limit() == 20 * 2**30
    monkeypatch.setenv("QPREF_REFERENCE_CACHE_BYTES", "1000")
    assert reference_cache.size_limit() == 1000


def test_a_shard_that_is_a_link_is_neither_read_nor_in_the_way(shards, tmp_path):
    folder = shards["x/one"].parent
    for name, target in {"circle": "circle.shard", "gone": "nowhere", "leading": shards["y/two"]}.items():
        (folder / f"{name}.shard").symlink_to(target)
    cache = ReferenceCache.open(folder, "new")
    assert not cache.store.shards() & {"circle.shard", "gone.shard", "leading.shard"}
    shrink(root(), 0)
    assert left(shards) == []


def test_an_entry_that_is_a_link_is_refused(tmp_path):
    """A shared cache is written by others, and such a link leads the shards of this user anywhere."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "entry").symlink_to(tmp_path / "outside")
    with pytest.raises(DiskError, match="entry: is a symbolic link, and no entry of the cache is one"):
        ReferenceCache.open(tmp_path / "entry", "run")
    with pytest.raises(DiskError, match="is a symbolic link"):
        reference_cache.describe(tmp_path / "entry", {})
    assert not list((tmp_path / "outside").iterdir())
