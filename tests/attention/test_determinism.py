"""Determinism: strict on a GPU for the length of a run, nothing on a CPU, and never the end of a run."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import qpref
from qpref.attention import determinism
from qpref.attention.determinism import deterministic, distinct_indices, is_deterministic
from qpref.attention.varlen import _Gather, key_layout
from qpref.errors import PluginError
from qpref.policy.out_of_memory import attempt
from qpref.recipe.resolve import make_plan
from qpref.records import Group
from qpref.training import run as run_module
from qpref.training.loss_caller import LossCaller
from qpref.training.objective import Objective

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
"""A device object needs no GPU, and torch's flag is the process's."""


@pytest.fixture(autouse=True)
def _own_flags(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    yield
    torch.set_deterministic_debug_mode(0)


def without_deterministic_way() -> Tensor:
    """torch has no deterministic `put_`, on a CPU either."""
    return torch.zeros(3).put_(torch.tensor([1]), torch.tensor([2.0]))


class Noted(torch.autograd.Function):
    """Notes the flag in its forward and backward pass."""

    flags: ClassVar[list[tuple[str, bool]]] = []

    @staticmethod
    def forward(ctx, x):
        Noted.flags.append(("forward", is_deterministic()))
        ctx.save_for_backward(x)
        return x.square() / 2

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        Noted.flags.append(("backward", is_deterministic()))
        return grad * x


def test_the_backward_pass_and_recomputed_layers_see_the_flag():
    Noted.flags.clear()
    x = torch.ones(2, requires_grad=True)
    with deterministic(True, CUDA):
        checkpoint(Noted.apply, x, use_reentrant=False).sum().backward()
    assert Noted.flags == [("forward", True), ("forward", True), ("backward", True)]


def test_the_flag_is_the_strict_one_and_fills_no_memory():
    """Under warn_only torch's flash backward pass stays nondeterministic."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    with deterministic(True, CUDA):
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert not torch.utils.deterministic.fill_uninitialized_memory
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory == before


def test_the_flag_is_restored_after_an_error():
    with pytest.raises(ZeroDivisionError), deterministic(True, CUDA):
        raise ZeroDivisionError
    assert not is_deterministic()


@pytest.mark.parametrize(("wanted", "device"), [(True, CPU), (False, CPU), (False, CUDA)])
def test_nothing_changes_on_a_cpu_or_where_it_is_not_wanted(wanted, device):
    with deterministic(wanted, device):
        assert torch.get_deterministic_debug_mode() == 0
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ


def test_an_operator_without_a_deterministic_way_is_named_once_and_the_work_repeated(said):
    calls = []

    def work() -> Tensor:
        calls.append(is_deterministic())
        return without_deterministic_way()

    with deterministic(True, CUDA):
        assert attempt(work)[1] == 2
        assert attempt(work)[1] == 2
    assert calls == [True, False, False]
    assert said == [
        "[train] deterministic: put_ is not deterministic on this GPU; from here on, repeating the run may give other "
        "bits"
    ]


def test_cublas_without_a_fixed_workspace_is_no_end_either(said):
    message = (
        "Deterministic behavior was enabled with either `torch.use_deterministic_algorithms(True)` or "
        "`at::Context::setDeterministicAlgorithms(true)`, but this operation is not deterministic because it uses "
        "CuBLAS and you have CUDA >= 10.2."
    )
    with deterministic(True, CUDA):
        assert attempt(lambda: _raise_if(is_deterministic(), message)) == 1
    assert "CUBLAS_WORKSPACE_CONFIG=:4096:8" in said[0]


def _raise_if(fails: bool, message: str) -> int:
    if fails:
        raise RuntimeError(message)
    return 1


def test_a_loss_with_such_an_operator_is_not_called_broken(make_recipe, tmp_path):
    caller = Objective.of(make_plan(make_recipe(), (), tmp_path / "run").losses).callers[0]
    broken = LossCaller(caller.choice, lambda inputs: without_deterministic_way())
    inputs = SimpleNamespace(policy=SimpleNamespace(lengths=[1]))
    with deterministic(True, CUDA), pytest.raises(RuntimeError, match="does not have a deterministic"):
        broken(inputs)
    with pytest.raises(PluginError):  # the same error out of nowhere is the plugin's own
        LossCaller(caller.choice, lambda inputs: _raise_if(True, "no"))(inputs)


def test_distinct_indices_are_scattered_as_usual(monkeypatch):
    """In strict mode torch would sort them, about ten kernels for each of four scatters a layer."""
    seen, real = [], Tensor.index_add_

    def noted(self, *call):
        seen.append(is_deterministic())
        return real(self, *call)

    monkeypatch.setattr(Tensor, "index_add_", noted)
    layout = key_layout((Group(start=0, prompt=2, branches=(1, 1)),), CPU)
    states = torch.randn(4, 1, 2, requires_grad=True)
    with deterministic(True, CUDA):
        _Gather.apply(states, layout).sum().backward()
        assert is_deterministic()
    assert seen
    assert not any(seen)


def test_distinct_indices_restore_the_flag_after_an_error():
    with deterministic(True, CUDA):
        with pytest.raises(ZeroDivisionError), distinct_indices():
            raise ZeroDivisionError
        assert is_deterministic()


@pytest.mark.parametrize("wanted", [True, False])
def test_a_run_is_as_deterministic_as_its_recipe_says(wanted, make_recipe, tmp_path, monkeypatch):
    asked = []

    def noted(*call):
        asked.append(call)
        return deterministic(*call)

    monkeypatch.setattr(run_module, "deterministic", noted)
    changes = {"train.max_steps": 1} | ({} if wanted else {"train.deterministic": False})
    qpref.train(make_recipe(changes), output=tmp_path / "run")
    assert asked == [(wanted, CPU)]
    assert torch.get_deterministic_debug_mode() == determinism.OFF
