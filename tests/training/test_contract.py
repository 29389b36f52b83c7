"""A loss that breaks its contract ends a run by name, whichever way the run was started."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tomli_w

import qpref
from qpref.errors import PluginError

PLUGIN = """
import sys
import torch
from qpref.hooks import Options, PairedLoss, hookimpl
from qpref.records import LossOutput


class OddOptions(Options):
    pass


def build(options):
    {build}

    def odd(inputs):
        losses = inputs.policy.rejected.mean - inputs.policy.chosen.mean
        {body}

    return odd


@hookimpl
def qpref_losses():
    yield PairedLoss(name="odd", summary="", options=OddOptions, build=build, needs=frozenset({needs}))
"""

BROKEN = {
    "raises": ("raise RuntimeError('no luck')", "raised RuntimeError: no luck"),
    "exits": ("sys.exit(0)", "raised SystemExit: 0"),
    "ends the process": ("import os; os._exit(0)", "raised SystemExit: os._exit(0)"),
    "raises an interrupt": ("raise KeyboardInterrupt", "raised KeyboardInterrupt"),
    "raises a generator's exit": ("raise GeneratorExit", "raised GeneratorExit"),
    "recurses": (
        "return inputs and odd(inputs)",
        "raised RecursionError: maximum recursion depth exceeded",
    ),
    "switches gradients off": (
        "torch.set_grad_enabled(False); return LossOutput(losses=losses, metrics={})",
        "changed torch's grad mode, which would change the whole run",
    ),
    "draws random numbers": (
        "return LossOutput(losses=losses + torch.rand(2), metrics={})",
        "changed torch's random number state, which would change the whole run",
    ),
    "takes a name of the core's": (
        "return LossOutput(losses=losses, metrics={'loss': losses.detach()})",
        "returned a metric that is called 'loss', a name of the core's own",
    ),
    "returns a tensor": ("return losses", "returned Tensor, not LossOutput"),
    "returns nothing": ("return None", "returned NoneType, not LossOutput"),
    "returns a mean": (
        "return LossOutput(losses=losses.mean(), metrics={})",
        "returned losses of shape () for 2 examples; it has to be (2,)",
    ),
    "returns a column": (
        "return LossOutput(losses=losses[:, None], metrics={})",
        "returned losses of shape (2, 1) for 2 examples; it has to be (2,)",
    ),
    "returns a list": (
        "return LossOutput(losses=losses.tolist(), metrics={})",
        "returned losses of shape list for 2 examples; it has to be (2,)",
    ),
    "returns a detached value": (
        "return LossOutput(losses=losses.detach(), metrics={})",
        "returned losses without a gradient",
    ),
    "attaches a metric": (
        "return LossOutput(losses=losses, metrics={'odd/loss': losses})",
        "returned the metric odd/loss not as one detached value an example",
    ),
    "averages a metric": (
        "return LossOutput(losses=losses, metrics={'odd/loss': losses.detach().mean()})",
        "returned the metric odd/loss not as one detached value an example",
    ),
    "gives a metric as a number": (
        "return LossOutput(losses=losses, metrics={'odd/loss': 0.5})",
        "returned the metric odd/loss not as one detached value an example",
    ),
    "gives no metrics": (
        "return LossOutput(losses=losses, metrics=None)",
        "returned metrics as NoneType, not by name",
    ),
}


@pytest.fixture
def install_loss(tmp_path, monkeypatch):
    """`install_loss(body)`: put a distribution `acme-odd 2.0` that offers the loss `odd` on the path."""

    def install(body: str, build: str = "pass", needs: str = "") -> None:
        info = tmp_path / "site" / "acme_odd-2.0.dist-info"
        info.mkdir(parents=True)
        (info.parent / "acme_odd.py").write_text(PLUGIN.format(body=body, build=build, needs=needs))
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-odd\nVersion: 2.0\n")
        (info / "entry_points.txt").write_text("[qpref]\nloss-odd = acme_odd\n")
        monkeypatch.syspath_prepend(info.parent)
        monkeypatch.delitem(sys.modules, "acme_odd", raising=False)

    yield install
    sys.modules.pop("acme_odd", None)


@pytest.fixture
def odd_recipe(make_recipe):
    """One micro-batch of 2 pairs a step, and nothing held out, so that the first call is a training step's."""
    recipe = make_recipe({"train.batch_size": 2, "train.tokens_per_microbatch": 10_000})
    del recipe["data"]["heldout"]
    return recipe | {"loss": {"name": "odd"}}


