"""One run from plan to adapter: data, policy, first-batch checks, loop, checkpoints, result."""

from __future__ import annotations

import json
import logging
import platform
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import tomli_w
import torch

from qpref import fsio
from qpref.data.load import CheckedRows, fingerprint, load_rows, tokenize_rows
from qpref.data.mismatch import with_mismatched
from qpref.data.tokenize import PairTokenizer
from qpref.errors import CheckpointError, DeviceMemoryError, PolicyError, StoppedBySignal
from qpref.hooks.types import SinkContext
from qpref.plan import Plan
from qpref.policy.adapter import TRAINED
from qpref.policy.load import Policy, load_policy
from qpref.policy.reference import ReferenceMemory
from qpref.policy.source import BaseFolder, cached_sha256, resolve_base
from qpref.policy.tokenizer import load_tokenizer, stop_tokens
from qpref.records import PackedBatch, TokenizedExample
from qpref.training import checkpoint, invariants, optim, references
from qpref.training.folder import RunFolder, claimed
from qpref.training.loop import Progress, Trainer, refuse_empty_steps
from qpref.training.metrics import Averages, Recorder
from qpref.training.objective import Objective

log = logging.getLogger("qpref")

VERSIONED = ("qpref", "torch", "transformers", "peft", "bitsandbytes", "safetensors", "trl")


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """What a run has once everything that can be refused has been."""

    plan: Plan
    base: BaseFolder
    tokenizer: Any
    policy: Policy
    loss: Objective
    examples: list[TokenizedExample]
    heldout: list[TokenizedExample]
    fingerprints: dict[str, str]


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
            prepared = _prepare(plan, checked)
            _train(prepared, folder, resume)
        except torch.OutOfMemoryError as error:
            raise DeviceMemoryError(
                "the device ran out of memory",
                "lower [train] tokens_per_microbatch or [data] max_length, or set gradient_checkpointing = true; "
                "go on with --resume where checkpoints exist",
            ) from error
    return plan.output


def _prepare(plan: Plan, checked: tuple[CheckedRows, CheckedRows | None]) -> Prepared:
    recipe = plan.recipe
    base = resolve_base(recipe.model)
    tokenizer = load_tokenizer(recipe.model, base)
    pairs = PairTokenizer.of(tokenizer, recipe.data.template, stop_tokens(base))
    examples = tokenize_rows(checked[0], pairs, recipe.data)
    heldout = tokenize_rows(checked[1], pairs, recipe.data) if checked[1] else []
    loss = Objective.of(plan.losses, _class_counts(examples))
    if "mismatched" in loss.needs:
        seed, longest = recipe.train.seed, recipe.data.max_length
        # A held-out file may have one prompt alone, so its partners come from all examples.
        heldout = with_mismatched([*heldout, *examples], seed, longest)[: len(heldout)]
        examples = with_mismatched(examples, seed, longest)
    refuse_empty_steps(recipe, len(examples))
    loss.refuse_bad_schedule(optim.total_steps(recipe.train, len(examples)))
    invariants.check_first_row(pairs, examples[0])
    policy = load_policy(recipe, base)
    invariants.check_layout(policy, examples[0])
    return Prepared(
        plan=plan,
        base=base,
        tokenizer=tokenizer,
        policy=policy,
        loss=loss,
        examples=examples,
        heldout=heldout,
        fingerprints={
            "recipe": plan.fingerprint,
            "base model": json.dumps(base.weights, sort_keys=True),
            "training data": fingerprint(examples),
            "held-out data": fingerprint(heldout),
            "start adapter": _start_digest(recipe.adapter.start),
        },
    )


def _class_counts(examples: Sequence[TokenizedExample]) -> tuple[int, int]:
    """Desirable and undesirable examples."""
    labels = [example.label for example in examples]
    return labels.count(True), labels.count(False)


def _start_digest(start: str | None) -> str:
    return "" if start is None else cached_sha256(Path(start) / "adapter_model.safetensors")


def _train(prepared: Prepared, folder: RunFolder, resume: bool) -> None:
    plan, policy = prepared.plan, prepared.policy
    optimizer = optim.make_optimizer(plan.recipe.train, policy.trained_parameters().values(), policy.device)
    scaler = torch.amp.GradScaler(policy.device.type, enabled=policy.dtype == torch.float16)
    progress = Progress()
    metrics_bytes = 0
    folder.remove_leftovers()
    kept = checkpoint.load_newest(folder.checkpoints, prepared.fingerprints) if resume else None
    if kept is not None:
        memory = _open_memory(prepared, folder.description().get("reference_cache"))
        _restore(kept, policy, optimizer, scaler, progress)
        if memory is not None:
            memory.restore(kept.tensors["reference"])
            invariants.check_cached_reference(policy, memory, _first_batch(prepared))
        metrics_bytes = _metrics_bytes(kept, folder)
        checkpoint.remove_newer(folder.checkpoints, progress.step)
        log.info("going on after step %d", progress.step)
    else:
        if resume:
            log.info("%s: no checkpoint yet; starting from the beginning", folder.path)
        memory = _open_memory(prepared, None)
        invariants.check_start(policy, prepared.loss, _first_batch(prepared), memory)
        folder.clear()
        _describe(prepared, folder, memory)

    total = optim.total_steps(plan.recipe.train, len(prepared.examples))
    context = SinkContext(run_folder=folder.path, first_step=progress.step, total_steps=total)
    recorder = Recorder(folder.metrics, metrics_bytes, plan.sinks, context)

    def save() -> None:
        current = _capture(prepared, optimizer, scaler, progress, memory, recorder.size)
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
    _write_adapter(prepared, folder)
    log.info("adapter: %s", folder.adapter)


