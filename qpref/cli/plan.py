"""`qpref plan`"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qpref.cli.options import json_option, set_option
from qpref.cli.output import echo

if TYPE_CHECKING:
    from qpref.memory.forecast import Forecast, Target
    from qpref.recipe.sections import Recipe


@click.command("plan")
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--vram", metavar="SIZE", help="Plan for a GPU with this much free memory: 24GiB, 24GB, 24.")
@click.option("--card", metavar="NAME", help="Plan for a card by its name: 'RTX 3060 12GB', A10G; see --desktop.")
@click.option("--desktop", is_flag=True, help="Leave 1 GiB of the card to a desktop.")
@click.option("--shape", metavar="NAME|FOLDER", help="Size of the base: a known shape, or a folder with config.json.")
@set_option
@click.option("--tflops", type=click.FloatRange(min=0, min_open=True), help="Speed in TFLOP/s to predict hours at.")
@json_option
def command(
    recipe: Path, *, shape: str | None, overrides: tuple[str, ...], tflops: float | None, as_json: bool, **device: Any
) -> None:
    """Predict the memory, work and steps of RECIPE, a TOML file.

    Loads no weights and needs no GPU. Exits with 5 if nothing fits the memory.
    """
    from qpref.cli import quiet_transformers
    from qpref.errors import DeviceMemoryError
    from qpref.memory.forecast import Forecast
    from qpref.recipe.resolve import make_plan

    quiet_transformers()
    plan = make_plan(recipe, overrides)
    forecast = Forecast.of(plan, _target(plan.recipe, **device), shape)
    facts = forecast.facts(tflops)
    if as_json:
        echo(json.dumps({"recipe": str(recipe)} | facts, indent=2))
    else:
        for line in (*_overview(forecast, facts), "", *_memory(forecast), *_choice(forecast), *_notes(facts)):
            echo(line)
    if not forecast.fit.fits:
        need, limit = _gib(forecast.fit.memory.total), _gib(forecast.target.limit_bytes)
        what = f"needs {need}, and the limit is {limit} ({forecast.target.limit_origin})"
        raise DeviceMemoryError(what, "\n  ".join(["what would help, most first:", *forecast.fit.advice]))


def _target(recipe: Recipe, vram: str | None, card: str | None, desktop: bool) -> Target:
    """Choose what to plan for: a card, a size of memory, or this machine."""
    from qpref.memory.cards import find_card
    from qpref.memory.forecast import Target

    if vram is not None and card is not None:
        raise click.UsageError("--card and --vram exclude each other: both name the memory.")
    if desktop and card is None:
        raise click.UsageError("--desktop needs --card; --vram is free memory, without a desktop's share.")
    if card is not None:
        return Target.of_card(find_card(card), desktop)
    return Target.here(recipe) if vram is None else Target.of_vram(vram, recipe)


def _overview(forecast: Forecast, facts: dict[str, Any]) -> Iterator[str]:
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
    limit, origin = _gib(forecast.target.limit_bytes), forecast.target.limit_origin
    yield f"  {'total':<13}{memory.total / GIB:>7.2f}   of {limit}: {origin}"


def _choice(forecast: Forecast) -> Iterator[str]:
    """Lines for what was chosen; none where nothing fits."""
    fit, train = forecast.fit, forecast.plan.recipe.train
    if fit.fits:
        layers = f"{fit.recomputed_layers} of {forecast.demand.shape.num_layers}"
        yield ""
        yield f"tokens per micro-batch  {fit.tokens_per_microbatch}  {_origin(train.tokens_per_microbatch)}"
        yield f"recomputed layers       {layers}  {_origin(train.gradient_checkpointing)}"


def _notes(facts: dict[str, Any]) -> Iterator[str]:
    if facts["notes"]:
        yield ""
    for note in facts["notes"]:
        yield f"note: {note}"


def _origin(setting: object) -> str:
    return "(auto)" if setting == "auto" else "(the recipe's)"


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
