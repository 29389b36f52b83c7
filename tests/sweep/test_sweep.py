"""`qpref sweep`: each run equals a run alone, one base is loaded, failures stop no other run, and it resumes."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys

import pytest
import tomli_w
import torch
from click.testing import CliRunner
from conftest import outcome

from qpref.cli import main
from qpref.hooks.process_state import ProcessState
from qpref.policy import load
from qpref.policy.kept_base import KeptBase
from qpref.recipe.resolve import make_plan
from qpref.training import prepare
from qpref.training import run as run_module
from qpref.training.loop import Trainer
from qpref.training.run import train_plan

GRID = ("--over", "loss.beta=0.05,0.3", "--over", "loss.name=dpo,ipo")
NAMES = ("beta=0.05,name=dpo", "beta=0.05,name=ipo", "beta=0.3,name=dpo", "beta=0.3,name=ipo")


@pytest.fixture
def recipe(make_recipe, tmp_path, monkeypatch):
    """A recipe of three steps with NF4, dropout and a cache of its own."""
    monkeypatch.setenv("QPREF_CACHE", str(tmp_path / "cache"))
    changes = {"model.quantization": "nf4", "model.dtype": "bf16", "adapter.dropout": 0.1}
    path = tmp_path / "recipe.toml"
    path.write_text(tomli_w.dumps(make_recipe(changes | {"train.max_steps": 3, "train.save_every": 1})))
    return path


def sweep(recipe, *arguments, code=0):
    output = recipe.parent / "sweep"
    done = CliRunner().invoke(main, ["sweep", str(recipe), "--output", str(output), *arguments], catch_exceptions=False)
    assert done.exit_code == code, done.output
    return done


def alone(recipe, name, *overrides):
    """Train one point with `qpref train` in a process and with a cache of its own."""
    settings = [part for override in overrides for part in ("--set", override)]
    folder = recipe.parent / "alone" / name
    environment = {"QPREF_CACHE": str(recipe.parent / f"cache-{name}"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    subprocess.run(
        [sys.executable, "-m", "qpref", "train", str(recipe), *settings, "--output", str(folder)],
        check=True,
        capture_output=True,
        env=environment,
    )
    return folder


def test_each_run_equals_a_run_alone_over_one_base_and_one_reference_cache(recipe, monkeypatch):
    loads, load_base = [], load.load_base
    monkeypatch.setattr(load, "load_base", lambda *arguments: loads.append(1) or load_base(*arguments))
    before = ProcessState.now(random_numbers=True)
    done = sweep(recipe, *GRID)
    assert before.restore() == ["the logger of qpref"]  # the command's own
    folders = [recipe.parent / "sweep" / name for name in NAMES]
    assert loads == [1]
    assert len(list((recipe.parent / "cache" / "reference").glob("*/*.shard"))) == 1
    last = alone(recipe, "last", "loss.beta=0.3", "loss.name=ipo")
    assert outcome(folders[-1]) == outcome(last)
    assert len({outcome(folder).adapter for folder in folders}) == 4
    table = [line.split()[0] for line in done.stdout.splitlines() if line.startswith("beta=")]
    assert table == list(NAMES)
    assert "ACCURACY BY REWARD MARGIN (95 %)" in done.stdout
    assert done.stdout.endswith(f"report: {recipe.parent / 'sweep' / 'report.html'}\n")
    page = (recipe.parent / "sweep" / "report.html").read_text()
    assert all(name in page for name in NAMES)


def test_a_run_leaves_nothing_on_the_kept_base(recipe, tmp_path):
    kept = KeptBase()
    plan = make_plan(recipe, output=tmp_path / "run")
    train_plan(plan, kept=kept)
    modules = {name: type(module).__name__ for name, module in kept.model.named_modules()}
    tensors = digests(kept.model)
    assert not any("lora" in name for name in modules)
    train_plan(make_plan(recipe, ["loss.name=ipo", "adapter.rank=2"], tmp_path / "other"), kept=kept)
    assert {name: type(module).__name__ for name, module in kept.model.named_modules()} == modules
    assert digests(kept.model) == tensors


def digests(model):
    return {
        name: hashlib.sha256(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()).hexdigest()
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
    }


def test_the_limit_counts_the_kept_base_as_free(recipe, tmp_path, monkeypatch):
    held = []
    monkeypatch.setattr(prepare, "enforced_limit", lambda *arguments: held.append(arguments[2]) or 2**30)
    kept = KeptBase()
    for name in ("one", "two"):
        train_plan(make_plan(recipe, ["train.max_steps=1"], tmp_path / name), kept=kept)
    weights = sum(tensor.nbytes for tensor in kept.model.parameters())
    assert held[0] == 0
    assert weights < held[1] < 1.5 * weights  # the scales of 4-bit weights too


def test_a_failed_run_is_reported_and_the_others_are_trained(recipe, monkeypatch):
    loop = run_module._run_loop

    def without_memory(session, *arguments):
        if session.prepared.plan.document["loss"]["beta"] == 0.2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return loop(session, *arguments)

    monkeypatch.setattr(run_module, "_run_loop", without_memory)
    axes = ("--over", "loss.beta=hot,0.2,0.3", "--over", "train.batch_size=4,400")
    done = sweep(recipe, *axes, "--set", 'sinks=[{name="console"}]', "--json", code=2)
    described = json.loads(done.stdout)
    assert [(one["set"], one["exit_code"]) for one in described] == [
        (["loss.beta=hot", "train.batch_size=4"], 2),
        (["loss.beta=hot", "train.batch_size=400"], 2),
        (["loss.beta=0.2", "train.batch_size=4"], 5),
        (["loss.beta=0.2", "train.batch_size=400"], 2),
        (["loss.beta=0.3", "train.batch_size=4"], 0),
        (["loss.beta=0.3", "train.batch_size=400"], 2),
    ]
    assert described[4]["finished"]
    assert described[4]["accuracy"]["examples"] == 4
    assert "batch_size is 400, and there are 12 training examples" in described[3]["error"]
    assert "error: beta=0.2,batch_size=4: the device ran out of memory" in done.stderr
    assert "error: beta=hot,batch_size=4: " in done.stderr


def test_a_killed_sweep_resumes_where_it_was(recipe, monkeypatch, tmp_path):
    axes = ("--over", "loss.beta=0.05,0.1")
    step, taken = Trainer.step, []

    def killed(trainer):
        taken.append(1)
        if len(taken) == 5:
            raise SystemExit(137)
        return step(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", killed)
        sweep(recipe, *axes, code=137)
    first = recipe.parent / "sweep" / "beta=0.05"
    before = (first / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns
    refused = sweep(recipe, *axes, code=2)
    assert f"error: {first}: holds a run\nhint: continue with --resume" in refused.stderr
    changed = sweep(recipe, *axes, "--set", "train.learning_rate=0.5", "--resume", code=4)
    assert f"error: {first}: is the run of another recipe" in changed.stderr
    done = sweep(recipe, *axes, "--resume")
    assert "resuming after step 1" in done.stderr
    assert (first / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns == before
    assert sum(line.startswith("beta=") for line in done.stdout.splitlines()) == 2
    monkeypatch.setenv("QPREF_CACHE", str(tmp_path / "another"))
    whole = train_plan(make_plan(recipe, ["loss.beta=0.1"], tmp_path / "whole"))
    assert outcome(recipe.parent / "sweep" / "beta=0.1") == outcome(whole)


def test_a_signal_saves_the_run_and_starts_no_other(recipe, monkeypatch):
    step = Trainer.step

    def signalled(trainer):
        os.kill(os.getpid(), signal.SIGTERM)
        return step(trainer)

    monkeypatch.setattr(Trainer, "step", signalled)
    done = sweep(recipe, "--over", "loss.beta=0.05,0.1", code=143)
    assert done.stderr.endswith("error: stopped after step 1, saved\nhint: continue with --resume\n")
    assert [folder.name for folder in (recipe.parent / "sweep").iterdir() if folder.is_dir()] == ["beta=0.05"]


def test_a_dry_run_checks_every_point_and_trains_none(recipe):
    done = sweep(recipe, "--over", "loss.beta=0.1,hot", "--dry-run", code=2)
    assert done.stdout == (
        f"RUN       STATE\nbeta=0.1  ready\nbeta=hot  refused\n\n# sweep folder: {recipe.parent / 'sweep'}\n"
    )
    assert done.stderr.startswith("error: beta=hot: ")
    assert not (recipe.parent / "sweep").exists()


def test_several_gpus_are_refused(recipe):
    done = sweep(recipe, *GRID, "--gpus", "2", code=2)
    assert done.stderr == (
        "error: --gpus 2: qpref sweep trains on one GPU, one run after the other\n"
        "hint: start a sweep of its own on each GPU, with other values\n"
    )


def test_a_sweep_in_which_nothing_is_trained_leaves_no_folder(recipe):
    done = sweep(recipe, "--over", "train.batch_size=400,500", code=2)
    assert done.stderr.count("training examples") == 2
    assert not (recipe.parent / "sweep").exists()


def test_a_run_folder_is_no_sweep_folder(recipe):
    (recipe.parent / "sweep").mkdir()
    (recipe.parent / "sweep" / "run.json").write_text("{}")
    done = sweep(recipe, *GRID, code=2)
    assert "holds a run; a sweep has a folder for each of its runs" in done.stderr
