"""Arms that are compared, and the size of the comparison."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from benchmarks.frontier.openings import openings
from benchmarks.frontier.task import SCALE

RANK, ALPHA = 16, 32
OFFLINE, ROUNDS, TRUE, LEARNED = "dpo", "dpo-rounds", "rlhf-true", "rlhf-learned"
PAIRS = "pairs"
"""The base's samples with their preferences, which dpo and rlhf-learned have in common; a process like an arm's."""
BASE = "base"
"""The base itself, which isn't trained and is measured once."""
ARMS = (OFFLINE, ROUNDS, TRUE, LEARNED)
NEEDS_PAIRS = (OFFLINE, LEARNED)
TITLES = {
    OFFLINE: "offline DPO",
    ROUNDS: "DPO in three rounds",
    TRUE: "RLHF, true reward",
    LEARNED: "RLHF, learned reward",
}
NUM_ROUNDS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Size of the experiment, the same for all arms and seeds.

    Attributes:
        openings: training openings; each is sampled k times for pairs.
        k: samples of an opening, of which pairs are drawn; also the completions of an RLOO group.
        epochs: passes over the pairs, of DPO, of each round and of the reward model.
        rl_steps, completions_per_step: of RLOO; completions are generated for two steps at once, since a CPU
            dequantizes all weights for each generated token, whatever the batch.
        checkpoints: of each arm, measured.
        heldout, samples: openings that the measures sample from, and samples of each.
        learning_rate: of all trained adapters.
        beta: DPO's.
    """

    openings: int
    k: int
    epochs: int
    pairs_per_step: int
    rl_steps: int
    completions_per_step: int
    checkpoints: int
    heldout: int
    samples: int
    learning_rate: float
    beta: float


QUICK = Sizes(
    openings=48,
    k=4,
    epochs=3,
    pairs_per_step=8,
    rl_steps=12,
    completions_per_step=16,
    checkpoints=2,
    heldout=64,
    samples=2,
    learning_rate=1e-3,
    beta=0.1,
)
FULL = replace(QUICK, openings=160, rl_steps=48, checkpoints=4, samples=4)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """An arm with a seed, in a folder of its own.

    Attributes:
        base: folder of the base model.
        pairs: file of the shared pairs; "" for arms that don't read it.
    """

    arm: str
    seed: int
    folder: str
    base: str
    pairs: str
    sizes: Sizes

    @property
    def openings(self) -> list[str]:
        """Training openings, evenly chosen from all."""
        every = openings()[0]
        return every[:: max(1, len(every) // self.sizes.openings)][: self.sizes.openings]

    @property
    def heldout(self) -> list[str]:
        """Held-out openings, likewise."""
        every = openings()[1]
        return every[:: max(1, len(every) // self.sizes.heldout)][: self.sizes.heldout]

    @property
    def beta_of_the_reward(self) -> float:
        """RLOO's beta with DPO's optimum.

        DPO's optimum under Bradley-Terry preferences is the base times exp(scale * reward / beta). With the true reward
        RLOO's is the base times exp(reward / its beta), so its beta is divided by the scale; a learned reward is in
        units of log-odds, which have the scale inside.
        """
        return self.sizes.beta / SCALE if self.arm == TRUE else self.sizes.beta

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Job:
        return cls(**(data | {"sizes": Sizes(**data["sizes"])}))
