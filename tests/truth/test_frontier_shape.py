"""The frontier of reward and KL divergence, in the shape of the DPO paper's on sentiment (Rafailov et al. 2023).

Its figure 2 (left) has expected reward over the KL divergence from the reference, a program computing the reward. Along
DPO's frontier both rise together, and fine-tuning on the preferred responses stays below it. Here the most reward that
any policy can have at a KL is known, too.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import small_world
from small_world import SEEDS, draw_pairs, make_policy, most_reward_at, outcome_of, quality, show, train

pytestmark = pytest.mark.truth

BETAS = (4.0, 1.0, 0.25)


def reward(response: str) -> float:
    return quality(response) + 0.25 * len(response)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_smaller_beta_goes_further_along_the_best_frontier_and_sft_stays_below_it(seed, tmp_path):
    base, pairs = make_policy(tmp_path / "base", seed), draw_pairs(reward, 1024, seed)

    def trained(loss):
        folder = tmp_path / "-".join(map(str, loss.values()))
        return outcome_of(train(base, pairs, loss, folder, seed=seed))

    dpo = [trained({"name": "dpo", "beta": beta}) for beta in BETAS]
    preferred = trained({"name": "sft"})
    start = small_world.mean(preferred.reference, reward)

    def share_of_best(outcome):
        return (outcome.mean(reward) - start) / (most_reward_at(outcome.kl, outcome.reference, reward) - start)

    shares = [share_of_best(one) for one in dpo]
    show("kl", [one.kl for one in dpo] + [preferred.kl])
    show("reward", [one.mean(reward) - start for one in dpo] + [preferred.mean(reward) - start])
    show("share", [*shares, share_of_best(preferred)])
    for nearer, further in pairwise(dpo):
        assert further.kl > 1.5 * nearer.kl
        assert further.mean(reward) > nearer.mean(reward) + 0.2
    assert min(shares) > 0.85
    assert share_of_best(preferred) < min(shares) - 0.1
