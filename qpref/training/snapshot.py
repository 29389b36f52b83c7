"""Capture a run's state as a checkpoint, and restore it from one."""

from __future__ import annotations

import hashlib
import logging
import os
from dataclasses import dataclass, field
from typing import Any

import torch

from qpref import opening
from qpref.errors import CheckpointError
from qpref.memory.tune import choose_sizes
from qpref.policy.adapter_names import LayerNames
from qpref.policy.policy import Policy
from qpref.policy.reference import ReferenceStore
from qpref.training import optim
from qpref.training.checkpoint import STATE_VALUES, Checkpoint
from qpref.training.folder import RunFolder
from qpref.training.heldout_scores import HeldoutScores
from qpref.training.metrics import Averages
from qpref.training.prepare import Prepared
from qpref.training.state import TrainingState
from qpref.training.symptoms import Watch

log = logging.getLogger("qpref")


@dataclass(slots=True)
class Session:
    """One process's share of a run: the parts that its checkpoints are made of.

    Attributes:
        scaler: fp16's loss scaling; passes everything through in other dtypes.
        references: reference scores; None for losses without a reference.
        sizes: tokens per micro-batch and number of recomputed layers of each process, by rank; empty for one process.
        description: the values of run.json.
        metrics_sha256: hash of metrics.jsonl at the end of training.
        symptoms: the watch over its rows, in the process that writes them.
    """

    prepared: Prepared
    optimizer: Any
    scaler: torch.amp.GradScaler
    references: ReferenceStore | None = None
    state: TrainingState = field(default_factory=TrainingState)
    sizes: list[list[int]] = field(default_factory=list)
    description: dict[str, Any] = field(default_factory=dict)
    metrics_sha256: str = ""
    symptoms: Watch | None = None

    @classmethod
    def of(cls, prepared: Prepared) -> Session:
        """Make a new optimizer for a prepared run."""
        policy = prepared.policy
        parameters = policy.trained_parameters().values()
        optimizer = optim.make_optimizer(prepared.plan.recipe.train, parameters, policy.device)
        scaler = torch.amp.GradScaler(policy.device.type, enabled=policy.dtype == torch.float16)
        return cls(prepared, optimizer, scaler)


def capture(session: Session, metrics_bytes: int, metrics_sha256: str) -> Checkpoint:
    """Copy the state of a run after `session.state.step` steps.

    Args:
        metrics_bytes, metrics_sha256: length and hash of metrics.jsonl.
    """
    prepared, state = session.prepared, session.state
    tensors, numbers = optim.optimizer_tensors(session.optimizer)
    state.averages.settle()
    values = {
        "tokens": state.tokens,
        "seconds": state.seconds,
        "nonfinite": state.nonfinite,
        "asked_sizes": requested_sizes(prepared),
        "budget": state.budget,
        "recomputed_layers": prepared.policy.recomputed_layers,
        "sizes": session.sizes,
        "sums": {name: total.hex() for name, total in state.averages.sums.items()},  # JSON has no infinity
        "counts": state.averages.counts,
        "optimizer": numbers,
        "scaler": session.scaler.state_dict(),
        "best": None if state.best is None else state.best.as_state(),
        "metrics_bytes": metrics_bytes,
        "metrics_sha256": metrics_sha256,
        "run": session.description,
        "fingerprints": prepared.fingerprints,
    }
    adapter = {name: parameter.detach() for name, parameter in prepared.policy.trained_parameters().items()}
    files = {"adapter": adapter, "optimizer": tensors}
    if session.references is not None:
        files["reference"] = session.references.to_tensors()
    if state.first_scores is not None and state.last_scores is not None:
        files["heldout"] = state.first_scores.to_tensors("first") | state.last_scores.to_tensors("last")
    if state.of_losses:
        files["losses"] = {name: value.detach().cpu() for name, value in state.of_losses.items()}
    return Checkpoint(step=state.step, state=values, tensors=files)


