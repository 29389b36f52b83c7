"""A run that was killed and resumed is the run that never stopped, bit for bit; nothing bad is ever resumed from.

`Killed` stands for the death of the process wherever a test needs it at an exact place: nothing catches it, and what is
on the disk then is what a killed process leaves. Real processes die of real signals further down.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from conftest import Outcome, outcome, preference_rows, rows_of, write_jsonl
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny_models import TinyModel
from transformers import AutoModelForCausalLM

import qpref
from qpref import fsio, locks
from qpref.errors import CheckpointError, NonFiniteError, RecipeError, RunLockedError, StoppedBySignal
from qpref.records import LossOutput
from qpref.training import checkpoint, objective, optim, stop
from qpref.training.folder import claimed
from qpref.training.metrics import Recorder

STEPS = 6
ADAPTER = Path("adapter") / "adapter_model.safetensors"
FILES = ("adapter.safetensors", "optimizer.safetensors", "reference.safetensors", "state.json", "MANIFEST.json")

Recipe = dict[str, dict[str, object]]


class Killed(BaseException):
    """The process dies here."""


@pytest.fixture(scope="module")
def make_toy(make_base, tmp_path_factory) -> Callable[..., Recipe]:
    """`make_toy(save_every=1)`: 2 epochs of 3 steps with dropout, a row every 2 steps, held-out rows every 3."""
    folder = tmp_path_factory.mktemp("toy")
    train = write_jsonl(folder / "train.jsonl", preference_rows(12))
    heldout = write_jsonl(folder / "heldout.jsonl", preference_rows(4, start=100))

    def make(**settings: object) -> Recipe:
        return {
            "model": {"base": str(make_base()), "quantization": "none", "dtype": "float32"},
            "adapter": {"rank": 4, "alpha": 8, "dropout": 0.1},
            "data": {"train": str(train), "heldout": str(heldout)},
            "checks": {"too_short": "off"},
            "loss": {"name": "dpo", "beta": 0.1},
            "train": {
                "learning_rate": 1e-3,
                "batch_size": 4,
                "epochs": 2,
                "log_every": 2,
                "eval_every": 3,
                "save_every": 1,
                "tokens_per_microbatch": 250,
                "gradient_checkpointing": False,
            }
            | settings,
            "sinks": [],
        }

    return make


@pytest.fixture(scope="module")
def unbroken(make_toy, tmp_path_factory) -> Outcome:
    return outcome(qpref.train(make_toy(), output=tmp_path_factory.mktemp("unbroken") / "run").path)


@pytest.fixture
def said() -> Iterator[list[str]]:
    """What qpref's log says, whatever handlers an earlier command has set."""
    lines: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    listener, log = Listener(), logging.getLogger("qpref")
    level = log.level
    log.addHandler(listener)
    log.setLevel(logging.INFO)
    yield lines
    log.setLevel(level)
    log.removeHandler(listener)


def train_until(recipe: Recipe, folder: Path, deadly: Callable[[pytest.MonkeyPatch], None], **options: bool) -> None:
    """Train until what `deadly` has laid in the way kills the run."""
    with pytest.MonkeyPatch.context() as patch:
        deadly(patch)
        with pytest.raises(Killed):
            qpref.train(recipe, output=folder, **options)


def after_save(step: int) -> Callable[[pytest.MonkeyPatch], None]:
    """Death right after the checkpoint of `step` is on the disk."""
    real = checkpoint.save_checkpoint

    def save(folder: Path, current: checkpoint.Checkpoint, keep: int) -> Path:
        path = real(folder, current, keep)
        if current.step == step:
            raise Killed
        return path

    return lambda patch: patch.setattr(checkpoint, "save_checkpoint", save)


def after_row(number: int) -> Callable[[pytest.MonkeyPatch], None]:
    """Death right after the row of that number (from 1) is on the disk, so before the step is saved."""
    real, rows = Recorder.write, []

    def write(recorder: Recorder, row: object) -> None:
        real(recorder, row)
        rows.append(row)
        if len(rows) == number:
            raise Killed

    return lambda patch: patch.setattr(Recorder, "write", write)


