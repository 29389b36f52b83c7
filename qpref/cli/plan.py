"""`qpref plan`"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    import torch

    from qpref.data.example_rows import ExampleRow
    from qpref.memory.fit import Fit, Lengths, Settings, Workload
    from qpref.memory.shape import ModelShape
    from qpref.recipe.choices import SourceChoice
    from qpref.recipe.resolve import Plan

CHARACTERS_A_TOKEN = 4
MOST_TOKENIZED, LONGEST_TOKENIZED = 2000, 64
"""Rows that are tokenized of a large file: so many, evenly spread, and so many of the longest."""
PARTS = {
    "weights": "the frozen base",
    "adapters": "with their gradients, float32",
    "optimizer": "state",
    "activations": "kept for the backward pass",
    "live": "the backward pass in one layer",
    "head_tile": "scoring responses",
    "reserve": "assumed: 0.6 GiB of libraries and 3 % lost between blocks",
}


@click.command("plan")
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--vram", metavar="SIZE", help="Plan for a GPU with so much free memory: 24GiB, 24GB, 24.")
@click.option("--shape", metavar="NAME|FOLDER", help="Size of the base: a known shape, or a folder with config.json.")
@click.option("--set", "overrides", multiple=True, metavar="TABLE.KEY=VALUE", help="Change one value of the recipe.")
@click.option("--tflops", type=click.FloatRange(min=0, min_open=True), help="Say hours at this speed, in TFLOP/s.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object.")
def command(
    recipe: Path, vram: str | None, shape: str | None, overrides: tuple[str, ...], tflops: float | None, as_json: bool
) -> None:
    """Predict the memory, work and steps of RECIPE, a TOML file.

    Loads no weight and needs no GPU. Exits 5 where nothing fits the memory.
    """
    from qpref.cli import quiet_transformers
    from qpref.errors import DeviceMemoryError
    from qpref.recipe.resolve import make_plan

    quiet_transformers()
    forecast = Forecast.of(make_plan(recipe, overrides), vram, shape)
    facts = _facts(forecast, tflops)
    if as_json:
        click.echo(json.dumps({"recipe": str(recipe)} | facts, indent=2))
    else:
        _print(forecast, facts)
    if not forecast.fit.fits:
        what = (
            f"needs {_gib(forecast.fit.memory.total)}, and the limit is {_gib(forecast.limit)} ({forecast.limit_from})"
        )
        raise DeviceMemoryError(what, "\n  ".join(["what would help, most first:", *forecast.fit.advice]))


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedData:
    """The training data as far as they are known.

    Attributes:
        said: where the lengths come from, for people.
        lengths: of some examples that stand for all.
        longest: of some examples, the longest among them.
        num_examples: of all; None where the file isn't there.
    """

    said: str
    lengths: list[Lengths]
    longest: list[Lengths]
    num_examples: int | None

    def with_partners(self) -> PlannedData:
        """With another example's completion after each prompt, for a loss that asks for mismatched ones."""
        partners = [responses for _, responses in (*self.lengths[1:], self.lengths[0])]
        pairs = zip(self.lengths, partners, strict=True)
        lengths: list[Lengths] = [(prompt, [*own, *other]) for (prompt, own), other in pairs]
        longest: list[Lengths] = [(prompt, [*own, *own]) for prompt, own in self.longest]
        return replace(self, lengths=lengths, longest=longest)

    def workload(self, batch_size: int, shared: bool) -> Workload:
        from qpref.memory.fit import Workload

        typical = Workload.of(self.lengths, batch_size, shared)
        longest = Workload.of([*self.lengths, *self.longest], batch_size, shared)
        return replace(typical, lengths=longest.lengths, longest=longest.longest)


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """All that is predicted of a run."""

    plan: Plan
    shape: ModelShape
    settings: Settings
    data: PlannedData
    workload: Workload
    limit: int
    limit_from: str
    fit: Fit

    @classmethod
    def of(cls, plan: Plan, vram: str | None, named: str | None) -> Forecast:
        from qpref.memory.costs import Setup
        from qpref.memory.fit import Settings, choose
        from qpref.memory.shape import model_shape

        recipe = plan.recipe
        device, limit, limit_from = _device_and_limit(plan, vram)
        shape = model_shape(recipe.model, recipe.adapter, named)
        settings = Settings.of(recipe, Setup.of(recipe, "cuda" if device == "cuda" else "cpu", shape), shape)
        data = planned_data(plan)
        if "mismatched" in _needs(plan):
            data = data.with_partners()
        workload = data.workload(recipe.train.batch_size, shape.shares_prompts)
        return cls(
            plan=plan,
            shape=shape,
            settings=settings,
            data=data,
            workload=workload,
            limit=limit,
            limit_from=limit_from,
            fit=choose(shape, settings, limit, workload),
        )


