"""A changed byte changes the checksum, wherever it is, and so does another order."""

from __future__ import annotations

import pytest
import torch

from qpref.policy import checksum as module
from qpref.policy.checksum import checksum


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 100])
def test_every_bit_counts(length, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 4)  # words, so that several chunks are added
    generator = torch.Generator().manual_seed(length)
    sound = torch.randint(0, 256, (length,), dtype=torch.uint8, generator=generator)
    seen = {checksum(sound)}
    for index in range(length):
        for bit in range(8):
            changed = sound.clone()
            changed[index] ^= 1 << bit
            seen.add(checksum(changed))
    assert len(seen) == 1 + 8 * length


def test_two_changes_do_not_cancel():
    sound = torch.zeros(64, dtype=torch.uint8)
    seen = {checksum(sound)}
    for first in range(7, 64, 8):
        for second in range(first + 8, 64, 8):
            changed = sound.clone()
            changed[[first, second]] = 128  # the sign of two words
            seen.add(checksum(changed))
    assert len(seen) == 1 + 8 * 7 // 2


def test_words_that_change_places_count():
    words = torch.arange(1, 64, dtype=torch.int64)
    assert checksum(words) != checksum(words.flip(0))
    assert checksum(torch.tensor([1, 2, 3])) != checksum(torch.tensor([1, 3, 2]))


def test_zeros_at_the_end_count():
    assert len({checksum(torch.zeros(length, dtype=torch.uint8)) for length in range(8)}) == 8


def test_shape_and_dtype_do_not_count_and_chunks_neither(monkeypatch):
    values = torch.randn(33, 5)
    expected = checksum(values)
    assert checksum(values.view(5, 33)) == checksum(values.view(torch.int32)) == expected
    monkeypatch.setattr(module, "CHUNK", 7)
    assert checksum(values) == expected


def test_a_tensor_may_begin_anywhere_in_its_storage():
    values = torch.arange(40, dtype=torch.bfloat16)
    for start in range(5):
        assert checksum(values[start:]) == checksum(values[start:].clone())