@pytest.mark.parametrize("fault", BROKEN)
def test_broken_loss_ends_the_run_by_name_distribution_and_version(odd_recipe, install_loss, tmp_path, fault):
    body, complaint = BROKEN[fault]
    install_loss(body)
    with pytest.raises(PluginError) as stopped:
        qpref.train(odd_recipe, output=tmp_path / "run")
    assert stopped.value.what.startswith(f"loss 'odd' (acme-odd 2.0 [loss-odd]) {complaint}")
    assert stopped.value.exit_code == 6


@pytest.mark.parametrize("fault", ["raise KeyError('beta')", "sys.exit(3)", "raise KeyboardInterrupt"])
def test_loss_whose_build_fails_ends_the_run_before_it_begins(odd_recipe, install_loss, tmp_path, fault):
    install_loss("return LossOutput(losses=losses, metrics={})", build=fault)
    with pytest.raises(PluginError, match=r"loss 'odd' \(acme-odd 2\.0 \[loss-odd\]\) build raised"):
        qpref.train(odd_recipe, output=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_loss_of_an_unknown_scope_is_refused_by_name(odd_recipe, install_loss, tmp_path):
    install_loss("return LossOutput(losses=losses, metrics={})", needs="), scope=('batch'")
    with pytest.raises(PluginError, match=r"has the scope 'batch', not one of 'example', 'mismatched', 'step'"):
        qpref.train(odd_recipe, output=tmp_path / "run")


def test_loss_that_needs_the_unknown_is_refused_by_name(odd_recipe, install_loss, tmp_path):
    install_loss("return LossOutput(losses=losses, metrics={})", needs="{'a critic'}")
    with pytest.raises(PluginError, match=r"acme-odd 2\.0 \[loss-odd\] needs a critic, which this qpref doesn't have"):
        qpref.train(odd_recipe, output=tmp_path / "run")


def test_loss_that_raises_late_leaves_the_last_checkpoint(odd_recipe, install_loss, tmp_path):
    # With batches of 2 pairs in one micro-batch the third call is the third step's.
    install_loss(
        "calls.append(1)\n        if len(calls) == 3: raise RuntimeError('no luck')\n"
        "        return LossOutput(losses=losses, metrics={})",
        build="calls = []",
    )
    odd_recipe["train"]["save_every"] = 1
    with pytest.raises(PluginError):
        qpref.train(odd_recipe, output=tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["step-000001", "step-000002"]


def test_loss_that_needs_no_reference_is_handed_none(odd_recipe, install_loss, tmp_path):
    install_loss("assert inputs.reference is None\n        return LossOutput(losses=losses, metrics={})")
    assert (qpref.train(odd_recipe, output=tmp_path / "run") / "adapter").is_dir()


# Two ways to run.


def test_python_call_trains_as_the_command_does(make_recipe, tmp_path):
    recipe = make_recipe({"adapter.dropout": 0.1, "train.max_steps": 2})
    (tmp_path / "recipe.toml").write_text(tomli_w.dumps(recipe))
    arguments = ["train", str(tmp_path / "recipe.toml"), "--output", str(tmp_path / "command")]
    done = subprocess.run(
        [sys.executable, "-c", "from qpref.cli import main; main()", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},  # as many as in this process; sums depend on it
    )
    assert done.returncode == 0, done.stderr
    qpref.train(recipe, output=tmp_path / "call")

    def result(folder: Path) -> tuple[bytes, list[dict]]:
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return (folder / "adapter" / "adapter_model.safetensors").read_bytes(), [row | {"seconds": 0} for row in rows]

    assert result(tmp_path / "call") == result(tmp_path / "command")


def test_python_call_works_twice_in_one_process(make_recipe, tmp_path):
    # A subpackage of that name, once imported, would take the function's place.
    folders = [qpref.train(make_recipe({"train.max_steps": 1}), output=tmp_path / name).path for name in ("one", "two")]
    adapters = [(folder / "adapter" / "adapter_model.safetensors").read_bytes() for folder in folders]
    assert adapters[0] == adapters[1]
