"""Answers of a model, and of its base with the adapter off, to the same prompts: for people to look at."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qpref.data.source import DataSource
from qpref.data.tokenize import PairTokenizer
from qpref.errors import DataError, DeviceMemoryError, RecipeError
from qpref.evaluation.heldout_pairs import data_of_run, text_of
from qpref.evaluation.models import Subject
from qpref.policy.lora import decoding
from qpref.policy.policy import Policy
from qpref.policy.reference import as_reference, frozen
from qpref.recipe.reopen import RecordedRun
from qpref.recipe.resolve import make_data_plan
from qpref.records import Finding, Message, Row, Source, TokenizedExample, UnpairedExample

log = logging.getLogger("qpref")

GIVEN = Source(path="--prompt", line=1)
NUM_HELDOUT = 8
"""Prompts of a run that are taken where none are named."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How answers are drawn.

    Attributes:
        temperature: 0 for the likeliest token always.
        top_p: from the likeliest tokens that have this much probability together.
        batch_size: prompts at once; halved when the memory runs out.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    batch_size: int = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """What was answered to one prompt; `base` is None for a model without an adapter.

    Attributes:
        prompt: its text, all turns.
        ended: for the model and the base, whether the answer ended by itself.
    """

    prompt: str
    model: str
    base: str | None
    ended: tuple[bool, bool | None]


def read_prompts(location: str) -> list[UnpairedExample]:
    """The prompts of some data: each row's, whatever else it has or lacks; each line of a .txt file.

    Raises:
        RecipeError: no reader fits.
        DataError: it cannot be read, a row has no prompt, or there is none.
    """
    if location.lower().endswith(".txt"):
        prompts = _lines(Path(location))
    else:
        sources = [DataSource(choice) for choice in make_data_plan(location).sources]
        prompts = [_prompt_of(source, row) for source in sources for row in source.raw()]
    if not prompts:
        raise DataError(f"{location}: holds no prompt")
    return prompts


def heldout_prompts(run: RecordedRun) -> list[UnpairedExample]:
    """The first prompts that a run holds out, each once.

    Raises:
        RecipeError: it holds nothing out, or a reader isn't installed.
        DataError: they cannot be read, or there is none.
    """
    heldout = data_of_run(run, heldout_alone=True).heldout
    if heldout is None:
        raise RecipeError(f"{run.path}: this run holds no data out", "name prompts with --prompt or --prompts")
    found: dict[str, UnpairedExample] = {}
    for row in heldout.rows():
        found.setdefault(text_of(row.prompt), _asked(row.prompt, row.tools, row.source))
        if len(found) == NUM_HELDOUT:
            break
    if not found:
        raise DataError(heldout.why_empty)
    return list(found.values())


def as_prompt(text: str, source: Source = GIVEN) -> UnpairedExample:
    """A text as one turn of the user's."""
    return _asked((Message(role="user", content=text),), (), source)


def _asked(prompt: tuple[Message, ...], tools: tuple[Mapping[str, object], ...], source: Source) -> UnpairedExample:
    """A prompt as a row, which a template can render: with a response that stands for none."""
    response = (Message(role="assistant", content="."),)
    return UnpairedExample(prompt=prompt, tools=tools, completion=response, label=True, source=source)


def _lines(path: Path) -> list[UnpairedExample]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    places = enumerate(lines, start=1)
    return [as_prompt(line, Source(path=str(path), line=number)) for number, line in places if line.strip()]


def _prompt_of(source: DataSource, row: Row | Finding) -> UnpairedExample:
    """A row's prompt: of the example that it is, or the column `prompt` of a row that has no response."""
    found = source.records(row)
    if isinstance(found, Finding) and isinstance(row, Row):
        if row.values.get("prompt") is None:
            raise DataError(f"{row.source}: no prompt; the row has {', '.join(row.values) or 'nothing'}")
        filled = {"prompt": row.values["prompt"], "chosen": "a", "rejected": "b"}
        found = source.records(Row(values=filled, source=row.source))
    if isinstance(found, Finding):
        raise DataError(f"{found.source}: {found.message}")
    return _asked(found[0].prompt, found[0].tools, found[0].source)


