"""Sample k responses to each prompt of a batch: prompts are computed once, and finished responses leave the batch.

transformers' `generate` computes a prompt once for each of its responses, and a batch until its last response ends. It
is used for models whose cache isn't keys and values alone: state-space and other linear attention, compressed keys.
A response depends on its prompt, its number and the seed, not on what shares its batch, apart from rounding; so
sampling that was interrupted goes on with the same draws.
"""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qpref.policy.forward_errors import naming_the_model
from qpref.policy.lora import decoding
from qpref.policy.policy import Policy
from qpref.policy.reference import frozen

KEPT_SHARE = 0.75
"""The batch is made smaller where at most this share of its responses still grows: each time copies the cache."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Draws:
    """Settings by which responses are drawn.

    Attributes:
        num_responses: k, to each prompt.
        temperature: 0 takes the most probable token.
        top_p: nucleus sampling's probability mass.
    """

    num_responses: int
    max_new_tokens: int = 128
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0


def sample(
    policy: Policy, prompts: Sequence[Sequence[int]], draws: Draws, stop_tokens: Sequence[int]
) -> list[list[list[int]]]:
    """Sample the responses to each prompt, as token ids; a stop token is the last one where a response ended by itself.

    Args:
        policy: in the mode that is to be sampled from; dropout is off inside.
        prompts: token ids, each at least one.
        stop_tokens: each ends a response.

    Raises:
        PolicyError: the model's own code fails.
    """
    from transformers import DynamicCache

    numbers = [_numbers(prompt, response, draws) for prompt in prompts for response in range(draws.num_responses)]
    uniform = torch.stack(numbers).to(policy.device)
    model = policy.plain_model
    with frozen(policy), policy.autocast(), decoding(), naming_the_model(model, "sampled"):
        cache = DynamicCache(config=model.config)
        if _holds_keys_and_values(cache):
            responses = _Batch(policy, prompts, draws, stop_tokens, cache, uniform).finished()
        else:
            responses = _by_generate(policy, prompts, draws, stop_tokens, uniform)
    k = draws.num_responses
    return [responses[first : first + k] for first in range(0, len(responses), k)]


def _holds_keys_and_values(cache: Any) -> bool:
    """Return whether each layer's state is keys and values of tokens, whose rows can be repeated and selected."""
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    return bool(cache.layers) and {type(layer) for layer in cache.layers} <= {DynamicLayer, DynamicSlidingWindowLayer}


