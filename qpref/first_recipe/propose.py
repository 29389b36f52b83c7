"""Propose a recipe for a model, data, device and goal, with the reason for each value, and plan it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from qpref.errors import DeviceMemoryError, PolicyError
from qpref.first_recipe.goals import loss_table
from qpref.first_recipe.sample import Sample
from qpref.memory.cards import find_card
from qpref.memory.forecast import Forecast, Target
from qpref.memory.parts import GIB, count_text
from qpref.recipe.resolve import make_plan
from qpref.recipe.sections import Recipe

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
PROMPT_STEP = 128
FEW_ROWS, HELDOUT_SHARE = 1000, 0.05
SMALL_MODEL = 4e9
"""Parameters below which LoRA tolerates twice the learning rate, as in the recipes of this repository."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """The user's answers.

    Attributes:
        base: as `[model] base`.
        train, heldout: as in `[data]`; without held-out data a share of the training prompts is held out.
        goal: a key of `GOALS`.
        card, vram: the device; None for this machine's.
    """

    base: str
    train: str
    heldout: str | None = None
    goal: str = "align"
    card: str | None = None
    vram: str | None = None


@dataclass(slots=True)
class Proposal:
    """A recipe, the reason for each of its values, and its plan in sentences."""

    tables: dict[str, dict[str, Any]]
    reasons: dict[tuple[str, str], str] = field(default_factory=dict)
    plan: list[str] = field(default_factory=list)


def propose(wishes: Wishes, sample: Sample) -> Proposal:
    """Choose every value that a first run needs, and shorten the rows where nothing else would fit.

    Raises:
        DeviceMemoryError: it fits the memory at no length.
        RecipeError: the card or the memory is none, or the goal doesn't fit the data.
    """
    longest = _length(sample)
    while True:
        proposal = _proposal(wishes, sample, longest)
        forecast = _forecast(proposal, wishes)
        if forecast is None:
            return proposal
        if forecast.fit.fits or longest == LENGTHS[0]:
            break
        longest = LENGTHS[LENGTHS.index(longest) - 1]
    if not forecast.fit.fits:
        need, limit = forecast.fit.memory.total / GIB, forecast.target.limit_bytes / GIB
        raise DeviceMemoryError(
            f"{wishes.base} needs {need:.1f} GiB, and {limit:.1f} are there ({forecast.target.limit_origin})",
            "\n  ".join(["what would help, most first:", *forecast.fit.advice]),
        )
    _adapt(proposal, forecast)
    _describe(proposal, forecast, sample)
    return proposal


def _length(sample: Sample) -> int:
    return next((length for length in LENGTHS if length >= sample.most_tokens), LENGTHS[-1])


def _proposal(wishes: Wishes, sample: Sample, longest: int) -> Proposal:
    prompt = min(-(-sample.most_prompt_tokens // PROMPT_STEP) * PROMPT_STEP, longest * 3 // 4)
    loss, why_loss = loss_table(wishes.goal, sample.is_paired)
    num_rows = sample.num_rows if sample.is_whole else None
    batch = 16 if num_rows is None or num_rows >= 320 else 8 if num_rows >= 80 else 4
    few = num_rows is not None and num_rows < FEW_ROWS
    data: dict[str, Any] = {"train": wishes.train}
    data |= {"heldout": wishes.heldout} if wishes.heldout else {"heldout_share": 0.1 if few else HELDOUT_SHARE}
    data |= {"max_length": longest, "max_prompt_length": prompt, "on_overflow": "drop"}
    data |= {"skip_bad": 0.05} if sample.refused else {}
    tables: dict[str, dict[str, Any]] = {
        "model": {"base": wishes.base, "quantization": "nf4", "dtype": "bf16"},
        "adapter": {"rank": 16, "alpha": 32, "targets": "all-linear"},
        "data": data,
        "loss": loss,
        "train": {"learning_rate": 5e-6, "epochs": 3 if few else 1, "batch_size": batch, "optimizer": "adamw",
                  "eval_every": "epoch"},
    }  # fmt: skip
    proposal = Proposal(tables)
    proposal.reasons = {
        ("model", "base"): "A hub id, a folder with safetensors, or a .gguf file.",
        ("model", "quantization"): "4 bits a weight; the same base with its adapters off is the reference.",
        ("adapter", "rank"): "Rank and scale of the LoRA update; 16 is plenty for preferences.",
        ("data", "train"): sample.summary() + ".",
        ("data", "max_length"): "Tokens of prompt and response; longer rows are dropped and counted.",
        ("loss", "name"): why_loss,
        ("train", "learning_rate"): "LoRA tolerates ten times the rate of full fine-tuning. If rewards/margins stays "
        "flat, raise it.",
        ("train", "batch_size"): "Examples per optimizer step; the micro-batch is chosen by memory.",
        ("train", "eval_every"): "Held-out rows are scored at step 0 and at the end, too.",
    }
    if not wishes.heldout:
        proposal.reasons["data", "heldout_share"] = "A share of the prompts that is scored, never trained on."
    if sample.refused:
        first = sample.refused[0]
        proposal.reasons["data", "skip_bad"] = f"Share of rows that may be refused, as line {first.source.line} is."
    if few:
        proposal.reasons["train", "epochs"] = "More than one pass, since there are few rows."
    return proposal


def _target(recipe: Recipe, wishes: Wishes) -> Target:
    if wishes.card is not None:
        return Target.of_card(find_card(wishes.card))
    return Target.here(recipe) if wishes.vram is None else Target.of_vram(wishes.vram, recipe)


def _forecast(proposal: Proposal, wishes: Wishes) -> Forecast | None:
    """Plan the recipe; None, with a sentence, where the model's config can't be had."""
    plan = make_plan(proposal.tables)
    target = _target(plan.recipe, wishes)
    try:
        return Forecast.of(plan, target)
    except PolicyError as error:
        what = error.what.splitlines()[0]
        proposal.plan = [f"Not planned, since the model's config can't be had: {what}"]
        return None


def _adapt(proposal: Proposal, forecast: Forecast) -> None:
    """Set what follows from the model's size and the device."""
    train, model, target = proposal.tables["train"], proposal.tables["model"], forecast.target
    if forecast.demand.shape.parameters < SMALL_MODEL:
        train["learning_rate"] = 1e-5
    if target.device == "cuda":
        train["optimizer"] = "adamw_8bit"
        proposal.reasons["train", "optimizer"] = "AdamW with its moments in 8 bits; the adapter stays float32."
    if target.capability is not None and target.capability < (8, 0):
        model["dtype"] = "fp16"
        proposal.reasons["model", "dtype"] = "This GPU computes no bf16."


def _describe(proposal: Proposal, forecast: Forecast, sample: Sample) -> None:
    facts, fit, target = forecast.facts(), forecast.fit, forecast.target
    shape = forecast.demand.shape
    layers = f"{fit.recomputed_layers} of {shape.num_layers} layers recompute their activations"
    proposal.plan = [
        f"Planned, not measured: {fit.memory.total / GIB:.2f} of {target.limit_bytes / GIB:.2f} GiB "
        f"({target.limit_origin}), {layers}.",
        f"{count_text(shape.parameters)} parameters; {facts['flops_per_step'] / 1e12:,.1f} TFLOP a step"
        + ("." if facts["steps"] is None else f", {facts['steps']} steps."),
        *(f"{note[0].upper()}{note[1:]}." for note in facts["notes"]),
    ]
