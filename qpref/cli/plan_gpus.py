"""The text of `qpref plan --gpus`: a base on each GPU beside one that they share, and the one to take"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from qpref.cli.output import echo
from qpref.cli.plan_text import gib, notes, overview, too_small

if TYPE_CHECKING:
    from qpref.memory.forecast import Forecast
    from qpref.memory.scaling import Mode, Scaling


def show(
    forecast: Forecast,
    facts: dict[str, Any],
    tflops: float | None,
    as_json: bool,
    *,
    gpus: int | None,
    hosts: int | None,
    links: Sequence[str],
) -> None:
    """Print a plan for several GPUs.

    Raises:
        DeviceMemoryError: neither mode fits them.
    """
    from qpref.memory.scaling import plan_gpus

    scaling = plan_gpus(forecast, gpus or 1, hosts or 1, links, tflops)
    best = scaling.best
    facts = {name: value for name, value in facts.items() if name not in OF_ONE_DEVICE}
    facts |= {"fits": best is not None, "several_gpus": scaling.facts()}
    if as_json:
        echo(json.dumps(facts, indent=2))
    else:
        for line in _lines(forecast, scaling, facts):
            echo(line)
    if best is None:
        least = scaling.replicated if scaling.refusal else scaling.sharded
        raise too_small(least.fit, forecast.target)


OF_ONE_DEVICE = ("memory", "tokens_per_microbatch", "recomputed_layers", "advice", "hours")
"""Facts that are another for each mode."""


def _lines(forecast: Forecast, scaling: Scaling, facts: dict[str, Any]) -> Iterator[str]:
    from qpref.memory.parts import CAPTIONS, GIB

    yield from overview(forecast, facts)
    target, link, speed = forecast.target, scaling.link, scaling.speed
    hosts = "" if scaling.hosts == 1 else f", {scaling.gpus} in each of {scaling.hosts} hosts"
    yield f"GPUs     {scaling.ranks}{hosts}; {gib(target.limit_bytes)} on each: {target.limit_origin}"
    yield f"link     {link.name} ({link.title}): {link.bandwidth / 1e9:g} GB/s; {link.source}"
    yield f"speed    {speed.tflops:g} TFLOP/s on each: {speed.source}"
    share = scaling.dealing.imbalance
    yield f"dealing  the fullest GPU has {share:.2f} times the tokens of the mean one"
    modes = (scaling.replicated, scaling.sharded)
    yield ""
    yield _row("predicted peak on each GPU, GiB", ("replicated", "sharded"))
    sizes = [mode.fit.memory.facts() for mode in modes]
    for part, caption in CAPTIONS.items():
        cells = [f"{size[part] / GIB:.2f}" if part != mode.fit.memory.uncounted else f"({size[part] / GIB:.2f})"
                 for mode, size in zip(modes, sizes, strict=True)]  # fmt: skip
        yield _row(f"  {part.replace('_', ' '):<13}{SHARDED_CAPTIONS.get(part, caption)}", cells)
    yield _row(f"  {'total':<13}of {gib(target.limit_bytes)}", [f"{size['total'] / GIB:.2f}" for size in sizes])
    yield ""
    for caption, cell in ROWS.items():
        yield _row(caption, [cell(mode) if mode.fit.fits else "-" for mode in modes])
    yield ""
    yield f"plan     {_verdict(scaling)}"
    yield from notes(facts)


SHARDED_CAPTIONS = {
    "weights": "frozen base; sharded: a part, and 3 gathered layers",
    "reserve": "assumed: libraries, fragmentation, error",
}
ROWS: dict[str, Callable[[Mode], str]] = {
    "tokens per micro-batch": lambda mode: str(mode.fit.tokens_per_microbatch),
    "recomputed layers": lambda mode: f"{mode.fit.recomputed_layers} of {mode.demand.shape.num_layers}",
    "micro-batches a step": lambda mode: str(mode.microbatches),
    "each GPU sends a step, GiB": lambda mode: f"{(mode.gradient_bytes + mode.base_bytes) / 2**30:.2f}",
    "seconds a step": lambda mode: f"{mode.step_seconds:.1f}",
    "  of them waiting for the link": lambda mode: f"{mode.waiting_seconds:.1f}",
    "efficiency": lambda mode: f"{mode.efficiency:.0%}",
}


def _row(caption: str, cells: Sequence[str]) -> str:
    return f"{caption:<66}" + "".join(f"{cell:>12}" for cell in cells)


def _verdict(scaling: Scaling) -> str:
    best, (replicated, sharded) = scaling.best, (scaling.replicated, scaling.sharded)
    if scaling.refusal is not None:
        fits = "replicated base" if best else "a replicated base does not fit"
        return f"{fits}; it can't be sharded: {scaling.refusal}"
    if best is None:
        return "neither fits"
    if best is replicated:
        longer = f"takes {sharded.step_seconds / replicated.step_seconds:.2f} times as long"
        return f"replicated base; a sharded one {longer if sharded.fit.fits else 'does not fit'}"
    if replicated.fit.fits:
        faster = replicated.step_seconds / sharded.step_seconds
        return f"sharded base, {faster:.2f} times as fast as a replicated one: [distributed] shard_base = true"
    return f"sharded base; a replicated one needs {gib(replicated.fit.memory.total)}"
