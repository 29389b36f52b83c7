"""Effect of beta on a real run: the quickstart trained at a small, a usual and a large beta.

    python -m benchmarks.beta FOLDER [--seeds 0,1,2]

Trains what isn't trained in the FOLDER yet (`qpref sweep --resume`), measures how far each policy has moved from its
reference, and writes `results/DATE-beta.json`, which `docs/make_beta_page.py` turns into docs/beta.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from benchmarks import machine
from benchmarks.frontier.measures import estimate, log_ratios
from benchmarks.frontier.task import Model, put_adapter
from qpref.evaluation.generate import prompt_ids, read_prompts, text_of_answer
from qpref.evaluation.subjects import identify
from qpref.policy.reference import as_reference
from qpref.sampling.decode import Draws, sample

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"
RECIPE = "recipes/quickstart.toml"
PROMPTS = "recipes/quickstart/heldout.jsonl"
BETAS = ("0.02", "0.1", "0.5")
SETTINGS = ("train.max_steps=16", "train.batch_size=4", "train.learning_rate=5e-4", "train.eval_every=4",
            "train.save_every=16", "train.keep=1")  # fmt: skip
"""More and larger steps than the quickstart's, on two thirds of its pairs: far enough for pairs to be satisfied, which
is where beta acts, and cheap enough to be repeated."""
DRAWS = Draws(num_responses=1, max_new_tokens=32, temperature=1.0, seed=0)
GREEDY = Draws(num_responses=1, max_new_tokens=40, temperature=0.0)
SHOWN = 2
"""Held-out prompts whose greedy answers are kept, of each policy and of the base."""
KEPT = ("loss", "rewards/margins", "rewards/accuracies", "logps/accuracies", "logps/chosen", "logps/rejected")


def runs(seeds: Sequence[int]) -> list[dict[str, str]]:
    """List the settings that vary from run to run."""
    return [{"train.seed": str(seed), "loss.beta": beta} for seed in seeds for beta in BETAS]


def folder_of(settings: Mapping[str, str]) -> str:
    """Name a run's folder as `qpref sweep` does."""
    return ",".join(f"{key.rpartition('.')[2]}={value}" for key, value in settings.items())


def sweep(output: str, seeds: Sequence[int]) -> list[str]:
    """Return the command that trains the runs."""
    over = ["--over", f"train.seed={','.join(map(str, seeds))}", "--over", f"loss.beta={','.join(BETAS)}"]
    fixed = [part for setting in SETTINGS for part in ("--set", setting)]
    return ["qpref", "sweep", RECIPE, *over, *fixed, "--output", output]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--curves-only", action="store_true", help="sample nothing: no KL and no answers")
    options = parser.parse_args()
    folder, seeds = options.folder.resolve() / "betas", [int(seed) for seed in options.seeds.split(",")]
    subprocess.run([sys.executable, "-m", *sweep(str(folder), seeds), "--resume"], check=True, cwd=ROOT)
    write(folder, seeds, options.curves_only)


def write(folder: Path, seeds: Sequence[int], curves_only: bool) -> None:
    """Measure the runs of a sweep's folder, and write the results."""
    chosen = runs(seeds)
    paths = [folder / folder_of(settings) for settings in chosen]
    measured = Measured([], [None] * len(chosen)) if curves_only else measure(paths)
    today, named = f"{datetime.now(UTC):%Y-%m-%d}", ",".join(map(str, seeds))
    result = {
        "date": today,
        "command": f"python -m benchmarks.beta FOLDER --seeds {named}" + curves_only * " --curves-only",
        "sweep": " ".join(sweep("FOLDER/betas", seeds)),
        "machine": machine.describe(torch.get_num_threads()),
        "draws": asdict(DRAWS),
        "base_answers": measured.base_answers,
        "runs": [
            {"settings": settings, **_record(folder / folder_of(settings)), "measured": found}
            for settings, found in zip(chosen, measured.runs, strict=True)
        ],
    }
    (RESULTS / f"{today}-beta.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")


def _record(run: Path) -> dict[str, Any]:
    """Collect what a run has recorded itself: its held-out curve, and its verdict."""
    verdict = json.loads((run / "result.json").read_text())["verdict"]
    return {
        "curve": list(_curve(run / "metrics.jsonl")),
        "verdict": {name: verdict[name] for name in ("pairs", "accuracy", "margin", "chosen", "sentence")},
    }


def _curve(path: Path) -> Iterator[dict[str, float]]:
    """Read the held-out rows of a run, rounded."""
    for row in map(json.loads, path.read_text().splitlines()):
        if row["split"] == "eval":
            yield {"step": row["step"]} | {name: round(row[f"eval_{name}"], 4) for name in KEPT}


@dataclass(frozen=True, slots=True)
class Measured:
    """Greedy answers of the base to the first prompts, and for each run its KL and its answers."""

    base_answers: list[str]
    runs: Sequence[dict[str, Any] | None]


def measure(paths: Sequence[Path]) -> Measured:
    """Sample a response to each held-out prompt from each run's policy, and measure its KL from the reference on them.

    The KL is that of a response's first tokens, as many as the draws have: the mean of log policy - log reference of
    the policy's own samples, nats.

    Args:
        paths: run folders of one base and one shape of adapter; the base is loaded once.
    """
    subject = identify(str(paths[0]))
    tokenizer = subject.tokenizer()
    ids = prompt_ids(tokenizer, read_prompts(str(ROOT / PROMPTS)))
    model = Model(policy=subject.load(subject.dtype), tokenizer=tokenizer, ends=tokenizer.stop_tokens)
    with as_reference(model.policy):
        base_answers = _answers(model, ids[:SHOWN])
    found = []
    for path in paths:
        put_adapter(model, path / "adapter")
        responses = _drawn(model, ids, DRAWS)
        kl = estimate(log_ratios(model, list(zip(ids, responses, strict=True))))
        found.append(
            {
                "kl": {name: round(getattr(kl, name), 3) for name in ("value", "low", "high")},
                "tokens": round(fmean(len(response) for drawn in responses for response in drawn), 1),
                "answers": _answers(model, ids[:SHOWN]),
            }
        )
    return Measured(base_answers, found)


def _answers(model: Model, ids: Sequence[list[int]]) -> list[str]:
    """Answer prompts greedily; an answer that was cut off ends in [...]."""
    texts = [text_of_answer(model.tokenizer, answer) for (answer,) in _drawn(model, ids, GREEDY)]
    return [text if ended else f"{text} [...]" for text, ended in texts]


def _drawn(model: Model, ids: Sequence[list[int]], draws: Draws) -> list[list[list[int]]]:
    """Sample under the model's own attention, and return to the one that shares prompts."""
    sharing = model.policy.attention
    model.policy.share_prompts(False)
    try:
        return sample(model.policy, ids, draws, model.ends)
    finally:
        model.policy.use_attention(sharing)


if __name__ == "__main__":
    main()