class _Batch:
    """Responses that grow together; row r is response `rows[r]` of the k times N.

    Attributes:
        mask: [R, L] int64, 1 for a token of a row's prompt or response, 0 for padding on the left.
        cache: of transformers, keys and values of the same rows.
    """

    def __init__(
        self,
        policy: Policy,
        prompts: Sequence[Sequence[int]],
        draws: Draws,
        stop_tokens: Sequence[int],
        cache: Any,
        uniform: Tensor,
    ) -> None:
        self.model, self.device, self.draws = policy.plain_model, policy.device, draws
        self.stops = torch.tensor(stop_tokens, device=self.device)
        ids, self.mask = _padded(prompts, stop_tokens[0], self.device)
        self.cache, self.uniform = cache, uniform
        # Newer transformers call the argument `cache`; the old name goes in 5.40.
        takes = inspect.signature(self.model.forward).parameters
        self.as_argument = "cache" if "cache" in takes else "past_key_values"
        scores = self._forward(ids)
        self.cache.batch_repeat_interleave(draws.num_responses)
        self.mask = self.mask.repeat_interleave(draws.num_responses, dim=0)
        self.scores = scores.repeat_interleave(draws.num_responses, dim=0)
        self.rows = torch.arange(len(uniform), device=self.device)
        self.tokens = torch.full(uniform.shape, -1, device=self.device)

    def finished(self) -> list[list[int]]:
        """Sample until each response has ended or has its most tokens."""
        done = torch.zeros_like(self.rows, dtype=torch.bool)
        for at in range(self.draws.max_new_tokens):
            drawn = _draw(self.scores, self.uniform[self.rows, at], self.draws)
            self.tokens[self.rows[~done], at] = drawn[~done]
            done |= torch.isin(drawn, self.stops)
            growing = int((~done).sum())
            if not growing or at + 1 == self.draws.max_new_tokens:
                break
            if growing <= KEPT_SHARE * len(done):
                drawn, done = self._without(done, drawn)
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], dim=1)
            self.scores = self._forward(drawn[:, None])
        return [[token for token in row if token >= 0] for row in self.tokens.tolist()]

    def _without(self, done: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor]:
        """Take finished rows out; returns the tokens and the states of those that are left."""
        left = (~done).nonzero().flatten()
        self.cache.batch_select_indices(left)
        self.mask, self.rows = self.mask[left], self.rows[left]
        return drawn[left], done[left]

    def _forward(self, ids: Tensor) -> Tensor:
        """Compute the scores of the next token, [R, V] float32; the cache grows."""
        positions = (self.mask.cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        output = self.model(
            input_ids=ids,
            attention_mask=self.mask,
            position_ids=positions,
            use_cache=True,
            logits_to_keep=1,
            **{self.as_argument: self.cache},
        )
        scores: Tensor = output.logits[:, -1].float()
        return scores


def _by_generate(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    draws: Draws,
    stop_tokens: Sequence[int],
    uniform: Tensor,
) -> list[list[int]]:
    """Sample as `_Batch` does with transformers' `generate`, whose greedy choice is led to the drawn token."""
    from transformers import GenerationConfig, LogitsProcessorList

    repeated = [prompt for prompt in prompts for _ in range(draws.num_responses)]
    ids, mask = _padded(repeated, stop_tokens[0], policy.device)
    longest = ids.shape[1]

    def lead(tokens: Tensor, scores: Tensor) -> Tensor:
        drawn = _draw(scores.float(), uniform[:, tokens.shape[1] - longest], draws)
        return torch.full_like(scores, -math.inf).scatter(-1, drawn[:, None], 0.0)

    settings = GenerationConfig(
        max_new_tokens=draws.max_new_tokens,
        do_sample=False,
        eos_token_id=list(stop_tokens),
        pad_token_id=stop_tokens[0],
        use_cache=True,
    )
    # transformers fills unset fields from the model's own generation config, such as a repetition penalty.
    policy.plain_model.generation_config = settings
    output: Tensor = policy.plain_model.generate(
        input_ids=ids,
        attention_mask=mask,
        generation_config=settings,
        logits_processor=LogitsProcessorList([lead]),
    )
    return [_ended(row, stop_tokens) for row in output[:, longest:].tolist()]


def _ended(tokens: list[int], stop_tokens: Sequence[int]) -> list[int]:
    """Cut off the padding after a stop token."""
    end = next((at for at, token in enumerate(tokens, start=1) if token in stop_tokens), len(tokens))
    return tokens[:end]


def _padded(prompts: Sequence[Sequence[int]], padding: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Pad prompts on the left; returns ids and mask, [N, L] int64."""
    longest = max(map(len, prompts))
    ids = [[padding] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _draw(scores: Tensor, uniform: Tensor, draws: Draws) -> Tensor:
    """Draw each row's token, [R], by the inverse of its cumulative probabilities.

    Args:
        scores: [R, V] float32.
        uniform: [R] float64 in [0, 1).
    """
    if not draws.temperature:
        return scores.argmax(dim=-1)
    probabilities = (scores.double() / draws.temperature).softmax(dim=-1)
    if draws.top_p < 1:
        probabilities = _nucleus(probabilities, draws.top_p)
    cumulative = probabilities.cumsum(dim=-1)
    drawn = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)
    return drawn.flatten().clamp(max=probabilities.shape[1] - 1)


def _nucleus(probabilities: Tensor, mass: float) -> Tensor:
    """Set to 0 all but the most probable tokens that reach the mass together, [R, V]."""
    ordered, order = probabilities.sort(dim=-1, descending=True)
    before = ordered.cumsum(dim=-1) - ordered
    return torch.zeros_like(probabilities).scatter(-1, order, ordered.where(before < mass, 0.0))


def _numbers(prompt: Sequence[int], response: int, draws: Draws) -> Tensor:
    """Draw the numbers that decide one response, [max_new_tokens] float64 in [0, 1)."""
    key = hashlib.sha256(f"{draws.seed} {response} {list(prompt)}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:7]))
    return torch.rand(draws.max_new_tokens, generator=generator, dtype=torch.float64)