def writing(name: str) -> Callable[[pytest.MonkeyPatch], None]:
    """Death when the JSON file of that name is about to be written."""
    real = fsio.write_json

    def write(path: Path, value: object) -> None:
        if path.name == name:
            raise Killed
        real(path, value)

    return lambda patch: patch.setattr(fsio, "write_json", write)


def write_start_adapter(base: Path, folder: Path, seed: int = 1) -> Path:
    """Write a random adapter, in PEFT's format."""
    torch.manual_seed(seed)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(folder)
    return folder


# Killed at an exact place, resumed in the same process.


@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_run_killed_after_a_save_ends_as_if_it_never_stopped(make_toy, unbroken, tmp_path, step):
    # At odd steps a window of log_every = 2 is half full; at 6 nothing but the adapter is left to write.
    train_until(make_toy(), tmp_path / "run", after_save(step))
    assert outcome(qpref.train(make_toy(), output=tmp_path / "run", resume=True).path) == unbroken


@pytest.mark.parametrize("number", range(1, 7))
def test_run_killed_after_a_row_ends_as_if_it_never_stopped(make_toy, unbroken, tmp_path, number):
    # Rows: held-out 0, train 2, held-out 3, train 4, train 6, held-out 6. Saves: after 3 and 6.
    recipe = make_toy(save_every="epoch")
    train_until(recipe, tmp_path / "run", after_row(number))
    assert outcome(qpref.train(recipe, output=tmp_path / "run", resume=True).path) == unbroken


def test_run_killed_before_its_manifest_goes_on_from_the_save_before(make_toy, unbroken, tmp_path, said):
    train_until(make_toy(), tmp_path / "run", after_save(2))
    train_until(make_toy(), tmp_path / "run", writing("MANIFEST.json"), resume=True)
    assert outcome(qpref.train(make_toy(), output=tmp_path / "run", resume=True).path) == unbroken
    assert said.count("resuming after step 2") == 2


def test_run_killed_at_every_step_in_turn_ends_as_if_it_never_stopped(make_toy, unbroken, tmp_path):
    train_until(make_toy(), tmp_path / "run", after_save(1))
    for step in range(2, STEPS + 1):
        train_until(make_toy(), tmp_path / "run", after_save(step), resume=True)
    assert outcome(qpref.train(make_toy(), output=tmp_path / "run", resume=True).path) == unbroken


def test_8_bit_optimizer_resumes_to_the_bit(make_toy, tmp_path):
    recipe = make_toy(optimizer="adamw_8bit")
    recipe["adapter"]["rank"] = 64  # so that moments have the 4096 elements from which on they are 8-bit
    straight = outcome(qpref.train(recipe, output=tmp_path / "straight").path)
    train_until(recipe, tmp_path / "run", after_save(3))
    assert outcome(qpref.train(recipe, output=tmp_path / "run", resume=True).path) == straight


def test_nf4_run_resumes_to_the_bit(make_toy, tmp_path):
    recipe = make_toy(gradient_checkpointing=True)
    recipe["model"] |= {"quantization": "nf4", "dtype": "bf16"}
    straight = outcome(qpref.train(recipe, output=tmp_path / "straight").path)
    train_until(recipe, tmp_path / "run", after_save(3))
    assert outcome(qpref.train(recipe, output=tmp_path / "run", resume=True).path) == straight


def test_run_with_adapters_on_experts_resumes_to_the_bit(make_toy, tmp_path):
    recipe = make_toy(gradient_checkpointing=1)
    base = TinyModel(model_type="gpt_oss").write(tmp_path / "base")
    recipe["model"] |= {"quantization": "nf4", "dtype": "bf16", "base": str(base)}
    recipe["adapter"] = {"rank": 2, "experts": True}
    straight = outcome(qpref.train(recipe, output=tmp_path / "straight").path)
    assert any(".experts.base_layer.lora_B" in name for name in load_file(tmp_path / "straight" / ADAPTER))
    train_until(recipe, tmp_path / "run", after_save(3))
    assert outcome(qpref.train(recipe, output=tmp_path / "run", resume=True).path) == straight


