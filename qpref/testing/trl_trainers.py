"""Calls the loss code of the installed TRL on given log-probabilities, without training.

TRL's trainers compute their losses from a model's output, so the model here is a table: token id -> log-probability.
Its output serves every TRL 1.x: logits (read up to 1.14), and the log-probabilities of a fused head (from 1.15).

trl, transformers and datasets are imported inside the functions: training must not need trl.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import logging
import os
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qpref.errors import RecipeError

INSTALL = 'pip install "trl>=1.0,<2"'
PAD, REST, FIRST_ID = 0, 1, 2
"""Token ids: padding, the token with the remaining probability, and the first id of an example's tokens."""


WITH_REFERENCE = frozenset({"DPOTrainer", "KTOTrainer"})


class PairedRow(NamedTuple):
    """Token ids of a pair."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


class UnpairedRow(NamedTuple):
    """Token ids of a single completion, and of another example's completion for the KL estimate."""

    prompt: list[int]
    completion: list[int]
    mismatched: list[int]
    desirable: bool


class NotInTrl(Exception):
    """The installed TRL has no such trainer, loss type or option."""


class TableModel(torch.nn.Module):
    """A language model that gives each token id one log-probability, whatever comes before it.

    Args:
        log_probs: [V] nats by token id.
    """

    def __init__(self, log_probs: Tensor) -> None:
        super().__init__()
        self._log_probs = log_probs

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **ignored: object) -> SimpleNamespace:
        """Score each token after the first of each row: logits [B, L, V], the rest [B, L - 1]."""
        following = input_ids[:, 1:]
        scores = self._log_probs[following]
        rest = (-torch.expm1(scores)).log()
        logits = scores.new_full((*input_ids.shape, len(self._log_probs)), -1e9)
        predicted = logits[:, :-1].scatter(-1, torch.full_like(following, REST)[..., None], rest[..., None])
        predicted = predicted.scatter(-1, following[..., None], scores[..., None])
        is_scored = torch.ones_like(following, dtype=torch.bool) if labels is None else labels[:, 1:] != -100
        zeros = torch.zeros_like(scores).detach()
        return SimpleNamespace(
            logits=torch.cat([predicted, logits[:, -1:]], dim=1),
            log_probs=scores.masked_fill(~is_scored, 0),
            log_sum_sq_probs=log_sum_squares(scores).masked_fill(~is_scored, 0),
            entropy=zeros,
            mean_logits=zeros,
            is_top1=zeros.bool(),
        )


def log_sum_squares(log_probs: Tensor) -> Tensor:
    """Log of p^2 + (1 - p)^2 for each log p: the sum of squared probabilities under `TableModel`."""
    log_probs = log_probs.detach()
    return torch.logaddexp(2 * log_probs, 2 * (-torch.expm1(log_probs)).log())


def trl_version() -> str:
    """Return the version of the installed TRL.

    Raises:
        RecipeError: it isn't installed, fails to import, or is not a 1.x.
    """
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    try:
        with _silence():
            importlib.import_module("trl")
        version = metadata.version("trl")
    except (ImportError, metadata.PackageNotFoundError) as error:
        raise RecipeError(
            f"comparing with TRL needs the package trl, and importing it failed: {error}", INSTALL
        ) from error
    if not version.startswith("1."):
        raise RecipeError(f"TRL {version} is installed, and losses are compared with TRL 1.x", INSTALL)
    return version


def trainer_classes(trainer: str) -> tuple[type, type]:
    """Return TRL's trainer class of that name and its config class, stable or experimental.

    Raises:
        NotInTrl: the installed TRL has neither.
        RecipeError: the module fails to import.
    """
    trl_version()
    config = trainer.replace("Trainer", "Config")
    for module in ("trl", f"trl.experimental.{trainer.removesuffix('Trainer').lower()}"):
        try:
            with _silence():
                found = importlib.import_module(module)
                return getattr(found, trainer), getattr(found, config)
        except (ModuleNotFoundError, AttributeError):
            continue
        except (ImportError, RuntimeError) as error:
            raise RecipeError(f"importing {module}.{trainer} failed: {error}", INSTALL) from error
    raise NotInTrl(f"no {trainer}")


def loss_types(trainer: str) -> frozenset[str]:
    """Return the loss types that the trainer's source compares with; none where TRL has no such trainer."""
    try:
        trainer_class, _ = trainer_classes(trainer)
    except NotInTrl:
        return frozenset()
    sources = [inspect.getsource(kind) for kind in trainer_class.__mro__ if kind.__module__.startswith("trl.")]
    return frozenset(re.findall(r'loss_type == "(\w+)"', "".join(sources)))


def config_fields(trainer: str) -> frozenset[str]:
    """Return the option names of the trainer's config class."""
    return frozenset(field.name for field in dataclasses.fields(trainer_classes(trainer)[1]))


