"""A judge behind an address of your own: it gets responses as JSON and answers with their rewards."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from typing import Any

from qpref.hooks import Field, Options, Reward, RewardFunction, hookimpl
from qpref.records import SampledResponse

WAITS = (1.0, 4.0, 16.0)
"""Seconds before another try where the judge is busy or can't be reached."""
BUSY = frozenset({408, 425, 429, 500, 502, 503, 504})


class HttpOptions(Options):
    """Options of the reward `http`."""

    url: str = Field(
        pattern="^https?://", description="Address that takes a POST. Prompts and responses are sent there."
    )
    token_variable: str | None = Field(
        default=None, description="Environment variable whose value is sent as the bearer token."
    )
    batch_size: int = Field(default=16, ge=1, description="Responses of one request.")
    timeout: float = Field(default=120.0, gt=0, description="Seconds that an answer may take.")


class Judge:
    """A function of responses that asks the address."""

    def __init__(self, options: HttpOptions) -> None:
        self._options = options
        self._headers: dict[str, str] = {}
        if options.token_variable is not None:
            token = os.environ.get(options.token_variable)
            if not token:
                raise ValueError(f"the environment variable {options.token_variable} isn't set")
            self._headers["Authorization"] = f"Bearer {token}"

    def __call__(self, responses: Sequence[SampledResponse]) -> list[float]:
        """Ask for the rewards, some responses a request."""
        size = self._options.batch_size
        batches = [responses[start : start + size] for start in range(0, len(responses), size)]
        return [reward for batch in batches for reward in self._asked(batch)]

    def _asked(self, batch: Sequence[SampledResponse]) -> list[float]:
        rows = [
            {
                "prompt": [{"role": message.role, "content": message.content} for message in one.prompt],
                "response": one.text,
                "ended": one.ended,
            }
            for one in batch
        ]
        answer = self._posted(rows)
        rewards = answer.get("rewards") if isinstance(answer, dict) else None
        if not isinstance(rewards, list) or len(rewards) != len(batch):
            raise ValueError(f"the judge's answer has no list `rewards` of {len(batch)} numbers")
        return [float(reward) for reward in rewards]

    def _posted(self, rows: list[dict[str, Any]]) -> Any:
        """Return the answer's JSON. Redirections aren't followed: they could lead the token elsewhere."""
        import httpx

        options, problem = self._options, ""
        for wait in (0.0, *WAITS):
            time.sleep(wait)
            try:
                answer = httpx.post(
                    options.url, json={"responses": rows}, headers=self._headers, timeout=options.timeout
                )
            except httpx.TransportError as error:
                problem = f"the judge can't be reached: {error}"
                continue
            if answer.status_code == httpx.codes.OK:
                return answer.json()
            problem = f"the judge answered with status {answer.status_code}"
            if answer.status_code not in BUSY:
                break
        raise ValueError(problem)


def build(options: HttpOptions) -> RewardFunction:
    """Read the token."""
    return Judge(options)


@hookimpl
def qpref_rewards() -> Iterator[Reward]:
    yield Reward(
        name="http",
        summary="a judge behind an address of your own",
        options=HttpOptions,
        build=build,
        requires=("httpx>=0.27",),
    )
