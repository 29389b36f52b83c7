"""A run folder as the attacker: whatever stands in it, nothing outside it changes, and nothing foreign is deleted."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from pathlib import Path

import pytest

import qpref
from qpref.errors import CheckpointError, DiskError, RecipeError
from qpref.training import folder as run_folders
from qpref.training import loop
from qpref.training import run as runs
from qpref.training.folder import FILES, FOLDERS, RunFolder, claimed

HEX = "0123456789abcdef"


@pytest.fixture
def outside(tmp_path) -> Path:
    """What belongs to somebody else: files, and a folder that looks like a run's checkpoints."""
    folder = tmp_path / "outside"
    for name in (
        "notes.txt",
        f"checkpoints/.tmp-step-000001-{HEX}/half",
        "checkpoints/step-000001/adapter.safetensors",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


@pytest.fixture
def run(trained_run, tmp_path) -> Path:
    """A copy of a finished run."""
    return Path(shutil.copytree(trained_run(), tmp_path / "run"))


def contents(folder: Path) -> dict[str, tuple[bytes, float]]:
    return {str(path): (path.read_bytes(), path.stat().st_mtime) for path in folder.rglob("*") if path.is_file()}


def recipe_of(run: Path) -> dict[str, object]:
    import tomllib

    return tomllib.loads((run / "recipe.lock.toml").read_text())


def replace(path: Path, kind: str, target: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    if kind == "link":
        path.symlink_to(target)
    elif kind == "FIFO":
        os.mkfifo(path)
    elif kind == "hard link":
        os.link(target, path)


OPTIONS = ({"resume": True}, {"overwrite": True})


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", ["link", "FIFO"])
@pytest.mark.parametrize("name", [*FILES, "LOCK"])
def test_a_file_that_is_something_else_is_refused_at_once(run, outside, name, kind, options):
    recipe, before = recipe_of(run), contents(outside)
    replace(run / name, kind, outside / "notes.txt")
    start = time.monotonic()
    with pytest.raises(RecipeError, match=f"{name}: is a (symbolic link|FIFO)"):
        qpref.train(recipe, output=run, **options)
    assert contents(outside) == before
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_that_is_a_link_is_refused(run, outside, name, options):
    before = contents(outside)
    replace(run / name, "link", outside / "checkpoints")
    with pytest.raises(RecipeError, match=f"{name}: is a symbolic link; qpref follows no link inside a run"):
        qpref.train(recipe_of(run), output=run, **options)
    assert contents(outside) == before


@pytest.mark.parametrize("name", ["LOCK", "recipe.lock.toml", "data.json", f".tmp-run.json-{HEX}"])
@pytest.mark.parametrize("kind", ["link", "hard link"])
def test_a_new_run_in_a_prepared_folder_changes_nothing_outside(run, outside, tmp_path, name, kind):
    """No run is in it and no --resume is needed: whoever can make a folder on a shared disk can prepare one."""
    before, prepared = contents(outside), tmp_path / "prepared"
    prepared.mkdir()
    replace(prepared / name, kind, outside / "notes.txt")
    with contextlib.suppress(RecipeError, qpref.errors.DiskError):
        qpref.train(recipe_of(run), output=prepared)
    assert contents(outside) == before


@pytest.mark.parametrize("name", ["state.json", "MANIFEST.json", "adapter.safetensors"])
@pytest.mark.parametrize("kind", ["link", "FIFO"])
def test_a_checkpoint_file_that_is_something_else_is_not_read(run, outside, name, kind):
    newest = max((run / "checkpoints").iterdir())
    twin = shutil.copytree(newest, outside / newest.name)
    replace(newest / name, kind, twin / name)
    with pytest.raises(CheckpointError, match="not a checkpoint that verifies"):
        run_folders.checkpoint.read(newest)


@pytest.mark.parametrize(
    "files", [{"../../outside/notes.txt": {}}, {"state.json": {}, "/etc/hostname": {}}, {}, [], None]
)
def test_a_manifest_that_lists_no_checkpoints_files_is_not_believed(run, files):
    newest = max((run / "checkpoints").iterdir())
    written = json.loads((newest / "MANIFEST.json").read_text())
    (newest / "MANIFEST.json").write_text(json.dumps(written | {"files": files}))
    with pytest.raises(CheckpointError, match="not a checkpoint that verifies"):
        run_folders.checkpoint.read(newest)


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o775, 0o755, 0o700])
@pytest.mark.parametrize("name", [".", "checkpoints"])
def test_another_users_folder_is_used_only_if_nobody_else_can_write_to_it(run, monkeypatch, name, mode):
    (run / name).chmod(mode)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    folder = RunFolder(run)
    if mode & 0o022:
        with pytest.raises(RecipeError, match="belongs to another user, and others can write to it"):
            folder.refuse_unsafe()
    else:
        folder.refuse_unsafe()


