"""`qpref train --gpus` and `--processes` start processes by torchrun and end as they end; and how processes meet."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tomli_w
import torch
from click.testing import CliRunner
from conftest import outcome
from processes import fork_ranks, free_port
from teams import small_recipe
from torch.distributed import distributed_c10d

from qpref.cli import main
from qpref.distributed import join
from qpref.distributed.join import joined
from qpref.distributed.world import World
from qpref.errors import PeerError, RecipeError

HERE = str(Path(__file__).parent)
LAUNCH = (
    "import signal, sys\n"
    "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a test run in the background ignores it
    "from qpref.distributed.launch import launch\n"
    "from qpref.errors import QprefError\n"
    "try:\n"
    "    sys.exit(launch('launched', sys.argv[1:], 2, 20))\n"
    "except QprefError as error:\n"
    "    print(f'error: {error}', file=sys.stderr)\n"
    "    sys.exit(error.exit_code)\n"
)


def start(scene: str, folder: Path) -> subprocess.Popen[str]:
    """Launch two processes of a scene of launched.py."""
    variables = os.environ | {"PYTHONPATH": os.pathsep.join([HERE, *sys.path])}
    variables.pop("OMP_NUM_THREADS", None)
    command = [sys.executable, "-c", LAUNCH, scene, str(folder)]
    return subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def end(scene: str, folder: Path) -> tuple[int, str]:
    """Exit code and standard error of a scene."""
    process = start(scene, folder)
    _, errors = process.communicate(timeout=120)
    return process.returncode, errors


def qpref(*arguments: str, **variables: str):
    return CliRunner(env=variables).invoke(main, arguments)


@pytest.mark.parametrize(("found", "has"), [(0, "no GPU that torch sees"), (1, "1 GPU"), (2, "2 GPUs")])
def test_more_gpus_than_there_are_is_a_mistake(make_recipe, tmp_path, monkeypatch, found, has):
    (tmp_path / "r.toml").write_text(tomli_w.dumps(make_recipe()))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: found)
    done = qpref("train", str(tmp_path / "r.toml"), "--gpus", "3")
    assert done.exit_code == 2
    assert f"error: --gpus 3: this machine has {has}\n" in done.output


@pytest.mark.parametrize(("option", "device"), [("--gpus", "cuda"), ("--processes", "cpu")])
def test_the_option_decides_the_device_whatever_the_recipe_says(make_recipe, tmp_path, option, device):
    other = {"cuda": "cpu", "cpu": "cuda"}[device]
    (tmp_path / "r.toml").write_text(tomli_w.dumps(make_recipe({"model.device": other})))
    done = qpref("train", str(tmp_path / "r.toml"), option, "2", "--dry-run")
    assert f'device = "{device}"' in done.output


def test_processes_that_cannot_connect_after_they_met_leave_with_a_message(monkeypatch):
    def broken(**_: object) -> None:
        raise RuntimeError("[gloo] connectFullMesh failed: Connection refused\nmore")

    port = free_port()
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(join, "num_processes", lambda: 2)
    monkeypatch.setattr(torch.distributed, "new_group", broken)
    with pytest.raises(PeerError, match=r"rank 0: .* couldn't connect: .*Connection refused\nhint"):
        joined(torch.device("cpu"), timeout=5).__enter__()
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("is_ours", [True, False])
def test_after_a_failure_the_group_of_the_gpus_is_aborted_before_the_others_are_left(monkeypatch, is_ours):
    calls = []
    monkeypatch.setattr(distributed_c10d, "_abort_process_group", lambda group: calls.append(f"abort {group}"))
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda group="all": calls.append(f"leave {group}"))
    join._leave(["hosts", "devices"], is_ours, failed=True)
    assert calls == ["abort devices", "leave all" if is_ours else "leave hosts"]
    calls.clear()
    join._leave(["hosts", "devices"], is_ours, failed=False)
    assert calls == (["leave all"] if is_ours else ["leave hosts", "leave devices"])


def test_options_that_start_processes_are_refused_among_processes(make_recipe, tmp_path):
    (tmp_path / "r.toml").write_text(tomli_w.dumps(make_recipe()))
    done = qpref("train", str(tmp_path / "r.toml"), "--processes", "2", WORLD_SIZE="2")
    assert done.exit_code == 2
    assert "this is already one of 2" in done.output
    done = qpref("train", str(tmp_path / "r.toml"), "--processes", "2", "--gpus", "2")
    assert done.exit_code == 2
    assert "exclude each other" in done.output


@pytest.mark.parametrize("command", ["eval", "generate", "merge", "check"])
def test_other_commands_run_in_one_process(command):
    done = qpref(command, "runs/a", WORLD_SIZE="2", RANK="0")
    assert done.exit_code == 2
    assert f"error: qpref {command} runs in one process, and this is one of 2" in done.output
    done = qpref(command, "runs/a", WORLD_SIZE="2", RANK="1")
    assert (done.exit_code, done.output) == (2, "")


@pytest.mark.parametrize("code", [3, 5])
def test_the_exit_code_is_that_of_the_process_that_failed(tmp_path, code):
    assert end(str(code), tmp_path) == (code, "")


def test_a_killed_process_is_said_once(tmp_path):
    assert end("noticed", tmp_path) == (13, "")
    code, errors = end("unnoticed", tmp_path)
    assert code == 13
    assert errors.startswith("error: rank 1 was ended by SIGKILL\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_reach_all_processes_which_save(tmp_path, number):
    process = start("stop", tmp_path)
    deadline = time.monotonic() + 60
    while not all((tmp_path / f"ready-{rank}").exists() for rank in range(2)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    time.sleep(0.8)
    process.send_signal(number)  # an impatient user's second one
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (128 + number, "")
    received = [(tmp_path / f"saved-{rank}").read_text() for rank in range(2)]
    assert received == [f"{number.value} {number.value}"] * 2


def test_processes_share_the_processors(tmp_path):
    assert end("threads", tmp_path) == (0, "")
    share = str(max(1, len(os.sched_getaffinity(0)) // 2))
    assert [(tmp_path / f"threads-{rank}").read_text() for rank in range(2)] == [share] * 2


@pytest.mark.parametrize("rank", [0, 1])
def test_processes_that_do_not_meet_say_so_within_the_timeout(monkeypatch, rank):
    port = free_port()
    for name, value in {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    said = f"the 2 processes of the run didn't meet at 127.0.0.1:{port} within 2 s"
    with pytest.raises(PeerError, match=said), joined(torch.device("cpu"), timeout=2):
        pass


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, without RANK and MASTER_ADDR and MASTER_PORT"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two', not a number"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "h", "MASTER_PORT": "99999"}, "port must have value"),
    ],
)
def test_incomplete_variables_of_a_launcher_are_a_mistake(monkeypatch, variables, message):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RecipeError, match=message), joined(torch.device("cpu"), timeout=2):
        pass


def within_a_group(world: World) -> list[object]:
    """A run inside of a process group that the caller has made, as in a Ray worker, twice."""
    found = []
    for _ in range(2):
        with joined(torch.device("cpu"), timeout=30) as inner:
            found.append(inner.exchange(world.rank * 10, "a rank"))
    return [*found, world.exchange("still there", "a fact"), torch.distributed.is_initialized()]


def test_a_process_group_that_exists_is_used_and_stays():
    assert fork_ranks(2, within_a_group) == [[[0, 10], [0, 10], ["still there"] * 2, True]] * 2


@pytest.mark.soak
def test_the_command_trains_in_two_processes_and_torchrun_restarts_it(make_base, tmp_path):
    recipe = tmp_path / "r.toml"
    recipe.write_text(tomli_w.dumps(small_recipe(tmp_path, make_base(), epochs=4)))
    variables = os.environ | {"OMP_NUM_THREADS": "1"}
    base = [sys.executable, "-m"]
    command = [*base, "qpref", "train", str(recipe), "--processes", "2", "--output", str(tmp_path / "two")]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if "run folder" in line] == [f"run folder: {tmp_path / 'two'}"]

    command = [*base, "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=2", "-m", "qpref", "train"]
    command += [str(recipe), "--output", str(tmp_path / "restarted")]
    process = subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 200
    while not (tmp_path / "restarted" / "checkpoints" / "step-000002").is_dir():
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert "started again, and resumed" in output
    assert outcome(tmp_path / "restarted").adapter == outcome(tmp_path / "two").adapter