def prompt_ids(tokenizer: PairTokenizer, prompts: Sequence[UnpairedExample]) -> list[list[int]]:
    """The ids that a model is asked with: the same as before a response in training.

    Raises:
        DataError: a prompt holds a control token, or the chat template refuses it.
    """
    found = [one for one in tokenizer.tokenize(prompts) if isinstance(one, TokenizedExample) or one.severity == "error"]
    if refused := [one for one in found if isinstance(one, Finding)]:
        raise DataError(f"{refused[0].source}: cannot be asked: {refused[0].message}")
    return [list(example.prompt) for example in found if isinstance(example, TokenizedExample)]


def generate(
    subject: Subject, prompts: Sequence[UnpairedExample], sampling: Sampling, dtype: str | None = None
) -> list[Answers]:
    """The model's answers, and its base's, in the prompts' order.

    Prompts of about one length are answered together, padded on the left. The base's answers are drawn with the seed
    that the model's are.

    Raises:
        DataError: a prompt cannot be rendered.
        PolicyError: the model cannot be loaded.
        DeviceMemoryError: not even one prompt at a time fits.
    """
    tokenizer = subject.tokenizer()
    ids = prompt_ids(tokenizer, prompts)
    policy = subject.load(dtype or subject.dtype)
    policy.share_prompts(False)
    ours = _answers(policy, tokenizer, ids, sampling)
    theirs: list[tuple[str, bool]] | None = None
    if subject.has_reference:
        with as_reference(policy):
            theirs = _answers(policy, tokenizer, ids, sampling)
    return [
        Answers(
            prompt=text_of(prompt.prompt),
            model=ours[place][0],
            base=theirs[place][0] if theirs else None,
            ended=(ours[place][1], theirs[place][1] if theirs else None),
        )
        for place, prompt in enumerate(prompts)
    ]


def _answers(
    policy: Policy, tokenizer: PairTokenizer, ids: Sequence[list[int]], sampling: Sampling
) -> list[tuple[str, bool]]:
    """Each prompt's answer under the policy as it stands, and whether it ended by itself."""
    order = sorted(range(len(ids)), key=lambda place: -len(ids[place]))
    found: dict[int, tuple[str, bool]] = {}
    torch.manual_seed(sampling.seed)
    size = sampling.batch_size
    while len(found) < len(ids):
        places = order[len(found) : len(found) + size]
        new = _generate(policy, tokenizer, [ids[place] for place in places], sampling)
        if new is None:
            if size == 1:
                raise DeviceMemoryError("the device ran out of memory on one prompt", "lower --max-new-tokens")
            size //= 2
            log.warning("out of memory: %d prompts at once", size)
            continue
        for place, answer in zip(places, new, strict=True):
            stop = next((at for at, token in enumerate(answer) if token in tokenizer.stop_tokens), None)
            text = tokenizer.tokenizer.decode(answer[:stop], skip_special_tokens=True)
            found[place] = (text, stop is not None)
    return [found[place] for place in range(len(ids))]


def _generate(
    policy: Policy, tokenizer: PairTokenizer, prompts: Sequence[list[int]], sampling: Sampling
) -> list[list[int]] | None:
    """The new tokens of each prompt; None where the memory didn't suffice."""
    longest = max(map(len, prompts))
    padding = tokenizer.stop_tokens[0]
    rows = [[padding] * (longest - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    try:
        with frozen(policy), policy.autocast(), decoding():
            output: torch.Tensor = policy.plain_model.generate(
                input_ids=torch.tensor(rows, device=policy.device),
                attention_mask=torch.tensor(mask, device=policy.device),
                generation_config=_settings(policy, tokenizer, sampling),
            )
    except torch.OutOfMemoryError:
        return None
    return output[:, longest:].tolist()


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
    # transformers fills what isn't set from the model's own settings, such as a repetition penalty.
    policy.plain_model.generation_config = settings
    return settings
