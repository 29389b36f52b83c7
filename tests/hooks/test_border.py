"""Whatever a plugin raises or changes is named by its distribution; the user's own interrupt stays one."""

from __future__ import annotations

import _thread
import gc
import importlib.util
import io
import logging
import logging.config
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
import warnings

import pytest
import torch

from qpref.errors import DeviceMemoryError, PluginError
from qpref.hooks import border, hang_watch
from qpref.hooks.border import guarded, guarded_items, is_interrupt
from qpref.hooks.hang_watch import HangWatch
from qpref.hooks.manager import LOSS, PluginHost
from qpref.hooks.metric_names import name_problem
from qpref.hooks.process_state import ProcessState
from qpref.hooks.torch_state import TorchState
from qpref.printable import PrintableStream
from qpref.training.stop import stop_request


def failure(what: str) -> PluginError:
    return PluginError(f"acme 1.0 [loss-x] {what}")


def call(function, random: bool = False) -> None:
    with guarded("acme", lambda error: failure(f"raised {error}"), failure, random=random):
        function()


def raises(error: BaseException) -> None:
    raise error


def recurse() -> None:
    recurse()


RAISED = {
    "ValueError: no": lambda: raises(ValueError("no")),
    "KeyboardInterrupt": lambda: raises(KeyboardInterrupt()),
    "GeneratorExit": lambda: raises(GeneratorExit()),
    "SystemExit: 3": lambda: sys.exit(3),
    "StopIteration": lambda: raises(StopIteration()),
    "RecursionError: maximum recursion depth exceeded": recurse,
}


@pytest.mark.parametrize("said", RAISED)
def test_whatever_a_plugin_raises_is_named(said):
    with pytest.raises(PluginError) as caught:
        call(RAISED[said])
    assert str(caught.value).startswith(f"acme 1.0 [loss-x] raised {said}")
    assert caught.value.exit_code == 6


@pytest.mark.parametrize("said", [said for said in RAISED if said != "StopIteration"])
@pytest.mark.parametrize("begun", [False, True], ids=["before its first item", "after it"])
def test_whatever_an_iterating_plugin_raises_is_named(said, begun):
    def items():
        if begun:
            yield 1
        RAISED[said]()
        yield 2

    got = guarded_items("acme", items, lambda error: failure(f"raised {error}"), lambda error: False)
    if begun:
        assert next(got) == 1
    with pytest.raises(PluginError, match=re.escape(f"raised {said}"[:30])):
        next(got)


def test_a_consumer_that_stops_early_or_raises_is_no_failure_of_the_plugin():
    def items():
        yield from range(5)

    got = guarded_items("acme", items, failure, lambda error: False)
    assert next(got) == 0
    got.close()
    got = guarded_items("acme", items, failure, lambda error: False)
    next(got)
    with pytest.raises(KeyError):
        got.throw(KeyError("the consumer's"))


def by_python_handler() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    try:
        with stop_request():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def by_default_handler() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        _thread.interrupt_main()
        time.sleep(1)
    finally:
        signal.signal(signal.SIGINT, before)


def by_handler_of_the_command() -> None:
    """As under `python -m qpref`, whose first module is called __main__."""
    space = {"__name__": "__main__", "__spec__": importlib.util.find_spec("qpref.__main__")}
    exec("def interrupt(number, frame):\n    raise KeyboardInterrupt", space)
    before = signal.signal(signal.SIGINT, space["interrupt"])
    try:
        signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("interrupt", [by_python_handler, by_default_handler, by_handler_of_the_command])
def test_the_users_interrupt_in_a_plugin_is_the_users(interrupt):
    with pytest.raises(KeyboardInterrupt) as caught:
        call(interrupt)
    assert is_interrupt(caught.value)


def test_exceptions_that_the_caller_handles_pass():
    with pytest.raises(MemoryError), guarded("acme", failure, failure, passes=lambda e: isinstance(e, MemoryError)):
        raise MemoryError


def test_a_plugin_without_memory_is_named_and_no_broken_one():
    with pytest.raises(DeviceMemoryError) as caught:
        call(lambda: raises(MemoryError()))
    assert (caught.value.what, caught.value.exit_code) == ("acme ran out of memory", 5)


