"""A reward model: the score of a sequence classifier with one label, such as those of RewardBench."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

from qpref.hooks import Field, Options, Reward, RewardFunction, hookimpl
from qpref.records import Message, SampledResponse


class ModelOptions(Options):
    """Options of the reward `model`."""

    path: str = Field(min_length=1, description="Folder or Hugging Face id of the reward model.")
    revision: str | None = Field(default=None, description="Commit of a Hugging Face id.")
    dtype: Literal["float32", "bf16"] = Field(default="bf16", description="Of its weights.")
    device: Literal["auto", "cpu", "cuda"] = Field(default="cpu", description="Where it computes.")
    batch_size: int = Field(default=8, ge=1, description="Responses that it scores together.")
    max_length: int = Field(
        default=2048, ge=8, description="Most tokens of a prompt and its response; a longer prompt loses its start."
    )


class ModelScorer:
    """A sequence classifier of one label over a conversation in its own chat template."""

    def __init__(self, options: ModelOptions) -> None:
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        device = options.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self._options, self._device = options, device
        self._tokenizer = AutoTokenizer.from_pretrained(options.path, revision=options.revision)
        if not self._tokenizer.chat_template:
            raise ValueError(f"{options.path}: its tokenizer has no chat template")
        dtype = {"float32": torch.float32, "bf16": torch.bfloat16}[options.dtype]
        self._model = AutoModelForSequenceClassification.from_pretrained(
            options.path, revision=options.revision, dtype=dtype, use_safetensors=True
        )
        if self._model.config.num_labels != 1:
            raise ValueError(f"{options.path}: {self._model.config.num_labels} labels; a reward model has 1")
        self._model.config.pad_token_id = self._padding
        self._model.eval().to(device)

    @property
    def _padding(self) -> int:
        given = self._tokenizer.pad_token_id
        return int(self._tokenizer.eos_token_id if given is None else given)

    def __call__(self, responses: Sequence[SampledResponse]) -> list[float]:
        """Score responses, those of similar length together."""
        ids = [self._ids(one) for one in responses]
        order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
        scores = [0.0] * len(ids)
        for start in range(0, len(order), self._options.batch_size):
            batch = order[start : start + self._options.batch_size]
            for index, score in zip(batch, self._scores([ids[index] for index in batch]), strict=True):
                scores[index] = score
        return scores

    def _ids(self, one: SampledResponse) -> list[int]:
        turns = [*map(_plain, one.prompt), {"role": "assistant", "content": one.text}]
        ids: list[int] = self._tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)
        return ids[-self._options.max_length :]

    def _scores(self, batch: Sequence[list[int]]) -> list[float]:
        import torch

        longest = max(map(len, batch))
        ids = [one + [self._padding] * (longest - len(one)) for one in batch]
        mask = [[1] * len(one) + [0] * (longest - len(one)) for one in batch]
        with torch.no_grad():
            inputs = {"input_ids": ids, "attention_mask": mask}
            logits = self._model(
                **{name: torch.tensor(rows, device=self._device) for name, rows in inputs.items()}
            ).logits
        found: list[float] = logits[:, 0].float().tolist()
        return found


def _plain(message: Message) -> dict[str, Any]:
    return {"role": message.role, "content": message.content, **message.extra}


def build(options: ModelOptions) -> RewardFunction:
    """Load the model."""
    return ModelScorer(options)


@hookimpl
def qpref_rewards() -> Iterator[Reward]:
    yield Reward(name="model", summary="a reward model's score", options=ModelOptions, build=build)