def test_run_from_an_adapter_resumes_to_the_bit(make_toy, make_base, tmp_path):
    recipe = make_toy(max_steps=4) | {"reference": {"cache": False}}  # so that the resumed run scores it itself
    recipe["adapter"]["start"] = str(write_start_adapter(make_base(), tmp_path / "start"))
    straight = outcome(qpref.train(recipe, output=tmp_path / "straight").path)
    train_until(recipe, tmp_path / "run", after_save(2))
    assert outcome(qpref.train(recipe, output=tmp_path / "run", resume=True).path) == straight


def test_infinite_metric_in_a_half_full_window_survives_the_save(make_toy, tmp_path, monkeypatch):
    # JSON has no infinity: the window's sum has to be saved all the same. Step 1 is spoilt, the row comes after step 2.
    spoilt, real = [], objective.LossCaller.__call__

    def infinite_once(loss, *given):
        output = real(loss, *given)
        if torch.is_grad_enabled() and not spoilt:
            spoilt.append(output)
            return replace(output, metrics={**output.metrics, "rewards/chosen": output.losses.detach() * torch.inf})
        return output

    monkeypatch.setattr(objective.LossCaller, "__call__", infinite_once)
    train_until(make_toy(), tmp_path / "run", after_save(1))
    qpref.train(make_toy(), output=tmp_path / "run", resume=True)
    rewards = [row["rewards/chosen"] for row in rows_of(tmp_path / "run") if row["split"] == "train"]
    assert [reward is None for reward in rewards] == [True, False, False]


def test_third_non_finite_step_in_a_row_stops_the_run_across_a_resume(make_toy, tmp_path, monkeypatch):
    # Every step from the third on is spoilt; the run dies after the fourth and has one more before it gives up.
    begun, real_seed, real_loss = [], optim.seed_step, objective.LossCaller.__call__

    def seed_step(seed: int, step: int) -> None:
        begun.append(step)
        real_seed(seed, step)

    def spoilt(loss: Any, *given: Any) -> LossOutput:
        output = real_loss(loss, *given)
        bad = torch.is_grad_enabled() and begun[-1] >= 2
        steep = output.losses + (output.losses - output.losses.detach()).sqrt()
        return replace(output, losses=steep) if bad else output

    monkeypatch.setattr(optim, "seed_step", seed_step)
    monkeypatch.setattr(objective.LossCaller, "__call__", spoilt)
    train_until(make_toy(), tmp_path / "run", after_save(4))
    with pytest.raises(NonFiniteError, match="step 5: the gradient was not finite 3 times in a row"):
        qpref.train(make_toy(), output=tmp_path / "run", resume=True)


def test_seconds_go_on_over_a_resume(make_toy, tmp_path, monkeypatch):
    # A first step of a second or more is still counted in the last row of a resumed run that takes far less.
    real = optim.seed_step
    monkeypatch.setattr(optim, "seed_step", lambda seed, step: (time.sleep(0 if step else 1.0), real(seed, step)))
    train_until(make_toy(max_steps=2, log_every=1), tmp_path / "run", after_save(1))
    qpref.train(make_toy(max_steps=2, log_every=1), output=tmp_path / "run", resume=True)
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["seconds"] >= 1.0


# Where there is nothing to resume.


def test_resume_without_a_checkpoint_starts_from_the_beginning_and_says_so(make_toy, unbroken, tmp_path, said):
    train_until(make_toy(save_every="epoch"), tmp_path / "run", after_row(2))
    again = qpref.train(make_toy(), output=tmp_path / "run", resume=True).path
    assert f"{tmp_path / 'run'}: no checkpoint yet; starting from the beginning" in said
    assert outcome(again) == unbroken


def test_resume_of_a_folder_that_is_not_there_starts_from_the_beginning(make_toy, tmp_path, said):
    qpref.train(make_toy(max_steps=1), output=tmp_path / "run", resume=True)
    assert f"{tmp_path / 'run'}: no checkpoint yet; starting from the beginning" in said


