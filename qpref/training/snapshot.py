"""What a run's state is as a checkpoint, and a checkpoint as a run's state."""

from __future__ import annotations

from typing import Any

import torch

from qpref.errors import CheckpointError
from qpref.memory.tune import choose_sizes
from qpref.policy.policy import Policy
from qpref.policy.reference import ReferenceStore
from qpref.training import checkpoint, optim
from qpref.training.folder import RunFolder
from qpref.training.loop import Progress
from qpref.training.metrics import Averages
from qpref.training.prepare import Prepared


def capture(
    prepared: Prepared,
    optimizer: Any,
    scaler: torch.amp.GradScaler,
    progress: Progress,
    memory: ReferenceStore | None,
    metrics_bytes: int,
) -> checkpoint.Checkpoint:
    """The state of a run after `progress.step` steps."""
    tensors, numbers = optim.optimizer_tensors(optimizer)
    progress.averages.settle()
    state = {
        "tokens": progress.tokens,
        "seconds": progress.seconds,
        "nonfinite": progress.nonfinite,
        "asked_sizes": asked_sizes(prepared),
        "budget": progress.budget,
        "recomputed_layers": prepared.policy.recomputed_layers,
        "sums": {name: total.hex() for name, total in progress.averages.sums.items()},  # JSON has no infinity
        "counts": progress.averages.counts,
        "optimizer": numbers,
        "scaler": scaler.state_dict(),
        "best": None if progress.best is None else progress.best.as_state(),
        "metrics_bytes": metrics_bytes,
        "fingerprints": prepared.fingerprints,
    }
    adapter = {name: parameter.detach() for name, parameter in prepared.policy.trained_parameters().items()}
    files = {"adapter": adapter, "optimizer": tensors}
    if memory is not None:
        files["reference"] = memory.to_tensors()
    return checkpoint.Checkpoint(step=progress.step, state=state, tensors=files)


def restore(
    kept: checkpoint.Checkpoint, prepared: Prepared, optimizer: Any, scaler: torch.amp.GradScaler, progress: Progress
) -> None:
    """Put a checkpoint's state back.

    Raises:
        CheckpointError: its adapter is another.
    """
    policy = prepared.policy
    restore_adapter(kept, policy)
    optim.restore_optimizer(optimizer, kept.tensors["optimizer"], kept.state["optimizer"])
    scaler.load_state_dict(kept.state["scaler"])
    progress.step, progress.tokens = kept.step, kept.state["tokens"]
    progress.seconds, progress.nonfinite = kept.state["seconds"], kept.state["nonfinite"]
    if kept.state["asked_sizes"] == asked_sizes(prepared):
        progress.budget = kept.state["budget"]
        policy.recompute_layers(kept.state["recomputed_layers"])
    else:
        progress.budget = settled(prepared)
    sums = {name: float.fromhex(total) for name, total in kept.state["sums"].items()}
    progress.averages = Averages(sums, kept.state["counts"])


def restore_adapter(kept: checkpoint.Checkpoint, policy: Policy) -> None:
    """Put a checkpoint's adapter, and nothing else, back.

    Raises:
        CheckpointError: it is another.
    """
    parameters, saved = policy.trained_parameters(), kept.tensors["adapter"]
    if set(parameters) != set(saved):
        raise CheckpointError(f"step {kept.step}: its adapter has other layers than this run's")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(saved[name])


def metrics_bytes(kept: checkpoint.Checkpoint, folder: RunFolder) -> int:
    """How much of metrics.jsonl had been written.

    Raises:
        CheckpointError: it is shorter now.
    """
    wanted = int(kept.state["metrics_bytes"])
    if not folder.metrics.is_file() or folder.metrics.stat().st_size < wanted:
        raise CheckpointError(
            f"{folder.metrics}: is shorter than it was at step {kept.step}",
            "restore it, or start anew with --overwrite",
        )
    return wanted


def settled(prepared: Prepared) -> int:
    """The tokens per micro-batch that the recipe says or leaves to the memory; layers to checkpoint likewise."""
    return choose_sizes(
        prepared.policy, prepared.plan.recipe, prepared.base.path, prepared.examples, prepared.memory_limit
    )


def asked_sizes(prepared: Prepared) -> list[object]:
    train = prepared.plan.recipe.train
    return [train.tokens_per_microbatch, train.gradient_checkpointing]
