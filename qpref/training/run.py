"""One run from plan to adapter: data, policy, first-batch checks, loop, checkpoints, result."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qpref.attention.determinism import deterministic
from qpref.data.load import load_rows
from qpref.data.order import total_steps
from qpref.distributed.environment import is_restart
from qpref.distributed.join import joined, take_gpu
from qpref.distributed.world import World
from qpref.errors import CheckpointError, RecipeError, StoppedBySignal
from qpref.hooks.types import SinkContext
from qpref.policy.kept_base import KeptBase
from qpref.policy.load import choose_device
from qpref.policy.out_of_memory import out_of_memory_as
from qpref.recipe.plan import Plan
from qpref.recipe.requirements import refuse_missing
from qpref.training import checkpoint, invariants, reference_pass, snapshot
from qpref.training.best import Best, restore_best
from qpref.training.checkpoint import Checkpoint
from qpref.training.description import begin_records, restate_recipe, restore_records, was_begun_by_this_job
from qpref.training.export import take_best, write_adapter
from qpref.training.folder import RunFolder, claimed
from qpref.training.known_symptoms import known_symptoms
from qpref.training.length_bias import LengthGroups
from qpref.training.loop import Trainer
from qpref.training.metrics import NoRecorder, Recorder
from qpref.training.prepare import Prepared, prepare
from qpref.training.ranks import agree_on_layout, agree_on_plan, agree_on_start
from qpref.training.result import peak_of_device, reset_peak, summary_of
from qpref.training.samples import sample_table
from qpref.training.saving import Saver
from qpref.training.snapshot import Session
from qpref.training.stop import stop_request
from qpref.training.symptoms import History, Watch

log = logging.getLogger("qpref")

HINT = "`qpref plan` says what needs how much; continue with --resume where checkpoints exist"


def train_plan(plan: Plan, *, resume: bool = False, overwrite: bool = False, kept: KeptBase | None = None) -> Path:
    """Run a plan and return the run folder.

    Args:
        kept: the base of several runs of this process, see `load_policy`.

    Raises:
        QprefError: of the kind that fits; until training starts, nothing is left behind.
    """
    refuse_missing(plan.sinks)
    take_gpu(plan.recipe.model.device)
    device = choose_device(plan.recipe.model.device)
    with (
        joined(device, plan.recipe.distributed.timeout) as world,
        _claimed_by_first(world, plan.output, resume, overwrite) as (folder, resume),
    ):
        agree_on_plan(world, plan)
        if resume and world.share(world.is_first and _is_complete(plan, folder), "the run's result"):
            log.info("%s: this run is complete", folder.path)
            return folder.path
        with out_of_memory_as("the device ran out of memory", HINT):
            world.note("reading the data")
            checked = load_rows(plan)
            world.note("loading the model")
            with deterministic(plan.recipe.train.deterministic, device):
                prepared = prepare(plan, checked, world, kept)
                _train(prepared, folder, resume)
    return plan.output


@contextmanager
def _claimed_by_first(world: World, path: Path, resume: bool, overwrite: bool) -> Iterator[tuple[RunFolder, bool]]:
    """Lock the run folder where this process writes it; the others neither read nor write it, and may not see it.

    Processes that torchrun has started again resume the run that they began.

    Yields:
        The folder, and whether to resume its run.
    """
    if not world.is_first:
        yield RunFolder(path), bool(world.share(None, "the run folder"))
        return
    if is_restart() and was_begun_by_this_job(RunFolder(path)):
        log.info("%s: started again, and resumed", path)
        resume, overwrite = True, False
    with claimed(path, resume, overwrite) as folder:
        yield folder, bool(world.share(resume, "the run folder"))


def _train(prepared: Prepared, folder: RunFolder, resume: bool) -> None:
    session, world = Session.of(prepared), prepared.world
    agree_on_start(prepared)
    if world.is_first:
        folder.remove_leftovers()
    saved = _newest(prepared, folder) if resume else None
    if saved is not None:
        metrics_bytes = _resume(session, folder, saved)
    else:
        if resume:
            log.info("%s: no checkpoint yet; starting from the beginning", folder.path)
        metrics_bytes = _begin(session, folder)
    agree_on_layout(world, prepared.policy)
    log.info("reference: %s", prepared.reference_name or "none, the losses need none")
    _fill_references(session)
    first_step = session.state.step
    with _recording(session, folder, metrics_bytes) as recorder:
        with stop_request(announce=world.is_first) as requested:
            stops = world.stops(requested)
            finished = _run_loop(session, folder, recorder, stops)
            world.begin("the end")
            world.wait("the last checkpoint")
        if not finished:
            raise StoppedBySignal(f"stopped after step {session.state.step}, saved", "continue with --resume", stops[0])
        if world.is_first:
            take_best(prepared, folder, session.state)
            write_adapter(session, folder, first_step)
            recorder.summarize(summary_of(folder.result))
            log.info("adapter: %s", folder.adapter)
    world.wait("the adapter's files")


def _newest(prepared: Prepared, folder: RunFolder) -> Checkpoint | None:
    """Load the newest checkpoint, which rank 0 alone reads and shares with the others; None where there is none.

    Raises:
        CheckpointError: checkpoints exist and none verifies, or the newest good one belongs to another run.
    """
    world = prepared.world
    saved = None
    if world.is_first:
        saved = checkpoint.load_newest(
            folder.checkpoints, prepared.fingerprints, lambda found: snapshot.lost_metrics(found, folder)
        )
    if world.size == 1:
        return saved
    facts = world.share(None if saved is None else [saved.step, saved.state, sorted(saved.tensors)], "the checkpoint")
    if facts is None:
        return None
    step, state, stems = facts
    tensors = {stem: world.share_tensors(saved.tensors[stem] if saved else None, f"the {stem}") for stem in stems}
    return Checkpoint(step=step, state=state, tensors=tensors)


def _is_complete(plan: Plan, folder: RunFolder) -> bool:
    """Return whether the folder has this plan's finished run; with damaged files, or another base's path, it isn't
    complete.

    Raises:
        CheckpointError: it is the finished run of another recipe, or no checkpoint is left to write it again from.
    """
    if not (folder.result.exists() or folder.adapter.exists()):
        return False
    try:
        facts = folder.description()
    except RecipeError as error:
        damage: str | None = error.what
    else:
        refuse_other_recipe(plan, folder, facts)
        damage = folder.adapter_damage() or folder.changed_record(facts) or _moved_base(plan, facts)
        if damage is None:
            folder.remove_leftovers()  # of a process that was killed once all was written
            restate_recipe(plan, folder, facts)
            return True
    if not any(folder.checkpoints.glob("step-*")):
        raise CheckpointError(
            f"{damage}, and no checkpoint is left to write it again from",
            "restore a copy, or start over with --overwrite",
        )
    log.warning("%s; the run's records and its adapter are written again from the last checkpoint", damage)
    return False


def refuse_other_recipe(plan: Plan, folder: RunFolder, facts: Mapping[str, Any]) -> None:
    """Refuse to resume the run of another recipe.

    Args:
        facts: the folder's run.json.

    Raises:
        CheckpointError: settings differ that change results beyond rounding.
    """
    expected = {"recipe": plan.fingerprint} | plan.file_digests
    changed = [name for name, value in expected.items() if facts["fingerprints"].get(name) != value]
    if changed:
        raise CheckpointError(
            f"{folder.path}: is the run of another {' and another '.join(changed)}",
            "resume with what the run was started with (recipe.lock.toml), or start over with --overwrite",
        )


def _moved_base(plan: Plan, facts: Mapping[str, Any]) -> str | None:
    """Explain that the base isn't where it was in training, and so has to be compared with it; None where it is."""
    path, base = Path(facts["base_path"]), plan.recipe.model.base
    if not path.is_dir():
        return f"{path}: the run's base is gone"
    return None if base == facts["base"] else f"[model] base: is {base}, and was {facts['base']}"


