"""What run.json has to say before a run is believed to be one."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from edited_runs import reseal

from qpref.errors import CheckpointError, PolicyError, RecipeError
from qpref.evaluation.subjects import identify
from qpref.merging.guards import read_run
from qpref.sealed import write_sealed
from qpref.training import checkpoint
from qpref.training.folder import RunFolder
from qpref.training.run_json import REQUIRED, REQUIRED_WITHIN
from qpref.training.snapshot import restore_adapter

WHOLE = {name: kind() for name, kind in REQUIRED.items()} | {
    name: dict.fromkeys(keys, "") for name, keys in REQUIRED_WITHIN.items()
}
WHOLE["dtype"] = "bf16"
DAMAGED = {
    "cut off": ("[1", "cannot be read: "),
    "not a text": ("\ud800", "cannot be read: "),
    "no object": ("[1]", "cannot be read: expected a JSON object"),
    "empty": ("{}", "lacks 'base': not a run of this qpref"),
    "another kind": (json.dumps(WHOLE | {"base_weights": None}), "lacks 'base_weights': not a run of this qpref"),
    "a dtype": (json.dumps(WHOLE | {"dtype": "int3"}), "lacks 'dtype': not a run of this qpref"),
    "modules": (json.dumps(WHOLE | {"quantized_modules": [[]]}), "lacks 'quantized_modules': not a run of this qpref"),
    "a part": (json.dumps(WHOLE | {"fingerprints": {}}), "lacks 'fingerprints.recipe': not a run of this qpref"),
}


def test_what_a_run_of_this_qpref_says_is_returned(tmp_path):
    write_sealed(tmp_path / "run.json", WHOLE | {"more": 1})
    assert RunFolder(tmp_path).description() == WHOLE | {"more": 1}


@pytest.mark.parametrize("case", DAMAGED)
@pytest.mark.parametrize("read", [identify, read_run])
def test_a_damaged_run_json_is_refused_by_name(tmp_path, case, read):
    """By what evaluates a run and by what merges it alike."""
    text, words = DAMAGED[case]
    (tmp_path / "adapter").mkdir()
    (tmp_path / "recipe.lock.toml").touch()
    (tmp_path / "run.json").write_bytes(text.encode(errors="surrogatepass"))
    if text.startswith("{"):
        reseal(tmp_path)
    with pytest.raises(RecipeError) as caught:
        read(str(tmp_path) if read is identify else tmp_path)
    assert f"{tmp_path / 'run.json'}: {words}" in caught.value.what


def test_a_checkpoint_of_other_layers_is_refused_by_training_and_by_evaluation(trained_run, monkeypatch):
    run = trained_run()
    path = max((run / "checkpoints").iterdir())
    saved = checkpoint.read(path)
    other = replace(saved, tensors=saved.tensors | {"adapter": dict(list(saved.tensors["adapter"].items())[1:])})
    policy = identify(str(path)).load("float32")
    with pytest.raises(CheckpointError, match=f"step {saved.step}: its adapter has other layers than this run's"):
        restore_adapter(other, policy)
    monkeypatch.setattr(checkpoint, "read", lambda path: other)
    with pytest.raises(PolicyError, match="its adapter has other layers than this base"):
        identify(str(path)).load("float32")
