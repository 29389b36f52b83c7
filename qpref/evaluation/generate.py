"""Generate a model's answers, and its base's with the adapter off, to the same prompts: for people to read."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch

from qpref import opening
from qpref.data.source import DataSource
from qpref.data.tokenize import PairTokenizer
from qpref.errors import DataError, DeviceMemoryError, RecipeError
from qpref.evaluation.heldout_pairs import data_of_run, text_of
from qpref.evaluation.subjects import Subject
from qpref.policy.lora import decoding
from qpref.policy.out_of_memory import attempt, out_of_memory_as
from qpref.policy.policy import Policy
from qpref.policy.reference import as_reference, frozen
from qpref.recipe.reopen import RecordedRun
from qpref.recipe.resolve import make_data_plan
from qpref.records import Finding, Message, Row, Source, TokenizedExample, UnpairedExample

log = logging.getLogger("qpref")

GIVEN = Source(path="--prompt", line=1)
NAME_PROMPTS = "name prompts with --prompt or --prompts"
NUM_HELDOUT = 8
"""Number of a run's held-out prompts used by default."""
STARTED = "answering %d prompt(s) with %s, up to %d tokens each"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """Sampling settings.

    Attributes:
        temperature: 0 for greedy decoding.
        top_p: nucleus sampling's probability mass.
        batch_size: prompts per batch; halved when memory runs out.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    batch_size: int = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """The answers to one prompt; `base` is None for a model without an adapter.

    Attributes:
        prompt: its text, all turns.
        ended: for the model and the base, whether the answer ended with a stop token.
    """

    prompt: str
    model: str
    base: str | None
    ended: tuple[bool, bool | None]

    def as_json(self) -> dict[str, Any]:
        """Convert the answers to JSON values."""
        return asdict(self) | {"ended": list(self.ended)}


def read_prompts(location: str) -> list[UnpairedExample]:
    """Read the prompts of a data file: one from each row, with or without responses; from a .txt file, one per line.

    Raises:
        RecipeError: no reader fits.
        DataError: it cannot be read, a row has no prompt, or the file is empty.
    """
    if location.lower().endswith(".txt"):
        prompts = _lines(Path(location))
    else:
        sources = [DataSource(choice) for choice in make_data_plan(location).sources]
        prompts = [_prompt_of(source, row) for source in sources for row in source.raw()]
    if not prompts:
        raise DataError(f"{location}: has no prompt")
    return prompts


def heldout_prompts(run: RecordedRun) -> list[UnpairedExample]:
    """Read the first distinct held-out prompts of a run.

    Raises:
        RecipeError: the run has no held-out data, or a reader isn't installed.
        DataError: the data cannot be read, or no row is left.
    """
    heldout = data_of_run(run, heldout_alone=True).heldout
    if heldout is None:
        raise RecipeError(f"{run.path}: this run has no held-out data", NAME_PROMPTS)
    found: dict[str, UnpairedExample] = {}
    for row in heldout.rows():
        found.setdefault(text_of(row.prompt), _without_response(row.prompt, row.tools, row.source))
        if len(found) == NUM_HELDOUT:
            break
    if not found:
        raise DataError(heldout.why_empty)
    return list(found.values())


def asked_prompts(subject: Subject, given: Sequence[UnpairedExample], location: str | None) -> list[UnpairedExample]:
    """Collect the prompts that were given and those of a data file; without any, the run's first held-out ones.

    Raises:
        RecipeError: there are none, and the model is no run.
        DataError: the file's can't be read.
    """
    if not given and location is None:
        if subject.run is None:
            raise RecipeError(f"{subject.name}: not a run, so it has no held-out prompts", NAME_PROMPTS)
        return heldout_prompts(subject.run)
    return [*given, *(read_prompts(location) if location else [])]


def as_prompt(text: str, source: Source = GIVEN) -> UnpairedExample:
    """Make a prompt of one user turn."""
    return as_turns((Message(role="user", content=text),), source)


def as_turns(turns: tuple[Message, ...], source: Source = GIVEN) -> UnpairedExample:
    """Make a prompt of a conversation whose last turn is the user's."""
    return _without_response(turns, (), source)


def _without_response(
    prompt: tuple[Message, ...], tools: tuple[Mapping[str, object], ...], source: Source
) -> UnpairedExample:
    """Make an example that a chat template can render: the prompt and a placeholder response."""
    response = (Message(role="assistant", content="."),)
    return UnpairedExample(prompt=prompt, tools=tools, completion=response, label=True, source=source)


def _lines(path: Path) -> list[UnpairedExample]:
    try:
        lines = opening.read_bytes(path, follow=True).decode("utf-8-sig").splitlines()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    numbered = enumerate(lines, start=1)
    return [as_prompt(line, Source(path=str(path), line=number)) for number, line in numbered if line.strip()]


def _prompt_of(source: DataSource, row: Row | Finding) -> UnpairedExample:
    """Take the prompt of a row: of its example, or of the column `prompt` where the row has no response."""
    found = source.records(row)
    if isinstance(found, Finding) and isinstance(row, Row):
        if row.values.get("prompt") is None:
            raise DataError(f"{row.source}: no prompt; the row has {', '.join(row.values) or 'nothing'}")
        filled = {"prompt": row.values["prompt"], "chosen": "a", "rejected": "b"}
        found = source.records(Row(values=filled, source=row.source))
    if isinstance(found, Finding):
        raise DataError(f"{found.source}: {found.message}")
    return _without_response(found[0].prompt, found[0].tools, found[0].source)