def _begin(session: Session, folder: RunFolder) -> int:
    """Check a new run's start, settle its sizes and describe it in its folder.

    Until the checks have passed, nothing that stood in the folder is touched.

    Returns:
        Bytes of metrics.jsonl to keep.
    """
    prepared = session.prepared
    for each in known_symptoms(prepared):
        log.warning("%s", each["message"], extra={"rule": each["rule"]})
    batch = invariants.first_batch(prepared.first_step_examples(), prepared.policy)
    invariants.check_start(prepared.policy, prepared.objective, batch)
    prepared.policy.finish_passes()
    session.references = reference_pass.open_references(prepared)
    session.state.budget = snapshot.settle_sizes(prepared)
    prepared.policy.finish_passes()  # of processes that measure sizes which others' recipes set
    if prepared.world.is_first:
        folder.clear()
        begin_records(session, folder)
    return 0


def _resume(session: Session, folder: RunFolder, saved: Checkpoint) -> int:
    """Restore a run from its checkpoint.

    Returns:
        Bytes of metrics.jsonl to keep.
    """
    prepared, state, world = session.prepared, session.state, session.prepared.world
    if world.is_first:
        folder.refuse_replaced()
        restore_records(session, folder, saved)
    cache_before = session.description.get("reference_cache")
    session.references = reference_pass.open_references(prepared, cache_before, saved)
    snapshot.restore(saved, session)
    prepared.policy.finish_passes()  # of processes that settle other sizes
    metrics_bytes = snapshot.metrics_bytes(saved, folder) if world.is_first else 0
    best = restore_best(saved.state, folder, prepared.plan.recipe.train) if world.is_first else None
    best_state = world.share(None if best is None else best.as_state(), "the best step")
    state.best = None if best_state is None else Best(**best_state)
    if world.is_first:
        folder.refuse_replaced()
        checkpoint.remove_newer(folder.checkpoints, state.step)
    log.info("resuming after step %d", state.step)
    return metrics_bytes


