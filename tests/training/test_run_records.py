"""A run's files outside its checkpoints: damage is named by what reads them, and a resumption writes them again."""

from __future__ import annotations

import json
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from edited_runs import edit_facts, reseal

import qpref
from qpref import sealed
from qpref.errors import CheckpointError, MergeError, PolicyError, QprefError, RecipeError
from qpref.evaluation.subjects import identify
from qpref.merging.guards import read_run as merged_run
from qpref.report.read import read_run as reported_run
from qpref.training.folder import RunFolder
from qpref.training.run_json import RECORDS

ADAPTER = ("adapter/adapter_model.safetensors", "adapter/adapter_config.json", "adapter/tokenizer.json", "result.json")
EVERYTHING = ("run.json", *RECORDS, *ADAPTER)


@pytest.fixture
def run(trained_run, tmp_path) -> Path:
    """A copy of a finished run."""
    return Path(shutil.copytree(trained_run(), tmp_path / "run"))


def flip(path: Path) -> None:
    """Flip the lowest bit of the middle byte."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def resume(run: Path, **changes: object) -> Path:
    """Resume with the recipe of its folder before any damage, as the user's own recipe file says."""
    recipe = tomllib.loads((run.parent / "recipe.toml").read_text())
    for path, value in changes.items():
        table, _, key = path.partition(".")
        recipe[table][key] = value
    return qpref.train(recipe, output=run, resume=True).path


@pytest.fixture
def own_recipe(run) -> Path:
    return Path(shutil.copy(run / "recipe.lock.toml", run.parent / "recipe.toml"))


def identified(run: Path) -> object:
    return identify(str(run))


READERS: dict[str, tuple[Callable[[Path], object], type[QprefError]]] = {
    "merge": (merged_run, MergeError),
    "eval": (identified, PolicyError),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", EVERYTHING)
def test_a_flipped_bit_is_refused_by_name_with_the_way_out(run, name, reader):
    read, of_adapter = READERS[reader]
    read(run)
    flip(run / name)
    kinds = of_adapter if name in ADAPTER else (RecipeError, MergeError)
    with pytest.raises(kinds, match=name) as refused:
        read(run)
    assert "qpref train --resume" in str(refused.value.hint)


FACTS_OF_THE_BASE = (
    {"dtype": "bf16"},
    {"double_quantization": False},
    {"quantized_modules": ["model.layers.0.mlp.up_proj"]},
    {"quantized_experts": ["model.layers.0.mlp.experts.down_proj"]},
    {"base_weights": {"model.safetensors": "0" * 64}},
    {"base_config": "0" * 64},
)


@pytest.mark.parametrize("change", FACTS_OF_THE_BASE, ids=str)
def test_an_edited_fact_is_refused_by_the_hash_of_run_json(run, change):
    """The verdict of a merge replays the base by the same facts, so it would pass."""
    facts = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(facts | change))
    with pytest.raises(RecipeError, match=r"run\.json: cannot be read: it is not as it was written"):
        merged_run(run)


def test_a_run_json_without_its_own_hash_is_refused(run):
    facts = sealed.read_sealed(run / "run.json")
    (run / "run.json").write_text(json.dumps(facts))
    with pytest.raises(RecipeError, match=r"run\.json: cannot be read: it is not as it was written"):
        RunFolder(run).description()


def test_a_formatted_run_json_is_the_same(run):
    values = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(values, indent=7))
    assert RunFolder(run).description() == sealed.read_sealed(run / "run.json")


def test_the_adapters_card_may_be_edited(run):
    (run / "adapter/README.md").write_text("# Mine")
    assert RunFolder(run).adapter_damage() is None


def test_a_start_adapter_that_its_run_has_not_written_is_refused(run, make_recipe, tmp_path):
    flip(run / ADAPTER[0])
    recipe = make_recipe() | {"adapter": {"start": str(run / "adapter")}}
    with pytest.raises(
        PolicyError, match=r"\[adapter\] start: .*adapter_model.safetensors: is not as training"
    ) as refused:
        qpref.train(recipe, output=tmp_path / "second")
    assert "resume=True" in str(refused.value.hint)
    assert not (tmp_path / "second").exists()


@pytest.mark.parametrize("name", ["run.json", *RECORDS, "result.json"])
def test_a_resumption_of_a_finished_run_writes_a_damaged_file_again(run, own_recipe, name, said):
    before = {each: (run / each).read_bytes() for each in EVERYTHING}
    flip(run / name)
    resume(run)
    assert [each for each in EVERYTHING if (run / each).read_bytes() != before[each]] == (
        ["result.json"] if name == "result.json" else []  # its times are those of the resumption
    )
    assert any(name in line for line in said)
    merged_run(run)
    identified(run)


def test_an_unfinished_run_resumes_over_a_damaged_run_json(trained_run, tmp_path, said):
    run = Path(shutil.copytree(trained_run(**{"train.save_every": 1}), tmp_path / "run"))
    shutil.copy(run / "recipe.lock.toml", tmp_path / "recipe.toml")
    before = (run / "run.json").read_bytes()
    shutil.rmtree(run / "adapter")
    (run / "result.json").unlink()
    shutil.rmtree(run / "checkpoints/step-000003")
    flip(run / "run.json")
    resume(run)
    assert (run / "run.json").read_bytes() == before
    assert sum("run.json" in line and line.endswith("it is written again") for line in said) == 1
    assert RunFolder(run).adapter_damage() is None


