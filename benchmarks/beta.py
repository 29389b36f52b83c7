"""Effect of beta on a real run: the quickstart trained at three betas and at four learning rates.

    python -m benchmarks.beta FOLDER [--seeds 0,1,2]

Trains what isn't trained in the FOLDER yet (`qpref sweep --resume`), measures how far each policy has moved from its
reference, and writes `results/DATE-beta.json`, which `docs/make_beta_page.py` turns into docs/beta.md. What was trained
or measured in the FOLDER before is kept.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import machine
from qpref.data.pack import pack
from qpref.evaluation.generate import Sampling, answer_all, prompt_ids, read_prompts, text_of_answer
from qpref.evaluation.statistics import Bootstrap
from qpref.evaluation.subjects import identify
from qpref.policy.divergence import NextTokens, token_kl
from qpref.policy.logprobs import completion_hidden
from qpref.policy.policy import Policy
from qpref.policy.reference import as_reference, frozen
from qpref.records import Source, TokenizedExample
from qpref.sampling.decode import Draws, sample

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"
RECIPE = "recipes/quickstart.toml"
PROMPTS = "recipes/quickstart/heldout.jsonl"
BETAS = ("0.02", "0.1", "0.5")
RATES = ("5e-6", "5e-5")
"""Beside the rate of the runs that differ in beta, which is the third."""
SETTINGS = ("train.max_steps=16", "train.epochs=2", "train.learning_rate=5e-4", "train.eval_every=4",
            "train.save_every=8", "train.keep=2")  # fmt: skip
"""Two and a half times the quickstart's rate: far enough for pairs to be satisfied, which is where beta acts."""
CHECKPOINTS = (8, 16)
DRAWS = Draws(num_responses=2, max_new_tokens=48, temperature=1.0, seed=0)
PROMPTS_AT_ONCE = 16
SHOWN = 3
"""Held-out prompts whose greedy answers are kept."""
KEPT = ("loss", "rewards/margins", "rewards/accuracies", "logps/accuracies", "logps/chosen", "logps/rejected")


@dataclass(frozen=True, slots=True)
class Trained:
    """A run: its sweep, the settings that vary, and the steps whose checkpoint is measured."""

    sweep: str
    settings: dict[str, str]
    steps: tuple[int, ...]

    @property
    def folder(self) -> str:
        """Folder below FOLDER, as `qpref sweep` names it."""
        settings = (f"{key.rpartition('.')[2]}={value}" for key, value in self.settings.items())
        return f"{self.sweep}/{','.join(settings)}"


def runs(seeds: Sequence[int]) -> list[Trained]:
    """List the runs; the first seed's are measured at each checkpoint, the others at the end."""
    betas = [
        Trained("betas", {"train.seed": str(seed), "loss.beta": beta}, CHECKPOINTS[-1:] if number else CHECKPOINTS)
        for number, seed in enumerate(seeds)
        for beta in BETAS
    ]
    return betas + [Trained("rates", {"train.learning_rate": rate}, CHECKPOINTS[-1:]) for rate in RATES]


