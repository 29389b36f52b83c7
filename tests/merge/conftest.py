"""Finished runs, each trained once a session."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from qpref.plan import make_plan
from qpref.training.run import train_plan


@pytest.fixture(scope="session")
def _trained(tmp_path_factory) -> dict[str, Path]:
    return {}


@pytest.fixture
def train(make_recipe, make_base, tmp_path, tmp_path_factory, _trained) -> Callable[..., Path]:
    """`train(base, **recipe changes)`: a finished run of three large steps; not to be written to."""

    def run(base: Path | None = None, **changes) -> Path:
        changes = {"train.learning_rate": 0.02, "model.base": str(base or make_base())} | changes
        key = json.dumps(changes, sort_keys=True)
        if key not in _trained:
            folder = tmp_path_factory.mktemp("trained")
            recipe = make_recipe(changes)
            for name in ("train", "heldout"):
                if name in recipe["data"]:
                    data = Path(recipe["data"][name])
                    recipe["data"][name] = str(shutil.copy(data, folder / data.name))
            _trained[key] = train_plan(make_plan(recipe, output=folder / "run"))
        return _trained[key]

    return run
