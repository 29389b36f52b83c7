"""One run from plan to adapter: data, policy, first-batch checks, loop, checkpoints, result."""

from __future__ import annotations

import logging
import platform
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import tomli_w
import torch

from qpref import fsio
from qpref.data.load import load_rows
from qpref.errors import DeviceMemoryError, PolicyError, StoppedBySignal
from qpref.hooks.types import SinkContext
from qpref.memory.tune import forecast
from qpref.policy.adapter import TRAINED
from qpref.policy.reference import ReferenceStore
from qpref.recipe.resolve import Plan
from qpref.records import PackedBatch
from qpref.training import best, checkpoint, invariants, optim, snapshot
from qpref.training import reference_pass as references
from qpref.training.checkpoint import Checkpoint
from qpref.training.folder import RunFolder, claimed
from qpref.training.loop import Progress, Trainer
from qpref.training.metrics import Recorder
from qpref.training.prepare import Prepared, prepare
from qpref.training.reference_check import check_cache
from qpref.training.result import reset_peak, write_result

log = logging.getLogger("qpref")

VERSIONED = ("qpref", "torch", "transformers", "peft", "bitsandbytes", "safetensors", "trl")


def train_plan(plan: Plan, *, resume: bool = False, overwrite: bool = False) -> Path:
    """Run a plan and return the run folder.

    Raises:
        QprefError: of the kind that fits; until training starts, nothing is left behind.
    """
    with claimed(plan.output, resume, overwrite) as folder:
        if resume and folder.adapter.is_dir():
            log.info("%s: this run is complete", folder.path)
            return folder.path
        checked = load_rows(plan)
        try:
            prepared = prepare(plan, checked)
            _train(prepared, folder, resume)
        except torch.OutOfMemoryError as error:
            raise DeviceMemoryError(
                "the device ran out of memory",
                "`qpref plan` says what needs how much; go on with --resume where checkpoints exist",
            ) from error
    return plan.output


def _train(prepared: Prepared, folder: RunFolder, resume: bool) -> None:
    plan, policy = prepared.plan, prepared.policy
    optimizer = optim.make_optimizer(plan.recipe.train, policy.trained_parameters().values(), policy.device)
    scaler = torch.amp.GradScaler(policy.device.type, enabled=policy.dtype == torch.float16)
    progress = Progress()
    metrics_bytes = 0
    folder.remove_leftovers()
    kept = checkpoint.load_newest(folder.checkpoints, prepared.fingerprints) if resume else None
    if kept is not None:
        memory = _open_memory(prepared, folder.description().get("reference_cache"), kept)
        snapshot.restore(kept, prepared, optimizer, scaler, progress)
        metrics_bytes = snapshot.metrics_bytes(kept, folder)
        progress.best = best.of_state(kept.state, folder, plan.recipe.train)
        checkpoint.remove_newer(folder.checkpoints, progress.step)
        log.info("going on after step %d", progress.step)
    else:
        if resume:
            log.info("%s: no checkpoint yet; starting from the beginning", folder.path)
        memory = _begin(prepared, folder, progress)

    if memory is not None and plan.recipe.reference.fill == "before":
        everything = [*prepared.examples, *prepared.heldout]
        references.fill(memory, policy, everything, references.BATCH_FACTOR * progress.budget)
    total = optim.total_steps(plan.recipe.train, len(prepared.examples))
    context = SinkContext(run_folder=folder.path, first_step=progress.step, total_steps=total)
    recorder = Recorder(folder.metrics, metrics_bytes, plan.sinks, context)
    reset_peak(policy.device)

    def save() -> None:
        current = snapshot.capture(prepared, optimizer, scaler, progress, memory, recorder.size)
        checkpoint.save_checkpoint(folder.checkpoints, current, plan.recipe.train.keep)

    with _stop_request() as requested:
        trainer = Trainer(
            recipe=plan.recipe,
            policy=policy,
            loss=prepared.loss,
            memory=memory,
            optimizer=optimizer,
            scaler=scaler,
            examples=prepared.examples,
            heldout=prepared.heldout,
            progress=progress,
            recorder=recorder,
            save=save,
            should_stop=lambda: bool(requested),
        )
        try:
            finished = trainer.run()
        finally:
            recorder.close()
            if memory is not None and memory.cache is not None:
                memory.cache.close()
    if not finished:
        raise StoppedBySignal(f"stopped after step {progress.step}, saved", "go on with --resume", requested[0])
    _take_best(prepared, folder, progress)
    write_result(folder.result, progress, policy.device, context.first_step)
    _write_adapter(prepared, folder)
    log.info("adapter: %s", folder.adapter)


def _begin(prepared: Prepared, folder: RunFolder, progress: Progress) -> ReferenceStore | None:
    """Check a new run's start, settle its sizes, write down what it is; returns what it knows of the reference.

    Until the checks have passed, nothing that stood in the folder is touched.
    """
    invariants.check_start(prepared.policy, prepared.loss, _first_batch(prepared))
    memory = _open_memory(prepared)
    progress.budget = snapshot.settled(prepared)
    folder.clear()
    _describe(prepared, folder, memory, progress.budget)
    return memory


