"""Rules of rewards: a finite number for each response, which depends on that response alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qpref.hooks.reward import Reward
from qpref.installed import missing
from qpref.records import Message, SampledResponse
from qpref.testing.calls import BrokenRule, attempt

_TEXTS = ("", "Yes.", "It is four, please.", "日本語です。", "Größe\n\n- a\n- b", "word " * 500)


@dataclass(frozen=True, slots=True)
class BuildableReward:
    """A reward and its options."""

    record: Reward
    options: Any

    def scores(self, responses: Sequence[SampledResponse]) -> list[float]:
        """Build the reward and score the responses in one call."""
        function = attempt("build", self.record.build, self.options)
        if not callable(function):
            raise BrokenRule(f"build returns {type(function).__name__}, which is no function")
        scores: list[float] = attempt("scoring", lambda: [float(score) for score in function(responses)])
        if len(scores) != len(responses):
            raise BrokenRule(f"it returns {len(scores)} scores for {len(responses)} responses")
        for score, response in zip(scores, responses, strict=True):
            if not math.isfinite(score):
                raise BrokenRule(f"it scores {response.text[:20]!r} with {score!r}; a score is a finite number")
        return scores


def sampled_responses() -> list[SampledResponse]:
    """Return responses to two prompts: of several lengths and scripts, ended and cut off."""
    prompts = (Message(role="user", content="What is 2 + 2?"), Message(role="user", content="日本語で?"))
    return [
        SampledResponse(prompt=(prompt,), text=text, ended=number % 2 == 0)
        for prompt in prompts
        for number, text in enumerate(_TEXTS)
    ]


def check_record(reward: BuildableReward) -> None:
    """Fields of the record have the right types, and what it requires is installed."""
    if lacking := missing(reward.record.requires):
        raise BrokenRule(f"it requires {', '.join(lacking)}, which isn't installed")


def check_scores(reward: BuildableReward) -> None:
    """Each response has a finite number, and no response has none."""
    reward.scores(sampled_responses())
    reward.scores([])


def check_alone(reward: BuildableReward) -> None:
    """A score is the same whatever else is scored in its call, and in which order."""
    responses = sampled_responses()
    together = reward.scores(responses)
    apart = [reward.scores([response])[0] for response in responses]
    backwards = reward.scores(responses[::-1])[::-1]
    for response, *scores in zip(responses, together, apart, backwards, strict=True):
        if not all(math.isclose(score, scores[0], rel_tol=1e-4, abs_tol=1e-6) for score in scores):
            called = "in one call with others, alone and in the other order"
            raise BrokenRule(f"it scores {response.text[:20]!r} with {', '.join(map(str, scores))} {called}")


REWARD_RULES: Mapping[str, Callable[[BuildableReward], None]] = {
    "record": check_record,
    "scores": check_scores,
    "alone": check_alone,
}
