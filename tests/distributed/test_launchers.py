"""The launchers' files of docs/distributed: what they start, and that a cluster would take them."""

import json
import os
import shlex
import stat
import subprocess
import sys
from pathlib import Path

import kubernetes_validate
import pytest
import tomli_w
import yaml
from click.testing import CliRunner
from processes import free_port

from qpref.cli import main

ROOT = Path(__file__).parents[2]
FILES = ROOT / "docs/distributed"
SBATCH, JOB, RAY = FILES / "slurm.sbatch", FILES / "kubernetes-job.yaml", FILES / "ray_train.py"


def script(path, text):
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def cluster(tmp_path):
    """Programs of a Slurm cluster of two nodes, which are this machine: `srun` runs its command once for each node."""
    folder = tmp_path / "bin"
    folder.mkdir()
    script(folder / "scontrol", '[ "$*" = "show hostnames node[1-2]" ] && printf "localhost\\nnode2\\n"')
    script(
        folder / "srun",
        '[ "$1" = --kill-on-bad-exit=1 ] && shift\n'
        'for node in 0 1; do SLURM_NODEID=$node "$@" & started="$started $!"; done\n'
        "for each in $started; do wait $each || code=$?; done\nexit ${code:-0}",
    )
    return folder


def sbatch(cluster, *arguments, **variables):
    """Run the script as Slurm would, in the folder of submission."""
    slurm = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": "2"}
    slurm |= {"SLURM_GPUS_ON_NODE": "1", "PATH": f"{cluster}:{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = ["bash", str(SBATCH), *map(str, arguments)]
    environment = os.environ | slurm | variables
    return subprocess.run(command, env=environment, cwd=cluster.parent, capture_output=True, text=True, check=False,
                          timeout=280)  # fmt: skip


def test_slurm_starts_a_launcher_on_each_node_and_they_meet_at_the_first(cluster):
    script(cluster / "torchrun", 'echo "$SLURM_NODEID $*"')
    done = sbatch(cluster, "my recipes/dpo.toml", "--set", "train.epochs=2", SLURM_GPUS_ON_NODE="8")
    assert (done.returncode, done.stderr) == (0, "")
    first, second = sorted(done.stdout.splitlines())
    assert (
        first.removeprefix("0 ")
        == second.removeprefix("1 ")
        == (
            "--nnodes=2 --nproc-per-node=8 --rdzv-backend=c10d --rdzv-endpoint=localhost:24711 --rdzv-id=4711 "
            "-m qpref train my recipes/dpo.toml --output runs/dpo-4711 --resume --set train.epochs=2"
        )
    )


def test_slurm_ends_with_the_code_of_a_node_that_failed(cluster):
    script(cluster / "torchrun", "exit $((13 * SLURM_NODEID))")
    assert sbatch(cluster, "dpo.toml").returncode == 13


def test_slurm_without_a_recipe_says_how_it_is_called(cluster):
    done = sbatch(cluster)
    assert done.returncode != 0
    assert "usage: sbatch slurm.sbatch RECIPE" in done.stderr


def documents():
    return list(yaml.safe_load_all(JOB.read_text()))


@pytest.mark.parametrize("kind", ["Service", "Job"])
def test_kubernetes_takes_each_part_of_the_job(kind):
    """By the schemas of its API, with no field that it doesn't know."""
    (document,) = [each for each in documents() if each["kind"] == kind]
    kubernetes_validate.validate(document, "1.30", strict=True)


def test_the_parts_of_the_job_fit_each_other():
    """The pods find the first one by the Service's name, at its port; each starts a process for each of its GPUs."""
    service, job = documents()
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    options = dict(part.removeprefix("--").split("=", 1) for part in container["command"] if "=" in part)
    name, port = job["metadata"]["name"], service["spec"]["ports"][0]["port"]
    assert service["metadata"]["name"] == pod["subdomain"]
    assert service["spec"]["selector"] == {"job-name": name}
    assert options["rdzv-endpoint"] == f"{name}-0.{pod['subdomain']}:{port}"
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == int(options["nnodes"])
    assert container["resources"]["limits"]["nvidia.com/gpu"] == int(options["nproc-per-node"])
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}


@pytest.mark.parametrize("path", [SBATCH, JOB], ids=lambda path: path.name)
def test_what_a_launcher_passes_to_qpref_train_are_options_that_it_has(path):
    words = shlex.split(path.read_text(), comments=True) if path is SBATCH else documents()[1]["spec"]["template"][
        "spec"]["containers"][0]["command"]  # fmt: skip
    start = words.index("train") - 1
    assert words[start - 1 : start + 2] == ["-m", "qpref", "train"]
    known = CliRunner().invoke(main, ["train", "--help"]).output
    for word in words[start + 2 :]:
        assert not word.startswith("--") or f" {word} " in known, word


@pytest.fixture
def recipe(tmp_path, make_recipe):
    path = tmp_path / "tiny.toml"
    path.write_text(tomli_w.dumps(make_recipe({"train.epochs": 1, "model.device": "cpu"})))
    return path


def losses(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert (run / "adapter/adapter_model.safetensors").is_file()
    return [row["loss"] for row in rows if row["split"] == "train"]


def alone(recipe, tmp_path):
    """The losses of one process."""
    done = subprocess.run([sys.executable, "-m", "qpref", "train", str(recipe), "--output", str(tmp_path / "alone")],
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return losses(tmp_path / "alone")


@pytest.mark.soak
def test_slurms_script_trains_on_two_nodes_as_one_process_does(cluster, recipe, tmp_path):
    done = sbatch(cluster, recipe, OMP_NUM_THREADS="1", SLURM_JOB_ID=str(free_port() % 10000 + 10000))
    assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / "runs").iterdir()
    assert losses(run) == pytest.approx(alone(recipe, tmp_path), abs=1e-4)


@pytest.mark.soak
def test_the_pods_command_trains_on_two_pods_as_one_process_does(recipe, tmp_path):
    """The Job's own command, with this machine's name for the first pod's and a process for each pod."""
    command = documents()[1]["spec"]["template"]["spec"]["containers"][0]["command"]
    changes = {"qpref-0.qpref:29500": f"localhost:{free_port()}", "my.toml": str(recipe), "=8": "=1"}
    for old, new in changes.items():
        command = [part.replace(old, new) for part in command]
    torchrun = [sys.executable, "-m", "torch.distributed.run", *command[1:]]
    options = {"env": os.environ | {"OMP_NUM_THREADS": "1"}, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    pods = [subprocess.Popen(torchrun, cwd=tmp_path, text=True, **options) for _ in range(2)]
    try:
        outputs = [pod.communicate(timeout=280)[0] for pod in pods]
    finally:
        for pod in pods:
            pod.kill()
    assert [pod.returncode for pod in pods] == [0, 0], outputs
    assert losses(tmp_path / "runs/my") == pytest.approx(alone(recipe, tmp_path), abs=1e-4)


@pytest.mark.soak
def test_ray_train_trains_with_two_workers_as_one_process_does(recipe, tmp_path):
    """Needs `pip install "ray[train]"`, of the extra `cluster`."""
    command = [sys.executable, str(RAY), str(recipe), "--workers", "2", "--cpu", "--output", str(tmp_path / "run")]
    variables = {"RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)}
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert losses(tmp_path / "run") == pytest.approx(alone(recipe, tmp_path), abs=1e-4)
