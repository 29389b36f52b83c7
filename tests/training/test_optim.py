"""Schedules, and optimizers whose state survives a save to the bit."""

from __future__ import annotations

import json
from pathlib import Path

import bitsandbytes
import pytest
import torch
from safetensors.torch import load_file

from qpref import fsio
from qpref.errors import RecipeError
from qpref.recipe.sections import TrainSection
from qpref.training import optim

CPU = torch.device("cpu")


def rates(total: int, **settings) -> list[float]:
    train = TrainSection(learning_rate=8.0, **settings)
    return [optim.learning_rate(train, step, total) for step in range(total)]


def test_constant_schedule_stays():
    assert rates(4, schedule="constant", warmup_ratio=0.0) == [8.0, 8.0, 8.0, 8.0]


def test_linear_schedule_falls_along_a_line():
    assert rates(4, schedule="linear", warmup_ratio=0.0) == [8.0, 6.0, 4.0, 2.0]


def test_cosine_schedule_falls_along_half_a_cosine():
    # 8 (1 + cos(pi k / 4)) / 2 for k = 0..3; cos(pi / 4) = 0.70710678
    assert rates(4, schedule="cosine", warmup_ratio=0.0) == pytest.approx([8.0, 6.82842712, 4.0, 1.17157288])


@pytest.mark.parametrize(
    ("schedule", "after"),
    [("constant", [8.0, 8.0, 8.0]), ("linear", [8.0, 16 / 3, 8 / 3]), ("cosine", [8.0, 6.0, 2.0])],
)
def test_warmup_rises_to_the_peak_and_the_schedule_starts_there(schedule, after):
    # 0.4 of 5 steps are 2: 8/2 and 8, then 3 steps of the schedule; cos(pi / 3) = 0.5
    assert rates(5, schedule=schedule, warmup_ratio=0.4) == pytest.approx([4.0, 8.0, *after])


def test_warmup_rounds_up_to_whole_steps():
    assert rates(10, schedule="constant", warmup_ratio=0.11)[:3] == [4.0, 8.0, 8.0]


def test_warmup_of_the_whole_run_never_stands_still():
    assert rates(4, warmup_ratio=1.0) == [2.0, 4.0, 6.0, 8.0]


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("total", [1, 2, 7])
def test_every_step_of_every_schedule_moves(schedule, total):
    assert min(rates(total, schedule=schedule, warmup_ratio=0.1)) > 0


def test_seed_step_repeats_every_generator():
    import random

    import numpy

    draws = []
    for _ in range(2):
        optim.seed_step(7, 3)
        draws.append((random.random(), numpy.random.rand(), torch.rand(()).item()))
        torch.rand(5)
    assert draws[0] == draws[1]


def test_seed_step_differs_from_step_to_step():
    draws = set()
    for step in range(20):
        optim.seed_step(0, step)
        draws.add(torch.rand(()).item())
    assert len(draws) == 20


def small_problem(optimizer: str) -> tuple[list[torch.nn.Parameter], object]:
    """Two parameters, one large enough (4096) for bitsandbytes to keep its moments in 8 bits, and one that isn't."""
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(shape) * 0.1) for shape in ((64, 96), (4, 8))]
    return parameters, optim.make_optimizer(TrainSection(optimizer=optimizer, learning_rate=1e-2), parameters, CPU)


def advance(parameters: list[torch.nn.Parameter], optimizer, steps: range) -> None:
    """Steps towards 1: the gradient of sum((p - 1)^2) / 2, with noise that depends on the step alone."""
    for step in steps:
        noise = torch.Generator().manual_seed(step)
        for parameter in parameters:
            parameter.grad = parameter.detach() - 1 + torch.randn(parameter.shape, generator=noise) * 0.1
        optimizer.step()


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_optimizer_trains_on_the_cpu(name):
    parameters, optimizer = small_problem(name)
    before = [(parameter - 1).square().mean().item() for parameter in parameters]
    advance(parameters, optimizer, range(60))
    after = [(parameter - 1).square().mean().item() for parameter in parameters]
    assert all(late < early / 4 for early, late in zip(before, after, strict=True))


