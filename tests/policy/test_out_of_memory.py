"""Every kind of out-of-memory is one, and no other error is taken for it."""

from __future__ import annotations

import errno
import logging
import weakref

import pytest
import torch
from bitsandbytes import functional

from qpref.errors import DeviceMemoryError, PolicyError
from qpref.policy.out_of_memory import attempt, fits, is_out_of_memory, out_of_memory_as
from qpref.policy.pretrained import load_pretrained

KINDS = {
    "torch": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "driver": torch.AcceleratorError("CUDA error: out of memory"),
    "cublas": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "cudnn": RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    "cudnn 9": RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    "triton": RuntimeError("Triton Error [CUDA]: out of memory"),
    "runtime": RuntimeError("cudaErrorMemoryAllocation"),
    "onednn": RuntimeError("could not create a primitive"),
    "python": MemoryError(),
    "mmap": OSError(errno.ENOMEM, "Cannot allocate memory"),
    "c++": RuntimeError("std::bad_alloc"),
}
OTHERS = (
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("CUDA error: no kernel image is available for execution on the device"),
    RuntimeError("could not create a primitive descriptor for a matmul primitive"),
    RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"),
    OSError(errno.ENOSPC, "No space left on device"),
    ValueError("out of memory is a phrase in this row"),
    KeyError("x"),
)


@pytest.mark.parametrize("kind", KINDS)
def test_out_of_memory_is_recognized_whoever_says_it(kind):
    assert is_out_of_memory(KINDS[kind])
    assert attempt(lambda: raises(KINDS[kind])) is None


def test_the_cpus_allocator_is_recognized():
    assert not fits(lambda: torch.empty(2**50))


def test_an_error_raised_from_out_of_memory_is_out_of_memory():
    error = ValueError("the loss failed")
    error.__cause__ = KINDS["cublas"]
    assert is_out_of_memory(error)


@pytest.mark.parametrize("error", OTHERS, ids=repr)
def test_other_errors_are_not_taken_for_out_of_memory(error):
    assert not is_out_of_memory(error)
    with pytest.raises(type(error)):
        attempt(lambda: raises(error))


def test_a_failed_attempts_tensors_are_freed_before_the_next_one():
    held: list[weakref.ref[torch.Tensor]] = []

    def fails() -> None:
        large = torch.zeros(4, requires_grad=True)
        kept = large * 2
        held.append(weakref.ref(kept))
        raise KINDS["torch"].with_traceback(None)

    assert not fits(fails)
    KINDS["torch"].__traceback__ = None  # held by this module, as no error of a library is
    assert held[0]() is None


def test_a_result_that_is_nothing_is_no_failure():
    assert fits(lambda: None)


@pytest.mark.parametrize("kind", KINDS)
def test_one_error_is_raised_for_all(kind):
    with pytest.raises(DeviceMemoryError) as caught, out_of_memory_as("full", "buy more"):
        raise KINDS[kind]
    assert (caught.value.exit_code, caught.value.hint) == (5, "buy more")


SWITCHED_OFF = {
    "nothing": lambda: None,
    "transformers' logger": lambda: setattr(logging.getLogger("transformers.modeling_utils"), "disabled", True),
    "all logging": lambda: logging.disable(logging.CRITICAL),
}


@pytest.mark.parametrize("switch_off", SWITCHED_OFF.values(), ids=SWITCHED_OFF)
def test_a_model_that_is_too_large_to_load_is_out_of_memory(switch_off, make_base, monkeypatch):
    """transformers catches the error of each weight, and raises one that refers to a report that it has logged."""
    from transformers import BitsAndBytesConfig

    base, settings = make_base(), BitsAndBytesConfig(load_in_4bit=True)
    monkeypatch.setattr(functional, "quantize_4bit", lambda *call, **options: raises(KINDS["torch"]))
    monkeypatch.setattr(logging.root.manager, "disable", 0)
    monkeypatch.setattr(logging.getLogger("transformers.modeling_utils"), "disabled", False)
    switch_off()
    with pytest.raises(DeviceMemoryError, match="while the model was loaded"):
        load_pretrained(base, quantization_config=settings, device_map={"": "cpu"})


def test_a_weight_that_fails_otherwise_is_no_lack_of_memory(make_base, monkeypatch):
    from transformers import BitsAndBytesConfig

    base, settings = make_base(), BitsAndBytesConfig(load_in_4bit=True)
    monkeypatch.setattr(functional, "quantize_4bit", lambda *call, **options: raises(ValueError("odd shape")))
    with pytest.raises(PolicyError, match="transformers can't load this model"):
        load_pretrained(base, quantization_config=settings, device_map={"": "cpu"})


def raises(error: BaseException) -> None:
    raise error
