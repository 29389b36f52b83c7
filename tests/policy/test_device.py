"""The device is said, and a GPU that stays unused is explained by what was found."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qpref.errors import PolicyError
from qpref.policy import device as module
from qpref.policy.device import WSL_DRIVER, Machine, announce, driver_version, missing_kernels, why_no_gpu
from qpref.policy.load import choose_device, load_plain
from qpref.policy.source import BaseFolder
from qpref.recipe.sections import ModelSection

CPU = torch.device("cpu")
PLAIN = Machine(torch_version="2.13.0+cpu", environment={})
CARD = Machine(torch_version="2.13.0+cu130", cuda="13.0", traces=frozenset({"/dev/nvidia0"}), environment={})
OLD_DRIVER = "The NVIDIA driver on your system is too old (found version 11040)."
CU130 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]


@pytest.mark.parametrize(
    ("machine", "reason", "remedy"),
    [
        (replace(PLAIN, traces=CARD.traces), "torch 2.13.0+cpu is built for the CPU alone", "pip install"),
        (replace(PLAIN, has_smi=True), "built for the CPU alone", "pip install"),
        (replace(PLAIN, has_card=True), "built for the CPU alone", "pip install"),
        (replace(PLAIN, hip="7.1", has_card=True), "built for ROCm", "pip install"),
        (replace(PLAIN, traces=frozenset({WSL_DRIVER, "/dev/dxg"})), "built for the CPU alone", "pip install"),
        (replace(PLAIN, traces=frozenset({"/dev/nvhost-gpu"})), "built for the CPU alone", "JetPack"),
        (replace(CARD, init_error=OLD_DRIVER), "too old (found version 11040)", "update NVIDIA's driver"),
        (replace(CARD, environment={"CUDA_VISIBLE_DEVICES": ""}), "CUDA_VISIBLE_DEVICES is ''", "unset"),
        (replace(CARD, environment={"CUDA_VISIBLE_DEVICES": "-1"}), "CUDA_VISIBLE_DEVICES is '-1'", "unset"),
        (replace(CARD, environment={"NVIDIA_VISIBLE_DEVICES": "void"}), "NVIDIA_VISIBLE_DEVICES is 'void'", "unset"),
        (replace(CARD, unreadable=frozenset({"/dev/nvidia0"})), "no permission to open /dev/nvidia0", "group"),
        (replace(CARD, traces=frozenset(), has_card=True), "there is no /dev/nvidia0", "--gpus all"),
        (replace(CARD, init_error="CUDA unknown error"), "CUDA unknown error", "nvidia-smi"),
        (replace(PLAIN, traces=frozenset({"/dev/dxg"})), "Windows shares a GPU", "driver on Windows"),
        (replace(PLAIN, other=frozenset({"xpu"})), "Intel GPU (XPU)", "NVIDIA"),
        (replace(PLAIN, other=frozenset({"mps"})), "Apple GPU (MPS)", "NVIDIA"),
        (replace(PLAIN, traces=frozenset({"/dev/davinci0"})), "Ascend NPU", "NVIDIA"),
        (replace(PLAIN, traces=frozenset({"/dev/kfd"})), "AMD GPU", "NVIDIA"),
    ],
)  # fmt: skip
def test_a_gpu_that_torch_cannot_use_is_explained(machine, reason, remedy):
    found = why_no_gpu(machine)
    assert found is not None
    assert reason in found[0]
    assert remedy in found[1]


@pytest.mark.parametrize("machine", [PLAIN, replace(PLAIN, cuda="13.0"), replace(CARD, is_available=True)])
def test_nothing_is_said_where_there_is_no_gpu_or_torch_has_it(machine):
    assert why_no_gpu(machine) is None


def test_several_gpus_may_be_visible_by_number():
    assert "doesn't say why" in why_no_gpu(replace(CARD, environment={"CUDA_VISIBLE_DEVICES": "0,1"}))[0]


@pytest.mark.parametrize(
    ("capability", "architectures", "runs"),
    [
        ((8, 9), CU130, True),  # by sm_86
        ((7, 5), CU130, True),
        ((12, 1), CU130, True),
        ((13, 0), CU130, True),  # by PTX
        ((7, 0), CU130, False),  # Volta
        ((6, 1), CU130, False),  # Pascal
        ((8, 0), ["sm_86"], False),
        ((10, 0), ["sm_90a"], False),
        ((9, 0), ["sm_90a"], True),
        ((9, 0), [], True),  # torch doesn't say
        ((9, 0), ["gfx1100"], True),
    ],
)
def test_a_gpu_without_kernels_is_known_by_its_capability(capability, architectures, runs):
    found = missing_kernels("NVIDIA Card", capability, architectures)
    assert (found is None) == runs
    if found:
        assert f"compute capability {capability[0]}.{capability[1]}" in found


def listen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    for level in ("info", "warning"):
        monkeypatch.setattr(module.log, level, lambda text, *values: lines.append(text % values))
    return lines


def test_a_cpu_is_said_by_name_with_its_threads(monkeypatch):
    lines = listen(monkeypatch)
    announce(CPU, "cpu")
    assert lines == [f"device: CPU, {module._cpu_name()}, 1 thread"]


def test_an_unused_gpu_is_warned_of_unless_the_cpu_was_asked_for(monkeypatch):
    monkeypatch.setattr(Machine, "found", lambda: replace(CARD, init_error=OLD_DRIVER))
    lines = listen(monkeypatch)
    announce(CPU, "auto")
    announce(CPU, "cpu")
    assert len([line for line in lines if "driver on your system is too old" in line]) == 1


def test_a_gpu_is_said_with_all_that_is_known(monkeypatch):
    """torch's answers are made up here; the line is real."""
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (22 * 2**30, 24 * 2**30))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA GeForce RTX 4090")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    monkeypatch.setattr(module, "driver_version", lambda: "580.65.06")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    lines = listen(monkeypatch)
    announce(cuda, "auto")
    assert lines == [
        "device: NVIDIA GeForce RTX 4090, 22.0 of 24.0 GiB free, compute capability 8.9, driver 580.65.06, "
        f"torch {torch.__version__} (CUDA 13.0)"
    ]


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\n", "535.104.05"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.10  Release Build  (x@y)\n", "570.86.10"),
    ],
)
def test_the_drivers_version_is_the_kernels(text, version, tmp_path):
    (tmp_path / "version").write_text(text)
    assert driver_version(tmp_path / "version") == version


