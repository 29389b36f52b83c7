"""The recipe's `[rounds]` table: on-policy rounds, in which a reward makes the preferences."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from qpref.recipe.section import Section


class RoundsSection(Section):
    """Responses that `qpref rounds` samples from the policy before each round, and the reward that ranks them.

    `qpref train` doesn't read this table. The pairs are the training data, in place of `[data] train`.
    """

    prompts: str = Field(
        min_length=1,
        description="Prompts that each round samples responses to: data with prompts, such as pairs, whose responses "
        "are left aside, or a .txt file with one prompt per line.",
    )
    heldout: str = Field(
        min_length=1, description="Held-out prompts, likewise: reward and KL of each round are measured on them."
    )
    reward: str | dict[str, Any] = Field(
        description='Name of the reward, or a table of it with its options: `{ name = "length", target = 120 }`.'
    )
    k: int = Field(default=4, ge=2, le=64, description="Responses to each prompt, training and held-out.")
    form: Literal["auto", "extremes", "pairs", "ranked"] = Field(
        default="auto",
        description="Preferences of a prompt's responses. extremes: a pair of the best and the worst. pairs: one of "
        "any two. ranked: a list from best to worst. auto: what the loss takes, ranked or extremes.",
    )
    min_gap: float = Field(
        default=0.0, ge=0, description="Least difference of two rewards in a pair, or of a list's ends."
    )
    max_new_tokens: int = Field(default=128, ge=1, description="Most tokens of a response.")
    temperature: float = Field(
        default=1.0, gt=0, description="Temperature of the training responses; held-out ones are drawn at 1."
    )
    top_p: float = Field(
        default=1.0, gt=0, le=1, description="Nucleus sampling of the training responses; held-out ones have none."
    )
    seed: int = Field(default=0, ge=0, description="Seed of the draws; each round has other draws.")
    batch_size: int = Field(default=64, ge=1, description="Responses drawn together; halved where memory runs out.")
    kl_budget: float | None = Field(
        default=None,
        gt=0,
        description="Most KL of the result from the base, nats per response; default: no bound.",
    )

    @field_validator("reward")
    @classmethod
    def name_the_reward(cls, reward: str | dict[str, Any]) -> str | dict[str, Any]:
        name = reward.get("name") if isinstance(reward, dict) else reward
        if not isinstance(name, str) or not name:
            raise ValueError('name the reward, such as "length" or { name = "length", target = 120 }')
        return reward

    @property
    def reward_table(self) -> dict[str, Any]:
        """The reward's name and options, always as a table."""
        return {"name": self.reward} if isinstance(self.reward, str) else self.reward
