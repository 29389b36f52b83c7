"""Swapped labels: DPO learns a smaller difference, robust DPO the one behind the noise.

Chowdhury et al. 2024 ("Provably Robust DPO: Aligning Language Models with Noisy Feedback"): with a known share of
swapped labels, a reweighted loss is unbiased, so that its optimum is that of DPO on clean labels.

Two responses, of which judges prefer the first in 16 of 20 cases; with a quarter of the labels swapped the data prefer
it in 13 of 20, 0.8 * 0.75 + 0.2 * 0.25. Every step sees all rows in these proportions, so the optimum is a formula: a
reward margin of log(16 / 4) without noise, log(13 / 7) for DPO with it.
"""

from __future__ import annotations

import math

import pytest
from small_world import PROMPT, SEEDS, make_policy, show, train

pytestmark = pytest.mark.truth

SWAPPED = 0.25
CLEAN = math.log(16 / 4)
NOISY = math.log(13 / 7)


def rows(num_first: int, num_second: int) -> list[dict[str, str]]:
    """Preferences for the one and for the other of two responses."""
    first = {"prompt": PROMPT, "chosen": "bb", "rejected": "cc"}
    return [first] * num_first + [first | {"chosen": "cc", "rejected": "bb"}] * num_second


@pytest.mark.parametrize("seed", SEEDS)
def test_robust_dpo_finds_the_margin_behind_the_noise_and_dpo_a_smaller_one(seed, tmp_path):
    base = make_policy(tmp_path / "base", seed)

    def margin(data, loss):
        """Reward margin of the first response over the second at the last step."""
        name = f"{loss['name']}-{len(list(tmp_path.iterdir()))}"
        run = train(base, data, loss, tmp_path / name, batch_size=20, learning_rate=1e-2, log_every=1, seed=seed)
        share = sum(row["chosen"] == "bb" for row in data) / len(data)
        last = run.metrics[-1].values["rewards/margins"]  # a mean over rows of either order
        return last / (2 * share - 1)

    found = {
        "clean": margin(rows(16, 4), {"name": "dpo", "beta": 1.0}),
        "dpo": margin(rows(13, 7), {"name": "dpo", "beta": 1.0}),
        "robust": margin(rows(13, 7), {"name": "robust", "beta": 1.0, "label_smoothing": SWAPPED}),
    }
    show("margins", found)
    assert found == pytest.approx({"clean": CLEAN, "dpo": NOISY, "robust": CLEAN}, abs=0.15)
