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
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import steps
from benchmarks.gpu.context import Context
from benchmarks.gpu.device import seconds
from benchmarks.gpu.runs import Command, qpref_command, write_recipe, write_rows
from benchmarks.pairs import WORKLOADS, make_pairs
from benchmarks.shapes import SHAPES

ROOT = Path(__file__).parents[2]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
STATES = ("result", "query grad", "key grad", "value grad")
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
LAYOUTS: dict[str, tuple[tuple[int, tuple[int, ...]], ...]] = {
    "few queries, many keys": ((700, (3, 20)), (33, (70, 129))),
    "two pairs": ((180, (150, 140)), (33, (20, 29))),
    "four branches": ((40, (10, 20, 0, 30)),),
    "lengths of 1": ((1, (0, 1)), (1, (1, 0)), (5, (1, 7))),
}
"""Prompt and branches of each example, in input tokens: a response of one token has none."""
WINDOW = 48
SINK = 20.0
"""Logit of a strong attention sink above the others."""


def kernels(context: Context) -> None:
    """Compare every path of shared-prompt attention with float64, by its relative error and the plain path's.

    A path passes with up to twice the plain path's error, or one step of its dtype; the plain path with two steps. With
    a strong sink the gradients of queries and keys are what is left of two nearly equal numbers, and any 16-bit kernel
    is far off: those errors are reported without a verdict.
    """
    from qpref.attention.register import SEGMENTS, register, sharing_paths

    register()
    widths, repeats = context.pick((64, 80, 128, 256), (80,)), context.pick((1, 4, 7), (4,))
    for dtype, width, repeat in itertools.product(context.device.dtypes, widths, repeats):
        eps = torch.finfo(DTYPES[dtype]).eps
        layouts = list(LAYOUTS)[context.pick(0, 1) :]  # the first is the largest
        cases = [_case(context, DTYPES[dtype], width, repeat, name, 0.0) for name in layouts]
        sinks = [_case(context, DTYPES[dtype], width, repeat, name, SINK) for name in layouts[:2]]
        paths = sharing_paths(torch.device(context.device.name), DTYPES[dtype])
        limits = dict.fromkeys(STATES, 2 * eps)
        for path in reversed(paths):  # the plain one first
            row = {"path": path, "dtype": dtype, "width": width, "queries_per_key": repeat}
            try:
                found = worst_errors(partial(_path, path), cases)
                sunk = worst_errors(partial(_path, path), sinks)
                row |= _repeatability(context, path, next(case for case in cases if case.name == "two pairs"))
            except RuntimeError as error:  # a kernel that refuses a width says so; the others are still to be tried
                context.report(**row, ok=False, error=str(error)[:500])
                continue
            if path == SEGMENTS:
                limits = {name: max(eps, 2 * error) for name, (error, _) in found.items()}
            context.report(
                **row,
                ok=all(error <= (2 * eps if path == SEGMENTS else limits[name]) for name, (error, _) in found.items()),
                errors={name: error for name, (error, _) in found.items()},
                at={name: where for name, (_, where) in found.items()},
                with_a_sink={name: error for name, (error, _) in sunk.items()},
            )


@dataclass(frozen=True, slots=True)
class Case:
    """Attributes:
    states: queries [1, heads, T, width], keys and values [1, 2, T, width].
    direction: gradient of the result.
    exact: window -> result and gradients in float64.
    """

    name: str
    states: list[Tensor]
    direction: Tensor
    groups: tuple[Any, ...]
    exact: dict[int | None, list[Tensor]]


def _case(context: Context, dtype: torch.dtype, width: int, repeat: int, layout: str, sink: float) -> Case:
    """Make random states of a layout; with a sink, all queries look at the first key of their prompt."""
    from qpref.records import Group

    groups, start = [], 0
    for prompt, branches in LAYOUTS[layout]:
        groups.append(Group(start=start, prompt=prompt, branches=branches))
        start += prompt + sum(branches)
    generator = torch.Generator().manual_seed(width + repeat)
    states = [torch.randn(1, heads, start, width, generator=generator) for heads in (2 * repeat, 2, 2)]
    for group in groups if sink else ():
        states[0][..., 0] = sink  # times the key's below, over sqrt(width)
        states[1][:, :, group.start, 0] = width**0.5
    direction = torch.randn(1, start, 2 * repeat, width, generator=generator)
    *moved, direction = (each.to(context.device.name, dtype) for each in (*states, direction))
    exact = {
        window: _with_gradients(exact_attention(groups, window), [each.double() for each in moved], direction.double())
        for window in (None, WINDOW)
    }
    return Case(layout, moved, direction, tuple(groups), exact)


