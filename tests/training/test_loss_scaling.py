"""fp16's loss scaling, on a CPU in float32: a scale is a power of two, so it changes no bit; a gradient that overflows
costs one step and half the scale; and a run that is killed right after resumes bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import outcome
from safetensors.torch import load_file

import qpref
from qpref.training import checkpoint
from qpref.training.loop import Trainer

SCALE = 2.0**16
OVERFLOW = 2
"""Steps before the one whose gradient overflows."""


class Killed(BaseException):
    """The process dies here."""


@pytest.fixture
def recipe(make_recipe):
    steps = {"train.epochs": 2, "train.max_steps": 5, "train.save_every": 1, "train.keep": 5}
    return make_recipe(steps | {"adapter.dropout": 0.1})


@pytest.fixture
def scaled(monkeypatch) -> None:
    """Loss scaling as in fp16."""
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device, enabled: scaler(device, init_scale=SCALE))


@pytest.fixture
def overflowing(monkeypatch) -> None:
    """An infinite gradient in one entry at one step."""
    compute = Trainer.compute_gradient

    def overflow(self: Trainer, examples):
        nonfinite = compute(self, examples)
        if self.state.step == OVERFLOW:
            next(iter(self.policy.trained_parameters().values())).grad[0, 0] = torch.inf
        return nonfinite

    monkeypatch.setattr(Trainer, "compute_gradient", overflow)


def saved(folder: Path, step: int, name: str):
    path = folder / "checkpoints" / f"step-{step:06d}" / name
    return json.loads(path.read_text()) if name == "state.json" else load_file(path)


def same(folder: Path, one: int, other: int, name: str) -> bool:
    before, after = (saved(folder, step, name) for step in (one, other))
    return all(torch.equal(value, after[key]) for key, value in before.items())


def test_a_scale_changes_no_bit_of_the_adapter(recipe, tmp_path, request):
    plain = outcome(qpref.train(recipe, output=tmp_path / "plain").path)
    request.getfixturevalue("scaled")
    assert outcome(qpref.train(recipe, output=tmp_path / "scaled").path).adapter == plain.adapter


def test_an_overflow_skips_its_step_and_halves_the_scale(recipe, scaled, overflowing, tmp_path):
    folder = qpref.train(recipe, output=tmp_path / "run").path
    for name in ("adapter.safetensors", "optimizer.safetensors"):
        assert same(folder, OVERFLOW, OVERFLOW + 1, name)
        assert not same(folder, OVERFLOW + 1, OVERFLOW + 2, name)
    scales = [saved(folder, step, "state.json")["scaler"]["scale"] for step in range(1, 6)]
    assert scales == [SCALE, SCALE, SCALE / 2, SCALE / 2, SCALE / 2]
    assert saved(folder, OVERFLOW + 1, "state.json")["nonfinite"] == 0  # it is by design, no fault of the data


@pytest.mark.parametrize("step", [OVERFLOW, OVERFLOW + 1], ids=["before the overflow", "after it"])
def test_a_run_killed_around_an_overflow_resumes_bit_for_bit(recipe, scaled, overflowing, tmp_path, step, monkeypatch):
    unbroken = outcome(qpref.train(recipe, output=tmp_path / "unbroken").path)
    save = checkpoint.save_checkpoint

    def die(folder: Path, current: checkpoint.Checkpoint, keep: int) -> Path:
        path = save(folder, current, keep)
        if current.step == step:
            raise Killed
        return path

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_checkpoint", die)
        with pytest.raises(Killed):
            qpref.train(recipe, output=tmp_path / "run")
    assert outcome(qpref.train(recipe, output=tmp_path / "run", resume=True).path) == unbroken