def restore(saved: Checkpoint, session: Session) -> None:
    """Restore adapter, optimizer, counters and sizes from a checkpoint.

    Sizes that the recipe has changed since are settled again.

    Raises:
        CheckpointError: its adapter is for another model, or its losses keep another state.
    """
    prepared, state, values = session.prepared, session.state, saved.state
    if missing := sorted(STATE_VALUES.keys() - values.keys()):
        raise CheckpointError(f"step {saved.step}: its state lacks {missing[0]}")
    restore_adapter(saved, prepared.policy)
    optim.restore_optimizer(session.optimizer, saved.tensors["optimizer"], values["optimizer"])
    session.scaler.load_state_dict(values["scaler"])
    state.step, state.tokens = saved.step, values["tokens"]
    state.seconds, state.nonfinite = values["seconds"], values["nonfinite"]
    sizes = values.get("sizes") or [[values["budget"], values["recomputed_layers"]]]
    if values["asked_sizes"] == requested_sizes(prepared) and len(sizes) == prepared.world.size:
        state.budget, recomputed = sizes[prepared.world.rank]
        prepared.policy.recompute_layers(recomputed)
    else:
        state.budget = settle_sizes(prepared)
    sums = {name: float.fromhex(total) for name, total in values["sums"].items()}
    state.averages = Averages(sums, values["counts"])
    restore_heldout(saved, state)
    state.of_losses = saved.tensors.get("losses", {})
    prepared.objective.refuse_other_state(state.of_losses, saved.step)


def restore_heldout(saved: Checkpoint, state: TrainingState) -> None:
    """Restore the scores of held-out examples that a checkpoint has."""
    tensors = saved.tensors.get("heldout", {})
    state.first_scores = HeldoutScores.of_tensors(tensors, "first")
    state.last_scores = HeldoutScores.of_tensors(tensors, "last")


def restore_adapter(saved: Checkpoint, policy: Policy) -> None:
    """Copy a checkpoint's adapter, and nothing else, into the policy.

    Raises:
        CheckpointError: it has other layers than the policy's.
    """
    parameters = policy.trained_parameters()
    tensors = LayerNames.of(policy.plain_model).translated_keys(saved.tensors["adapter"])
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    if shapes != {name: parameter.shape for name, parameter in parameters.items()}:
        raise CheckpointError(f"step {saved.step}: its adapter has other layers than this run's")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


def lost_metrics(saved: Checkpoint, folder: RunFolder) -> str | None:
    """Explain that metrics.jsonl lacks rows that it had at the checkpoint; None where it has them.

    A run that resumes from an older checkpoint writes the rows after it again, so none is lost.
    """
    size = folder.metrics.stat().st_size if folder.metrics.is_file() else 0
    if size >= saved.state["metrics_bytes"]:
        return None
    return f"{folder.metrics}: is shorter than it was at step {saved.step}"


def metrics_bytes(saved: Checkpoint, folder: RunFolder) -> int:
    """Return the length that metrics.jsonl had at the checkpoint; a change of its rows since is logged.

    The checkpoint has all that training needs, so a damaged log doesn't stop it.

    Raises:
        CheckpointError: it is shorter now.
    """
    if lost := lost_metrics(saved, folder):
        raise CheckpointError(lost, "restore it, or start over with --overwrite")
    expected = int(saved.state["metrics_bytes"])
    with os.fdopen(opening.open_plain(folder.metrics), "rb") as file:
        if hashlib.sha256(file.read(expected)).hexdigest() != saved.state["metrics_sha256"]:
            log.warning("%s: its rows up to step %d are not as training wrote them; training is unaffected, "
                        "the report of this run isn't", folder.metrics, saved.step)  # fmt: skip
    return expected


def settle_sizes(prepared: Prepared) -> int:
    """Settle the tokens per micro-batch, which it returns, and the number of recomputed layers, which the policy gets.

    Both come from the recipe, or from the memory where the recipe says "auto".
    """
    return choose_sizes(
        prepared.policy, prepared.plan.recipe, prepared.base.path, prepared.examples, prepared.memory_limit
    )


def requested_sizes(prepared: Prepared) -> list[object]:
    """Return the sizes as the recipe has them, to tell whether it has changed them since a checkpoint."""
    train = prepared.plan.recipe.train
    return [train.tokens_per_microbatch, train.gradient_checkpointing]