def _take_best(prepared: Prepared, folder: RunFolder, progress: Progress) -> None:
    """Let the policy be the best step's, where the recipe asks for it, and say which one it is.

    Raises:
        CheckpointError: its checkpoint doesn't verify.
    """
    train, found = prepared.plan.recipe.train, progress.best
    if train.best_by is None:
        return
    if found is None:
        log.warning("no held-out row whose checkpoint is left has a number for %s; the adapter is the last step's",
                    train.best_by)  # fmt: skip
        return
    if found.step != progress.step:
        snapshot.restore_adapter(checkpoint.read(checkpoint.path_of(folder.checkpoints, found.step)), prepared.policy)
    total = optim.total_steps(train, len(prepared.examples))
    early = f", which stopped early, after {progress.step} of {total} steps" if progress.step < total else ""
    log.info("the adapter is that of step %d of this run%s: %s %.4f is the best of its held-out rows",
             found.step, early, train.best_by, found.value)  # fmt: skip


def _first_batch(prepared: Prepared) -> PackedBatch:
    train = prepared.plan.recipe.train
    places = optim.step_order(len(prepared.examples), train.batch_size, train.seed, 0)
    return invariants.first_batch([prepared.examples[place] for place in places], prepared.policy)


def _open_memory(
    prepared: Prepared, before: Mapping[str, Any] | None = None, kept: Checkpoint | None = None
) -> ReferenceStore | None:
    """What is known of the reference and confirmed on this machine, and says how much; None for losses without one.

    Args:
        before: what run.json says of the cache, for a run that goes on.
        kept: the checkpoint that it goes on from.
    """
    if "reference" not in prepared.loss.needs:
        return None
    recipe, everything = prepared.plan.recipe, [*prepared.examples, *prepared.heldout]
    cache = None
    if recipe.reference.cache:
        digest = prepared.fingerprints["start adapter"]
        cache = references.open_cache(recipe, prepared.base, digest, prepared.policy, before)
    memory = ReferenceStore(cache)
    if kept is not None:
        memory.restore(kept.tensors["reference"])
    if not recipe.reference.cache:
        return memory
    check_cache(memory, prepared.policy, _first_batch(prepared))
    known, asked = references.count_known(memory, everything)
    log.info("reference: %d of %d responses are in the cache (%.0f %%)", known, asked, 100 * known / asked)
    return memory


def _versions() -> dict[str, str]:
    """Return the versions of the installed libraries; trl is not needed for training."""
    versions = {}
    for name in VERSIONED:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def _describe(prepared: Prepared, folder: RunFolder, memory: ReferenceStore | None, budget: int) -> None:
    """Write down what this run is: the resolved recipe, and run.json with what it was made of."""
    plan, policy = prepared.plan, prepared.policy
    fsio.write_text(folder.recipe, tomli_w.dumps(plan.document))
    fsio.write_json(folder.data_json, prepared.report.facts())
    offers = sorted({str(plugin.offer): asdict(plugin.offer) for plugin in plan.plugins}.items())
    fsio.write_json(
        folder.run_json,
        {
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": _versions() | {"python": platform.python_version()},
            "device": _device_name(policy.device),
            "plugins": [offer for _, offer in offers],
            "base": plan.recipe.model.base,
            "base_path": str(prepared.base.path),
            "base_weights": prepared.base.weights,
            "base_config": fsio.sha256_file(prepared.base.path / "config.json"),
            "dtype": plan.recipe.model.dtype,
            "double_quantization": plan.recipe.model.double_quantization,
            "quantized_modules": policy.quantized_modules(),
            "tokens_per_microbatch": budget,
            "recomputed_layers": policy.recomputed_layers,
            "attention": policy.attention,
            "shares_prompts": policy.shares_prompts,
            "reference_cache": references.describe(memory),
            "fingerprints": prepared.fingerprints,
            "examples": {"train": len(prepared.examples), "heldout": len(prepared.heldout)},
            "forecast": forecast(policy, plan.recipe, prepared.base.path, prepared.examples, budget),
            "steps": optim.total_steps(plan.recipe.train, len(prepared.examples)),
        },
    )
    fsio.make_folder(folder.checkpoints)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"


def _write_adapter(prepared: Prepared, folder: RunFolder) -> None:
    """The result in PEFT's format, with the tokenizer that it was trained with."""
    model = prepared.policy.model
    bad = [name for name, value in prepared.policy.trained_parameters().items() if not bool(value.isfinite().all())]
    if bad:
        raise PolicyError(f"the trained adapter is not finite in {bad[0]}; the last checkpoint may be")
    model.peft_config[TRAINED].base_model_name_or_path = str(prepared.base.path)
    with fsio.staged_folder(folder.adapter) as staging, fsio.disk_errors(folder.adapter):
        model.save_pretrained(staging, selected_adapters=[TRAINED], save_embedding_layers=False)
        prepared.tokenizer.save_pretrained(staging)


@contextmanager
def _stop_request() -> Iterator[Sequence[int]]:
    """A list that holds the number of the first signal that asked to stop; a second interrupt stops at once.

    Outside the main thread Python takes no handlers, and the list stays empty.
    """
    requested: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield requested
        return

    def note(number: int, frame: object) -> None:
        if requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        requested.append(number)
        log.warning("stopping after this step; interrupt again to stop at once")

    before: dict[int, Callable[..., Any] | int | None] = {}
    for caught in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        before[caught] = signal.signal(caught, note)
    try:
        yield requested
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