def _device_and_limit(plan: Plan, vram: str | None) -> tuple[str, int, str]:
    """What it is planned for: the kind of device, the bytes that may be filled, and who says so."""
    from qpref.memory.fit import memory_limit, parse_bytes
    from qpref.policy.load import choose_device

    model = plan.recipe.model
    if vram is not None:
        return "cpu" if model.device == "cpu" else "cuda", parse_bytes(vram, "--vram"), "--vram"
    device: torch.device = choose_device(model.device)
    free = "free on the GPU now" if device.type == "cuda" else "half of the memory that is free now"
    return device.type, memory_limit(plan.recipe, device), "[model] memory" if model.memory else free


def planned_data(plan: Plan) -> PlannedData:
    """The training file's examples by length, or what the recipe's limits allow where it isn't there.

    Raises:
        DataError: the file is there and training would refuse it.
    """
    from qpref.data.load import load_rows

    data = plan.recipe.data
    sources = [source for source in plan.sources if source.split == "train"]
    where = ", ".join(source.location for source in sources)
    if missing := [source.location for source in sources if _is_missing(source)]:
        response = data.max_length - data.max_prompt_length
        lengths: Lengths = (data.max_prompt_length, [response] * (2 if plan.is_paired else 1))
        kind = "pair" if plan.is_paired else "completion"
        said = f"{missing[0]}: no such file; each {kind} is taken to be {_as_text(lengths)} tokens, the longest allowed"
        return PlannedData(said=said, lengths=[lengths], longest=[], num_examples=None)
    train = load_rows(replace(plan, sources=tuple(sources))).train
    rows = list(train.rows())
    planned = _tokenized(plan, rows, where) or _estimated(plan, rows, where)
    weights = [train.weights.get(row.source.path, 1.0) for row in rows]
    if planned.num_examples is None or not train.weights:
        return planned
    return replace(planned, num_examples=round(planned.num_examples * sum(weights) / len(weights)))


def _is_missing(source: SourceChoice) -> bool:
    is_path = source.reader.record.takes != "name" and not source.location.startswith("pypi:")
    return is_path and not Path(source.location.removeprefix(f"{source.reader.record.name}:")).exists()


def _as_text(lengths: Lengths) -> str:
    prompt, responses = lengths
    return f"{prompt} + {len(responses)} x {responses[0]}"


