"""Correctness on the device: kernels, adapters, head and NF4; kill and resume; waits."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import steps
from benchmarks.gpu.attention import kernels
from benchmarks.gpu.context import Context
from benchmarks.gpu.device import DTYPES, relative_error
from benchmarks.gpu.runs import Command, qpref_command, write_recipe, write_rows
from benchmarks.pairs import WORKLOADS, make_pairs
from benchmarks.shapes import SHAPES

__all__ = ["adapters", "head", "kernels", "nf4", "resume", "waits"]

ROOT = Path(__file__).parents[2]


def adapters(context: Context) -> None:
    """Add an adapter of less than half a rounding step of the base's results: how much of it arrives, and gradients.

    `arrives` is the projection of what the adapter changed onto what it should have changed: 1 where the sum is
    rounded once, less where the adapter's part is lost in a sum of 16 bits.
    """
    shape = context.pick(
        replace(SHAPES["8B"], name="8B, one layer", num_hidden_layers=1, vocab_size=512), SHAPES["tiny"]
    )
    policy = steps.load(context, context.base(shape))
    eps = torch.finfo(policy.dtype).eps
    layers = {
        name: module for name, module in policy.model.named_modules() if "lora_A" in dict(module.named_children())
    }
    for (name, layer), reduced in itertools.product(list(layers.items())[:7], (True, False)):
        context.device.allow_reduced_sums(reduced)
        found = _adapter_errors(layer, policy.dtype)
        ok = abs(found["arrives"] - 1) < 0.1 and max(found["errors"].values()) < 4 * eps
        context.report(
            layer=name.split(".layers.")[-1], reduced_sums=reduced, **found, **({} if reduced else {"ok": ok})
        )


def _adapter_errors(layer: Any, dtype: torch.dtype) -> dict[str, Any]:
    from bitsandbytes.functional import dequantize_4bit

    base, device = layer.base_layer, layer.base_layer.weight.device
    weight = dequantize_4bit(base.weight, base.weight.quant_state).to(dtype).double()
    generator = torch.Generator().manual_seed(0)
    (a,), (b,), (scaling,) = layer.lora_A.parameters(), layer.lora_B.parameters(), layer.scaling.values()
    with torch.no_grad():
        a.copy_(torch.randn(a.shape, generator=generator) / a.shape[1] ** 0.5)
        b.copy_(torch.randn(b.shape, generator=generator))
        x = torch.randn(384, a.shape[1], generator=generator).to(device, dtype)
        plain = x.double() @ weight.t()
        low = x.double() @ a.double().t() @ b.double().t() * scaling
        # A tenth of the rounding step of a typical result.
        b *= 0.1 * torch.finfo(dtype).eps * plain.norm() / low.norm()
    x.requires_grad_()
    result = layer(x)
    direction = torch.randn(result.shape, generator=generator).to(result)
    gradients = torch.autograd.grad(result, (x, a, b), direction)
    inputs = [each.detach().double().requires_grad_() for each in (x, a, b)]
    adapted = inputs[0] @ inputs[1].t() @ inputs[2].t() * scaling
    exact = inputs[0] @ weight.t() + adapted
    expected = torch.autograd.grad(exact, inputs, direction.double())
    added = result.detach().double() - plain
    return {
        "arrives": ((added * adapted).sum() / adapted.square().sum()).item(),
        "errors": {
            name: relative_error(one, other)
            for name, one, other in zip(
                ("result", "input grad", "A grad", "B grad"), (result, *gradients), (exact, *expected), strict=True
            )
        },
    }


def head(context: Context) -> None:
    """Compare log-probabilities and their gradient with float64, at both sizes of the vocabulary's slices."""
    from qpref.policy.head import Head
    from qpref.policy.token_scores import score_tokens

    rows, width, vocabulary = context.pick((600, 2048, 128256), (20, 64, 3001))
    generator = torch.Generator(context.device.name).manual_seed(0)

    def random(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, device=context.device.name)

    for dtype, softcap, tile in itertools.product(context.device.dtypes, (None, 30.0), steps.TILES):
        weight, hidden = (random(vocabulary, width) * 0.05).to(DTYPES[dtype]), random(rows, width).to(DTYPES[dtype])
        tokens = torch.randint(vocabulary, (rows,), generator=generator, device=context.device.name)
        direction = random(rows)
        leaf = hidden.clone().requires_grad_()
        with steps.tiles(context, tile):
            values, _ = score_tokens(Head(weight, None, 1.0, softcap), leaf, tokens)
            (grad,) = torch.autograd.grad(values, leaf, direction)
        exact_leaf = hidden.double().requires_grad_()
        logits = exact_leaf @ weight.double().t()
        if softcap is not None:
            logits = softcap * (logits / softcap).tanh()
        exact = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        (exact_grad,) = torch.autograd.grad(exact, exact_leaf, direction.double())
        error, grad_error = (values - exact).abs().max().item(), relative_error(grad, exact_grad)
        context.report(
            dtype=dtype, softcap=softcap, tile=tile, largest_error_nats=error, grad_error=grad_error,
            ok=error < 1e-3 and grad_error < 4 * torch.finfo(DTYPES[dtype]).eps,
        )  # fmt: skip