def test_a_finished_run_of_another_base_is_not_restated(run, own_recipe, make_base):
    before = {name: (run / name).read_bytes() for name in EVERYTHING}
    with pytest.raises(CheckpointError, match="was made with another base model"):
        resume(run, **{"model.base": str(make_base(initializer_range=0.3))})
    assert {name: (run / name).read_bytes() for name in EVERYTHING} == before


def test_a_whole_run_is_left_as_it_is(run, own_recipe, said):
    times = {name: (run / name).stat().st_mtime_ns for name in EVERYTHING}
    resume(run)
    assert {name: (run / name).stat().st_mtime_ns for name in EVERYTHING} == times
    assert said == []


@pytest.mark.parametrize("name", RECORDS)
@pytest.mark.parametrize("content", [b"[1, 2", b"5", b"\xff", b"[" * 100_000], ids=len)
def test_a_record_that_is_sealed_and_no_record_is_refused(run, name, content):
    """As somebody writes it who wants to see a traceback."""
    (run / name).write_bytes(content)
    reseal(run)
    for read in (merged_run, identified):
        with pytest.raises((RecipeError, MergeError), match=f"{name}: (cannot be read|not )"):
            read(run)


def test_a_damaged_run_without_checkpoints_is_refused(run, own_recipe):
    shutil.rmtree(run / "checkpoints")
    flip(run / "run.json")
    with pytest.raises(CheckpointError, match=r"run\.json: .*, and no checkpoint is left to write it again from"):
        resume(run)


def test_a_finished_run_takes_the_new_location_of_its_data(run, own_recipe, tmp_path):
    """recipe.lock.toml is hashed, so nobody can write the location there."""
    document = tomllib.loads(own_recipe.read_text())
    moved = shutil.copy(document["data"]["heldout"], tmp_path / "moved.jsonl")
    before = (run / "adapter/adapter_model.safetensors").stat().st_mtime_ns
    resume(run, **{"data.heldout": str(moved)})
    assert merged_run(run).plan.document["data"]["heldout"] == str(moved)
    assert (run / "adapter/adapter_model.safetensors").stat().st_mtime_ns == before


def test_a_resumed_run_takes_the_new_location_of_its_base(run, own_recipe, tmp_path, said):
    old = Path(sealed.read_sealed(run / "run.json")["base_path"])
    new = shutil.copytree(old, tmp_path / "base")
    edit_facts(run, base_path=str(tmp_path / "gone"))
    resume(run, **{"model.base": str(new)})
    assert any("the run's base is gone" in line for line in said)
    assert merged_run(run).base.path == new
    assert identify(str(run)).base.path == new


# Settings of the base: they say at which tokens an answer stops, and how the weights are computed with.


@pytest.fixture
def own_base(run, tmp_path) -> Path:
    """A copy of the run's base that the run is of."""
    base = Path(shutil.copytree(sealed.read_sealed(run / "run.json")["base_path"], tmp_path / "base"))
    settings = run / "adapter/adapter_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"base_model_name_or_path": str(base)}))
    edit_facts(run, base_path=str(base))
    return base


def edited_settings(path: Path) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | {"a_setting": 1}))


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("change", [edited_settings, Path.unlink])
def test_changed_settings_of_the_base_are_refused_by_name(run, own_base, name, change):
    identify(str(run))
    change(own_base / name)
    with pytest.raises(PolicyError, match=rf"base.*{name}"):
        identify(str(run))


def test_settings_that_the_base_has_got_since_are_refused(run, own_base):
    (own_base / "generation_config.json").unlink()
    facts = sealed.read_sealed(run / "run.json")
    sealed.write_sealed(run / "run.json", facts | {"base_generation_config": None})
    identify(str(run))
    (own_base / "generation_config.json").write_text('{"eos_token_id": 7}')
    with pytest.raises(PolicyError, match=r"base/generation_config\.json: has come since"):
        identify(str(run))


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_a_run_is_not_resumed_on_a_base_with_other_settings(run, own_base, own_recipe, name):
    shutil.rmtree(run / "adapter")
    edited_settings(own_base / name)
    with pytest.raises(CheckpointError, match=rf"base/{name}: is not the one used in training"):
        resume(run, **{"model.base": str(own_base)})


def test_a_run_is_not_resumed_with_another_chat_template(run, own_base, own_recipe):
    """Its data's tokens are the same, since the template's end isn't reached."""
    shutil.rmtree(run / "adapter")
    template = own_base / "chat_template.jinja"
    template.write_text("{# edited #}" + template.read_text())
    with pytest.raises(CheckpointError, match=r"base: not the tokenizer or chat template that this run started with"):
        resume(run, **{"model.base": str(own_base)})


# metrics.jsonl: a log, which nothing may be lost for.


def test_changed_rows_are_named_by_the_resumption_which_goes_on(run, own_recipe, said):
    shutil.rmtree(run / "adapter")
    flip(run / "metrics.jsonl")
    resume(run)
    assert any("metrics.jsonl: its rows up to step 3 are not as training wrote them" in line for line in said)
    assert RunFolder(run).adapter_damage() is None


def test_unchanged_rows_are_not_named(run, own_recipe, said):
    shutil.rmtree(run / "adapter")
    resume(run)
    assert not any("metrics.jsonl" in line for line in said)


@pytest.mark.parametrize("name", ["run.json", "result.json", *RECORDS, "metrics.jsonl"])
def test_a_report_names_what_training_has_not_written(run, name):
    assert reported_run(run, "run").changed == ()
    path = run / name
    text = path.read_text()
    digit = max(place for place, letter in enumerate(text) if letter.isdigit())
    path.write_text(text[:digit] + ("1" if text[digit] != "1" else "2") + text[digit + 1 :])
    assert name in reported_run(run, "run").changed
