"""What `qpref plan --gpus` says that each process sends is what training moves."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tomli_w

from qpref.memory.costs import layer_weight_bytes
from qpref.memory.links import LINKS
from qpref.memory.setup import Setup
from qpref.memory.shape import model_shape
from qpref.recipe.resolve import make_plan

COUNTED = Path(__file__).with_name("counted_training.py")


def moved(tmp_path, document, steps):
    """Bytes of each collective in a run of two processes, by its name in torch."""
    recipe, name = tmp_path / f"{steps}.toml", tmp_path / f"counts-{steps}"
    document["train"]["max_steps"] = steps
    recipe.write_text(tomli_w.dumps(document))
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(COUNTED), str(recipe)]
    done = subprocess.run([sys.executable, *command, str(tmp_path / f"run-{steps}"), str(name)], check=False,
                          capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.returncode == 0, done.stderr
    first, second = (json.loads(Path(f"{name}.{rank}").read_text()) for rank in (0, 1))
    assert first == second
    return first


def per_step(tmp_path, document, collective):
    """Bytes that two further steps move, each."""
    few, more = (moved(tmp_path, document, steps).get(collective, 0) for steps in (1, 3))
    return (more - few) / 2


@pytest.fixture
def document(make_recipe):
    """A loss without a reference, and steps of one micro-batch; held-out rows are scored at the start and the end."""
    changes = {"loss.name": "simpo", "loss.beta": 2.0, "model.device": "cpu", "train.tokens_per_microbatch": 10**6}
    return make_recipe(changes | {"train.batch_size": 4, "train.save_every": 100, "train.epochs": 2})


@pytest.mark.soak
def test_a_replicated_step_adds_up_the_adapters_gradients_once(tmp_path, document):
    document["distributed"] = {"shard_base": False}
    recipe = make_plan(document).recipe
    shape = model_shape(recipe.model, recipe.adapter)
    beside = (
        len(shape.adapter_sizes) + 1
    )  # a number for each matrix: how many ranks have its gradient; one for the loss
    planned = LINKS["pcie4"].sum_bytes(4 * sum(shape.adapter_sizes), 2)  # two ranks send as much as the message has
    assert per_step(tmp_path, document, "allreduce_") == planned + 4 * beside


@pytest.mark.soak
def test_a_shared_base_is_gathered_once_forward_and_once_backward(tmp_path, document):
    document["distributed"] = {"shard_base": True}
    document["model"]["quantization"] = "nf4"
    recipe = make_plan(document).recipe
    shape = model_shape(recipe.model, recipe.adapter)
    layers = sum(layer_weight_bytes(layer, Setup.of(recipe, "cpu", shape)) for layer in shape.layers)
    assert per_step(tmp_path, document, "_allgather_base_") == pytest.approx(2 * layers, rel=0.05)
