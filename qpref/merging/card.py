"""The model card: the model, its training, and its distance from the trained policy."""

from __future__ import annotations

from pathlib import Path

from qpref import fsio
from qpref.credentials import redact
from qpref.merging.guards import TrainedRun
from qpref.merging.request import MergeRequest, MergeResult, Verdict
from qpref.training.card import front_matter, portable, training_sections
from qpref.version import __version__


def write_card(path: Path, run: TrainedRun, request: MergeRequest, result: MergeResult) -> None:
    """Write README.md in the form that the hub reads, without passwords or tokens: it is uploaded with the model."""
    parts = [
        front_matter(run.plan.recipe, "transformers", "finetune"),
        f"# {request.out.name}",
        _summary(run, request, result),
        "## Verdict",
        verdict_table(result.verdict),
        *training_sections(run.folder, run.facts, run.plan.document),
    ]
    fsio.write_text(path, redact("\n\n".join(parts) + "\n"))


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
