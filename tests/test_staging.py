"""One copy to the device for several tensors."""

from __future__ import annotations

import pytest
import torch

from qpref import staging
from qpref.staging import ALIGNMENT, to_device

CPU = torch.device("cpu")
TENSORS = [
    torch.tensor([3, 1, 2]),
    torch.tensor([], dtype=torch.int64),
    torch.tensor([7], dtype=torch.int32),
    torch.tensor([True, False]),
    torch.tensor([[0.5, -1.0]]),
]


class OnCuda:
    """Takes the CUDA branch; a copy to it stays on the CPU."""

    type = "cuda"


def test_on_a_cpu_tensors_stay_what_they_are():
    assert all(found is given for found, given in zip(to_device(TENSORS, CPU), TENSORS, strict=True))


@pytest.fixture
def copies(monkeypatch) -> list[torch.Tensor]:
    """Host buffers that were copied; no memory can be pinned here."""
    made: list[torch.Tensor] = []
    empty, to = torch.empty, torch.Tensor.to

    def plain(*size, pin_memory: bool = False, **settings):
        assert pin_memory
        return empty(*size, **settings)

    def moved(tensor, device, non_blocking: bool = False):
        assert isinstance(device, OnCuda)
        assert non_blocking
        made.append(tensor)
        return to(tensor, CPU, copy=True)

    monkeypatch.setattr(staging.torch, "empty", plain)
    monkeypatch.setattr(torch.Tensor, "to", moved)
    return made


def test_one_copy_brings_all_tensors_with_their_dtypes_and_shapes(copies):
    found = to_device(TENSORS, OnCuda())
    assert len(copies) == 1
    for one, other in zip(found, TENSORS, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


def test_each_tensor_is_aligned_in_the_buffer(copies):
    found = to_device(TENSORS, OnCuda())
    assert all(each.storage_offset() * each.element_size() % ALIGNMENT == 0 for each in found)
    assert len({each.untyped_storage().data_ptr() for each in found}) == 1