def _fill_references(session: Session) -> None:
    """Score the reference before training, where `[reference] fill` is "before"."""
    prepared, references = session.prepared, session.references
    if references is not None and prepared.plan.recipe.reference.fill == "before":
        tokens = reference_pass.BATCH_FACTOR * session.state.budget
        reference_pass.fill(references, prepared.policy, prepared.all_examples, tokens, prepared.world)


@contextmanager
def _recording(session: Session, folder: RunFolder, metrics_bytes: int) -> Iterator[Recorder]:
    """Open metrics.jsonl and the sinks, in the process that writes; they are closed whatever happens.

    Args:
        metrics_bytes: bytes of metrics.jsonl to keep.
    """
    prepared = session.prepared
    total = total_steps(prepared.plan.recipe.train, len(prepared.examples))
    is_writer = prepared.world.is_first
    recorder = _open_recorder(session, folder, metrics_bytes, total) if is_writer else NoRecorder()
    try:
        yield recorder
    finally:
        recorder.close()


def _run_loop(session: Session, folder: RunFolder, recorder: Recorder, stops: Sequence[int]) -> bool:
    """Train to the end; False where a signal stopped the run.

    Args:
        stops: holds the signals that asked to stop.
    """
    prepared, references = session.prepared, session.references
    plan, total = prepared.plan, total_steps(prepared.plan.recipe.train, len(prepared.examples))
    saver = Saver(session, folder, recorder, stops, total)
    reset_peak(prepared.policy.device)
    trainer = Trainer(
        train=plan.recipe.train,
        world=prepared.world,
        policy=prepared.policy,
        objective=prepared.objective,
        references=references,
        optimizer=session.optimizer,
        scaler=session.scaler,
        examples=prepared.examples,
        heldout=prepared.heldout,
        state=session.state,
        recorder=recorder,
        save=saver.save,
        should_stop=lambda: bool(stops),
    )
    try:
        finished = trainer.run()
        recorder.flush()
        session.metrics_sha256 = recorder.sha256
        return finished
    finally:
        if references is not None and references.cache is not None:
            references.cache.close()


def _open_recorder(session: Session, folder: RunFolder, metrics_bytes: int, total_steps: int) -> Recorder:
    """Open metrics.jsonl, the recipe's sinks, and the watch over the metrics."""
    folder.refuse_replaced()
    prepared, device = session.prepared, session.prepared.policy.device
    forecast = session.description.get("forecast")
    context = SinkContext(
        run_folder=folder.path,
        first_step=session.state.step,
        total_steps=total_steps,
        printing=prepared.plan.printing,
        planned_bytes=forecast["memory"]["total"] if forecast else 0,
        limit_bytes=prepared.memory_limit,
        peak_bytes=lambda: peak_of_device(device),
        recipe=prepared.plan.document,
        samples=lambda count: sample_table(prepared.heldout[:count], prepared.tokenizer),
    )
    session.symptoms = Watch(
        History(
            start=prepared.objective.starts_at() if prepared.starts_at_reference else None,
            num_heldout=len(prepared.heldout),
            length_error=LengthGroups.of(prepared.heldout).error,
            total_steps=total_steps,
        ),
        known_symptoms(prepared),
    )
    plan = prepared.plan
    return Recorder(folder.metrics, metrics_bytes, plan.sinks, context, session.symptoms, plan.on_metrics)