def commands(folder: str, seeds: Sequence[int]) -> dict[str, list[str]]:
    """Map each sweep to the command that trains its runs."""
    betas = ["--over", f"train.seed={','.join(map(str, seeds))}", "--over", f"loss.beta={','.join(BETAS)}"]
    rates = ["--over", f"train.learning_rate={','.join(RATES)}"]
    fixed = [part for setting in SETTINGS for part in ("--set", setting)]
    return {
        name: ["qpref", "sweep", RECIPE, *over, *fixed, "--output", f"{folder}/{name}"]
        for name, over in (("betas", betas), ("rates", rates))
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", default="0,1,2", help="of the runs that differ in beta")
    options = parser.parse_args()
    folder, seeds = options.folder.resolve(), [int(seed) for seed in options.seeds.split(",")]
    measured = []
    for sweep, command in commands(str(folder), seeds).items():
        subprocess.run([sys.executable, "-m", *command, "--resume"], check=True, cwd=ROOT)
        measured += [_measured(folder, run) for run in runs(seeds) if run.sweep == sweep]
    today = f"{datetime.now(UTC):%Y-%m-%d}"
    result = {
        "date": today,
        "command": f"python -m benchmarks.beta FOLDER --seeds {options.seeds}",
        "commands": [" ".join(command) for command in commands("FOLDER", seeds).values()],
        "commit": machine.commit(ROOT),
        "machine": machine.describe(torch.get_num_threads()),
        "draws": asdict(DRAWS),
        "runs": measured,
    }
    (RESULTS / f"{today}-beta.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")


def _measured(folder: Path, run: Trained) -> dict[str, Any]:
    """Collect a run's curve, verdict and measurements, from the FOLDER where they were made before."""
    kept = folder / "measured" / f"{run.folder.replace('/', ',')}.json"
    if not kept.exists():
        measures = [
            {"step": step} | measure(folder / run.folder / f"checkpoints/step-{step:06d}") for step in run.steps
        ]
        kept.parent.mkdir(exist_ok=True)
        kept.write_text(json.dumps(measures))
    verdict = json.loads((folder / run.folder / "result.json").read_text())["verdict"]
    return {
        "sweep": run.sweep,
        "settings": run.settings,
        "curve": list(_curve(folder / run.folder / "metrics.jsonl")),
        "verdict": {name: verdict[name] for name in ("pairs", "accuracy", "margin", "chosen", "sentence")},
        "measures": json.loads(kept.read_text()),
    }


def _curve(path: Path) -> Iterator[dict[str, float]]:
    """Read the held-out rows of a run, rounded."""
    for row in map(json.loads, path.read_text().splitlines()):
        if row["split"] == "eval":
            yield {"step": row["step"]} | {name: round(row[f"eval_{name}"], 4) for name in KEPT}


def measure(checkpoint: Path) -> dict[str, Any]:
    """Sample responses of a policy, measure its KL from its reference on them, and keep some answers."""
    subject = identify(str(checkpoint))
    tokenizer = subject.tokenizer()
    ids = prompt_ids(tokenizer, read_prompts(str(ROOT / PROMPTS)))
    policy = subject.load(subject.dtype)
    sharing = policy.attention
    policy.share_prompts(False)
    responses = [
        drawn
        for start in range(0, len(ids), PROMPTS_AT_ONCE)
        for drawn in sample(policy, ids[start : start + PROMPTS_AT_ONCE], DRAWS, tokenizer.stop_tokens)
    ]
    shown = Sampling(max_new_tokens=DRAWS.max_new_tokens)
    answers = [answer for answer, _ in answer_all(policy, tokenizer, ids[:SHOWN], shown)]
    with as_reference(policy):
        before = [answer for answer, _ in answer_all(policy, tokenizer, ids[:SHOWN], shown)]
    policy.use_attention(sharing)
    kl = np.array([sequence_kl(policy, *each) for each in zip(ids, responses, strict=True)])
    estimate = Bootstrap(np.arange(len(kl)), samples=2000, seed=0).mean(kl)
    tokens = [len(response) for drawn in responses for response in drawn]
    return {
        "kl": {name: round(float(getattr(estimate, name)), 3) for name in ("value", "low", "high")},
        "tokens": round(float(np.mean(tokens)), 1),
        "answers": answers,
        "base_answers": before,
        "samples": [text_of_answer(tokenizer, drawn[0])[0] for drawn in responses[:SHOWN]],
    }


def sequence_kl(policy: Policy, prompt: Sequence[int], responses: Sequence[Sequence[int]]) -> float:
    """Estimate KL(policy || reference) of the response to a prompt, nats: the mean over the policy's own samples of the
    sum over their tokens of the exact KL of the next token (Amini et al. 2025, "Better Estimation of the KL Divergence
    Between Language Models").

    With samples that are cut at T tokens, it is the KL of the first T tokens, which is no more than the whole one's.

    Args:
        responses: token ids that the policy has sampled, each at least one.
    """
    branches = tuple(array("i", response) for response in responses)
    example = TokenizedExample(
        prompt=array("i", prompt), branches=branches, truncated=(False,) * len(branches), weight=1.0, margin=0.0,
        source=Source(path="sampled", line=1),
    )  # fmt: skip
    batch = pack([example], policy.device)
    with frozen(policy):
        own = NextTokens.of(policy.head, completion_hidden(policy, batch))
    with as_reference(policy):
        reference = NextTokens.of(policy.head, completion_hidden(policy, batch))
    return float(token_kl(own, reference).sum()) / len(responses)


if __name__ == "__main__":
    main()
