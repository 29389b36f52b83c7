"""Likelihood displacement on near-identical pairs, under DPO and under two losses that hold the chosen response.

Pal et al. 2024 (Smaug): DPO can lower the likelihood of the preferred responses as long as that of the others falls
further, and does so above all on pairs with a low edit distance; DPO-Positive doesn't. Razin et al. 2024 call this
likelihood displacement. Pang et al. 2024 (iterative RPO) add the chosen response's likelihood to the loss.

Here the two responses of a pair are a letter and the same sixteen letters after it, which the policy has learned: the
difference is in the first token, and what falls is the rest. DPO-Positive without its penalty is the control.
"""

from __future__ import annotations

import random

import pytest
from small_world import PROMPT, SEEDS, make_policy, show, train

pytestmark = pytest.mark.truth

GOOD, BAD = "abcdefgh", "ijklmnop"
REST = "stuvwxyzstuvwxyz"
LOSSES = {
    "dpo": {"name": "dpo", "beta": 0.1},
    "dpop": {"name": "dpop", "beta": 0.1, "penalty": 50.0},
    "rpo": {"name": "rpo", "beta": 0.1, "alpha": 1.0},
    "no penalty": {"name": "dpop", "beta": 0.1, "penalty": 0.0},
}


def near_identical(count: int, draw: random.Random) -> list[dict[str, str]]:
    """Pairs that differ in their first letter alone."""
    places = [draw.randrange(len(GOOD)) for _ in range(count)]
    return [{"prompt": PROMPT, "chosen": GOOD[place] + REST, "rejected": BAD[place] + REST} for place in places]


@pytest.mark.parametrize("seed", SEEDS)
def test_the_chosen_response_falls_under_dpo_and_not_under_losses_that_hold_it(seed, tmp_path):
    base = make_policy(tmp_path / "base", seed, num_steps=60, responses=[letter + REST for letter in GOOD + BAD])
    draw = random.Random(seed)
    pairs, others = near_identical(64, draw), near_identical(16, draw)
    chosen, margin = {}, {}
    for name, loss in LOSSES.items():
        settings = {"batch_size": 8, "max_steps": 20, "seed": seed}
        run = train(base, pairs, loss, tmp_path / name, heldout=others, **settings)
        before, after = (row.values for row in run.metrics if row.split == "eval")
        changes = {side: after[f"eval_logps/{side}"] - before[f"eval_logps/{side}"] for side in ("chosen", "rejected")}
        chosen[name], margin[name] = changes["chosen"], changes["chosen"] - changes["rejected"]
    show("chosen", chosen)
    show("margin", margin)
    assert min(margin.values()) > 0
    assert max(chosen["dpo"], chosen["no penalty"]) < -1.5
    assert chosen["dpop"] > -0.5
    assert chosen["rpo"] > chosen["dpo"] / 2