CHANGES = {
    "grad mode": lambda: torch.set_grad_enabled(False),
    "default dtype": lambda: torch.set_default_dtype(torch.float64),
    "number of threads": lambda: torch.set_num_threads(torch.get_num_threads() + 1),
    "deterministic algorithms": lambda: torch.use_deterministic_algorithms(True, warn_only=True),
    "precision of float32 products": lambda: torch.set_float32_matmul_precision("medium"),
    "cuDNN flags": lambda: setattr(torch.backends.cudnn, "benchmark", True),
    "default device": lambda: torch.set_default_device("meta"),
    "autocast": lambda: torch.set_autocast_enabled("cpu", True),
    "anomaly detection": lambda: torch.autograd.set_detect_anomaly(True),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("is_raising", [False, True], ids=["returns", "raises"])
def test_a_setting_of_torch_that_a_plugin_changes_is_set_back_and_named(name, is_raising):
    before = TorchState.now()

    def change() -> None:
        CHANGES[name]()
        if is_raising:
            raise ValueError

    with pytest.raises(PluginError) as caught:
        call(change)
    assert TorchState.now() == before
    said = "raised ValueError" if is_raising else f"changed torch's {name}, which would change the whole run"
    assert str(caught.value) == f"acme 1.0 [loss-x] {said}"


PROCESS_CHANGES = {
    "the working directory": lambda: os.chdir("/"),
    "the umask": lambda: os.umask(0o123),
    "standard output or error": lambda: setattr(sys, "stderr", io.StringIO()),
    "the recursion limit": lambda: sys.setrecursionlimit(12345),
    "garbage collection": gc.disable,
    "the logger of qpref": lambda: logging.disable(logging.CRITICAL),
    "warnings that are errors": lambda: warnings.simplefilter("error", ResourceWarning),
    "signal handlers": lambda: signal.signal(signal.SIGTERM, signal.SIG_IGN),
    "a timer": lambda: signal.alarm(1000),
}
LOGGER_CHANGES = {
    "level": lambda logger: logger.setLevel(logging.CRITICAL),
    "handlers": lambda logger: logger.addHandler(logging.NullHandler()),
    "disabled": lambda logger: logging.config.dictConfig({"version": 1}),
}


@pytest.mark.parametrize("name", PROCESS_CHANGES)
@pytest.mark.parametrize("is_raising", [False, True], ids=["returns", "raises"])
def test_a_setting_of_the_process_that_a_plugin_changes_is_set_back_and_named(name, is_raising):
    before, filters = ProcessState.now(), list(warnings.filters)

    def change() -> None:
        PROCESS_CHANGES[name]()
        if is_raising:
            raise ValueError

    with pytest.raises(PluginError) as caught:
        call(change)
    assert ProcessState.now() == before
    assert list(warnings.filters) == filters
    said = "raised ValueError" if is_raising else f"changed {name}, which would change the whole run"
    assert str(caught.value) == f"acme 1.0 [loss-x] {said}"


@pytest.mark.parametrize("change", LOGGER_CHANGES.values(), ids=LOGGER_CHANGES)
def test_a_logger_that_would_say_no_more_is_set_back(change, monkeypatch):
    for logger in logging.root.manager.loggerDict.values():  # dictConfig switches all of them off
        if isinstance(logger, logging.Logger):
            monkeypatch.setattr(logger, "disabled", logger.disabled)
    before = ProcessState.now()
    with pytest.raises(PluginError, match="changed the logger of qpref"):
        call(lambda: change(logging.getLogger("qpref")))
    assert ProcessState.now() == before


def test_filters_that_show_fewer_warnings_are_the_plugins_own():
    with warnings.catch_warnings():
        call(lambda: warnings.simplefilter("ignore", BytesWarning))
        assert warnings.filters[0][0] == "ignore"


def test_pythons_random_numbers_are_named_too():
    random.seed(3)
    with pytest.raises(PluginError, match="changed Python's random number state"):
        call(random.random, random=True)
    drawn = random.random()
    random.seed(3)
    assert drawn == random.random()


def test_a_plugin_cannot_close_the_commands_output():
    inside = io.StringIO()
    stream = PrintableStream(inside)
    stream.close()
    stream.write("still here")
    assert inside.getvalue() == "still here"


@pytest.mark.parametrize("draw", [lambda: torch.rand(1), lambda: torch.manual_seed(7)], ids=["draws", "seeds"])
def test_random_numbers_are_named_where_they_would_change_a_run(draw):
    torch.manual_seed(3)
    call(draw)
    torch.manual_seed(3)
    with pytest.raises(PluginError, match="changed torch's random number state"):
        call(draw, random=True)
    drawn = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(1))


