"""Forecast of a run: memory, work and steps, for `qpref plan` and for run.json.

A plan's forecast is made before anything is loaded. A run's own forecast is made for its current settings, on the
loaded policy and the real data; the report compares it with the measurements.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qpref.data.order import refuse_empty_steps, total_steps
from qpref.errors import PolicyError, RecipeError
from qpref.memory.cards import Card, capability_notes, find_card
from qpref.memory.demand import Demand
from qpref.memory.fit import Fit, fit_memory
from qpref.memory.flops import forward_flops, step_flops
from qpref.memory.limit import memory_limit, parse_bytes
from qpref.memory.parts import CONTEXT_BYTES, GIB
from qpref.memory.planned_data import PlannedData, planned_data
from qpref.memory.setup import Device, Setup
from qpref.memory.shape import model_shape
from qpref.memory.tune import demand_of
from qpref.policy.load import choose_device
from qpref.policy.policy import Policy
from qpref.recipe.plan import Plan
from qpref.recipe.sections import Recipe
from qpref.records import TokenizedExample


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A device to plan for.

    Attributes:
        limit_bytes: memory that the run may fill; on a GPU without the CUDA context.
        limit_origin: source of the limit, for messages.
        capability: compute capability of a GPU; None where it isn't known.
        card: a card by its name, for the GPU.
        desktop: the card drives a desktop, too.
    """

    device: Device
    limit_bytes: int
    limit_origin: str
    capability: tuple[int, int] | None = None
    card: Card | None = None
    desktop: bool = False

    @classmethod
    def chosen(
        cls, recipe: Recipe, *, vram: str | None = None, card: str | None = None, desktop: bool = False
    ) -> Target:
        """Plan for a card by its name, for so much free memory, or for this machine.

        Raises:
            RecipeError: no such card is known, or `vram` is no size.
        """
        if card is not None:
            return cls.of_card(find_card(card), desktop)
        return cls.here(recipe) if vram is None else cls.of_vram(vram, recipe)

    @classmethod
    def of_card(cls, card: Card, desktop: bool = False) -> Target:
        """Plan for a card that this machine needn't have."""
        return cls(
            device="cuda",
            limit_bytes=card.usable_bytes(desktop),
            limit_origin=card.limit_origin(desktop),
            capability=card.capability,
            card=card,
            desktop=desktop,
        )

    @classmethod
    def of_vram(cls, size: str, recipe: Recipe) -> Target:
        """Plan for a GPU with so much free memory before the run (`--vram`).

        Raises:
            RecipeError: it is no size.
        """
        free = parse_bytes(size, "--vram")
        if recipe.model.device == "cpu":
            return cls(device="cpu", limit_bytes=free, limit_origin="--vram")
        origin = f"--vram {size}, less {CONTEXT_BYTES / GIB:.2f} of the CUDA context (assumed)"
        return cls(device="cuda", limit_bytes=max(1, free - CONTEXT_BYTES), limit_origin=origin)

    @classmethod
    def here(cls, recipe: Recipe) -> Target:
        """Plan for this machine, by the recipe's device and limit, or what is free now."""
        device = choose_device(recipe.model.device)
        is_gpu = device.type == "cuda"
        free = "free on the GPU now" if is_gpu else "half of the memory that is free now"
        return cls(
            device="cuda" if is_gpu else "cpu",
            limit_bytes=memory_limit(recipe, device),
            limit_origin="[model] memory" if recipe.model.memory else free,
            capability=torch.cuda.get_device_capability(device) if is_gpu else None,
        )

    def notes(self, recipe: Recipe) -> list[str]:
        """Sentences on what the recipe asks of the device in vain, each with the way out."""
        if self.capability is None:
            return []
        name = "this GPU" if self.card is None else self.card.name
        return list(capability_notes(name, self.capability, recipe.model.dtype))


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """The result of `qpref plan` for one device.

    Attributes:
        limit_bytes: memory that the run may fill.
        memory: bytes by part, and their `total`.
        steps: None where the number of examples is unknown.
        hours: None unless a speed was given.
        advice: what would help a recipe that doesn't fit, most first.
        facts: all of it as JSON data.
    """

    fits: bool
    device: str
    limit_bytes: int
    memory: Mapping[str, int]
    tokens_per_microbatch: int
    recomputed_layers: int
    steps: int | None
    hours: float | None
    advice: tuple[str, ...]
    facts: Mapping[str, Any]

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> Prediction:
        """Make the record of a forecast's facts."""
        hours = facts.get("hours")
        same = ("fits", "device", "memory", "tokens_per_microbatch", "recomputed_layers", "steps")
        return cls(
            **{name: facts[name] for name in same},
            limit_bytes=facts["limit"]["bytes"],
            hours=None if hours is None else hours["hours"],
            advice=tuple(facts["advice"]),
            facts=facts,
        )

    def as_json(self) -> dict[str, Any]:
        """Convert the prediction to JSON values."""
        return dict(self.facts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """Prediction for a plan."""

    plan: Plan
    target: Target
    demand: Demand
    data: PlannedData
    fit: Fit

    @classmethod
    def of(
        cls, plan: Plan, target: Target, named_shape: str | None = None, data: PlannedData | None = None
    ) -> Forecast:
        """Predict a plan on a device.

        Args:
            named_shape: value of `--shape`.
            data: lengths to plan for, instead of those of the recipe's data.

        Raises:
            RecipeError: the recipe's device isn't the target's.
        """
        recipe = plan.recipe
        if target.card is not None and recipe.model.device == "cpu":
            raise RecipeError('--card: the recipe has [model] device = "cpu"', "plan with --set model.device=auto")
        shape = model_shape(recipe.model, recipe.adapter, named_shape)
        data = data or planned_data(plan)
        if "mismatched" in plan.needs:
            data = data.with_mismatched()
        workload = data.workload(recipe.train.batch_size, shape.shares_prompts)
        demand = Demand.of(recipe, shape, Setup.of(recipe, target.device, shape, target.capability), workload)
        fit = fit_memory(demand, target.limit_bytes)
        return cls(plan=plan, target=target, demand=demand, data=data, fit=fit)

    def facts(self, tflops: float | None = None) -> dict[str, Any]:
        """Write the forecast as JSON data, sizes in bytes; hours only at a given speed in TFLOP/s.

        Raises:
            RecipeError: the data don't fill one optimizer step.
        """
        shape, fit, target = self.demand.shape, self.fit, self.target
        peak = _peak_facts(self.demand, fit.tokens_per_microbatch, fit.recomputed_layers)
        facts: dict[str, Any] = {
            "shape": {
                "origin": shape.origin,
                "parameters": shape.parameters,
                "layers": shape.num_layers,
                "experts": self._expert_facts(),
            },
            "adapter_parameters": sum(shape.adapter_sizes),
            "expert_adapter_parameters": shape.expert_adapter_parameters,
            "data": {"origin": self.data.origin, "examples": self.data.num_examples},
            "tokens_per_step": peak["tokens_per_step"],
            "flops_per_step": peak["flops_per_step"],
            **self._total_facts(peak["flops_per_step"]),
            "device": self.demand.setup.device,
            "limit": {"bytes": target.limit_bytes, "origin": target.limit_origin},
            "card": None if target.card is None else target.card.facts(target.desktop),
            "notes": target.notes(self.plan.recipe),
            "memory": peak["memory"],
            "tokens_per_microbatch": fit.tokens_per_microbatch,
            "recomputed_layers": fit.recomputed_layers,
            "fits": fit.fits,
            "advice": list(fit.advice),
        }
        if tflops is not None and facts["flops"] is not None:
            facts["hours"] = {"at_tflops": tflops, "hours": facts["flops"] / (tflops * 1e12) / 3600}
        return facts

    def _expert_facts(self) -> dict[str, int] | None:
        """Parameters of fused experts by how they are kept; None for a model without experts."""
        shape, setup = self.demand.shape, self.demand.setup
        total = shape.unpacked_experts + sum(each.num_weights for each in shape.experts)
        if not total:
            return None
        is_packed = setup.double_quantization is not None
        packed = sum(each.num_weights for each in shape.experts if each.packed and is_packed)
        return {"packed": packed, "unpacked": total - packed}

    def _total_facts(self, flops_per_step: float) -> dict[str, Any]:
        """Sum tokens, steps and operations over the run; None for each where the number of examples is unknown."""
        recipe, count, workload = self.plan.recipe, self.data.num_examples, self.demand.workload
        if count is None:
            return {"tokens_per_epoch": None, "steps": None, "flops": None}
        refuse_empty_steps(recipe, count)
        steps, batch = total_steps(recipe.train, count), recipe.train.batch_size
        examples = min(steps * batch, recipe.train.epochs * count)
        flops = flops_per_step * examples / batch
        if "reference" in self.plan.needs:
            step = workload.typical.scaled_to(workload.step_tokens)
            flops += forward_flops(self.demand.shape, step, adapted=False) * min(examples, count) / batch
        per_epoch = round(workload.typical.tokens / len(self.data.lengths) * count)
        return {"tokens_per_epoch": per_epoch, "steps": steps, "flops": flops}


def run_forecast(
    policy: Policy, recipe: Recipe, base: Path, examples: Sequence[TokenizedExample], budget: int
) -> dict[str, Any] | None:
    """Predict memory and work under the current settings, uncorrected by any probe, as JSON data; sizes in bytes.

    None for a base whose shape cannot be read; it can be trained where the recipe leaves nothing `auto`.
    """
    try:
        demand = demand_of(policy, recipe, base, examples)
    except PolicyError:
        return None
    return _peak_facts(demand, budget, policy.recomputed_layers)


def _peak_facts(demand: Demand, tokens: int, layers: int) -> dict[str, Any]:
    """Write memory, tokens and operations of a step as JSON data."""
    workload, shape = demand.workload, demand.shape
    step = workload.typical.scaled_to(workload.step_tokens)
    return {
        "memory": demand.peak(tokens, layers).facts(),
        "tokens_per_step": workload.step_tokens,
        "flops_per_step": step_flops(shape, step, layers / shape.num_layers),
    }
