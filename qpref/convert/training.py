"""Model, adapter, optimizer and steps: most keys are copied, a few are computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from qpref.convert.draft import Draft
from qpref.convert.settings import Settings, anything, flag, number, whole, word, words

COPIED: dict[str, Callable[[Any], Any]] = {
    "model.base": word,
    "model.revision": word,
    "model.tokenizer": word,
    "model.double_quantization": flag,
    "adapter.rank": whole,
    "adapter.alpha": number,
    "adapter.dropout": number,
    "adapter.rslora": flag,
    "adapter.start": word,
    "train.learning_rate": number,
    "train.weight_decay": number,
    "train.max_grad_norm": number,
    "train.seed": whole,
}
"""Keys whose values are the same in all tools."""
DTYPES = {
    "bfloat16": "bf16",
    "bf16": "bf16",
    "auto": "bf16",
    "float16": "fp16",
    "fp16": "fp16",
    "float32": "float32",
}
OPTIMIZERS = {
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "adamw_hf": "adamw",
    "adamw_8bit": "adamw_8bit",
    "adamw_bnb_8bit": "adamw_8bit",
    "paged_adamw": "paged_adamw",
    "paged_adamw_32bit": "paged_adamw",
    "paged_adamw_8bit": "paged_adamw_8bit",
}
SCHEDULES = {
    "cosine": "cosine",
    "linear": "linear",
    "constant": "constant",
    "constant_with_warmup": "constant",
}
ALL_LINEAR = {"all-linear", "all"}


def convert_training(settings: Settings, draft: Draft, num_gpus: int) -> None:
    """Convert the tables `model`, `adapter` and `train`."""
    for ours, kind in COPIED.items():
        if found := settings.first(ours, kind):
            draft.put(ours, *found)
    _weights(settings, draft)
    _targets(settings, draft)
    _batch_size(settings, draft, num_gpus)
    _length(settings, draft)
    _warmup(settings, draft)
    _named(settings, draft, "train.schedule", SCHEDULES, "cosine")
    _named(settings, draft, "train.optimizer", OPTIMIZERS, "adamw")
    _adam(settings, draft)


def _weights(settings: Settings, draft: Draft) -> None:
    """Quantization and dtype: a tool's mixed precision is the dtype of the frozen base here."""
    in_4_bits = any(settings.get(key, anything) in (True, 4, "4") for key in settings.keys_of("model.quantization"))
    origin = settings.origin(*settings.keys_of("model.quantization"))
    draft.put("model.quantization", "nf4" if in_4_bits else "none", origin)
    if not in_4_bits:
        draft.differs.append(
            'quantization = "none": the file doesn\'t load in 4 bits; "nf4" takes about a quarter of the memory'
        )
    dtypes = [DTYPES[name] for name in _precisions(settings) if name in DTYPES]
    if dtypes:
        draft.put("model.dtype", dtypes[0], settings.origin(*settings.keys_of("model.dtype")))


def _precisions(settings: Settings) -> list[str]:
    """Return the names of dtypes that the file or the tool sets, mixed precision first: that is what is computed in."""
    keys = settings.keys_of("model.dtype")
    found = []
    for key in sorted(keys, key=lambda key: key in ("dtype", "torch_dtype")):
        value = settings.get(key, anything)
        if value is True:
            found.append({"pure_bf16": "bf16"}.get(key, key))
        elif isinstance(value, str):
            found.append(value)
    return found


def _targets(settings: Settings, draft: Draft) -> None:
    ours = "adapter.targets"
    if settings.tool == "axolotl" and settings.get("lora_target_linear", flag):
        settings.used.update(settings.keys_of(ours))
        draft.put(ours, "all-linear", "lora_target_linear")
    elif found := settings.first(ours, words):
        names, origin = found
        draft.put(ours, "all-linear" if ALL_LINEAR & set(names) else names, origin)
    else:
        draft.differs.append(
            'targets = "all-linear": without names, PEFT adapts a few projections that it has listed for the family '
            "(q_proj and v_proj as a rule); qpref adapts every linear layer, as QLoRA does"
        )
        draft.put(ours, "all-linear", "no names in the file")


def _batch_size(settings: Settings, draft: Draft, num_gpus: int) -> None:
    if settings.tool == "axolotl" and (total := settings.get("batch_size", whole)):
        settings.used.update(("micro_batch_size", "gradient_accumulation_steps"))
        draft.put("train.batch_size", total, "batch_size")
        return
    per_device = "micro_batch_size" if settings.tool == "axolotl" else "per_device_train_batch_size"
    micro, steps = settings.get(per_device, whole) or 1, settings.get("gradient_accumulation_steps", whole) or 1
    gpus = f"{num_gpus} GPU{'s' if num_gpus > 1 else ''}"
    draft.put(
        "train.batch_size",
        micro * steps * num_gpus,
        f"{per_device} {micro} x gradient_accumulation_steps {steps} x {gpus}",
    )
    if num_gpus == 1:
        draft.differs.append(
            f"batch_size = {micro * steps} is that of one GPU; if the file was run on several, convert with --gpus"
        )


def _length(settings: Settings, draft: Draft) -> None:
    """Epochs and steps. A tool's max_steps repeats the data as often as it has to; here epochs ends a run too."""
    epochs = settings.first("train.epochs", number)
    steps = settings.first("train.max_steps", whole)
    if epochs:
        count = max(1, round(epochs[0] + 0.499))
        draft.put("train.epochs", count, epochs[1])
        if count != epochs[0]:
            draft.differs.append(
                f"epochs = {count}: a whole number here; max_steps ends the run earlier, {epochs[0]:g} epochs' worth "
                "of the steps that `qpref plan` prints"
            )
    if steps and steps[0] > 0:
        draft.put("train.max_steps", *steps)
        draft.differs.append("max_steps: epochs ends a run too; if the data are shorter than that, raise epochs")


def _warmup(settings: Settings, draft: Draft) -> None:
    ratio, steps = settings.get("warmup_ratio", number), settings.get("warmup_steps", number)
    ours = "train.warmup_ratio"
    if steps and steps < 1:  # transformers 5 takes a share here, too
        ratio, steps = steps, None
    total = draft.get("train.max_steps")
    if steps and total:
        draft.put(ours, min(1.0, round(steps / total, 4)), f"warmup_steps {steps:g} of max_steps {total}")
    elif steps:
        draft.differs.append(
            f"warmup_ratio: warmup is a share of the steps; for warmup_steps {steps:g}, set {steps:g} / the steps that "
            "`qpref plan` prints"
        )
    elif ratio is not None:
        draft.put(ours, ratio, settings.origin("warmup_ratio", "warmup_steps"))
    elif steps == 0:
        draft.put(ours, 0.0, settings.origin("warmup_steps"))


def _named(settings: Settings, draft: Draft, ours: str, names: dict[str, str], instead: str) -> None:
    found = settings.first(ours, word)
    if found is None:
        return
    name, origin = found
    draft.put(ours, names.get(name, instead), origin)
    if name not in names:
        draft.differs.append(f'{ours.partition(".")[2]} = "{instead}": {name} has no equal')


def _adam(settings: Settings, draft: Draft) -> None:
    for key, ours in (("adam_beta1", 0.9), ("adam_beta2", 0.999), ("adam_epsilon", 1e-8)):
        value = settings.get(key, number)
        if value is not None and value != ours:
            draft.no_equal[key] = f"it is {ours:g} always"