def nf4(context: Context) -> None:
    """Quantize and dequantize the same weights here and on the CPU: the bits have to be equal."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    sizes = context.pick(((576, 1536), (4096, 4096), (1000, 64)), ((64, 128),))
    for size, dtype in itertools.product(sizes, (torch.bfloat16, torch.float16, torch.float32)):
        weight = torch.randn(*size, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(dtype)
        made = {
            name: quantize_4bit(weight.to(name), blocksize=64, compress_statistics=True, quant_type="nf4")
            for name in (context.device.name, "cpu")
        }
        (packed, state), (cpu_packed, cpu_state) = made.values() if len(made) == 2 else [*made.values()] * 2
        # The CPU's weight unpacked here, as when one machine quantizes and another trains or merges.
        crossed = dequantize_4bit(cpu_packed.to(context.device.name), _moved(cpu_state, context.device.name)).cpu()
        equal = {
            "packed": torch.equal(packed.cpu(), cpu_packed),
            "scales": torch.equal(state.absmax.cpu(), cpu_state.absmax),
            "dequantized": torch.equal(dequantize_4bit(packed, state).cpu(), dequantize_4bit(cpu_packed, cpu_state)),
            "the CPU's, dequantized here": torch.equal(crossed, dequantize_4bit(cpu_packed, cpu_state)),
        }
        context.report(size=list(size), dtype=str(dtype).removeprefix("torch."), equal=equal, ok=all(equal.values()))


def _moved(state: Any, device: str) -> Any:
    from bitsandbytes.functional import QuantState

    return QuantState.from_dict(
        {f"weight.{name}": part.clone() for name, part in state.as_dict(packed=True).items()},
        device=torch.device(device),
    )


def resume(context: Context) -> None:
    """Train a tiny run whole, and killed twice and resumed: the adapters have to be the same bits."""
    shape = context.pick(replace(SHAPES["135M"], name="135M, four layers", num_hidden_layers=4), SHAPES["tiny"])
    base, folder = context.base(shape), context.folder("resume")
    workload = context.pick(WORKLOADS["chat-like"], WORKLOADS["tiny"])
    rows = write_rows(folder / "rows.jsonl", make_pairs(workload, 2 * RESUMED_STEPS, shape.vocab_size))
    variants = context.pick(RESUMED, RESUMED[:1])
    with ThreadPoolExecutor(max_workers=context.pick(6, 2)) as pool:
        outcomes = pool.map(lambda one: _variant(context, one, base, rows, folder), variants)
        for variant, found in zip(variants, outcomes, strict=True):
            context.report(**variant, **found)


RESUMED_STEPS = 40
RESUMED: tuple[dict[str, Any], ...] = tuple(
    {"deterministic": deterministic, "dtype": dtype, "optimizer": optimizer}
    for deterministic in (True, False)
    for dtype, optimizer in (("bf16", "adamw"), ("bf16", "adamw_8bit"), ("fp16", "adamw"))
)


def _variant(context: Context, variant: dict[str, Any], base: Path, rows: Path, folder: Path) -> dict[str, Any]:
    name = "-".join(str(value) for value in variant.values())
    train = {"batch_size": 2, "save_every": 5, "learning_rate": 1e-3, "tokens_per_microbatch": 4096}
    recipe = write_recipe(
        folder / f"{name}.toml", base, rows, context.device.name, dtype=variant["dtype"],
        train=train | {key: variant[key] for key in ("deterministic", "optimizer")}, adapter={"dropout": 0.1},
    )  # fmt: skip
    whole, killed = (
        qpref_command("train", recipe, "--output", folder / f"{name}-{kind}") for kind in ("whole", "killed")
    )
    done = whole.run()
    if done.returncode:
        return {"ok": False, "error": done.stderr[-2000:]}
    statuses = [_kill_at(killed, step) for step in (5, 20)]
    last = killed.with_arguments("--resume").run()
    hashes = [_adapter_hash(command.output) if command.output else "" for command in (whole, killed)]
    bits = last.returncode == 0 and len(set(hashes)) == 1
    judged = {"ok": bits and statuses == [-signal.SIGKILL] * 2} if variant["deterministic"] else {}
    return {"same_bits": bits, "killed": statuses, "losses_equal_to_step": _equal_losses(whole, killed), **judged}


def _kill_at(command: Command, step: int) -> int:
    """Start or resume a run, and kill it once it has saved a step. Returns its exit status, -9 for killed."""
    checkpoint = command.output / "checkpoints" / f"step-{step:06}"
    resumed = command.with_arguments("--resume") if command.output.exists() else command
    process = resumed.start()
    while process.poll() is None and not checkpoint.exists():
        time.sleep(0.01)
    process.kill()
    return process.wait()


def _adapter_hash(run: Path) -> str:
    file = run / "adapter/adapter_model.safetensors"
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.exists() else ""


def _equal_losses(whole: Command, killed: Command) -> int:
    """Count the steps from the first on whose losses are equal to the last digit."""
    losses = []
    for command in (whole, killed):
        lines = (command.output / "metrics.jsonl").read_text().splitlines()
        losses.append([row["loss"] for row in map(json.loads, lines) if "loss" in row])
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(*losses, strict=False)))


def waits(context: Context) -> None:
    """Count where the host waits for the device in a step, beside the count on fake tensors of the same step.

    The simulated count is at the tiny size alone; it is None where fake tensors don't run on this machine.
    """
    for name in context.pick(("tiny", "1B"), ("tiny",)):
        counted: list[Any] = []
        steps.run(context, name, [nullcontext(), nullcontext(), steps.counted_waits(context, counted)])
        row = {"simulated": _simulated_waits()} if name == "tiny" else {}
        context.report(shape=name, waits=sum(counted[0].values()), at=dict(counted[0].most_common(20)), **row)


def _simulated_waits() -> int | None:
    """Count the waits on fake tensors in a process of its own, without the GPU."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.fake_cuda.step", "--pairs", "4"],
        cwd=ROOT, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    match = re.search(r"^syncs +(\d+)", done.stdout, re.MULTILINE)
    if match is None:
        print(done.stderr[-2000:], file=sys.stderr)
    return int(match[1]) if match else None