def _tokenized(plan: Plan, rows: list[ExampleRow], where: str) -> PlannedData | None:
    """Lengths by the base's own tokenizer; None where it isn't on this machine."""
    from qpref.data.tokenize import PairTokenizer
    from qpref.errors import DataError
    from qpref.memory.known_shapes import local_base
    from qpref.policy.source import BaseFolder
    from qpref.policy.tokenizer import load_tokenizer, stop_tokens

    model, data = plan.recipe.model, plan.recipe.data
    folder = local_base(model)
    if folder is None or not (
        Path(model.tokenizer).is_dir() if model.tokenizer else (folder / "tokenizer.json").exists()
    ):
        return None
    base = BaseFolder(path=folder, weights={})
    tokenizer = PairTokenizer.of(load_tokenizer(model, base), data.template, stop_tokens(base))
    spread = rows[:: -(-len(rows) // MOST_TOKENIZED)]
    longest = sorted(rows, key=_characters)[-LONGEST_TOKENIZED:] if len(spread) < len(rows) else []
    lengths, longest_lengths = (_lengths(tokenizer, some, plan) for some in (spread, longest))
    if not lengths:
        raise DataError(f"{where}: no example is left within [data] max_length and max_prompt_length")
    kept = round(len(rows) * len(lengths) / len(spread))
    left_out = f", {len(rows) - kept} of them left out" if kept < len(rows) else ""
    sample = "" if len(spread) == len(rows) else f" (by {len(spread)} of them)"
    said = f"{where}: {len(rows)} examples{left_out}{sample}, by the base's tokenizer"
    return PlannedData(said=said, lengths=lengths, longest=longest_lengths, num_examples=kept)


def _lengths(tokenizer: Any, rows: list[ExampleRow], plan: Plan) -> list[Lengths]:
    """Of the rows that training would keep."""
    from qpref.data.truncate import fit_length, prompt_limit
    from qpref.records import Finding, TokenizedExample

    found: list[Lengths] = []
    for example in tokenizer.tokenize(rows, prompt_limit(plan.recipe.data)):
        fitted = example if isinstance(example, Finding) else fit_length(example, plan.recipe.data)
        if isinstance(fitted, TokenizedExample):
            found.append((len(fitted.prompt), [len(branch) for branch in fitted.branches]))
    return found


def _estimated(plan: Plan, rows: list[ExampleRow], where: str) -> PlannedData:
    data = plan.recipe.data
    lengths: list[Lengths] = []
    for row in rows:
        prompt, *responses = (max(1, size // CHARACTERS_A_TOKEN) for size in _sizes(row))
        prompt = min(prompt, data.max_prompt_length)
        lengths.append((prompt, [min(size, data.max_length - prompt) for size in responses]))
    said = f"{where}: {len(rows)} examples; tokens estimated, {CHARACTERS_A_TOKEN} characters each"
    return PlannedData(said=said, lengths=lengths, longest=[], num_examples=len(rows))


def _sizes(row: ExampleRow) -> list[int]:
    """Characters of the prompt and of each response."""
    from qpref.records import PreferencePair

    sides = [row.chosen, row.rejected] if isinstance(row, PreferencePair) else [row.completion]
    return [sum(len(message.content) for message in turns) for turns in (row.prompt, *sides)]


def _characters(row: ExampleRow) -> int:
    return sum(_sizes(row))


def _facts(forecast: Forecast, tflops: float | None) -> dict[str, Any]:
    """The forecast as JSON data; sizes in bytes."""
    shape, fit, memory = forecast.shape, forecast.fit, forecast.fit.memory
    facts: dict[str, Any] = {
        "shape": {"origin": shape.origin, "parameters": shape.parameters, "layers": shape.num_layers},
        "adapter_parameters": sum(shape.adapter_sizes),
        "data": {"origin": forecast.data.said, "examples": forecast.data.num_examples},
        **_work(forecast),
        "device": forecast.settings.setup.device,
        "limit": {"bytes": forecast.limit, "origin": forecast.limit_from},
        "memory": asdict(memory) | {"reserve": memory.reserve, "total": memory.total},
        "tokens_per_microbatch": fit.tokens_per_microbatch,
        "recomputed_layers": fit.recomputed_layers,
        "fits": fit.fits,
        "advice": list(fit.advice),
    }
    if tflops is not None and facts["flops"] is not None:
        facts["hours"] = {"at_tflops": tflops, "hours": facts["flops"] / (tflops * 1e12) / 3600}
    return facts


def _work(forecast: Forecast) -> dict[str, Any]:
    """Tokens, steps and floating-point operations; None what needs the number of examples."""
    from qpref.memory.flops import forward_flops, step_flops
    from qpref.training.loop import refuse_empty_steps
    from qpref.training.optim import total_steps

    recipe, shape, count = forecast.plan.recipe, forecast.shape, forecast.data.num_examples
    step = forecast.workload.typical.of_tokens(forecast.workload.step_tokens)
    each = step_flops(shape, step, forecast.fit.recomputed_layers / shape.num_layers)
    work = {"tokens_per_step": forecast.workload.step_tokens, "flops_per_step": each}
    if count is None:
        return work | {"tokens_per_epoch": None, "steps": None, "flops": None}
    refuse_empty_steps(recipe, count)
    steps, batch = total_steps(recipe.train, count), recipe.train.batch_size
    examples = min(steps * batch, recipe.train.epochs * count)
    total = each * examples / batch
    if "reference" in _needs(forecast.plan):
        total += forward_flops(shape, step, adapted=False) * min(examples, count) / batch
    per_epoch = round(forecast.workload.typical.tokens / len(forecast.data.lengths) * count)
    return work | {"tokens_per_epoch": per_epoch, "steps": steps, "flops": total}


def _needs(plan: Plan) -> set[str]:
    """What the losses need beside the policy's scores."""
    choices = [loss.at(0.0) for loss in plan.losses]
    return {need for choice in choices for need in choice.plugin.record.needs_of(choice.options)}


def _print(forecast: Forecast, facts: dict[str, Any]) -> None:
    shape, fit, train = forecast.shape, forecast.fit, forecast.plan.recipe.train
    adapted = sum(bool(linear.rank) for linear in shape.linears)
    shares = "" if shape.shares_prompts else "; its attention can't share prompts: each response is a row of its own"
    lines = {
        "base": f"{shape.origin}: {shape.parameters / 1e9:.3f} billion parameters, {shape.num_layers} layers{shares}",
        "adapter": f"{facts['adapter_parameters'] / 1e6:.1f} million parameters on {adapted} linear layers",
        "data": facts["data"]["origin"],
    }
    if facts["steps"] is not None:
        lines["steps"] = (
            f"{facts['steps']} of {train.batch_size} examples; {facts['tokens_per_epoch']:,} tokens an epoch, "
            f"{facts['tokens_per_step']:,} a step"
        )
        lines["work"] = f"{facts['flops'] / 1e15:,.2f} PFLOP, {facts['flops_per_step'] / 1e12:,.1f} TFLOP a step"
    else:
        lines["steps"] = f"unknown; {facts['tokens_per_step']:,} tokens a step"
        lines["work"] = f"{facts['flops_per_step'] / 1e12:,.1f} TFLOP a step"
    if "hours" in facts:
        lines["time"] = f"{facts['hours']['hours']:.2f} hours at {facts['hours']['at_tflops']:g} TFLOP/s"
    for title, line in lines.items():
        click.echo(f"{title:<9}{line}")
    click.echo(f"\npredicted peak on {'a GPU' if facts['device'] == 'cuda' else 'the CPU'}, GiB")
    paged = ", paged: the rest may leave the GPU" if train.optimizer.startswith("paged") else ""
    parts = PARTS | {"optimizer": f"{train.optimizer}'s state{paged}"}
    smaller = "live" if fit.memory.live < fit.memory.head_tile else "head_tile"
    for part, what in parts.items():
        size = facts["memory"][part] / 2**30
        counts = f"({size:.2f})" if part == smaller else f"{size:.2f} "
        note = f"{what}; not at the same time" if part == smaller else what
        click.echo(f"  {part.replace('_', ' '):<13}{counts:>8}  {note}")
    click.echo(f"  {'total':<13}{fit.memory.total / 2**30:>7.2f}   of {_gib(forecast.limit)}: {forecast.limit_from}")
    if fit.fits:
        click.echo(f"\ntokens per micro-batch  {fit.tokens_per_microbatch}  {_whose(train.tokens_per_microbatch)}")
        layers = f"{fit.recomputed_layers} of {shape.num_layers}"
        click.echo(f"checkpointed layers     {layers}  {_whose(train.gradient_checkpointing)}")


def _whose(setting: object) -> str:
    return "(auto)" if setting == "auto" else "(the recipe's)"


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