def test_adamw_8bit_keeps_its_moments_in_8_bits():
    parameters, optimizer = small_problem("adamw_8bit")
    advance(parameters, optimizer, range(1))
    tensors, _ = optim.optimizer_tensors(optimizer)
    assert (tensors["0.state1"].dtype, tensors["0.state2"].dtype) == (torch.uint8, torch.uint8)


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_optimizer_goes_on_from_a_saved_state_to_the_bit(name, tmp_path: Path):
    unbroken, optimizer = small_problem(name)
    advance(unbroken, optimizer, range(5))
    tensors, numbers = optim.optimizer_tensors(optimizer)
    fsio.write_tensors(tmp_path / "optimizer.safetensors", tensors)
    fsio.write_json(tmp_path / "numbers.json", numbers)
    kept = [parameter.detach().clone() for parameter in unbroken]
    advance(unbroken, optimizer, range(5, 10))

    resumed, fresh = small_problem(name)
    with torch.no_grad():
        for parameter, value in zip(resumed, kept, strict=True):
            parameter.copy_(value)
    saved_numbers = json.loads((tmp_path / "numbers.json").read_text())
    optim.restore_optimizer(fresh, load_file(tmp_path / "optimizer.safetensors"), saved_numbers)
    advance(resumed, fresh, range(5, 10))
    assert [parameter.tolist() for parameter in resumed] == [parameter.tolist() for parameter in unbroken]


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_restored_state_is_the_saved_one(name):
    parameters, optimizer = small_problem(name)
    advance(parameters, optimizer, range(3))
    tensors, numbers = optim.optimizer_tensors(optimizer)
    _, fresh = small_problem(name)
    optim.restore_optimizer(fresh, tensors, numbers)
    again, numbers_again = optim.optimizer_tensors(fresh)
    assert numbers_again == numbers
    assert {key: (value.dtype, value.tolist()) for key, value in again.items()} == {
        key: (value.dtype, value.tolist()) for key, value in tensors.items()
    }


def test_saved_tensors_are_no_views_of_the_living_state():
    parameters, optimizer = small_problem("adamw")
    advance(parameters, optimizer, range(1))
    tensors, _ = optim.optimizer_tensors(optimizer)
    before = tensors["0.exp_avg"].tolist()
    advance(parameters, optimizer, range(1, 2))
    assert tensors["0.exp_avg"].tolist() == before


@pytest.mark.parametrize("name", ["paged_adamw", "paged_adamw_8bit"])
def test_paged_optimizers_are_refused_on_the_cpu_with_the_reason(name):
    with pytest.raises(RecipeError, match=f"optimizer: {name} pages a GPU's memory, and this run is on the CPU"):
        small_problem(name)


@pytest.mark.parametrize("name", ["paged_adamw", "paged_adamw_8bit"])
def test_restored_paged_state_is_paged_again(name, monkeypatch):
    """On the meta device, which stands for a GPU; host memory stands for managed memory."""

    def get_paged(*shape, dtype, device):
        buffer = torch.empty(shape, dtype=dtype)
        buffer.is_paged = True
        return buffer

    monkeypatch.setattr(bitsandbytes.functional, "get_paged", get_paged)
    monkeypatch.setattr(bitsandbytes.functional, "fill", lambda buffer, value: buffer.fill_(value))
    shapes, meta = ((400, 300), (4, 8)), torch.device("meta")
    parameters = [torch.nn.Parameter(torch.empty(shape, device=meta)) for shape in shapes]
    optimizer = optim.make_optimizer(TrainSection(optimizer=name, learning_rate=1e-2), parameters, meta)
    dtype = torch.uint8 if "8bit" in name else torch.float32
    saved = {f"{index}.{state}": torch.full(shape, 3 + number, dtype=dtype) for index, shape in enumerate(shapes)
             for number, state in enumerate(("state1", "state2"))}  # fmt: skip
    optim.restore_optimizer(optimizer, saved, {"0.step": 5, "1.step": 5})
    large, small = (optimizer.state[parameter] for parameter in parameters)
    assert large["step"] == 5
    assert all(large[state].is_paged for state in ("state1", "state2"))
    assert all(torch.equal(large[state], saved[f"0.{state}"]) for state in ("state1", "state2"))
    assert small["state1"].device.type == small["state2"].device.type == "meta"  # too small to be paged


def test_weight_decay_is_decoupled():
    # With no gradient AdamW moves a weight by decay alone: p (1 - lr * decay) = 2 (1 - 0.1 * 0.5)
    parameter = torch.nn.Parameter(torch.tensor([2.0]))
    train = TrainSection(learning_rate=0.1, weight_decay=0.5)
    optimizer = optim.make_optimizer(train, [parameter], CPU)
    parameter.grad = torch.zeros(1)
    optimizer.step()
    assert parameter.item() == pytest.approx(1.9)


def test_optimizer_refuses_16_bit_parameters():
    with pytest.raises(AssertionError):
        optim.make_optimizer(TrainSection(), [torch.nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))], CPU)