def test_resume_of_a_finished_run_says_so_and_changes_nothing(make_toy, tmp_path, said):
    folder = qpref.train(make_toy(), output=tmp_path / "run").path

    def stamps() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != "LOCK"}

    before = stamps()
    qpref.train(make_toy(), output=folder, resume=True)
    assert said[-1] == f"{folder}: this run is complete"
    assert stamps() == before


@pytest.mark.parametrize("resume", [False, True])
def test_start_that_was_killed_before_its_run_json_is_in_nobodys_way(make_toy, unbroken, tmp_path, resume):
    (tmp_path / "run").mkdir()  # one that the run has not made it does not remove either, as a killed one would not
    train_until(make_toy(), tmp_path / "run", writing("run.json"))
    (tmp_path / "run" / ".tmp-run.json-0123456789abcdef").write_text("{")
    assert (tmp_path / "run" / "recipe.lock.toml").is_file()
    assert outcome(qpref.train(make_toy(), output=tmp_path / "run", resume=resume).path) == unbroken


def test_overwrite_that_was_killed_can_be_repeated(make_toy, unbroken, tmp_path):
    folder = qpref.train(make_toy(), output=tmp_path / "run").path
    (folder / "run.json").unlink()  # it goes first
    assert outcome(qpref.train(make_toy(), output=folder, overwrite=True).path) == unbroken