def test_a_plugin_that_changes_nothing_is_not_named():
    call(lambda: torch.zeros(3).sum(), random=True)


def test_settings_of_a_torch_that_a_plugin_has_imported_are_compared_with_torchs_own():
    before = TorchState({})
    torch.set_grad_enabled(False)
    assert before.restore() == ["grad mode"]
    assert torch.is_grad_enabled()


# os._exit


@pytest.fixture
def install(tmp_path, monkeypatch):
    """`install(source)`: a distribution acme 1.0 whose module offers the loss `x`."""

    def make(source: str) -> None:
        info = tmp_path / "acme-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text("[qpref]\nloss-x = acme_loss_x\n")
        (tmp_path / "acme_loss_x.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path)
        importlib.invalidate_caches()
        monkeypatch.delitem(sys.modules, "acme_loss_x", raising=False)

    return make


EXITS = {
    "at import": "import os\nos._exit(3)\n",
    "at import, by name": "from os import _exit\n_exit(3)\n",
    "through a library": "import os, functools\nfunctools.partial(os._exit, 3)()\n",
}


@pytest.mark.parametrize("where", EXITS)
def test_a_plugin_that_ends_the_process_is_named(install, where):
    install(EXITS[where])
    with pytest.raises(PluginError) as caught:
        PluginHost().load(LOSS, "x")
    said = "acme 1.0 [loss-x]: importing acme_loss_x raised SystemExit: os._exit(3)"
    assert str(caught.value).splitlines()[0] == said


def test_everybody_elses_exits_are_real():
    code = "import os; from qpref.hooks import border; border.note_plugin('acme'); os._exit(3)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 3


FORK = """
import os
from qpref.hooks import border
border.note_plugin("__main__")
child = os.fork()
if child == 0:
    os._exit(4)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
try:
    os._exit(5)
except SystemExit as error:
    print(error)
"""


def test_a_plugins_child_process_ends_for_real():
    done = subprocess.run([sys.executable, "-c", FORK], check=True, capture_output=True, text=True)
    assert done.stdout == "4\nos._exit(5)\n"


# Calls that don't return.


def test_a_call_that_does_not_return_is_named_once_with_how_to_interrupt_it(said, monkeypatch):
    monkeypatch.setattr(hang_watch, "SECONDS", 0.2)
    watch = HangWatch()
    watch.enter("loss 'x' (acme 1.0 [loss-x])")
    deadline = time.monotonic() + 10
    while not said and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.3)
    watch.leave()
    assert len(said) == 1
    assert re.fullmatch(
        r"loss 'x' \(acme 1\.0 \[loss-x\]\) has not returned for 0 s; Ctrl\+C stops it \(during training: twice\), and "
        rf"where that doesn't help, `kill -9 {os.getpid()}`; a run continues with --resume",
        said[0],
    )


def test_many_short_calls_are_not_one_long_one(said, monkeypatch):
    monkeypatch.setattr(hang_watch, "SECONDS", 0.2)
    watch = HangWatch()
    end = time.monotonic() + 0.7
    while time.monotonic() < end:
        watch.enter("loss")
        watch.leave()
        watch.enter("loss")
    watch.leave()
    assert said == []


def test_the_watch_is_entered_for_every_call_and_left_after_it(monkeypatch):
    seen = []
    monkeypatch.setattr(border.watch, "enter", lambda who: seen.append(who))
    monkeypatch.setattr(border.watch, "leave", lambda: seen.append(None))
    call(lambda: None)
    list(guarded_items("reader", lambda: iter("ab"), failure, lambda error: False))
    assert seen == ["acme", None, *["reader", None] * 3]


# Names of metrics.


@pytest.mark.parametrize(
    "name",
    ["loss", "loss/dpo", "step", "split", "tokens", "seconds", "grad_norm", "learning_rate", "logps/chosen",
     "logps/accuracies", "eval_loss", "rewards/other", "", "two\nlines", "\x1b[31m", 3, None, "x" * 201],
)  # fmt: skip
def test_a_metric_cannot_have_a_name_of_the_cores_or_none(name):
    assert name_problem(name)


@pytest.mark.parametrize("name", ["rewards/chosen", "rewards/accuracies", "kl", "lossy", "steps", "acme/loss", "größe"])
def test_a_metric_can_have_any_other_name(name):
    assert name_problem(name) is None


def test_threads_end_with_the_process():
    assert all(thread.daemon for thread in threading.enumerate() if thread.name.startswith("qpref"))
