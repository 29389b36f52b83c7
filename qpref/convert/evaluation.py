"""Evaluation, checkpoints, logging, and the choice of the best step."""

from __future__ import annotations

from qpref.convert.draft import Draft
from qpref.convert.settings import Settings, flag, number, whole, word


def convert_evaluation(settings: Settings, draft: Draft, has_heldout: bool) -> None:
    """Convert how often a run evaluates, saves and logs."""
    if has_heldout:
        _every(settings, draft, "eval", "train.eval_every")
    else:
        settings.used.update(settings.keys_of("train.eval_every"))
    _every(settings, draft, "save", "train.save_every")
    if keep := settings.first("train.keep", whole):
        draft.put("train.keep", *keep)
    if log := settings.first("train.log_every", number):
        _log_every(*log, draft)
    _best(settings, draft, has_heldout)


def _every(settings: Settings, draft: Draft, what: str, ours: str) -> None:
    """Convert `eval_steps` or `save_steps` with the strategy that says whether they count."""
    per_epoch = settings.get(f"{what}s_per_epoch", number)
    if per_epoch:
        draft.put(ours, "epoch", f"{what}s_per_epoch {per_epoch:g}")
        if per_epoch != 1:
            draft.differs.append(
                f'{ours.partition(".")[2]} = "epoch": for {what}s_per_epoch {per_epoch:g}, give it a number of steps'
            )
        settings.used.update((f"{what}_steps", f"{what}_strategy"))
        return
    strategy, steps = settings.get(f"{what}_strategy", word), settings.get(f"{what}_steps", number)
    is_given = settings.has(f"{what}_steps") and not settings.has(f"{what}_strategy")
    if strategy == "epoch" and not is_given:
        draft.put(ours, "epoch", settings.origin(f"{what}_strategy"))
    elif strategy == "no" and what == "save":
        draft.differs.append("save_every: a run always saves, at its end at least")
    elif steps and steps >= 1 and (strategy in ("steps", None) or is_given):
        draft.put(ours, int(steps), settings.origin(f"{what}_steps", f"{what}_strategy"))
    elif steps and strategy != "no":
        draft.differs.append(
            f"{ours.partition('.')[2]}: {what}_steps {steps:g} is a share of all steps; give a number of steps"
        )


def _log_every(steps: float, origin: str, draft: Draft) -> None:
    if steps >= 1:
        draft.put("train.log_every", int(steps), origin)
    else:
        draft.differs.append(f"log_every: logging_steps {steps:g} is a share of all steps; every step is logged")


def _best(settings: Settings, draft: Draft, has_heldout: bool) -> None:
    metric, higher = settings.get("metric_for_best_model", word), settings.get("greater_is_better", flag)
    wants_best = settings.get("load_best_model_at_end", flag)
    patience = settings.first("train.patience", whole)
    if not (wants_best or patience):
        return
    if not has_heldout or draft.get("train.eval_every") is None:
        draft.differs.append("best_by: the best step is chosen by held-out data, evaluated every so many steps")
        return
    name = metric or "loss"
    draft.put("train.best_by", name if name.startswith("eval_") else f"eval_{name}", "metric_for_best_model")
    if higher is not None:
        draft.put("train.best_direction", "max" if higher else "min", "greater_is_better")
    if patience:
        draft.put("train.patience", *patience)
