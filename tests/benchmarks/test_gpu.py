"""The scripts for a GPU, rehearsed: the same code on a CPU, and the GPU's adapter on fake tensors.

`pytest -m soak tests/benchmarks/test_gpu.py` rehearses all four scripts by the command itself.
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import os
import subprocess
import sys
import zipfile
from importlib import import_module
from pathlib import Path

import pytest
import torch

from benchmarks import race
from benchmarks.contestants import QPREF, Leg, Race, gpu_race
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import attention, memory, tables, timing, wheels
from benchmarks.gpu.context import Context, run_stage
from benchmarks.gpu.device import Cpu
from benchmarks.gpu.plan import STAGES, Stage
from benchmarks.pairs import WORKLOADS
from benchmarks.shapes import SHAPES, make_base
from qpref.records import Group

ROOT = Path(__file__).parents[2]
GIB = 2**30


@pytest.fixture
def context(tmp_path) -> Context:
    (tmp_path / "bases").mkdir()
    return Context(Cpu(), rehearse=True, scratch=tmp_path, target=tmp_path / "rows.json")


def test_every_stage_of_the_plan_exists():
    for stage in STAGES:
        assert callable(getattr(import_module(f"benchmarks.gpu.{stage.script}"), stage.name))


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*")
@pytest.mark.parametrize("stage", ["kernels", "adapters", "head", "nf4"])
def test_this_machine_computes_what_float64_says(context, stage):
    assert run_stage("correct", stage, context) == 0
    assert [row for row in context.rows if "ok" in row]


def test_attention_is_judged_by_its_definition():
    # Stream: prompt 0 1, branch 2 3, branch 4; then prompt 5, branch 6.
    groups = [Group(start=0, prompt=2, branches=(2, 1)), Group(start=5, prompt=1, branches=(1,))]
    seen = [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 4], [5], [5, 6]]
    assert [row.nonzero()[:, 0].tolist() for row in attention.attended(groups, None)] == seen
    local = [[0], [0, 1], [1, 2], [2, 3], [1, 4], [5], [5, 6]]
    assert [row.nonzero()[:, 0].tolist() for row in attention.attended(groups, 2)] == local


@pytest.mark.parametrize("fault", ["scale", "window", "branch"])
def test_a_wrong_kernel_is_far_off(context, fault):
    def wrong(groups, window):
        if fault == "window":
            return attention.exact_attention(groups, window and window - 1)
        if fault == "branch":  # one that sees its sibling
            first = Group(start=0, prompt=groups[0].prompt, branches=(sum(groups[0].branches),))
            return attention.exact_attention([first, *groups[1:]], window)
        return lambda query, key, value: attention.exact_attention(groups, window)(query * 1.05, key, value)

    case = attention._case(context, torch.bfloat16, 64, 4, "four branches", 0.0)
    right, found = (attention.worst_errors(attend, [case]) for attend in (attention.exact_attention, wrong))
    eps = torch.finfo(torch.bfloat16).eps
    assert all(error <= eps for error, _ in right.values())
    assert all(error > 2 * eps for error, _ in found.values())


def test_a_row_is_on_disk_as_soon_as_it_is_reported(context):
    context.report(first=1)
    assert json.loads(context.target.read_text()) == [{"first": 1}]


def options(tmp_path: Path) -> argparse.Namespace:
    return argparse.Namespace(rehearse=True, model="", only=None, output=tmp_path)


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def test_a_stage_that_does_not_end_is_stopped(tmp_path):
    found = command._run(Stage("correct", "kernels", 1), options(tmp_path), tmp_path, environment())
    assert found["status"] == "stopped after 1 s"
    assert found["seconds"] < 10


def test_a_failed_stage_says_why(tmp_path):
    found = command._run(Stage("correct", "no_such_stage", 60), options(tmp_path), tmp_path, environment())
    assert found["status"] == "failed"
    assert "no_such_stage" in found["rows"][-1]["error"]
    assert "no_such_stage" in found["log"][-1]


def test_a_machine_without_a_gpu_is_refused(tmp_path):
    hidden = environment() | {"CUDA_VISIBLE_DEVICES": ""}
    line = [sys.executable, "-m", "benchmarks.run", "--suite", "cuda", "--only", "nf4", "--output", str(tmp_path)]
    done = subprocess.run(line, cwd=ROOT, env=hidden, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("torch sees no GPU on this machine; --rehearse")


def test_reserve_needed_is_reserved_memory_and_libraries_less_the_plan_without_its_reserve(tmp_path):
    described = {"recomputed_layers": 3, "attention": "x", "forecast": {"memory": {"total": 8 * GIB, "reserve": GIB}}}
    result = {"tokens_per_microbatch": 1, "steps": 6, "tokens": 9, "seconds": 2.0}
    peaks = {"resident": 0, "allocated": 7 * GIB, "reserved": int(7.25 * GIB)}
    (tmp_path / "run.json").write_text(json.dumps(described))
    (tmp_path / "result.json").write_text(json.dumps(result | {"peak_bytes": peaks}))
    stderr = "warning: out of memory: 512 tokens per micro-batch instead of 1024; the step is repeated\n"
    done = subprocess.CompletedProcess([], 0, "", stderr)
    row = memory._outcome(done, tmp_path, tmp_path / "none.json", libraries=GIB // 4)
    assert row["reserve_needed_gib"] == 7.25 + 0.25 - 7
    assert row["allocated_over_plan_percent"] == 0
    assert row["repeats"] == 1


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<...>", "attention"),
        ("void kDequantizeBlockwise<__nv_bfloat16, 512, 64, 8, 2>(float*, unsigned char*, ...)", "dequantizing"),
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NTT", "products"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_256x128_32x3_tn_align8>", "products"),
        ("ampere_bf16_s16816gemm_bf16_128x64_ldg8_f2f_stages_64x3_nn", "products"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>, ...>", "elementwise"),
        ("void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda(...)>", "copies"),
        ("Memcpy HtoD (Pageable -> Device)", "copies"),
        ("void at::native::(anonymous namespace)::indexSelectLargeIndex<c10::BFloat16, long>", "copies"),
        ("void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::MeanOps>>", "reductions"),
        ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<...FusedAdamMathFunctor>", "optimizer"),
        ("a_kernel_of_tomorrow", "other"),
    ],
)
def test_a_kernel_has_its_class(kernel, kind):
    assert timing.class_of(kernel) == kind


def test_overlapping_kernels_are_busy_once():
    assert timing.busy_seconds([("a", 0, 2), ("b", 1, 3), ("c", 1.5, 1.75), ("d", 5, 6)]) == 4


@pytest.mark.parametrize("name", ["1B", "7B"])
def test_an_nf4_base_loads_as_what_was_quantized(tmp_path, name):
    from bitsandbytes.functional import dequantize_4bit
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM

    shape = SHAPES["tiny"] if name == "1B" else Context.shape(Context(Cpu(), True, tmp_path, tmp_path), "7B")
    plain, packed = (make_base(shape, tmp_path / str(nf4), nf4=nf4) for nf4 in (False, True))
    model = AutoModelForCausalLM.from_pretrained(packed, device_map={"": "cpu"})
    layer = model.model.layers[1].self_attn.q_proj
    with safe_open(plain / "layer-001.safetensors", "pt") as file:
        weight = file.get_tensor("model.layers.1.self_attn.q_proj.weight")
        if name == "7B":
            assert torch.equal(layer.bias, file.get_tensor("model.layers.1.self_attn.q_proj.bias"))
    error = dequantize_4bit(layer.weight, layer.weight.quant_state) - weight
    assert error.norm() / weight.norm() < 0.1  # NF4's own rounding; another weight would be 1.4 off


def test_one_contestant_is_in_memory_at_a_time(tmp_path):
    leg = Leg(workload=WORKLOADS["tiny"], timed=1, warmup=1)
    one = Race(name="two", shape=SHAPES["tiny"], contestants=(QPREF, QPREF), legs=(leg,))
    base = make_base(one.shape, tmp_path / "base", nf4=True)
    records = []
    for record in race.run_alone(one, base, "cpu", turns=1):
        assert not multiprocessing.active_children()
        assert record["failure"] is None
        records.append(record)
    assert [record["turn"] for record in records] == [0, 0]
    (joined,) = race.merged_turns(records)
    assert len(joined["steps"]) == len(joined["predicted"]["flops"]) == 2
    assert len(joined["warmup"]) == 2


def test_a_pair_by_pair_race_is_predicted_without_padding_between_pairs():
    from benchmarks.predict import predictions

    one = gpu_race(SHAPES["tiny"], WORKLOADS["chat-like"])
    flops = {each.name: predictions(one, one.legs[0], each, [2])["flops"][0] for each in one.contestants[:3]}
    assert flops["qpref"] < flops["TRL best tuned, pair by pair"] < flops["TRL best tuned"]


def test_a_slim_wheel_keeps_its_record(tmp_path):
    wheel = tmp_path / "bitsandbytes-1-py3-none-any.whl"
    libraries = [f"bitsandbytes/libbitsandbytes_{kind}.so" for kind in ("cpu", "cuda126", "cuda130", "rocm6")]
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in [*libraries, "bitsandbytes/__init__.py", "bitsandbytes-1.dist-info/RECORD"]:
            archive.writestr(name, name)
    wheels.slim(wheel, "130")
    with zipfile.ZipFile(wheel) as archive:
        rows = list(csv.reader(archive.read("bitsandbytes-1.dist-info/RECORD").decode().splitlines()))
        assert [row[0] for row in rows] == archive.namelist()
        assert [name for name in archive.namelist() if name.endswith(".so")] == [libraries[0], libraries[2]]


def test_the_gpus_adapter_runs_on_fake_tensors(tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.benchmarks.fake_gpu", str(tmp_path)],
        cwd=ROOT, env=environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["capped"] == 8 / 24
    assert found["waits"] > 0
    assert found["allocated"] > 0
    assert found["limit"] == 8 * GIB


def test_rows_of_other_columns_begin_a_table_of_their_own():
    lines = tables._plain([{"a": 1, "b": {"c": 0.5}}, {"a": 2, "b": {"c": True}}, {"d": None}])
    assert lines == ["| a | b: c |", "| --- | --- |", "| 1 | 0.5 |", "| 2 | yes |", "", "| d |", "| --- |", "|  |"]


@pytest.mark.soak
@pytest.mark.parametrize("script", ["correct", "memory", "timing", "race"])
def test_a_whole_script_passes_its_rehearsal(tmp_path, script):
    line = [sys.executable, "-m", "benchmarks.run", "--suite", "cuda", script, "--rehearse", "--output", str(tmp_path)]
    done = subprocess.run(line, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = tmp_path.glob("*.json")
    result = json.loads(file.read_text())
    assert [stage["name"] for stage in result["stages"]] == [each.name for each in STAGES if each.script == script]
    assert {stage["status"] for stage in result["stages"]} == {"passed"}
    assert file.with_suffix(".md").read_text() == tables.table(result)