def test_an_own_folder_may_be_open_to_a_group(run):
    run.chmod(0o775)
    RunFolder(run).refuse_unsafe()


def test_a_link_to_a_run_folder_is_followed(run, tmp_path):
    (tmp_path / "link").symlink_to(run)
    with claimed(tmp_path / "link", resume=True, overwrite=False) as folder:
        assert folder.run_json.is_file()


def test_another_users_link_to_a_folder_is_not(run, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(run)
    os.lchown(tmp_path / "link", 12345, 12345)
    with pytest.raises(RecipeError, match="is a link that another user has made"):
        RunFolder(tmp_path / "link").refuse_unsafe()


FOREIGN = (
    "notes.txt",
    ".tmp-notes",
    f".tmp-notes-{HEX}",
    "checkpoints/best",
    "checkpoints/step-000001/notes.txt",
    "checkpoints/.tmp-mine",
    "adapter/analysis.ipynb",
    "adapter/sub/deep.txt",
)


@pytest.mark.parametrize("name", FOREIGN)
def test_overwrite_names_what_the_run_has_not_written_and_deletes_nothing(run, name):
    (run / name).parent.mkdir(parents=True, exist_ok=True)
    (run / name).write_text("years")
    before = contents(run)
    with pytest.raises(RecipeError, match=f"holds files that this run has not written: {name}"):
        qpref.train(recipe_of(run), output=run, overwrite=True)
    assert contents(run) == before


def test_overwrite_removes_all_that_a_run_has_written(run):
    (run / "sinks" / "tensorboard").mkdir(parents=True)
    (run / "report.html").touch()
    (run / f".tmp-run.json-{HEX}").touch()
    (run / "checkpoints" / f".tmp-step-000009-{HEX}").mkdir()
    with claimed(run, resume=False, overwrite=True) as folder:
        folder.clear()
        assert [path.name for path in run.iterdir()] == ["LOCK"]


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: flip(path), lambda path: path.write_text("{}")])
def test_overwrite_knows_an_adapter_by_its_names_where_its_list_is_damaged(run, damage):
    damage(run / "result.json")
    with claimed(run, resume=False, overwrite=True) as folder:
        folder.clear()
        assert [path.name for path in run.iterdir()] == ["LOCK"]


def test_overwrite_names_foreign_files_in_an_adapter_whose_list_is_damaged(run):
    (run / "result.json").unlink()
    (run / "adapter" / "notes.txt").write_text("years")
    with pytest.raises(RecipeError, match=r"holds files that this run has not written: adapter/notes\.txt\nhint"):
        qpref.train(recipe_of(run), output=run, overwrite=True)


def test_foreign_staging_folders_stay_where_a_run_resumes(run):
    kept = [run / "checkpoints" / ".tmp-mine", run / ".tmp-mine", run / f".tmp-mine-{HEX}"]
    for path in kept:
        path.mkdir()
    with claimed(run, resume=True, overwrite=False) as folder:
        folder.remove_leftovers()
    assert all(path.is_dir() for path in kept)


# Whoever may write beside a folder can swap it while its run trains; so does a user who moves it.


def swap_folder(path: Path, other: Path, aside: Path) -> None:
    path.rename(aside)
    other.rename(path)


def swap_for_link(path: Path, other: Path, aside: Path) -> None:
    path.rename(aside)
    path.symlink_to(other)


def swap_checkpoints(path: Path, other: Path, aside: Path) -> None:
    (path / "checkpoints").rename(aside)
    (path / "checkpoints").symlink_to(other / "checkpoints")


def leave_no_folder(path: Path, other: Path, aside: Path) -> None:
    path.rename(aside)


SWAPS = {
    swap_folder: "new: is no longer the folder of this run",
    swap_for_link: "new: is no longer the folder of this run",
    swap_checkpoints: "checkpoints: is a symbolic link",
    leave_no_folder: "new: is no longer the folder of this run",
}


