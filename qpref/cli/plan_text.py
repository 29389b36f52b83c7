"""The text of `qpref plan`: base, adapter, data, steps, work, and memory by part"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qpref.errors import QprefError
    from qpref.memory.fit import Fit
    from qpref.memory.forecast import Forecast, Target


def lines(forecast: Forecast, facts: dict[str, Any]) -> Iterator[str]:
    """Write a plan for one device."""
    yield from overview(forecast, facts)
    yield ""
    yield from _memory(forecast)
    yield from _choice(forecast)
    yield from notes(facts)


def too_small(fit: Fit, target: Target) -> QprefError:
    """Make the error of a run that doesn't fit a device."""
    from qpref.errors import DeviceMemoryError

    what = f"needs {gib(fit.memory.total)}, and the limit is {gib(target.limit_bytes)} ({target.limit_origin})"
    return DeviceMemoryError(what, "\n  ".join(["what would help, most first:", *fit.advice]))


def overview(forecast: Forecast, facts: dict[str, Any]) -> Iterator[str]:
    from qpref.memory.parts import count_text

    shape, train = forecast.demand.shape, forecast.plan.recipe.train
    adapted = sum(bool(linear.rank) for linear in shape.linears)
    rows = "" if shape.shares_prompts else "; its attention can't share prompts: each response is a row of its own"
    yield f"base     {shape.origin}: {count_text(shape.parameters)} parameters, {shape.num_layers} layers{rows}"
    layers = sum(bool(each.adapter_weights) for each in shape.experts)
    on_experts = f" and on the experts of {layers} layers" if layers else ""
    yield f"adapter  {count_text(facts['adapter_parameters'])} parameters on {adapted} linear layers{on_experts}"
    if experts := facts["shape"]["experts"]:
        bits = 8 * forecast.demand.setup.dtype_bytes
        kept = {"packed": "in 4 bits", "unpacked": f"in {bits} bits"}
        parts = [f"{count_text(count)} parameters {kept[name]}" for name, count in experts.items() if count]
        own = facts["expert_adapter_parameters"]
        adapter = f"with {count_text(own)} parameters of the adapter" if own else "without an adapter"
        yield f"experts  {', '.join(parts)}, {adapter}"
    yield f"data     {facts['data']['origin']}"
    tokens, work = f"{facts['tokens_per_step']:,}", f"{facts['flops_per_step'] / 1e12:,.1f} TFLOP a step"
    if facts["steps"] is None:
        yield f"steps    unknown; {tokens} tokens a step"
        yield f"work     {work}"
    else:
        epoch = f"{facts['tokens_per_epoch']:,} tokens an epoch"
        yield f"steps    {facts['steps']} of {train.batch_size} examples; {epoch}, {tokens} a step"
        yield f"work     {facts['flops'] / 1e15:,.2f} PFLOP, {work}"
    if "hours" in facts:
        yield f"time     {facts['hours']['hours']:.2f} hours at {facts['hours']['at_tflops']:g} TFLOP/s"


def _memory(forecast: Forecast) -> Iterator[str]:
    from qpref.memory.parts import CAPTIONS, GIB

    memory, optimizer = forecast.fit.memory, forecast.plan.recipe.train.optimizer
    yield f"predicted peak on {'a GPU' if forecast.demand.setup.device == 'cuda' else 'the CPU'}, GiB"
    paged = ", paged: the rest may leave the GPU" if optimizer.startswith("paged") else ""
    captions = CAPTIONS | {"optimizer": f"{CAPTIONS['optimizer']} of {optimizer}{paged}"}
    sizes = memory.facts()
    for part, caption in captions.items():
        size = sizes[part] / GIB
        is_counted = part != memory.uncounted
        amount = f"{size:.2f} " if is_counted else f"({size:.2f})"
        note = "" if is_counted else "; not at the same time"
        yield f"  {part.replace('_', ' '):<13}{amount:>8}  {caption}{note}"
    limit, origin = gib(forecast.target.limit_bytes), forecast.target.limit_origin
    yield f"  {'total':<13}{memory.total / GIB:>7.2f}   of {limit}: {origin}"


def _choice(forecast: Forecast) -> Iterator[str]:
    """Lines for what was chosen; none where nothing fits."""
    fit, train = forecast.fit, forecast.plan.recipe.train
    if fit.fits:
        layers = f"{fit.recomputed_layers} of {forecast.demand.shape.num_layers}"
        yield ""
        yield f"tokens per micro-batch  {fit.tokens_per_microbatch}  {_origin(train.tokens_per_microbatch)}"
        yield f"recomputed layers       {layers}  {_origin(train.gradient_checkpointing)}"


def notes(facts: dict[str, Any]) -> Iterator[str]:
    if facts["notes"]:
        yield ""
    for note in facts["notes"]:
        yield f"note: {note}"


def _origin(setting: object) -> str:
    return "(auto)" if setting == "auto" else "(the recipe's)"


def gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