def worst_errors(
    attend_with: Callable[[Sequence[Any], int | None], Attend], cases: Iterable[Case]
) -> dict[str, tuple[float, str]]:
    """Return, for the result and each gradient, the largest relative error and its case."""
    found: dict[str, tuple[float, str]] = dict.fromkeys(STATES, (0.0, ""))
    for case in cases:
        for window, exact in case.exact.items():
            tried = _with_gradients(attend_with(case.groups, window), case.states, case.direction)
            for name, one, other in zip(STATES, tried, exact, strict=True):
                found[name] = max(found[name], (relative_error(one, other), f"{case.name}, window {window}"))
    return found


def _path(path: str, groups: Sequence[Any], window: int | None) -> Attend:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    from qpref.attention.register import LAYOUT

    module = SimpleNamespace(config=SimpleNamespace(layer_types=None), is_causal=True, layer_idx=0, training=True)
    keywords: dict[str, Any] = {"sliding_window": window, LAYOUT: tuple(groups)}
    return lambda *states: ALL_ATTENTION_FUNCTIONS[path](module, *states, None, **keywords)[0]


def exact_attention(groups: Sequence[Any], window: int | None) -> Attend:
    """Compute attention by its definition, with a [T, T] mask."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        repeat = query.shape[1] // key.shape[1]
        scores = query @ key.repeat_interleave(repeat, 1).mT / query.shape[-1] ** 0.5
        mask = attended(groups, window).to(query.device)
        return (scores.masked_fill(~mask, -torch.inf).softmax(-1) @ value.repeat_interleave(repeat, 1)).transpose(1, 2)

    return attend


def attended(groups: Sequence[Any], window: int | None) -> Tensor:
    """[T, T], true where a query may see a key: its own segment up to itself, and its prompt."""
    position, segment, prompt = [], [], []
    for index, group in enumerate(groups):
        for branch, length in enumerate((group.prompt, *group.branches)):
            before = group.prompt if branch else 0
            position += range(before, before + length)
            segment += [(index, branch)] * length
            prompt += [(index, 0)] * length
    codes = {each: code for code, each in enumerate(dict.fromkeys([*segment, *prompt]))}
    at, own, shared = (torch.tensor(each) for each in (position, *([codes[x] for x in y] for y in (segment, prompt))))
    same = (own[:, None] == own[None]) | (shared[:, None] == own[None])
    distance = at[:, None] - at[None]
    return same & (distance >= 0) & (distance < (window or len(at)))


def _with_gradients(attend: Attend, states: Sequence[Tensor], direction: Tensor) -> list[Tensor]:
    leaves = [each.detach().requires_grad_() for each in states]
    result = attend(*leaves)
    return [result.detach(), *torch.autograd.grad(result, leaves, direction)]


def relative_error(found: Tensor, exact: Tensor) -> float:
    """Divide the Euclidean norm of the difference by the exact value's."""
    size = exact.double().norm().item()
    return (found.double() - exact.double()).norm().item() / size if size else found.double().norm().item()


def _repeatability(context: Context, path: str, case: Case) -> dict[str, Any]:
    """Run a path twice on the same states, as torch chooses and under its deterministic algorithms."""
    states, direction = case.states, case.direction
    attend, found = _path(path, case.groups, None), {}
    for name, wanted in (("by default", False), ("deterministic", True)):
        torch.use_deterministic_algorithms(wanted, warn_only=True)
        try:
            first, second = (_with_gradients(attend, states, direction) for _ in range(2))
            cost = seconds(context.device, lambda: _with_gradients(attend, states, direction))
        finally:
            torch.use_deterministic_algorithms(False)
        equal = all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
        found[name] = {"repeats": equal, "seconds": cost}
    return {"repeatability": found}


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
    from qpref.policy.lora import dense_weight

    base, device = layer.base_layer, layer.base_layer.weight.device
    generator = torch.Generator().manual_seed(0)
    (a,), (b,), (scaling,) = layer.lora_A.parameters(), layer.lora_B.parameters(), layer.scaling.values()
    with torch.no_grad():
        a.copy_(torch.randn(a.shape, generator=generator) / a.shape[1] ** 0.5)
        b.copy_(torch.randn(b.shape, generator=generator))
        x = torch.randn(384, a.shape[1], generator=generator).to(device, dtype)
        plain = x.double() @ dense_weight(base, dtype).double().t()
        low = x.double() @ a.double().t() @ b.double().t() * scaling
        # A tenth of the rounding step of a typical result.
        b *= 0.1 * torch.finfo(dtype).eps * plain.norm() / low.norm()
    x.requires_grad_()
    result = layer(x)
    direction = torch.randn(result.shape, generator=generator).to(result)
    gradients = torch.autograd.grad(result, (x, a, b), direction)
    inputs = [each.detach().double().requires_grad_() for each in (x, a, b)]
    adapted = inputs[0] @ inputs[1].t() @ inputs[2].t() * scaling
    exact = inputs[0] @ dense_weight(base, dtype).double().t() + adapted
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
    from qpref.policy.head import Head, score_tokens

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
