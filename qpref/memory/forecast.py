"""Forecast of a run: memory, work and steps, for `qpref plan` and for run.json.

A plan's forecast is made before anything is loaded. A run's own forecast is made for its current settings, on the
loaded policy and the real data; the report compares it with the measurements.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qpref.data.order import refuse_empty_steps, total_steps
from qpref.errors import PolicyError
from qpref.memory.demand import Demand
from qpref.memory.fit import Fit, fit_memory
from qpref.memory.flops import forward_flops, step_flops
from qpref.memory.limit import memory_limit, parse_bytes
from qpref.memory.planned_data import PlannedData, planned_data
from qpref.memory.setup import Device, Setup
from qpref.memory.shape import model_shape
from qpref.memory.tune import demand_of
from qpref.policy.load import choose_device
from qpref.policy.policy import Policy
from qpref.recipe.resolve import Plan
from qpref.recipe.sections import Recipe
from qpref.records import TokenizedExample


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """Prediction for a plan.

    Attributes:
        limit_bytes: memory that the run may fill.
        limit_origin: source of the limit, for messages.
    """

    plan: Plan
    demand: Demand
    data: PlannedData
    limit_bytes: int
    limit_origin: str
    fit: Fit

    @classmethod
    def of(cls, plan: Plan, vram: str | None, named_shape: str | None) -> Forecast:
        """Predict a plan.

        Args:
            vram: value of `--vram`, which stands for a GPU with that much free memory.
            named_shape: value of `--shape`.
        """
        recipe = plan.recipe
        device, limit_bytes, limit_origin = _device_and_limit(recipe, vram)
        shape = model_shape(recipe.model, recipe.adapter, named_shape)
        data = planned_data(plan)
        if "mismatched" in plan.needs:
            data = data.with_mismatched()
        workload = data.workload(recipe.train.batch_size, shape.shares_prompts)
        demand = Demand.of(recipe, shape, Setup.of(recipe, device, shape), workload)
        return cls(
            plan=plan,
            demand=demand,
            data=data,
            limit_bytes=limit_bytes,
            limit_origin=limit_origin,
            fit=fit_memory(demand, limit_bytes),
        )

    def facts(self, tflops: float | None = None) -> dict[str, Any]:
        """Write the forecast as JSON data, sizes in bytes; hours only at a given speed in TFLOP/s.

        Raises:
            RecipeError: the data don't fill one optimizer step.
        """
        shape, fit = self.demand.shape, self.fit
        peak = _peak_facts(self.demand, fit.tokens_per_microbatch, fit.recomputed_layers)
        facts: dict[str, Any] = {
            "shape": {"origin": shape.origin, "parameters": shape.parameters, "layers": shape.num_layers},
            "adapter_parameters": sum(shape.adapter_sizes),
            "data": {"origin": self.data.origin, "examples": self.data.num_examples},
            "tokens_per_step": peak["tokens_per_step"],
            "flops_per_step": peak["flops_per_step"],
            **self._total_facts(peak["flops_per_step"]),
            "device": self.demand.setup.device,
            "limit": {"bytes": self.limit_bytes, "origin": self.limit_origin},
            "memory": peak["memory"],
            "tokens_per_microbatch": fit.tokens_per_microbatch,
            "recomputed_layers": fit.recomputed_layers,
            "fits": fit.fits,
            "advice": list(fit.advice),
        }
        if tflops is not None and facts["flops"] is not None:
            facts["hours"] = {"at_tflops": tflops, "hours": facts["flops"] / (tflops * 1e12) / 3600}
        return facts

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


def _device_and_limit(recipe: Recipe, vram: str | None) -> tuple[Device, int, str]:
    """Return the kind of device, the bytes that may be filled, and the source of that figure."""
    model = recipe.model
    if vram is not None:
        return "cpu" if model.device == "cpu" else "cuda", parse_bytes(vram, "--vram"), "--vram"
    device = choose_device(model.device)
    free = "free on the GPU now" if device.type == "cuda" else "half of the memory that is free now"
    origin = "[model] memory" if model.memory else free
    return "cuda" if device.type == "cuda" else "cpu", memory_limit(recipe, device), origin
