"""Linux and nothing else: one sentence on Windows, and the variables that torch reads at its import."""

from __future__ import annotations

import subprocess
import sys

import pytest

from qpref.linux import cgroup_memory, is_wsl, set_torch_variables

AS_ON_WINDOWS = """
import os, signal, sys
import click  # knows the real platform
sys.platform = "win32"
sys.modules["fcntl"] = sys.modules["resource"] = None
del signal.SIGHUP
os.kill = lambda *call: os._exit(99)  # a Ctrl+C there
"""
SENTENCE = "qpref runs on Linux, or in WSL2 on Windows"


def on_windows(code: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", AS_ON_WINDOWS + code]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize("command", ["['train', 'my.toml']", "['plugins']", "['cache']", "['merge', 'run', 'out']"])
def test_every_command_says_on_windows_where_it_runs(command):
    done = on_windows(f"from qpref.cli import main; main({command})")
    assert (done.returncode, done.stderr.splitlines()[0]) == (12, f"error: {SENTENCE}")
    assert len(done.stderr.splitlines()) == 2


@pytest.mark.parametrize(
    "code",
    ["import qpref.publish", "import qpref.data.template_limits", "import qpref; qpref.train('my.toml')"],
)
def test_the_python_api_says_so_too(code):
    done = on_windows(f"""
from qpref.errors import InstallError
try:
    {code}
except InstallError as error:
    print(error)
""")
    assert done.stdout.startswith(SENTENCE), done.stderr


@pytest.mark.parametrize(
    ("release", "expected"),
    [("6.8.0-45-generic\n", False), ("5.15.167.4-microsoft-standard-WSL2\n", True), (None, False)],
)
def test_wsl_is_known_by_its_kernel(release, expected, tmp_path):
    if release:
        (tmp_path / "osrelease").write_text(release)
    assert is_wsl(tmp_path / "osrelease") == expected


@pytest.mark.parametrize(
    ("given", "wsl", "expected"),
    [
        ({}, False, {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}),
        ({}, True, {}),  # its driver refuses the calls
        ({"PYTORCH_ALLOC_CONF": "a"}, False, {"PYTORCH_ALLOC_CONF": "a"}),
        ({"PYTORCH_CUDA_ALLOC_CONF": "a"}, False, {"PYTORCH_CUDA_ALLOC_CONF": "a"}),
        ({"PYTORCH_HIP_ALLOC_CONF": "a"}, False, {"PYTORCH_HIP_ALLOC_CONF": "a"}),
    ],
)
def test_the_users_allocator_settings_stay(given, wsl, expected):
    environment = dict(given)
    set_torch_variables(environment, wsl=wsl)
    assert environment == expected | {"OMP_WAIT_POLICY": "passive"}


@pytest.fixture
def groups(tmp_path):
    """`groups({"memory.max": "1"}, own)`: a tree of control groups, as keywords of `cgroup_memory`."""

    def make(files, own):
        root = tmp_path / "cgroup"
        root.mkdir()
        for name, text in files.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{text}\n")
        (tmp_path / "own").write_text(f"{own}\n")
        return {"root": root, "own": tmp_path / "own"}

    return make


def test_the_tightest_limit_of_a_control_group_and_its_parents_counts(groups):
    files = {"a/memory.max": "1000", "a/memory.current": "100", "a/b/memory.max": "max", "a/b/memory.current": "90",
             "a/b/c/memory.max": "5000", "a/b/c/memory.current": "80"}  # fmt: skip
    assert cgroup_memory(**groups(files, "0::/a/b/c")) == (1000, 100)


def test_cached_files_are_memory_that_is_left(groups):
    files = {"memory.max": "1000", "memory.current": "900", "memory.stat": "anon 300\ninactive_file 600"}
    assert cgroup_memory(**groups(files, "0::/")) == (1000, 300)


def test_a_limit_of_version_1_is_read_and_its_absence_is_no_limit(groups):
    files = {"memory/x/memory.limit_in_bytes": "2000", "memory/x/memory.usage_in_bytes": "500",
             "memory/x/memory.stat": "total_inactive_file 100", "memory/memory.limit_in_bytes": str(2**63 - 4096),
             "memory/memory.usage_in_bytes": "1"}  # fmt: skip
    assert cgroup_memory(**groups(files, "5:cpu:/y\n4:memory:/x")) == (2000, 400)


def test_a_machine_without_limits_has_none(groups, tmp_path):
    assert cgroup_memory(**groups({"memory.max": "max", "memory.current": "5"}, "0::/")) is None
    assert cgroup_memory(tmp_path / "none", tmp_path / "gone") is None