def _first_batch(prepared: Prepared) -> PackedBatch:
    train = prepared.plan.recipe.train
    places = optim.step_order(len(prepared.examples), train.batch_size, train.seed, 0)
    return invariants.first_batch([prepared.examples[place] for place in places], prepared.policy)


def _open_memory(prepared: Prepared, before: Mapping[str, Any] | None) -> ReferenceMemory | None:
    """What is known of the reference, and says how much; None for losses without one.

    Args:
        before: what run.json says of the cache, for a run that goes on.
    """
    if "reference" not in prepared.loss.needs:
        return None
    recipe, everything = prepared.plan.recipe, [*prepared.examples, *prepared.heldout]
    if not recipe.reference.cache:
        return ReferenceMemory()
    digest = prepared.fingerprints["start adapter"]
    memory = ReferenceMemory(references.open_cache(recipe, prepared.base, digest, prepared.policy, before))
    known, asked = references.count_known(memory, everything)
    log.info("reference: %d of %d responses are in the cache (%.0f %%)", known, asked, 100 * known / asked)
    return memory


def _capture(
    prepared: Prepared,
    optimizer: Any,
    scaler: torch.amp.GradScaler,
    progress: Progress,
    memory: ReferenceMemory | None,
    metrics_bytes: int,
) -> checkpoint.Checkpoint:
    tensors, numbers = optim.optimizer_tensors(optimizer)
    progress.averages.settle()
    state = {
        "tokens": progress.tokens,
        "seconds": progress.seconds,
        "nonfinite": progress.nonfinite,
        "budget": progress.budget,
        "checkpointed_layers": prepared.policy.checkpointed_layers,
        "sums": {name: total.hex() for name, total in progress.averages.sums.items()},  # JSON has no infinity
        "counts": progress.averages.counts,
        "optimizer": numbers,
        "scaler": scaler.state_dict(),
        "metrics_bytes": metrics_bytes,
        "fingerprints": prepared.fingerprints,
    }
    adapter = {name: parameter.detach() for name, parameter in prepared.policy.trained_parameters().items()}
    files = {"adapter": adapter, "optimizer": tensors}
    if memory is not None:
        files["reference"] = memory.to_tensors()
    return checkpoint.Checkpoint(step=progress.step, state=state, tensors=files)


def _restore(
    kept: checkpoint.Checkpoint, policy: Policy, optimizer: Any, scaler: torch.amp.GradScaler, progress: Progress
) -> None:
    parameters, saved = policy.trained_parameters(), kept.tensors["adapter"]
    if set(parameters) != set(saved):
        raise CheckpointError(f"step {kept.step}: its adapter has other layers than this run's")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(saved[name])
    optim.restore_optimizer(optimizer, kept.tensors["optimizer"], kept.state["optimizer"])
    scaler.load_state_dict(kept.state["scaler"])
    progress.step, progress.tokens = kept.step, kept.state["tokens"]
    progress.seconds, progress.nonfinite = kept.state["seconds"], kept.state["nonfinite"]
    progress.budget = kept.state["budget"]
    policy.checkpoint_layers(kept.state["checkpointed_layers"])
    sums = {name: float.fromhex(total) for name, total in kept.state["sums"].items()}
    progress.averages = Averages(sums, kept.state["counts"])


def _metrics_bytes(kept: checkpoint.Checkpoint, folder: RunFolder) -> int:
    wanted = int(kept.state["metrics_bytes"])
    if not folder.metrics.is_file() or folder.metrics.stat().st_size < wanted:
        raise CheckpointError(
            f"{folder.metrics}: is shorter than it was at step {kept.step}",
            "restore it, or start anew with --overwrite",
        )
    return wanted


def _describe(prepared: Prepared, folder: RunFolder, memory: ReferenceMemory | None) -> None:
    """Write down what this run is: the resolved recipe, and run.json with what it was made of."""
    plan, policy = prepared.plan, prepared.policy
    fsio.write_text(folder.recipe, tomli_w.dumps(plan.document))
    offers = sorted({str(plugin.offer): asdict(plugin.offer) for plugin in plan.plugins}.items())
    fsio.write_json(
        folder.run_json,
        {
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": {name: metadata.version(name) for name in VERSIONED} | {"python": platform.python_version()},
            "device": _device_name(policy.device),
            "plugins": [offer for _, offer in offers],
            "base": plan.recipe.model.base,
            "base_path": str(prepared.base.path),
            "base_weights": prepared.base.weights,
            "dtype": plan.recipe.model.dtype,
            "double_quantization": plan.recipe.model.double_quantization,
            "quantized_modules": policy.quantized_modules(),
            "attention": policy.attention,
            "shares_prompts": policy.shares_prompts,
            "reference_cache": references.describe(memory.cache) if memory and memory.cache else None,
            "fingerprints": prepared.fingerprints,
            "examples": {"train": len(prepared.examples), "heldout": len(prepared.heldout)},
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
