"""The model card: the model, its training, and its distance from the trained policy."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import tomli_w

from qpref import __version__, fsio, opening, sealed
from qpref.credentials import redact
from qpref.merge.guards import TrainedRun
from qpref.merge.request import MergeRequest, MergeResult, Verdict
from qpref.training.folder import RunFolder

log = logging.getLogger("qpref")


def write_card(path: Path, run: TrainedRun, request: MergeRequest, result: MergeResult) -> None:
    """Write README.md in the form that the hub reads, without passwords or tokens: it is uploaded with the model."""
    parts = [
        _front_matter(run),
        f"# {request.out.name}",
        _summary(run, request, result),
        "## Verdict",
        verdict_table(result.verdict),
        "## Held-out metrics",
        _metrics(run.folder),
        "## Data",
        _data(run.facts),
        "## Recipe",
        f"```toml\n{tomli_w.dumps(portable(run.plan.document)).strip()}\n```",
    ]
    fsio.write_text(path, redact("\n\n".join(parts) + "\n"))


def _front_matter(run: TrainedRun) -> str:
    base = run.plan.recipe.model.base
    lines = ["library_name: transformers", "pipeline_tag: text-generation"]
    if not base.startswith("pypi:") and not Path(base).is_absolute():
        lines += [f"base_model: {base}", "base_model_relation: finetune"]
    names = sorted({loss.name for loss in run.plan.recipe.loss})
    tags = "\n".join(f"- {tag}" for tag in ["qpref", "preference-training", *names])
    return "\n".join(["---", *lines, f"tags:\n{tags}", "---"])


def _summary(run: TrainedRun, request: MergeRequest, result: MergeResult) -> str:
    losses = " + ".join(loss.name for loss in run.plan.recipe.loss)
    onto = "the dequantized weights that were trained on" if request.onto == "trained" else "the original weights"
    stored = result.dtype if request.quantize is None else f"{request.quantize} (lossy), the rest {result.dtype}"
    base = portable(run.plan.recipe.model.base)
    return (
        f"Trained by {losses} from `{base}` with qpref {__version__}; the adapter is merged onto {onto}. "
        f"Stored as {stored}."
    )


def verdict_table(verdict: Verdict) -> str:
    """Format the verdict as a Markdown table, after a sentence on what was compared."""
    share = "" if verdict.share is None else f" ({verdict.share:.2%} of the learned change)"
    rows = [
        ("mean learned change of the margin", f"{verdict.learned:.4g} nats"),
        ("mean margin error", f"{verdict.margin_error:.4g} nats{share}; at most {verdict.allowed:.4g} passes"),
        ("largest margin error", f"{verdict.largest_margin_error:.4g} nats"),
        ("mean error of a response's log-probability", f"{verdict.logprob_error:.4g} nats"),
        ("KL(trained, merged) per token", f"{verdict.kl:.3g} nats (largest {verdict.largest_kl:.3g})"),
        ("preference flips", str(len(verdict.flips))),
    ]
    table = "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])
    outcome = "passed" if verdict.passed else "**not passed**"
    changed = " Their data have changed since training." if verdict.data_changed else ""
    return (
        f"This folder, read back with transformers, compared with the trained policy on {verdict.pairs} "
        f"{verdict.origin}, both computed in float32: {outcome}.{changed}\n\n{table}"
    )


def _metrics(folder: RunFolder) -> str:
    """Format the first held-out row of metrics.jsonl beside the row of the merged adapter's step."""
    rows = _held_out_rows(folder.metrics)
    if not rows:
        return "The run has no held-out metrics."
    step = _adapter_step(folder.result)
    first, merged = rows[0], next((row for row in rows if row["step"] == step), rows[-1])
    names = [name for name in merged if name.startswith("eval_")]
    changed = folder.changed_metrics()
    if changed:
        log.warning("%s; the card says so", changed)
    lines = [] if changed is None else ["metrics.jsonl is not as training wrote it, so these values may be wrong.", ""]
    lines += [f"| | step {first['step']} | step {merged['step']} |", "|---|---|---|"]
    lines += [
        f"| {name.removeprefix('eval_')} | {_number(first.get(name))} | {_number(merged[name])} |" for name in names
    ]
    return "\n".join(lines)


def _held_out_rows(path: Path) -> list[dict[str, Any]]:
    """Read the held-out rows; skip unreadable lines with a warning, so that they don't discard a finished merge."""
    try:
        with os.fdopen(opening.open_plain(path), encoding="utf-8", errors="replace") as file:
            found = [_row(line) for line in file]
    except FileNotFoundError:
        return []
    except OSError as error:
        log.warning("%s: left out of the card: %s", path, error.strerror)
        return []
    if bad := [number for number, row in enumerate(found, 1) if row is None]:
        log.warning("%s:%d: not a metrics row, left out of the card (%d in all)", path, bad[0], len(bad))
    return [row for row in found if row is not None and row["split"] == "eval"]


def _row(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and {"split", "step"} <= row.keys() else None


def _adapter_step(result: Path) -> Any:
    """Read the adapter's step from result.json (under `best_by`, not the last step); None if unknown."""
    try:
        return sealed.read_sealed(result).get("adapter_step")
    except (OSError, ValueError):
        return None


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else ""


def _data(facts: dict[str, Any]) -> str:
    counts, prints = facts["examples"], facts["fingerprints"]
    return "\n".join(
        f"- {counts[name]} {split} examples, fingerprint `{prints[f'{split} data']}`"
        for name, split in (("train", "training"), ("heldout", "held-out"))
        if counts[name]
    )


def portable(value: Any) -> Any:
    """Strip this machine's folders from settings: an absolute path becomes its last part."""
    if isinstance(value, dict):
        return {key: portable(part) for key, part in value.items()}
    if isinstance(value, list):
        return [portable(part) for part in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value