@pytest.mark.parametrize("swap", SWAPS)
def test_a_run_whose_folder_is_replaced_while_it_trains_changes_nothing_there(
    run, make_recipe, tmp_path, monkeypatch, swap
):
    new, aside, other, before, step = tmp_path / "new", tmp_path / "aside", run, contents(run), loop.Trainer.step

    def step_after_swap(trainer):
        if trainer.state.step == 1:
            swap(new, other, aside)
        return step(trainer)

    monkeypatch.setattr(loop.Trainer, "step", step_after_swap)
    recipe = make_recipe({"train.save_every": 1})
    with pytest.raises(DiskError, match=rf"step 3 is not saved, and neither was step 2: .*{SWAPS[swap]}"):
        qpref.train(recipe, output=new)
    found = contents(new if swap is swap_folder else other)
    assert list(found.values()) == list(before.values())
    assert new.exists() == (swap is not leave_no_folder)

    monkeypatch.undo()
    if swap is swap_checkpoints:
        (new / "checkpoints").unlink()
        aside.rename(new / "checkpoints")
    else:
        shutil.rmtree(new) if swap is swap_folder else new.unlink(missing_ok=True)
        aside.rename(new)
    qpref.train(recipe, output=new, resume=True)
    assert RunFolder(new).adapter_damage() is None


@pytest.mark.parametrize(
    ("swap", "options"),
    [
        (swap_folder, {"resume": True}),
        (swap_checkpoints, {"resume": True}),
        (swap_folder, {"overwrite": True}),
        (swap_for_link, {"overwrite": True}),
    ],
)
def test_a_run_whose_folder_is_replaced_before_its_first_step_changes_nothing_there(
    run, tmp_path, monkeypatch, swap, options
):
    new, prepare = tmp_path / "new", runs.prepare
    shutil.copytree(run, new)
    shutil.rmtree(new / "adapter")
    before = contents(run)

    def prepare_and_swap(*arguments):
        prepared = prepare(*arguments)
        swap(new, run, tmp_path / "aside")
        return prepared

    monkeypatch.setattr(runs, "prepare", prepare_and_swap)
    with pytest.raises(DiskError, match=SWAPS[swap]):
        qpref.train(recipe_of(run), output=new, **options)
    assert list(contents(new if swap is swap_folder else run).values()) == list(before.values())


def test_a_folder_that_takes_the_place_of_a_failed_new_run_stays(run, make_recipe, tmp_path, monkeypatch):
    new = tmp_path / "new"

    def fail(*arguments):
        swap_folder(new, run, tmp_path / "aside")
        raise RecipeError("as if something were wrong")

    monkeypatch.setattr(runs, "prepare", fail)
    before = contents(run)
    with pytest.raises(RecipeError):
        qpref.train(make_recipe(), output=new)
    assert list(contents(new).values()) == list(before.values())


def test_a_finished_run_is_resumed_with_its_own_recipe_alone(run):
    recipe = recipe_of(run)
    recipe["train"]["learning_rate"] *= 2
    before = contents(run / "adapter")
    with pytest.raises(CheckpointError, match="is the run of another recipe"):
        qpref.train(recipe, output=run, resume=True)
    assert contents(run / "adapter") == before


DAMAGE = {
    "missing": lambda run: shutil.rmtree(run / "adapter"),
    "a flipped bit": lambda run: flip(run / "adapter" / "adapter_model.safetensors"),
    "its settings": lambda run: flip(run / "adapter" / "adapter_config.json"),
    "its tokenizer": lambda run: (run / "adapter" / "tokenizer.json").unlink(),
}


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_adapter_is_exported_again_from_the_last_checkpoint(run, damage, said):
    whole = {path.name: path.read_bytes() for path in (run / "adapter").iterdir()}
    result = json.loads((run / "result.json").read_text())
    DAMAGE[damage](run)
    qpref.train(recipe_of(run), output=run, resume=True)
    assert {path.name: path.read_bytes() for path in (run / "adapter").iterdir()} == whole
    assert json.loads((run / "result.json").read_text()) == result
    assert sum("its adapter are written again from the last checkpoint" in line for line in said) == 1


def test_a_damaged_adapter_without_a_checkpoint_stays_and_is_named(run):
    flip(run / "adapter" / "adapter_model.safetensors")
    shutil.rmtree(run / "checkpoints")
    before = sorted((run / "adapter").iterdir())
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors: is not as .* no checkpoint is left"):
        qpref.train(recipe_of(run), output=run, resume=True)
    assert sorted((run / "adapter").iterdir()) == before


def test_an_edited_model_card_is_no_damage(run):
    (run / "adapter" / "README.md").write_text("# My model")
    qpref.train(recipe_of(run), output=run, resume=True)
    assert (run / "adapter" / "README.md").read_text() == "# My model"
