"""run.json: what a run was made of, written before its first step for resume, merge, evaluation and report."""

from __future__ import annotations

import platform
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import tomli_w
import torch

from qpref import fsio
from qpref.data.order import total_steps
from qpref.installed import version_of
from qpref.memory.forecast import run_forecast
from qpref.recipe.plan import Plan
from qpref.training.folder import RunFolder
from qpref.training.prepare import Prepared
from qpref.training.reference_pass import cache_description
from qpref.training.snapshot import Session

VERSIONED = ("qpref", "torch", "transformers", "peft", "bitsandbytes", "safetensors", "trl")


def write_description(session: Session, folder: RunFolder) -> None:
    """Write the resolved recipe, the data report and run.json, and make the folder of the checkpoints."""
    prepared = session.prepared
    fsio.write_text(folder.recipe, tomli_w.dumps(prepared.plan.document))
    fsio.write_json(folder.data_json, prepared.report.facts())
    fsio.write_json(folder.run_json, _description(session))
    fsio.make_folder(folder.checkpoints)


def _description(session: Session) -> dict[str, Any]:
    prepared = session.prepared
    recipe = prepared.plan.recipe
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {name: version_of(name) for name in VERSIONED} | {"python": platform.python_version()},
        "device": _device_name(prepared.policy.device),
        "plugins": _offers(prepared.plan),
        "losses": {"is_paired": prepared.plan.is_paired, "needs": sorted(prepared.plan.needs)},
        **_base(prepared),
        **_sizes(session),
        "reference_cache": cache_description(session.references),
        "fingerprints": prepared.fingerprints,
        "examples": {"train": len(prepared.examples), "heldout": len(prepared.heldout)},
        "forecast": run_forecast(prepared.policy, recipe, prepared.base.path, prepared.examples, session.state.budget),
        "steps": total_steps(recipe.train, len(prepared.examples)),
    }


def _base(prepared: Prepared) -> dict[str, Any]:
    base, model = prepared.base, prepared.plan.recipe.model
    return {
        "base": model.base,
        "base_path": str(base.path),
        "base_weights": base.weights,
        "base_config": fsio.sha256_file(base.path / "config.json"),
        "dtype": model.dtype,
        "double_quantization": model.double_quantization,
        "quantized_modules": prepared.policy.quantized_modules(),
        "quantized_experts": prepared.policy.packed_experts(),
    }


def _sizes(session: Session) -> dict[str, Any]:
    policy = session.prepared.policy
    return {
        "tokens_per_microbatch": session.state.budget,
        "recomputed_layers": policy.recomputed_layers,
        "attention": policy.attention,
        "shares_prompts": policy.shares_prompts,
    }


def _offers(plan: Plan) -> list[dict[str, Any]]:
    """List the plugins in use, each with its distribution and version."""
    offers = sorted({str(plugin.offer): asdict(plugin.offer) for plugin in plan.plugins}.items())
    return [offer for _, offer in offers]


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
