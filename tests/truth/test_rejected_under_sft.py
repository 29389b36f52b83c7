"""Fine-tuning on preferred responses raises the others with them; ORPO's odds ratio parts the two in the same run.

Hong et al. 2024 (ORPO) observe that fine-tuning on chosen responses alone raises the log-probability of the rejected
ones too, and add a penalty by odds ratio to the same loss, without a reference.

Here the policy starts as a random one, to which all sixteen responses are equally foreign.
"""

from __future__ import annotations

import pytest
from small_world import SEEDS, draw_pairs, make_policy, quality, show, train

pytestmark = pytest.mark.truth


def preferred(response: str) -> float:
    return 3 * quality(response)


@pytest.mark.parametrize("seed", SEEDS)
def test_sft_raises_the_rejected_responses_too_and_orpo_parts_them_from_the_chosen(seed, tmp_path):
    base = make_policy(tmp_path / "base", seed, num_steps=0)
    pairs, heldout = draw_pairs(preferred, 1024, seed), draw_pairs(preferred, 64, 1000 + seed)

    def changes(loss):
        """Changes of the mean log-probabilities of held-out chosen and rejected responses, in nats."""
        run = train(base, pairs, loss, tmp_path / loss["name"], heldout=heldout, seed=seed)
        before, after = (row.values for row in run.metrics if row.split == "eval")
        return [after[f"eval_logps/{side}"] - before[f"eval_logps/{side}"] for side in ("chosen", "rejected")]

    sft, orpo = changes({"name": "sft"}), changes({"name": "orpo", "beta": 1.0, "nll": "response"})
    show("sft", sft)
    show("orpo", orpo)
    assert sft[1] > sft[0] / 2
    assert orpo[0] > sft[0] / 2
    assert orpo[0] - orpo[1] > 1.5 * (sft[0] - sft[1])