def test_no_driver_has_no_version(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert driver_version(tmp_path / "version") is None


def test_a_gpu_that_is_asked_for_and_missing_is_refused_with_the_reason(monkeypatch):
    monkeypatch.setattr(Machine, "found", lambda: replace(PLAIN, has_smi=True))
    with pytest.raises(PolicyError, match="device is cuda: this machine has an NVIDIA GPU that torch can't use"):
        choose_device("cuda")
    monkeypatch.setattr(Machine, "found", lambda: PLAIN)
    with pytest.raises(PolicyError, match="device is cuda: torch sees no GPU"):
        choose_device("cuda")


def test_this_machines_facts_can_be_gathered():
    found = Machine.found()
    assert found.torch_version == torch.__version__
    assert found.is_available == torch.cuda.is_available()


@pytest.fixture
def turing(monkeypatch):
    """torch's answers on a card without bf16."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)


def test_a_plain_model_is_not_loaded_in_emulated_bf16(turing, tmp_path):
    base = BaseFolder(path=tmp_path, weights={})
    with pytest.raises(PolicyError, match="this GPU has no bf16"):
        load_plain(ModelSection(base="x", dtype="bf16"), base)


def test_a_plain_model_is_not_loaded_in_fp16_on_a_cpu(tmp_path):
    with pytest.raises(PolicyError, match="a CPU doesn't compute in fp16"):
        load_plain(ModelSection(base="x", dtype="fp16", device="cpu"), BaseFolder(path=tmp_path, weights={}))


def test_a_card_without_kernels_is_refused_before_it_is_used(turing, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA TITAN V")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: CU130)
    with pytest.raises(PolicyError, match=r"NVIDIA TITAN V has compute capability 7\.0"):
        load_plain(ModelSection(base="x", dtype="fp16"), BaseFolder(path=tmp_path, weights={}))


def test_a_run_and_the_commands_on_it_say_their_device_once(make_recipe, tmp_path, monkeypatch):
    import qpref
    from qpref.evaluation.evaluate import Request, evaluate
    from qpref.evaluation.generate import Sampling, as_prompt, generate
    from qpref.evaluation.subjects import identify
    from qpref.merging.merge import merge_run
    from qpref.merging.request import MergeRequest

    run = tmp_path / "run"
    commands = [
        lambda: qpref.train(make_recipe({"train.max_steps": 1, "model.device": "cpu"}), output=run),
        lambda: evaluate(Request(models=[str(run)], samples=10)),
        lambda: generate(identify(str(run)), [as_prompt("Hello")], Sampling(max_new_tokens=2)),
        lambda: merge_run(MergeRequest(run=run, out=tmp_path / "out", dtype="bf16")),
    ]
    lines = listen(monkeypatch)
    for command in commands:
        lines.clear()
        command()
        assert sum(line.startswith("device: CPU, ") for line in lines) == 1