def make_trainer(trainer: str, config: Mapping[str, Any], policy: Any = None, reference: Any = None) -> Any:
    """Make one of TRL's trainers on the CPU, for its loss alone.

    Args:
        trainer: name of the trainer class.
        config: options of its config class.
        policy, reference: transformers models; by default a tiny Llama that is never called.

    Raises:
        NotInTrl: the installed TRL lacks the trainer, or one of the options.
    """
    import datasets

    trainer_class, config_class = trainer_classes(trainer)
    if unknown := sorted(set(config) - config_fields(trainer)):
        raise NotInTrl(f"no option {', '.join(unknown)} of {config_class.__name__}")
    policy = _tiny_llama() if policy is None else policy
    models = {"model": policy}
    if trainer in WITH_REFERENCE:
        models["ref_model"] = _tiny_llama() if reference is None else reference
    row = {"prompt": "a", "completion": "b", "label": True, "chosen": "b", "rejected": "c"}
    columns = ("prompt", "completion", "label") if trainer == "KTOTrainer" else ("prompt", "chosen", "rejected")
    with _silence(), tempfile.TemporaryDirectory() as folder:
        settings = {
            "output_dir": folder,
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "remove_unused_columns": False,
            "report_to": "none",
            "disable_tqdm": True,
            "save_strategy": "no",
            "max_length": 512,
        }
        return trainer_class(
            **models,
            args=config_class(**settings | dict(config)),
            train_dataset=datasets.Dataset.from_list([{name: row[name] for name in columns}] * 2),
            processing_class=_tiny_tokenizer(),
        )


def trl_loss(trainer: Any, policy: Any, rows: Sequence[PairedRow] | Sequence[UnpairedRow]) -> Tensor:
    """Return the mean loss of the rows by the trainer, with gradient in what the policy computes from.

    Raises:
        NotInTrl: it doesn't know the loss type that it was configured with.
    """
    try:
        with _silence():
            loss: Tensor = trainer.compute_loss(policy, batch_of(type(trainer).__name__, rows))
    except ValueError as error:
        if "loss type" in str(error):
            raise NotInTrl(str(error).partition(".")[0].lower()) from error
        raise
    return loss


def batch_of(trainer: str, rows: Sequence[Any]) -> dict[str, Tensor]:
    """Return the rows as the trainer's data collator would."""
    batch = {"DPOTrainer": paired_batch, "KTOTrainer": unpaired_batch}.get(trainer, sided_batch)
    made: dict[str, Tensor] = batch(rows)  # type: ignore[operator]
    return made


def paired_batch(rows: Sequence[PairedRow]) -> dict[str, Tensor]:
    """The batch of TRL's DPO trainer: all chosen rows, then all rejected rows."""
    return _completions([(row.prompt, row.chosen) for row in rows] + [(row.prompt, row.rejected) for row in rows])


def unpaired_batch(rows: Sequence[UnpairedRow]) -> dict[str, Tensor]:
    """The batch of TRL's KTO trainer, under the names of every 1.x."""
    batch = {"label": torch.tensor([row.desirable for row in rows])}
    for prefix, responses in (("", "completion"), ("KL_", "mismatched")):
        made = _completions([(row.prompt, getattr(row, responses)) for row in rows])
        labels = made["input_ids"].masked_fill(made["completion_mask"] == 0, -100)
        batch |= {f"{prefix}{name}": value for name, value in made.items()}
        batch |= {f"{prefix}completion_{name}": made[name] for name in ("input_ids", "attention_mask")}
        batch[f"{prefix}completion_labels"] = labels
    return batch


def sided_batch(rows: Sequence[PairedRow]) -> dict[str, Tensor]:
    """The batch of TRL's trainers without a reference: tensors for each side, the prompt masked in the labels."""
    batch = {}
    for side in ("chosen", "rejected"):
        made = _completions([(row.prompt, getattr(row, side)) for row in rows])
        batch[f"{side}_input_ids"], batch[f"{side}_attention_mask"] = made["input_ids"], made["attention_mask"]
        batch[f"{side}_labels"] = made["input_ids"].masked_fill(made["completion_mask"] == 0, -100)
    return batch


def _completions(sequences: Sequence[tuple[list[int], list[int]]]) -> dict[str, Tensor]:
    """Prompts with their responses, padded on the right."""
    width = max(len(prompt) + len(response) for prompt, response in sequences)
    ids = torch.full((len(sequences), width), PAD)
    attention, completion = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, (prompt, response) in enumerate(sequences):
        end = len(prompt) + len(response)
        ids[row, :end] = torch.tensor(prompt + response)
        attention[row, :end] = 1
        completion[row, len(prompt) : end] = 1
    return {"input_ids": ids, "attention_mask": attention, "completion_mask": completion}


def _tiny_llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    return LlamaForCausalLM(config)


def _tiny_tokenizer() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {word: number for number, word in enumerate(("<pad>", "<s>", "</s>", "a", "b", "c"))}
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, "a")), **special)


@contextmanager
def _silence() -> Iterator[None]:
    """Keep the warnings, log lines and progress bars of TRL and its libraries off the console."""
    import datasets

    before, bars = logging.root.manager.disable, datasets.are_progress_bars_disabled()
    logging.disable(logging.WARNING)
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
        if not bars:
            datasets.enable_progress_bars()
