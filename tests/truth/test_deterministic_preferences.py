"""Overfitting to preferences that never vary: DPO's margin has no bound, IPO's has one.

Azar et al. 2023 ("A General Theoretical Paradigm to Understand Learning from Human Preferences"): where one response is
always preferred, DPO's optimum gives the other one probability 0 whatever beta is, so that the tie to the reference is
without effect; IPO's optimum is a difference of the two log-ratios of 1 / (2 beta).
"""

from __future__ import annotations

import pytest
from small_world import PROMPT, SEEDS, make_policy, show, train

pytestmark = pytest.mark.truth

ALWAYS = [{"prompt": PROMPT, "chosen": "bb", "rejected": "cc"}] * 4
BETAS = (1.0, 0.25)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_margin_grows_without_bound_under_dpo_and_ends_at_its_target_under_ipo(seed, tmp_path):
    base = make_policy(tmp_path / "base", seed)

    def margin(name, beta, **options):
        """The difference of the log-ratios after 80 steps, in nats."""
        loss = {"name": name, "beta": beta, **options}
        settings = {"batch_size": 4, "max_steps": 81, "schedule": "constant", "learning_rate": 3e-3, "log_every": 1}
        run = train(base, ALWAYS, loss, tmp_path / f"{name}-{beta}", seed=seed, **settings)
        return run.metrics[-1].values["rewards/margins"] / beta

    for beta in BETAS:
        target = 1 / (2 * beta)
        dpo, ipo = margin("dpo", beta), margin("ipo", beta, normalize="sum")
        show(f"beta {beta}", {"target": target, "dpo": dpo, "ipo": ipo})
        assert dpo > 8 * target
        assert abs(ipo - target) < 0.15 * target
