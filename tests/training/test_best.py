"""The best step by the held-out rows: chosen in the right direction, kept, resumed bit for bit, and what is exported.

On these data margins grow from row to row, so the largest is the last row's and the smallest the first's.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from conftest import outcome, preference_rows, rows_of, write_jsonl
from safetensors.torch import load_file

import qpref
from qpref.errors import CheckpointError, RecipeError
from qpref.recipe.sections import is_better_higher
from qpref.training import checkpoint
from qpref.training.best import Best, Criterion

SMALLEST = {"best_by": "eval_rewards/margins", "best_direction": "min"}


class Killed(BaseException):
    """The process dies here."""


@pytest.fixture(scope="module")
def make_toy(make_base, tmp_path_factory):
    """`make_toy(patience=2)`: 4 epochs of 3 steps, a held-out row and a checkpoint every step, two of them kept."""
    folder = tmp_path_factory.mktemp("best")
    train = write_jsonl(folder / "train.jsonl", preference_rows(12))
    heldout = write_jsonl(folder / "heldout.jsonl", preference_rows(4, start=100))

    def make(**settings):
        settings = {
            "learning_rate": 3e-3,
            "batch_size": 4,
            "epochs": 4,
            "warmup_ratio": 0.0,
            "schedule": "constant",
            "eval_every": 1,
            "save_every": 1,
            "tokens_per_microbatch": 400,
            "gradient_checkpointing": False,
        } | settings
        return {
            "model": {"base": str(make_base()), "quantization": "none", "dtype": "float32"},
            "adapter": {"rank": 4, "alpha": 8, "dropout": 0.1},
            "data": {"train": str(train), "heldout": str(heldout)},
            "checks": {"too_short": "off"},
            "loss": {"name": "dpo", "beta": 0.1},
            "train": {name: value for name, value in settings.items() if value is not None},
            "sinks": [],
        }

    return make


def margins(run: Path) -> dict[int, float]:
    """The held-out margin after each step from 1 on."""
    rows = [row for row in rows_of(run) if row["split"] == "eval" and row["step"]]
    return {row["step"]: row["eval_rewards/margins"] for row in rows}


def steps_kept(run: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*"))


def is_adapter_of(run: Path, step: int) -> bool:
    final = load_file(run / "adapter/adapter_model.safetensors")
    saved = load_file(run / f"checkpoints/step-{step:06}/adapter.safetensors")
    return all(torch.equal(value, final[name.replace(".default", "")]) for name, value in saved.items())


def test_the_adapter_is_the_best_steps_and_its_checkpoint_is_kept_beside_the_newest(make_toy, tmp_path):
    run = qpref.train(make_toy(**SMALLEST), output=tmp_path / "run").path
    found = margins(run)
    assert list(found) == list(range(1, 13))
    best = min(found, key=found.__getitem__)
    assert best < 11
    assert steps_kept(run) == [best, 11, 12]
    assert is_adapter_of(run, best)
    assert not is_adapter_of(run, 12)


def test_a_margin_is_best_where_it_is_largest(make_toy, tmp_path):
    run = qpref.train(make_toy(best_by="eval_rewards/margins"), output=tmp_path / "run").path
    found = margins(run)
    best = max(found, key=found.__getitem__)
    assert best > 6
    assert is_adapter_of(run, best)
    state = json.loads((run / "checkpoints/step-000012/state.json").read_text())
    assert state["best"]["step"] == best
    assert state["best"]["value"] == pytest.approx(found[best])


def test_without_best_by_the_adapter_is_the_last_steps(make_toy, tmp_path):
    run = qpref.train(make_toy(), output=tmp_path / "run").path
    assert steps_kept(run) == [11, 12]
    assert is_adapter_of(run, 12)


def test_the_best_step_is_saved_even_where_no_checkpoint_is_due(make_toy, tmp_path):
    run = qpref.train(make_toy(save_every=5, **SMALLEST), output=tmp_path / "run").path
    found = margins(run)
    assert is_adapter_of(run, min(found, key=found.__getitem__))


def test_patience_ends_the_run_complete(make_toy, tmp_path):
    run = qpref.train(make_toy(patience=3, log_every=5, **SMALLEST), output=tmp_path / "run").path
    found = margins(run)
    best = min(found, key=found.__getitem__)
    assert max(found) == best + 3 < 12
    assert is_adapter_of(run, best)
    last = [row for row in rows_of(run) if row["split"] == "train"][-1]
    assert last["step"] == max(found)  # every run ends in a training row
    assert qpref.train(make_toy(patience=3, log_every=5, **SMALLEST), output=run, resume=True).path == run


def test_the_steps_until_then_are_those_of_the_patient_run(make_toy, tmp_path):
    patient = qpref.train(make_toy(**SMALLEST), output=tmp_path / "patient").path
    impatient = qpref.train(make_toy(patience=3, **SMALLEST), output=tmp_path / "impatient").path
    short = rows_of(impatient)
    assert short == rows_of(patient)[: len(short)]


@pytest.mark.parametrize("step", [1, 3])
def test_a_killed_run_goes_on_to_the_same_best_bit_for_bit(make_toy, tmp_path, step):
    recipe = make_toy(patience=3, **SMALLEST)
    unbroken = outcome(qpref.train(recipe, output=tmp_path / "unbroken").path)
    real = checkpoint.save_checkpoint

    def save(folder, current, keep):
        path = real(folder, current, keep)
        if current.step == step:
            raise Killed
        return path

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save_checkpoint", save)
        with pytest.raises(Killed):
            qpref.train(recipe, output=tmp_path / "run")
    assert outcome(qpref.train(recipe, output=tmp_path / "run", resume=True).path) == unbroken


def test_a_run_that_was_killed_once_its_patience_was_out_trains_no_further(make_toy, tmp_path, monkeypatch):
    from qpref.training import run as module

    recipe = make_toy(patience=2, **SMALLEST)
    unbroken = outcome(qpref.train(recipe, output=tmp_path / "unbroken").path)

    def die(*parts):
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "write_adapter", die)
        with pytest.raises(Killed):
            qpref.train(recipe, output=tmp_path / "run")
    assert outcome(qpref.train(recipe, output=tmp_path / "run", resume=True).path) == unbroken


def test_a_best_checkpoint_that_is_lost_is_said_and_the_next_best_takes_its_place(make_toy, tmp_path, said):
    recipe = make_toy(**SMALLEST)
    real = checkpoint.save_checkpoint

    def save(folder, current, keep):
        path = real(folder, current, keep)
        if current.step == 6:
            raise Killed
        return path

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save_checkpoint", save)
        with pytest.raises(Killed):
            qpref.train(recipe, output=tmp_path / "run")
    best = min(steps_kept(tmp_path / "run"))
    assert best < 5
    (tmp_path / f"run/checkpoints/step-{best:06}/adapter.safetensors").write_bytes(b"")
    before = margins(tmp_path / "run")
    next_best = min((5, 6), key=before.__getitem__)
    run = qpref.train(recipe, output=tmp_path / "run", resume=True).path
    words = f"the best step so far, {best}, is lost, and step {next_best} is the best of those that are left: "
    assert any(words in line for line in said)
    left = {step: margin for step, margin in margins(run).items() if step >= 5}
    assert min(left, key=left.__getitem__) == next_best  # or no step before the resume would count
    assert is_adapter_of(run, next_best)


def test_rows_since_the_next_best_are_waited_for(make_toy, tmp_path):
    """As they would be had the lost one never been: patience goes on from there."""
    from qpref.recipe.sections import TrainSection
    from qpref.training import best as module
    from qpref.training.folder import RunFolder

    run = qpref.train(make_toy(**SMALLEST, keep=12), output=tmp_path / "run").path
    state = json.loads((run / "checkpoints/step-000012/state.json").read_text())
    train = TrainSection(**make_toy(**SMALLEST)["train"])
    assert module.restore_best(state, RunFolder(run), train) == Best(**state["best"])
    found = margins(run)
    (run / f"checkpoints/step-{state['best']['step']:06}/state.json").write_text("{")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 12, "split": "eval", "eval_rewards/margins": -9.0}\n')  # after the checkpoint
    found.pop(state["best"]["step"])
    step = min(found, key=found.__getitem__)
    assert module.restore_best(state, RunFolder(run), train) == Best(step, found[step], 12 - step)
    for path in (run / "checkpoints").iterdir():
        (path / "state.json").write_text("{")
    assert module.restore_best(state, RunFolder(run), train) is None


def test_a_best_checkpoint_that_is_damaged_at_the_end_is_not_exported(make_toy, tmp_path, monkeypatch):
    from qpref.training import run as module

    recipe, real = make_toy(**SMALLEST), module.take_best

    def take(prepared, folder, state):
        (folder.checkpoints / f"step-{state.best.step:06}/adapter.safetensors").write_bytes(b"")
        real(prepared, folder, state)

    monkeypatch.setattr(module, "take_best", take)
    with pytest.raises(CheckpointError, match="not a checkpoint that verifies"):
        qpref.train(recipe, output=tmp_path / "run")
    assert not (tmp_path / "run/adapter").exists()
    assert not (tmp_path / "run/result.json").exists()  # it would name an adapter that isn't there


def test_a_metric_that_held_out_rows_dont_have_is_refused_before_the_first_step(make_toy, tmp_path):
    with pytest.raises(RecipeError, match=r"no metric 'rewards/margin'; they have .*rewards/margins"):
        qpref.train(make_toy(best_by="eval_rewards/margin", best_direction="max"), output=tmp_path / "run")


@pytest.mark.parametrize(("settings", "words"), [
    ({"patience": 2}, "patience and best_direction need best_by"),
    ({"best_direction": "max"}, "patience and best_direction need best_by"),
    ({"best_by": "eval_loss", "eval_every": None}, "set eval_every"),
    ({"best_by": "eval_logps/chosen"}, "unknown whether a higher or a lower 'eval_logps/chosen' is better"),
    ({"best_by": "eval_loss", "patience": 0}, "patience"),
])  # fmt: skip
def test_settings_that_say_nothing_are_refused(make_toy, tmp_path, settings, words):
    with pytest.raises(RecipeError, match=words):
        qpref.train(make_toy(**settings), output=tmp_path / "run")


def test_best_by_needs_held_out_data(make_toy, tmp_path):
    recipe = make_toy(best_by="eval_loss")
    del recipe["data"]["heldout"]
    with pytest.raises(RecipeError, match=r"\[train\] best_by needs held-out data"):
        qpref.train(recipe, output=tmp_path / "run")


@pytest.mark.parametrize(("metric", "higher"), [
    ("eval_loss", False),
    ("loss", False),
    ("eval_loss/dpo", False),
    ("eval_rewards/margins", True),
    ("eval_rewards/accuracies", True),
    ("logps/accuracies", True),
    ("eval_logps/chosen", None),
    ("eval_kl", None),
])  # fmt: skip
def test_the_direction_of_known_metrics(metric, higher):
    assert is_better_higher(metric) is higher


def updated(values, higher=True, patience=2):
    """The best row and whether patience has run out after each held-out value, the first of which is step 0's."""
    criterion, best, found = Criterion("m", higher, patience), None, []
    for step, value in enumerate(values):
        best = criterion.update(best, step, {"m": value})
        found.append((best, criterion.is_out_of_patience(best)))
    return found


def test_the_row_before_training_is_no_candidate():
    assert updated([9.0, 1.0])[-1] == (Best(1, 1.0), False)


def test_a_tie_and_what_is_no_number_are_no_improvement():
    assert updated([0.0, 2.0, 2.0])[-1] == (Best(1, 2.0, 1), False)
    assert updated([0.0, 2.0, math.nan, 1.0])[-1] == (Best(1, 2.0, 2), True)
    assert updated([0.0, math.nan, 1.0])[-1] == (Best(2, 1.0), False)


def test_patience_counts_rows_in_a_row():
    assert [over for _, over in updated([0, 1, 0, 2, 1, 1.5])] == [False, False, False, False, False, True]
    assert updated([0, 3, 2, 1], higher=False)[-1] == (Best(3, 1), False)
