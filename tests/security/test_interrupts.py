"""An interrupt ends the process of the command with 130 and without a traceback, wherever it comes."""

import signal
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

from qpref.cli import LazyGroup

PROCESS = """
import atexit, os, signal, sys, types

signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background inherits that it is ignored

def interrupt():
    os.kill(os.getpid(), signal.SIGINT)

class Command(types.ModuleType):
    # Stands for qpref.cli, which is slow to start.
    def __getattr__(self, name):
        if name != "main":
            raise AttributeError(name)
        {importing}
        return self.run

    def run(self):
        {running}

import qpref.__main__ as process
sys.modules["qpref.cli"] = Command("qpref.cli")
{before}
process.run()
"""
WAYS = {
    "while it is imported": {"importing": "interrupt()"},
    "in its own code": {"running": "interrupt()"},
    "in native code that makes it an error": {
        "running": "\n        try: interrupt()\n        except BaseException: raise SystemError('no cause')"
    },
    "in an import, which fails": {
        "running": "\n        try: interrupt()\n        except BaseException: sys.exit(12)"
    },
    "at exit": {"running": "atexit.register(interrupt)"},
    "while threads are joined": {
        "running": "import threading, time; threading.Thread(target=lambda: (time.sleep(.1), interrupt())).start()"
    },
}  # fmt: skip


def run(importing="pass", running="pass", before="pass"):
    code = PROCESS.format(importing=importing, running=running, before=before)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_an_interrupt_exits_with_130(way):
    done = run(**way)
    assert done.returncode == 130, done.stderr
    assert "Traceback" not in done.stderr


def test_an_ignored_interrupt_stays_ignored():
    done = run(before="signal.signal(signal.SIGINT, signal.SIG_IGN)", running="interrupt(); sys.exit(3)")
    assert (done.returncode, done.stderr) == (3, "")


@pytest.mark.parametrize(("running", "code"), [("sys.exit(3)", 3), ("pass", 0), ("1 / 0", 1)])
def test_other_exits_keep_their_code(running, code):
    done = run(running=running)
    assert done.returncode == code
    assert ("ZeroDivisionError" in done.stderr) == (code == 1)


def test_an_interrupt_inside_a_command_is_one_line():
    @click.command("plugins")
    def interrupted():
        raise KeyboardInterrupt

    class Group(LazyGroup):
        def get_command(self, ctx, cmd_name):
            return interrupted

    done = CliRunner().invoke(Group("qpref"), ["plugins"])
    assert (done.exit_code, done.output) == (130, "error: interrupted\n")


def test_threads_that_never_end_are_named():
    """Python waits for them at its end without a word."""
    running = "import threading, time; threading.Thread(target=time.sleep, args=(60,), name='acme-upload').start()"
    code = PROCESS.format(importing="pass", running=running, before="process.THREAD_SECONDS = 0.1")
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) as process:
        said = process.stderr.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 130
    assert said.startswith("warning: the command is done, and waits for threads that a plugin or a library has started")
    assert "acme-upload" in said


def test_a_crash_names_its_line_of_python():
    done = run(running="os.abort()")
    assert done.returncode == -signal.SIGABRT
    assert "Fatal Python error: Aborted" in done.stderr
    assert "in run" in done.stderr
