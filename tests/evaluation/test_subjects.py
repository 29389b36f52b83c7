"""The kind of model that a path names, and clear refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import merge_to, preference_rows, write_jsonl
from edited_runs import edit_facts, reseal
from safetensors.torch import load_file

from qpref import sealed
from qpref.errors import CheckpointError, PolicyError, RecipeError
from qpref.evaluation.subjects import common_dtype, identify
from qpref.policy.reference import as_reference
from qpref.policy.tokenizer import tokenizer_difference
from qpref.recipe.resolve import make_plan
from qpref.training.run import train_plan


@pytest.fixture(scope="module")
def run(make_base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("identified")
    base = shutil.copytree(make_base(), folder / "base")
    recipe = {
        "model": {"base": str(base), "quantization": "nf4", "dtype": "bf16"},
        "adapter": {"rank": 4, "alpha": 8},
        "data": {
            "train": str(write_jsonl(folder / "train.jsonl", preference_rows(12))),
            "max_length": 256,
            "max_prompt_length": 128,
        },
        "checks": {"too_short": "off"},
        "loss": {"name": "dpo", "beta": 0.3},
        "train": {"learning_rate": 0.02, "batch_size": 4, "warmup_ratio": 0.0, "save_every": 1, "keep": 3},
        "sinks": [],
    }
    return train_plan(make_plan(recipe, output=folder / "run"))


def adapter_alone(run: Path, tmp_path: Path) -> Path:
    """A third-party PEFT folder: the run's adapter, without the run, and with the base's path, as PEFT writes it."""
    alone = Path(shutil.copytree(run / "adapter", tmp_path / "alone"))
    settings = json.loads((alone / "adapter_config.json").read_text())
    base = sealed.read_sealed(run / "run.json")["base_path"]
    (alone / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": base}))
    return alone


def test_a_runs_adapter_alone_needs_its_base_named_where_no_hub_has_it(run, make_base, tmp_path, said):
    adapter = str(shutil.copytree(run / "adapter", tmp_path / "copy"))
    with pytest.raises(PolicyError, match=r"its base base@sha256:[0-9a-f]{64} is on no hub\nhint: name its file"):
        identify(adapter)
    identify(adapter, base=sealed.read_sealed(run / "run.json")["base_path"], quantization="nf4").load("bf16")
    assert not said
    identify(adapter, base=str(make_base(dtype=torch.bfloat16)), quantization="nf4").load("bf16")
    assert len([line for line in said if "was trained on base@sha256:" in line]) == 1


def trained(policy):
    return {name: value.detach().clone() for name, value in policy.trained_parameters().items()}


def test_a_run_is_loaded_with_its_adapter_and_its_recipes_beta(run):
    subject = identify(str(run))
    assert (subject.kind, subject.beta, subject.dtype, subject.has_reference) == ("run", 0.3, "bf16", True)
    saved = load_file(run / "adapter/adapter_model.safetensors")
    for name, value in trained(subject.load("bf16")).items():
        assert torch.equal(value, saved[name.replace(".default", "")])


def test_the_adapter_folder_of_a_run_is_the_run(run):
    assert identify(str(run / "adapter")).recipe == identify(str(run)).recipe


def test_what_a_path_is_doesnt_depend_on_how_it_is_spelt(run, tmp_path, monkeypatch):
    for place, name, kind in (
        (run / "adapter", ".", "run"),
        (run / "checkpoints", "../adapter", "run"),
        (run / "checkpoints", "step-000001", "checkpoint"),
        (run / "checkpoints/step-000001", ".", "checkpoint"),
    ):
        monkeypatch.chdir(place)
        assert identify(name).kind == kind
    (tmp_path / "link").symlink_to(run / "adapter")
    assert identify(str(tmp_path / "link")).kind == "run"


def test_an_adapter_on_an_unquantized_base_is_warned_of(run, tmp_path, said):
    adapter = str(adapter_alone(run, tmp_path))
    identify(adapter, quantization="nf4")
    assert not said
    identify(adapter)
    assert said == [
        f"{adapter}: its base is loaded unquantized; use --quantization nf4 if it was trained in 4 bits",
    ]


def test_a_checkpoint_is_the_run_at_that_step(run):
    first, last = (identify(str(run / f"checkpoints/step-00000{step}")) for step in (1, 3))
    assert first.kind == "checkpoint"
    final = trained(identify(str(run)).load("bf16"))
    assert all(torch.equal(value, final[name]) for name, value in trained(last.load("bf16")).items())
    assert not all(torch.equal(value, final[name]) for name, value in trained(first.load("bf16")).items())


def test_a_checkpoint_that_is_damaged_is_refused(run, tmp_path):
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    (copy / "checkpoints/step-000002/adapter.safetensors").write_bytes(b"{}")
    with pytest.raises(CheckpointError, match="not a checkpoint that verifies"):
        identify(str(copy / "checkpoints/step-000002")).load("bf16")
    with pytest.raises(RecipeError, match="no such checkpoint"):
        identify(str(copy / "checkpoints/step-000009"))


def test_an_adapter_alone_is_that_on_its_base(run, tmp_path):
    """The reference is the base, not the adapter as it came."""
    subject = identify(str(adapter_alone(run, tmp_path)), quantization="nf4")
    assert (subject.kind, subject.beta) == ("adapter", None)
    policy, of_run = subject.load("float32"), identify(str(run)).load("float32")
    policy.share_prompts(False)
    of_run.share_prompts(False)
    ids = torch.arange(20, 60)[None]
    with torch.no_grad():
        logits = [one.plain_model(input_ids=ids, use_cache=False).logits for one in (policy, of_run)]
        with as_reference(policy), as_reference(of_run):
            bases = [one.plain_model(input_ids=ids, use_cache=False).logits for one in (policy, of_run)]
    # The base's own type is float32 here and bf16 in the run, so their weights differ by rounding.
    assert (logits[0] - logits[1]).abs().max() < 0.05 * (logits[1] - bases[1]).abs().max()
    assert (bases[0] - bases[1]).abs().max() < 0.05 * (logits[1] - bases[1]).abs().max()


def test_an_adapter_can_be_put_on_a_base_that_has_moved(run, make_base, tmp_path):
    adapter = adapter_alone(run, tmp_path)
    values = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(values | {"base_model_name_or_path": "/gone/away"}))
    with pytest.raises(PolicyError, match=r"its base /gone/away does not exist\nhint: name the base with --base"):
        identify(str(adapter))
    identify(str(adapter), base=str(make_base())).load("float32")


def test_an_adapter_for_another_base_is_refused(run, make_base, tmp_path):
    adapter = adapter_alone(run, tmp_path)
    for other in (make_base(num_hidden_layers=1), make_base(hidden_size=32, num_attention_heads=2)):
        with pytest.raises(PolicyError, match=r"not an adapter for this base|the base needs"):
            identify(str(adapter), base=str(other)).load("float32")


def test_a_runs_adapter_that_doesnt_fit_its_base_is_refused(run, tmp_path):
    from safetensors.torch import save_file

    copy = Path(shutil.copytree(run, tmp_path / "run"))
    tensors = load_file(copy / "adapter/adapter_model.safetensors")
    tensors.pop(min(tensors))
    save_file(tensors, copy / "adapter/adapter_model.safetensors")
    reseal(copy)
    with pytest.raises(PolicyError, match="not an adapter for this base"):
        identify(str(copy)).load("bf16")


def test_a_run_with_another_bases_adapter_is_refused(run, make_base, tmp_path):
    """Of the same shape, so that nothing but its config tells."""
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    config = copy / "adapter/adapter_config.json"
    base = json.loads(config.read_text())["base_model_name_or_path"]
    config.write_text(config.read_text().replace(base, str(make_base())))
    reseal(copy)
    with pytest.raises(PolicyError) as caught:
        identify(str(copy))
    assert caught.value.what == f"{config}: an adapter of {make_base()}, not of {base}"
    identify(str(copy / "checkpoints/step-000003"))  # has tensors of its own


def test_a_run_whose_base_has_changed_is_refused(run, tmp_path):
    copy = Path(shutil.copytree(run.parent, tmp_path / "all"))
    for name in ("run.json", "adapter/adapter_config.json"):
        file = copy / "run" / name
        file.write_text(file.read_text().replace(str(run.parent / "base"), str(copy / "base")))
    reseal(copy / "run")
    identify(str(copy / "run"))
    weights = copy / "base/model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(PolicyError, match=r"not the base that .* was trained on"):
        identify(str(copy / "run"))


def test_a_merged_folder_is_a_model_in_its_stored_type(run, tmp_path):
    merge_to(run, tmp_path / "out", "fp16")
    subject = identify(str(tmp_path / "out"))
    assert (subject.kind, subject.has_reference, subject.beta) == ("model", False, None)
    assert (subject.recipe.model.dtype, subject.recipe.model.quantization) == ("fp16", "none")
    assert subject.dtype == "float32"  # a CPU has no float16 products
    assert subject.recipe.data.max_length == 512
    policy = subject.load(subject.dtype)
    assert not policy.has_adapters
    assert policy.head.weight.dtype == torch.float32


def test_a_base_alone_can_be_quantized(make_base):
    assert identify(str(make_base()), quantization="nf4").load("float32").quantized_modules()
    assert not identify(str(make_base())).load("float32").quantized_modules()


def test_models_of_different_types_are_all_compared_in_float32(run, tmp_path):
    merge_to(run, tmp_path / "out", "fp16")
    of_run, merged = identify(str(run)), identify(str(tmp_path / "out"))
    assert common_dtype([of_run], all_float32=False) is None
    assert common_dtype([of_run, of_run], all_float32=True) == "float32"
    assert common_dtype([of_run, merged], all_float32=False) == "float32"


def unfinished(run: Path, tmp_path: Path) -> str:
    copy = Path(shutil.copytree(run, tmp_path / "unfinished"))
    shutil.rmtree(copy / "adapter")
    return str(copy)


def empty_folder(run: Path, tmp_path: Path) -> str:
    (tmp_path / "empty").mkdir()
    return str(tmp_path / "empty")


REFUSED = {
    "unfinished": (unfinished, "this run is not finished\nhint: .*name one of its checkpoints"),
    "no run": (empty_folder, "neither a run nor an adapter nor a model: it has no run.json"),
    "nothing there": (lambda run, tmp_path: str(tmp_path / "none"), "no such folder or file here, and no hub id"),
    "a relative path": (lambda run, tmp_path: "./none", "no such folder or file here, and no hub id"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_model_is_refused_by_name(run, tmp_path, case):
    make, words = REFUSED[case]
    name = make(run, tmp_path)
    with pytest.raises(RecipeError, match=words) as caught:
        identify(name)
    assert name in caught.value.what


def test_a_run_of_a_newer_recipe_is_refused_with_its_keys(run, tmp_path):
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    with (copy / "recipe.lock.toml").open("a") as file:
        file.write('\n[newer]\nkey = "value"\n')
    reseal(copy)
    with pytest.raises(RecipeError, match=r"cannot be read by this qpref\n.*newer"):
        identify(str(copy))


@pytest.mark.parametrize(("loss", "beta"), [
    ('name = "dpo"\nbeta = { start = 0.1, end = 0.4 }', 0.4),
    ('name = "sft"', None),
])  # fmt: skip
def test_beta_is_the_end_of_a_schedule_and_may_be_missing(run, tmp_path, loss, beta):
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    lock = copy / "recipe.lock.toml"
    head, _, rest = lock.read_text().partition("[loss]\n")
    tail = rest[rest.index("\n[") :] if "\n[" in rest else ""
    lock.write_text(f"{head}[loss]\n{loss}\n{tail}")
    reseal(copy)
    assert identify(str(copy)).beta == beta


# The tokenizer: that of the base has to be the one of training.


def use_own_base(run: Path, folder: Path) -> tuple[Path, Path]:
    """Copy a run and its base, so that both can be edited."""
    copy = Path(shutil.copytree(run, folder / "run"))
    base = Path(shutil.copytree(sealed.read_sealed(run / "run.json")["base_path"], folder / "base"))
    settings = copy / "adapter/adapter_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"base_model_name_or_path": str(base)}))
    edit_facts(copy, base_path=str(base))
    return copy, base


def edit_template(folder: Path) -> None:
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text() + "{{ ' ' }}")


def swap_ids(folder: Path) -> None:
    values = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = values["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (folder / "tokenizer.json").write_text(json.dumps(values))


@pytest.mark.parametrize("edit", [edit_template, swap_ids])
@pytest.mark.parametrize("part", [".", "checkpoints/step-000002"])
def test_a_tokenizer_changed_since_training_is_refused(run, tmp_path, edit, part):
    copy, base = use_own_base(run, tmp_path)
    identify(str(copy / part))
    edit(base)
    with pytest.raises(PolicyError, match=r"base: not the tokenizer or chat template used in training\nhint: restore"):
        identify(str(copy / part))


def test_a_tokenizer_that_splits_otherwise_is_refused(run, tmp_path):
    """Its ids and its template are those of training, so run.json can't tell."""
    copy, base = use_own_base(run, tmp_path)
    path = base / "tokenizer.json"
    path.write_text(path.read_text().replace('"add_prefix_space": false', '"add_prefix_space": true'))
    with pytest.raises(PolicyError, match=r"base: its tokenizer differs from that of .*run/adapter"):
        identify(str(copy))


@pytest.mark.parametrize(("edit", "part"), [(edit_template, "chat template"), (swap_ids, "tokenizer")])
def test_an_adapters_own_tokenizer_is_used_with_a_warning(run, tmp_path, said, edit, part):
    adapter = adapter_alone(run, tmp_path)
    identify(str(adapter), quantization="nf4")
    assert not said
    edit(adapter)
    subject = identify(str(adapter), quantization="nf4")
    assert said == [f"{adapter}: its {part} differs from its base's; the adapter's is used"]
    assert tokenizer_difference(subject.tokenizer().tokenizer, adapter) is None


def test_an_adapters_tokenizer_is_enough_for_a_base_without_one(run, tmp_path, said):
    copy, base = use_own_base(run, tmp_path)
    for file in base.glob("*token*"):
        file.unlink()
    identify(str(shutil.copytree(copy / "adapter", tmp_path / "alone")), quantization="nf4")
    assert not said