def test_files_that_are_no_runs_are_left_alone_even_with_overwrite(make_toy, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years")
    with pytest.raises(RecipeError, match="holds files and no run"):
        qpref.train(make_toy(), output=tmp_path / "run", overwrite=True)
    assert (tmp_path / "run" / "thesis.tex").read_text() == "years"


def test_run_is_not_trained_over_without_a_word(make_toy, tmp_path):
    folder = qpref.train(make_toy(max_steps=1), output=tmp_path / "run").path
    with pytest.raises(RecipeError, match="holds a run"):
        qpref.train(make_toy(max_steps=1), output=folder)


# Another run's checkpoint.


@pytest.fixture(scope="module")
def halfway(make_toy, tmp_path_factory) -> Path:
    """A run killed after its fourth save: checkpoints 3 and 4. Copy it before changing it."""
    folder = tmp_path_factory.mktemp("halfway") / "run"
    train_until(make_toy(), folder, after_save(4))
    return folder


@pytest.fixture
def stopped(halfway, tmp_path) -> Path:
    return Path(shutil.copytree(halfway, tmp_path / "run"))


def with_rate(recipe: Recipe, make_base, folder: Path) -> None:
    recipe["train"]["learning_rate"] = 2e-3


def with_beta(recipe: Recipe, make_base, folder: Path) -> None:
    recipe["loss"]["beta"] = 0.2


def with_row_changed(recipe: Recipe, make_base, folder: Path) -> None:
    rows = preference_rows(12)
    rows[7] |= {"chosen": "Eight."}
    recipe["data"]["train"] = str(write_jsonl(folder / "changed.jsonl", rows))


def with_weight_changed(recipe: Recipe, make_base, folder: Path) -> None:
    rows = preference_rows(12)
    rows[7] |= {"weight": 0.5}
    recipe["data"]["train"] = str(write_jsonl(folder / "changed.jsonl", rows))


def with_rows_in_another_order(recipe: Recipe, make_base, folder: Path) -> None:
    recipe["data"]["train"] = str(write_jsonl(folder / "changed.jsonl", preference_rows(12)[::-1]))


def with_other_heldout(recipe: Recipe, make_base, folder: Path) -> None:
    recipe["data"]["heldout"] = str(write_jsonl(folder / "changed.jsonl", preference_rows(4, start=200)))


def with_other_base(recipe: Recipe, make_base, folder: Path) -> None:
    recipe["model"]["base"] = str(make_base(initializer_range=0.03))


CHANGES = [
    (with_rate, "recipe"),
    (with_beta, "recipe"),
    (with_row_changed, "training data"),
    (with_weight_changed, "training data"),
    (with_rows_in_another_order, "training data"),
    (with_other_heldout, "held-out data"),
    (with_other_base, "base model"),
]


@pytest.mark.parametrize(("change", "named"), CHANGES, ids=[change.__name__ for change, _ in CHANGES])
def test_resume_with_something_else_is_refused_by_its_name(make_toy, make_base, stopped, tmp_path, change, named):
    recipe = make_toy()
    change(recipe, make_base, tmp_path)
    with pytest.raises(CheckpointError) as refused:
        qpref.train(recipe, output=stopped, resume=True)
    assert refused.value.what == f"{stopped}/checkpoints/step-000004: was made with another {named}"


def test_refusal_names_everything_that_changed(make_toy, make_base, stopped, tmp_path):
    recipe = make_toy()
    with_rate(recipe, make_base, tmp_path)
    with_other_heldout(recipe, make_base, tmp_path)
    with pytest.raises(CheckpointError, match="was made with another recipe and another held-out data"):
        qpref.train(recipe, output=stopped, resume=True)


def test_refused_resume_leaves_the_run_as_it_was(make_toy, make_base, stopped, tmp_path, unbroken):
    recipe = make_toy()
    with_rate(recipe, make_base, tmp_path)
    with pytest.raises(CheckpointError):
        qpref.train(recipe, output=stopped, resume=True)
    assert outcome(qpref.train(make_toy(), output=stopped, resume=True).path) == unbroken


def test_resume_with_another_start_adapter_is_refused(make_toy, make_base, tmp_path):
    # It is the reference: rows that have not been seen yet would get their scores from another one.
    for seed in (1, 2):
        write_start_adapter(make_base(), tmp_path / f"start-{seed}", seed)
    recipe = make_toy()
    recipe["adapter"]["start"] = str(tmp_path / "start-1")
    train_until(recipe, tmp_path / "run", after_save(2))
    recipe["adapter"]["start"] = str(tmp_path / "start-2")
    with pytest.raises(CheckpointError, match="was made with another start adapter"):
        qpref.train(recipe, output=tmp_path / "run", resume=True)


def test_moved_files_and_other_sinks_do_not_hinder_a_resume(make_toy, stopped, tmp_path, unbroken):
    recipe = make_toy()
    for key in ("train", "heldout"):
        recipe["data"][key] = str(shutil.copy(recipe["data"][key], tmp_path / f"moved-{key}.jsonl"))
    recipe["model"]["base"] = str(shutil.copytree(recipe["model"]["base"], tmp_path / "moved-base"))
    recipe["sinks"] = [{"name": "console"}]
    assert outcome(qpref.train(recipe, output=stopped, resume=True).path) == unbroken


# Damaged checkpoints.


def flip(path: Path, place: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << bit
    path.write_bytes(data)


def link_to_itself(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def take_from_the_one_before(path: Path) -> None:
    shutil.copy(path.parent.with_name("step-000003") / path.name, path)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "first byte": lambda path: flip(path, 0),
    "middle byte": lambda path: flip(path, path.stat().st_size // 2),
    "last byte": lambda path: flip(path, -1),
    "cut": lambda path: os.truncate(path, path.stat().st_size - 2),
    "empty": lambda path: os.truncate(path, 0),
    "deleted": Path.unlink,
    "a link": link_to_itself,
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "from another checkpoint": take_from_the_one_before,
}


CASES = [(name, damage) for name in FILES for damage in DAMAGE]
CASES.remove(("reference.safetensors", "from another checkpoint"))  # all rows were known by step 3: they are the same


@pytest.mark.parametrize(("name", "damage"), CASES)
def test_damaged_checkpoint_is_passed_over_by_name(stopped, said, name, damage):
    DAMAGE[damage](stopped / "checkpoints" / "step-000004" / name)
    kept = checkpoint.load_newest(stopped / "checkpoints", {})
    assert (kept.step, [line.partition(": ")[0] for line in said]) == (
        3,
        [f"{stopped}/checkpoints/step-000004 is skipped"],
    )


def test_no_flipped_bit_passes(stopped):
    # One bit of every byte of the small files, and of 400 bytes spread over each of the large ones.
    shutil.rmtree(stopped / "checkpoints" / "step-000003")
    accepted, tried = [], 0
    for name in FILES:
        path = stopped / "checkpoints" / "step-000004" / name
        size = path.stat().st_size
        for place in range(0, size, max(1, size // 400) if name.endswith("safetensors") else 1):
            flip(path, place, place % 8)
            tried += 1
            with contextlib.suppress(CheckpointError):
                checkpoint.load_newest(stopped / "checkpoints", {})
                accepted.append((name, place))
            flip(path, place, place % 8)
    assert (accepted, tried > 2000) == ([], True)


def test_renamed_checkpoint_is_passed_over(stopped):
    (stopped / "checkpoints" / "step-000004").rename(stopped / "checkpoints" / "step-000009")
    assert checkpoint.load_newest(stopped / "checkpoints", {}).step == 3


def test_link_to_a_checkpoint_is_passed_over(stopped):
    newest = stopped / "checkpoints" / "step-000004"
    newest.rename(stopped / "elsewhere")
    newest.symlink_to(stopped / "elsewhere")
    assert checkpoint.load_newest(stopped / "checkpoints", {}).step == 3


@pytest.mark.parametrize("damage", ["empty", "deleted"])
def test_run_that_fell_back_ends_as_if_nothing_had_happened(make_toy, stopped, unbroken, said, damage):
    DAMAGE[damage](stopped / "checkpoints" / "step-000004" / "optimizer.safetensors")
    again = qpref.train(make_toy(), output=stopped, resume=True).path
    assert "resuming after step 3" in said
    assert outcome(again) == unbroken


def test_resume_with_no_good_checkpoint_is_refused(make_toy, stopped):
    for step in (3, 4):
        flip(stopped / "checkpoints" / f"step-{step:06}" / "adapter.safetensors", 200)
    with pytest.raises(CheckpointError, match="none of 2 checkpoints verifies") as refused:
        qpref.train(make_toy(), output=stopped, resume=True)
    assert refused.value.exit_code == 4


def test_metrics_are_cut_to_the_place_of_the_checkpoint(make_toy, stopped):
    # What came after the save is written again, so each row stands once.
    with (stopped / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "split": "train"}\n{"st')
    qpref.train(make_toy(), output=stopped, resume=True)
    steps = [(row["split"], row["step"]) for row in rows_of(stopped)]
    assert steps == [("eval", 0), ("train", 2), ("eval", 3), ("train", 4), ("train", 6), ("eval", 6)]


def test_rows_lost_since_a_checkpoint_are_written_again_from_the_one_before(make_toy, unbroken, stopped, said):
    lines = (stopped / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    assert json.loads(lines[-1])["step"] == 4
    (stopped / "metrics.jsonl").write_bytes(b"".join(lines[:-1]) + lines[-1][:-1])
    assert outcome(qpref.train(make_toy(), output=stopped, resume=True).path) == unbroken
    assert "resuming after step 3" in said
    assert any("is shorter than it was at step 4" in line for line in said)


def test_metrics_shorter_than_at_every_checkpoint_are_refused(make_toy, stopped):
    os.truncate(stopped / "metrics.jsonl", 10)
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl: is shorter than it was at step 3"):
        qpref.train(make_toy(), output=stopped, resume=True)


def test_leftovers_of_a_killed_save_are_removed(make_toy, stopped):
    leftovers = [
        stopped / "checkpoints" / ".tmp-step-000005-0123456789abcdef",
        stopped / ".tmp-adapter-0123456789abcdef",
    ]
    for folder in leftovers:
        folder.mkdir()
        (folder / "adapter.safetensors").write_bytes(b"half")
    qpref.train(make_toy(), output=stopped, resume=True)
    assert not any(folder.exists() for folder in leftovers)


@pytest.mark.parametrize(("keep", "kept"), [(1, [5, 6]), (2, [5, 6]), (4, [3, 4, 5, 6])])
def test_rotation_keeps_the_newest_and_never_fewer_than_two(make_toy, tmp_path, keep, kept):
    folder = qpref.train(make_toy(keep=keep), output=tmp_path / "run").path
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [f"step-{step:06}" for step in kept]


def test_bad_checkpoint_is_not_counted_among_those_kept(make_toy, stopped):
    # 3 is good, 4 is bad. After the save of 6 alone, good ones are 3 and 6; a bad 4 between them would push 3 out.
    flip(stopped / "checkpoints" / "step-000004" / "adapter.safetensors", 200)
    qpref.train(make_toy(save_every="epoch"), output=stopped, resume=True)
    assert sorted(path.name for path in (stopped / "checkpoints").iterdir()) == ["step-000003", "step-000006"]


# Signals, in this process.


@pytest.fixture
def in_foreground():
    """Signals have their default effect, even if the tests run in the background or under nohup."""
    defaults = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGTERM: signal.SIG_DFL,
        signal.SIGHUP: signal.SIG_DFL,
    }
    before = {number: signal.signal(number, handler) for number, handler in defaults.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("in_foreground")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signal_stops_the_run_saved_and_a_resume_completes_it(make_toy, unbroken, tmp_path, said, number):
    # The row of step 2 brings the signal; saves are at 3 and 6, so the one of step 2 is the signal's.
    recipe, real = make_toy(save_every="epoch"), Recorder.write

    def write(recorder: Recorder, row: Any) -> None:
        real(recorder, row)
        if (row.split, row.step) == ("train", 2):
            signal.raise_signal(number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recorder, "write", write)
        with pytest.raises(StoppedBySignal, match="stopped after step 2, saved") as stop:
            qpref.train(recipe, output=tmp_path / "run")
    assert stop.value.exit_code == 128 + number
    assert outcome(qpref.train(recipe, output=tmp_path / "run", resume=True).path) == unbroken
    assert "resuming after step 2" in said


@pytest.mark.usefixtures("in_foreground")
def test_second_interrupt_stops_at_once():
    with stop.stop_request() as requested:
        signal.raise_signal(signal.SIGINT)
        assert list(requested) == [signal.SIGINT]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.usefixtures("in_foreground")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_is_ignored_stays_so(number):
    signal.signal(number, signal.SIG_IGN)
    with stop.stop_request() as requested:
        signal.raise_signal(number)
        assert list(requested) == []
    assert signal.getsignal(number) == signal.SIG_IGN


def test_signal_handlers_are_put_back_after_training(make_toy, tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    qpref.train(make_toy(max_steps=1), output=tmp_path / "run")
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before


# Real processes.

PRELOADED = [
    "transformers.models.llama.modeling_llama",
    "peft",
    "bitsandbytes",
    "qpref.cli.train",
    "qpref.training.run",
]
LONG = {"epochs": 14, "save_every": 1, "log_every": 1, "eval_every": 42}
"""42 steps: time enough to be killed in."""


def command(arguments: Sequence[str], output: Path) -> None:
    """The `qpref` command, as the body of a process; both its streams go to `output`."""
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    from qpref.cli import main

    main(list(arguments))


@dataclass
class Child:
    """A `qpref train` in a process of its own."""

    process: Any
    output: Path

    def wait(self) -> tuple[int, str]:
        """Its exit code and what it said."""
        self.process.join(120)
        return self.process.exitcode, self.output.read_text()


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Callable[..., Child]:
    """`start(recipe, folder, "--resume")`: a fresh process, forked from one that has only imported what it needs."""
    folder = tmp_path_factory.mktemp("children")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    children: list[Child] = []

    def make(recipe: Recipe, output: Path, *options: str) -> Child:
        stem = folder / f"child-{len(children)}"
        stem.with_suffix(".toml").write_text(tomli_w.dumps(recipe))
        arguments = ["train", str(stem.with_suffix(".toml")), "--output", str(output), *options]
        process = context.Process(target=command, args=(arguments, stem.with_suffix(".txt")))
        process.start()
        children.append(Child(process, stem.with_suffix(".txt")))
        return children[-1]

    with pytest.MonkeyPatch.context() as patch:
        # As many threads as this process has, since sums depend on it, and none that spins on a busy machine.
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("OMP_WAIT_POLICY", "passive")
        yield make
    for child in children:
        child.process.kill()
        child.process.join()


def wait_for_step(folder: Path, step: int, timeout: float = 120) -> None:
    """Until metrics.jsonl shows the row of `step`."""
    deadline, path = time.monotonic() + timeout, folder / "metrics.jsonl"
    while not (path.is_file() and f'{{"step": {step}, "split": "train"' in path.read_text()):
        assert time.monotonic() < deadline, f"step {step} never came"
        time.sleep(0.002)


@pytest.fixture(scope="module")
def long_run(make_toy, start, tmp_path_factory) -> Outcome:
    folder = tmp_path_factory.mktemp("long") / "run"
    code, said = start(make_toy(**LONG), folder).wait()
    assert code == 0, said
    return outcome(folder)


def test_process_killed_three_times_ends_as_if_it_never_stopped(make_toy, start, long_run, tmp_path):
    recipe, options = make_toy(**LONG), []
    for step in (4, 13, 25):
        child = start(recipe, tmp_path / "run", *options)
        wait_for_step(tmp_path / "run", step)
        os.kill(child.process.pid, signal.SIGKILL)
        assert child.wait()[0] == -signal.SIGKILL
        options = ["--resume"]
    code, said = start(recipe, tmp_path / "run", "--resume").wait()
    assert (code, "resuming after step" in said) == (0, True)
    assert outcome(tmp_path / "run") == long_run


def test_terminated_command_exits_143_saved_and_a_resume_completes_it(make_toy, start, long_run, tmp_path):
    recipe = make_toy(**LONG)
    (tmp_path / "recipe.toml").write_text(tomli_w.dumps(recipe))
    child = subprocess.Popen(
        [sys.executable, "-c", "from qpref.cli import main; main()", "train", "recipe.toml", "--output", "run"],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for_step(tmp_path / "run", 5)
    child.send_signal(signal.SIGTERM)
    said = child.communicate(timeout=120)[1]
    assert child.returncode == 143
    stopped_after = max(int(path.name[5:]) for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert f"error: stopped after step {stopped_after}, saved\nhint: continue with --resume\n" in said
    code, said = start(recipe, tmp_path / "run", "--resume").wait()
    assert (code, f"resuming after step {stopped_after}\n" in said) == (0, True)
    assert outcome(tmp_path / "run") == long_run


def test_folder_that_another_process_holds_exits_7_by_its_pid(make_toy, start, tmp_path):
    (tmp_path / "run").mkdir()
    with locks.locked(tmp_path / "run"):
        code, said = start(make_toy(), tmp_path / "run").wait()
    assert (code, f"another process is writing this run (pid {os.getpid()} on " in said) == (7, True)


def test_lock_of_a_killed_process_holds_nobody_up(make_toy, start, tmp_path):
    child = start(make_toy(**LONG), tmp_path / "run")
    wait_for_step(tmp_path / "run", 2)
    os.kill(child.process.pid, signal.SIGKILL)
    child.wait()
    with claimed(tmp_path / "run", resume=True, overwrite=False) as folder:
        assert folder.run_json.is_file()


def test_loser_of_a_race_for_a_new_folder_leaves_it_to_the_winner(tmp_path, monkeypatch):
    # The other process makes and locks the folder between our look at it and our own attempt.
    real, held = fsio.make_folder, []

    def make_after_the_other(path: Path, mode: int = 0o700) -> None:
        real(path, mode)
        held.append((path / "LOCK").open("w"))
        fcntl.flock(held[0], fcntl.LOCK_EX)

    monkeypatch.setattr(fsio, "make_folder", make_after_the_other)
    with pytest.raises(RunLockedError), claimed(tmp_path / "run", resume=False, overwrite=False):
        pass
    held[0].close()
    assert (tmp_path / "run" / "LOCK").is_file()


def test_twelve_simultaneous_starts_are_one_run(make_toy, start, unbroken, tmp_path):
    children = [start(make_toy(), tmp_path / "run") for _ in range(12)]
    codes = sorted(child.wait()[0] for child in children)
    # A late one may find the finished run, and refuse to train over it (2).
    assert codes[0] == 0
    assert set(codes[1:]) <= {2, 7}
    assert outcome(tmp_path / "run") == unbroken
