"""TensorBoard's own reader reads back the sink's events."""

import math
import sys

import pytest
from pydantic import ValidationError
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from qpref.errors import PluginError
from qpref.hooks import SinkContext
from qpref.records import MetricRow
from qpref_plugins.sink_tensorboard import TensorBoardOptions, qpref_metric_sinks


def opened(run_folder, first_step=0, **options):
    [sink] = qpref_metric_sinks()
    context = SinkContext(run_folder=run_folder, first_step=first_step, total_steps=10)
    return sink.open(TensorBoardOptions(**options), context)


def row(step, split="train", **values):
    named = {name.replace("__", "/"): value for name, value in values.items()}
    return MetricRow(step=step, split=split, values=named, tokens=1, seconds=1.0)


def write(run_folder, *rows, first_step=0, **options):
    writer = opened(run_folder, first_step, **options)
    for one in rows:
        writer.write(one)
    writer.close()


def scalars(folder):
    """name -> [(step, value)]"""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


def test_every_value_is_a_scalar_of_its_step(tmp_path):
    write(tmp_path, row(1, loss=0.5, rewards__margins=-2.0), row(2, loss=0.25), row(2, "eval", eval_loss=0.75))
    assert scalars(tmp_path / "sinks" / "tensorboard") == {
        "loss": [(1, 0.5), (2, 0.25)],
        "rewards/margins": [(1, -2.0)],
        "eval_loss": [(2, 0.75)],
    }


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_left_out(tmp_path, value):
    write(tmp_path, row(1, loss=value, margin=1.0), row(2, loss=0.5))
    assert scalars(tmp_path / "sinks" / "tensorboard") == {"loss": [(2, 0.5)], "margin": [(1, 1.0)]}


def test_the_folder_is_the_recipes(tmp_path):
    write(tmp_path, row(1, loss=0.5), folder="logs/tb")
    assert [path.name for path in (tmp_path / "sinks").iterdir()] == ["logs"]
    assert scalars(tmp_path / "sinks" / "logs" / "tb") == {"loss": [(1, 0.5)]}


def make_older(folder):
    """Give the event file the name that it would have had the second before, so that the next one is another."""
    [file] = folder.iterdir()
    stamp = file.name.split(".")[3]
    file.rename(folder / file.name.replace(stamp, str(int(stamp) - 1)))


def test_a_resumed_run_replaces_the_steps_after_its_checkpoint(tmp_path):
    write(tmp_path, *(row(step, loss=1.0) for step in range(1, 6)))
    make_older(tmp_path / "sinks" / "tensorboard")
    write(tmp_path, *(row(step, loss=2.0) for step in range(4, 8)), first_step=3)
    assert scalars(tmp_path / "sinks" / "tensorboard") == {
        "loss": [(step, 1.0 if step < 4 else 2.0) for step in range(1, 8)]
    }


def test_without_tensorboardx_the_way_out_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(PluginError) as caught:
        opened(tmp_path)
    assert str(caught.value) == (
        "the sink 'tensorboard' needs the package tensorboardX\nhint: pip install \"qpref[tensorboard]\""
    )


def test_the_plugin_loads_without_tensorboardx(monkeypatch):
    from qpref.hooks.manager import SINK, PluginHost

    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    monkeypatch.delitem(sys.modules, "qpref_plugins.sink_tensorboard")
    assert PluginHost().load(SINK, "tensorboard").record.name == "tensorboard"


@pytest.mark.parametrize("options", [{"folder": 3}, {"fodler": "x"}], ids=str)
def test_wrong_options_are_refused(options):
    with pytest.raises(ValidationError, match=next(iter(options))):
        TensorBoardOptions(**options)
