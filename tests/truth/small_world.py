"""A world small enough to compute: sixteen responses to one prompt, a policy that has learned them, known rewards.

A response is one of four letters, one to four times, so that it has a letter and a length. The policy is a tiny Llama,
trained here until it says each response about equally often. After preference training the probabilities of all sixteen
are read off, and with them expected rewards and KL divergences, which no sample has to estimate.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from conftest import make_tokenizer, tiny_config
from torch import Tensor

import qpref

PROMPT = "Q"
RESPONSES = tuple(letter * length for letter in "abcd" for length in (1, 2, 3, 4))
SEEDS = (0, 1, 2)
"""Of the policy's weights, of the pairs and of training; each test has to hold for every one."""

Reward = Callable[[str], float]


def quality(response: str) -> float:
    """The part of a reward that the letter alone decides, -1.5 to 1.5; its mean over the responses is 0."""
    return "abcd".index(response[0]) - 1.5


@dataclass(frozen=True, slots=True)
class Outcome:
    """A trained policy beside its reference.

    Attributes:
        policy, reference: log-probability of each response, [16], float64 nats; each sums to 1 over the responses.
    """

    policy: Tensor
    reference: Tensor

    @property
    def kl(self) -> float:
        """KL divergence of the policy from the reference, in nats."""
        return kl(self.policy, self.reference)

    def mean(self, of: Reward) -> float:
        """Expected value of a reward under the policy."""
        return mean(self.policy, of)


def mean(log_probs: Tensor, of: Reward) -> float:
    """Expected value of a reward over the responses."""
    return float(log_probs.exp() @ _values(of))


def kl(log_probs: Tensor, others: Tensor) -> float:
    """KL divergence between two distributions over the responses, in nats."""
    return float(log_probs.exp() @ (log_probs - others))


def optimum(reference: Tensor, reward: Reward, beta: float) -> Tensor:
    """Log-probabilities of the best policy for reward - beta KL: reference exp(reward / beta), normalized."""
    return (reference + _values(reward) / beta).log_softmax(0)


def most_reward_at(kl_limit: float, reference: Tensor, reward: Reward) -> float:
    """The largest expected reward of any policy within a KL divergence from the reference, by bisection on beta."""
    low, high = 1e-3, 1e3
    for _ in range(100):
        beta = math.sqrt(low * high)
        low, high = (beta, high) if kl(optimum(reference, reward, beta), reference) > kl_limit else (low, beta)
    return mean(optimum(reference, reward, high), reward)


def draw_pairs(reward: Reward, count: int, seed: int) -> list[dict[str, str]]:
    """Pairs of different responses, the better one drawn by Bradley-Terry: with sigmoid(difference of the rewards)."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        first, second = draw.sample(RESPONSES, 2)
        if draw.random() > 1 / (1 + math.exp(reward(second) - reward(first))):
            first, second = second, first
        rows.append({"prompt": PROMPT, "chosen": first, "rejected": second})
    return rows


def make_policy(folder: Path, seed: int, num_steps: int = 100, responses: Sequence[str] = RESPONSES) -> Path:
    """Write a base that has learned responses to the prompt, each about as probable as the others.

    With `num_steps` = 0 it is a random one that hasn't learned them.
    """
    from transformers import LlamaForCausalLM

    torch.manual_seed(seed)
    tokenizer = make_tokenizer(chat_template=None)
    model = LlamaForCausalLM(tiny_config("llama"))
    texts = [PROMPT + response for response in responses]
    rows = [[*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id] for text in texts]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [tokenizer.eos_token_id] * (longest - len(row)) for row in rows])
    labels = torch.tensor([[-100, *row[1:]] + [-100] * (longest - len(row)) for row in rows])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(num_steps):
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def train(
    base: Path,
    rows: list[dict[str, str]],
    loss: Mapping[str, Any],
    output: Path,
    *,
    heldout: list[dict[str, str]] | None = None,
    **settings: Any,
) -> qpref.Run:
    """Train by one loss with `qpref.train`: 60 steps of 24 pairs, unless `settings` of [train] say otherwise."""
    recipe = {
        "model": {"base": str(base), "quantization": "none", "dtype": "float32"},
        "adapter": {"rank": 8, "alpha": 16},
        "data": {"template": "none", "max_length": 32, "max_prompt_length": 8, "cache": False},
        "checks": {"too_short": "off"},
        "reference": {"cache": False},
        "loss": dict(loss),
        "train": {
            "learning_rate": 5e-3,
            "epochs": 1000,
            "max_steps": 60,
            "warmup_ratio": 0.0,
            "batch_size": 24,
            "tokens_per_microbatch": 2048,
            "gradient_checkpointing": False,
            "log_every": 20,
            "save_every": 1000,
            **settings,
        },
        "sinks": [],
    }
    return qpref.train(recipe, rows=rows, heldout=heldout, output=output)


def outcome_of(run: qpref.Run) -> Outcome:
    """Read the probabilities of all responses off a run."""
    model = qpref.load(run)

    def scores(of: Any) -> Tensor:
        totals = [float(of.log_probs(PROMPT, response).total) for response in RESPONSES]
        return torch.tensor(totals, dtype=torch.float64).log_softmax(0)

    return Outcome(policy=scores(model), reference=scores(model.reference))


def show(name: str, effects: Mapping[str, float] | Iterable[float]) -> None:
    """Print measured effects, which `pytest -rP` shows beside each test that passes."""
    if isinstance(effects, Mapping):
        print(f"{name}:", ", ".join(f"{of} {value:.2f}" for of, value in effects.items()))
    else:
        print(f"{name}:", ", ".join(f"{value:.2f}" for value in effects))


def _values(of: Reward) -> Tensor:
    return torch.tensor([of(response) for response in RESPONSES], dtype=torch.float64)