def prompt_ids(tokenizer: PairTokenizer, prompts: Sequence[UnpairedExample]) -> list[list[int]]:
    """Tokenize the prompts exactly as they precede a response in training.

    Raises:
        DataError: a prompt holds a control token, or the chat template refuses it.
    """
    found = [one for one in tokenizer.tokenize(prompts) if isinstance(one, TokenizedExample) or one.severity == "error"]
    if refused := [one for one in found if isinstance(one, Finding)]:
        raise DataError(f"{refused[0].source}: not a usable prompt: {refused[0].message}")
    return [list(example.prompt) for example in found if isinstance(example, TokenizedExample)]


def generate(
    subject: Subject, prompts: Sequence[UnpairedExample], sampling: Sampling, dtype: str | None = None
) -> list[Answers]:
    """Generate the model's answers, and its base's, in the prompts' order.

    Prompts of similar length share a batch, padded on the left. The base's answers are sampled with the same seed as
    the model's.

    Raises:
        DataError: a prompt cannot be rendered.
        PolicyError: the model cannot be loaded.
        DeviceMemoryError: not even one prompt at a time fits.
    """
    tokenizer = subject.tokenizer()
    ids = prompt_ids(tokenizer, prompts)
    subject.announce_device()
    with out_of_memory_as(f"{subject.name}: the device ran out of memory", "free its memory, or take a smaller base"):
        policy = subject.load(dtype or subject.dtype)
        policy.share_prompts(False)
        log.info(STARTED, len(ids), subject.name, sampling.max_new_tokens)
        answers = answer_all(policy, tokenizer, ids, sampling)
        of_base: list[tuple[str, bool]] | None = None
        if subject.has_reference:
            log.info(STARTED, len(ids), "the base", sampling.max_new_tokens)
            with as_reference(policy):
                of_base = answer_all(policy, tokenizer, ids, sampling)
    return [
        Answers(
            prompt=text_of(prompt.prompt),
            model=answers[index][0],
            base=of_base[index][0] if of_base else None,
            ended=(answers[index][1], of_base[index][1] if of_base else None),
        )
        for index, prompt in enumerate(prompts)
    ]


def answer_all(
    policy: Policy, tokenizer: PairTokenizer, ids: Sequence[list[int]], sampling: Sampling
) -> list[tuple[str, bool]]:
    """Generate each prompt's answer under the policy in its current mode; True where a stop token ended it."""
    order = sorted(range(len(ids)), key=lambda index: -len(ids[index]))
    found: dict[int, tuple[str, bool]] = {}
    torch.manual_seed(sampling.seed)
    size = sampling.batch_size
    while len(found) < len(ids):
        indices = sharing_a_batch(policy, order[len(found) : len(found) + size], ids, sampling.max_new_tokens)
        new = new_tokens(policy, tokenizer, [ids[index] for index in indices], sampling)
        if new is None:
            if size == 1:
                raise DeviceMemoryError("the device ran out of memory on one prompt", "lower --max-new-tokens")
            size //= 2
            log.warning("out of memory: continuing with %d prompts per batch", size)
            continue
        for index, answer in zip(indices, new, strict=True):
            found[index] = text_of_answer(tokenizer, answer)
    return [found[index] for index in range(len(ids))]


def text_of_answer(tokenizer: PairTokenizer, answer: Sequence[int]) -> tuple[str, bool]:
    """Decode an answer's tokens up to its stop token; True where it has one."""
    stop = next((at for at, token in enumerate(answer) if token in tokenizer.stop_tokens), None)
    return tokenizer.tokenizer.decode(answer[:stop], skip_special_tokens=True), stop is not None


def sharing_a_batch(policy: Policy, indices: list[int], ids: Sequence[list[int]], new: int) -> list[int]:
    """Take the first prompts that may share a batch: all of them, unless rotary positions change with their length.

    Then those that stay in one class of lengths until their ends do, and prompts of equal length.

    Args:
        new: tokens that are generated at most.
    """
    if policy.rope_lengths is None:
        return indices
    class_of = policy.rope_lengths.class_of

    def key(index: int) -> tuple[int, ...]:
        length = len(ids[index])
        first, last = class_of(length), class_of(length + new)
        return first if first == last else (*first, length)

    shared = key(indices[0])
    return list(takewhile(lambda index: key(index) == shared, indices))


def new_tokens(
    policy: Policy, tokenizer: PairTokenizer, prompts: Sequence[list[int]], sampling: Sampling, streamer: Any = None
) -> list[list[int]] | None:
    """Generate the new tokens of each prompt; None if memory ran out.

    Args:
        streamer: one of transformers', which gets the tokens of a single prompt as they come.
    """
    longest = max(map(len, prompts))
    padding = tokenizer.stop_tokens[0]
    rows = [[padding] * (longest - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]

    def sample() -> list[list[int]]:
        with frozen(policy), policy.autocast(), decoding():
            output: torch.Tensor = policy.plain_model.generate(
                input_ids=torch.tensor(rows, device=policy.device),
                attention_mask=torch.tensor(mask, device=policy.device),
                generation_config=_settings(policy, tokenizer, sampling),
                streamer=streamer,
            )
        return output[:, longest:].tolist()

    return attempt(sample)


def _settings(policy: Policy, tokenizer: PairTokenizer, sampling: Sampling) -> Any:
    from transformers import GenerationConfig

    drawn = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0} if sampling.temperature else {}
    settings = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        do_sample=bool(sampling.temperature),
        eos_token_id=list(tokenizer.stop_tokens),
        pad_token_id=tokenizer.stop_tokens[0],
        use_cache=True,
        **drawn,
    )
    # transformers fills unset fields from the model's own generation config, such as a repetition penalty.
    policy.plain_model.generation_config = settings
    return settings
