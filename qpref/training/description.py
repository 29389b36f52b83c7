"""run.json: what a run was made of, written before its first step for resume, merge, evaluation and report.

It is the root of trust of a run's folder: sealed with a hash of itself, it has those of recipe.lock.toml and data.json.
Values made of damaged ones would pass every later check, since these compare with run.json.
"""

from __future__ import annotations

import logging
import platform
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import tomli_w
import torch

from qpref import fsio, sealed
from qpref.data.order import total_steps
from qpref.distributed.environment import job_name
from qpref.errors import CheckpointError, RecipeError
from qpref.installed import version_of
from qpref.memory.forecast import run_forecast
from qpref.policy.base_name import public_name
from qpref.policy.tokenizer import tokenizer_digest
from qpref.recipe.plan import Plan
from qpref.training.base_settings import changed_settings, settings_hashes
from qpref.training.checkpoint import Checkpoint
from qpref.training.folder import RunFolder
from qpref.training.prepare import Prepared
from qpref.training.reference_pass import cache_description
from qpref.training.snapshot import Session

log = logging.getLogger("qpref")

VERSIONED = ("qpref", "torch", "transformers", "peft", "bitsandbytes", "safetensors", "trl")


def begin_records(session: Session, folder: RunFolder) -> None:
    """Write the records of a new run, and make the folder of its checkpoints."""
    session.description = _description(session)
    _write_records(session, folder)
    fsio.make_folder(folder.checkpoints)


def was_begun_by_this_job(folder: RunFolder) -> bool:
    """Return whether the launcher that started this process has begun the folder's run, too."""
    try:
        return bool(folder.run_json.is_file() and folder.description().get("job") == job_name())
    except RecipeError:
        return False


def restore_records(session: Session, folder: RunFolder, saved: Checkpoint) -> None:
    """Read run.json of a resumed run; write the records again where they are damaged, or say other than this start.

    Checkpoints hold run.json's values too, so that it comes back as it was. The settings that may differ between a run
    and its resumption are then those of the resumption.

    Raises:
        CheckpointError: the base has other settings, or another tokenizer, than at the run's start.
    """
    prepared = session.prepared
    try:
        written = folder.description()
        damage = folder.changed_record(written)
    except RecipeError as error:
        written, damage = saved.state["run"], error.what
    if changed := changed_settings(prepared.base.path, written):
        raise CheckpointError(changed, "restore the base as it was, or start over with --overwrite")
    if "tokenizer" in written and written["tokenizer"] != tokenizer_digest(prepared.tokenizer):
        raise CheckpointError(
            f"{prepared.plan.recipe.model.tokenizer or prepared.base.path}: not the tokenizer or chat template that "
            "this run started with",
            "restore its files as they were, or start over with --overwrite",
        )
    session.description = written | _location(prepared)
    if damage:
        log.warning("%s; it is written again", damage)
    if damage or session.description != written or folder.document(written) != prepared.plan.document:
        _write_records(session, folder)


def restate_recipe(plan: Plan, folder: RunFolder, facts: Mapping[str, Any]) -> None:
    """Write a complete run's recipe again where the settings that may differ between a run and its resumption do, such
    as the location of its data."""
    if folder.document(facts) != plan.document:
        log.info("%s: is written again, with the settings of this start", folder.recipe)
        fsio.write_text(folder.recipe, tomli_w.dumps(plan.document))
        _write_description(folder, facts)


def _write_records(session: Session, folder: RunFolder) -> None:
    """Write the resolved recipe, the data report, and run.json with the hashes of both."""
    fsio.write_text(folder.recipe, tomli_w.dumps(session.prepared.plan.document))
    fsio.write_json(folder.data_json, session.prepared.report.facts())
    session.description = _write_description(folder, session.description)


def _write_description(folder: RunFolder, facts: Mapping[str, Any]) -> dict[str, Any]:
    written = {**facts, "files": {path.name: fsio.sha256_file(path) for path in (folder.recipe, folder.data_json)}}
    sealed.write_sealed(folder.run_json, written)
    return written


def _description(session: Session) -> dict[str, Any]:
    prepared = session.prepared
    recipe = prepared.plan.recipe
    return {
        "job": job_name(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {name: version_of(name) for name in VERSIONED} | {"python": platform.python_version()},
        "device": _device_name(prepared.policy.device),
        "plugins": _offers(prepared.plan),
        "reference": prepared.reference_name,
        "losses": _losses(prepared.plan),
        **_location(prepared),
        **_base(prepared),
        **_sizes(session),
        "reference_cache": cache_description(session.references),
        "fingerprints": prepared.fingerprints,
        "examples": {"train": len(prepared.examples), "heldout": len(prepared.heldout)},
        "forecast": run_forecast(prepared.policy, recipe, prepared.base.path, prepared.examples, session.state.budget),
        "steps": total_steps(recipe.train, len(prepared.examples)),
    }


def _losses(plan: Plan) -> dict[str, Any]:
    """Return the facts that `LossFacts` has, for a run that is reopened without its loss plugins, and for each loss
    the names of the options that the recipe set: recipe.lock.toml has the defaults, too."""
    return {
        "is_paired": plan.is_paired,
        "is_listed": plan.is_listed,
        "needs": sorted(plan.needs),
        "columns": list(plan.columns),
        "given": [sorted(loss.options.given) for loss in plan.losses],
    }


def _location(prepared: Prepared) -> dict[str, Any]:
    named = prepared.plan.recipe.model.base
    return {
        "base": named,
        "base_path": str(prepared.base.path),
        "base_name": public_name(named, prepared.base),
    }


def _base(prepared: Prepared) -> dict[str, Any]:
    base, model = prepared.base, prepared.plan.recipe.model
    return {
        "base_weights": base.weights,
        **settings_hashes(base.path),
        "tokenizer": tokenizer_digest(prepared.tokenizer),
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
