"""TRL as a contestant: its own trainers and `train()`, paused between steps by a callback.

Two settings differ from TRL's defaults. `max_length` is None, since the default would truncate long prompts. And every
4-bit layer gets `support_avx512bf16_for_cpu = False`: on CPUs with AVX512-BF16, bitsandbytes 0.50 otherwise repacks the
weights at the first forward pass in eval mode (the reference's), after which no gradient flows through the base and
LoRA's gradients are wrong; the steps would be faster, and train nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.adapter import RANK, RATE, start_adapter
from benchmarks.contestants import Job
from benchmarks.meter import Gate
from benchmarks.pairs import Pair, as_singles, digest, text

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def train(job: Job, gate: Gate) -> None:
    """Train on the pairs in their order, passing the gate before each step."""
    from transformers import AutoTokenizer

    contestant = job.contestant
    with head_as_on_cuda() if contestant.compacts_head and job.device == "cpu" else contextlib.nullcontext():
        trainer = trainer_class(contestant.loss, gate)(
            model=_load(job.base, job.device),
            args=make_config(job),
            train_dataset=make_dataset(contestant.loss, job.pairs),
            processing_class=AutoTokenizer.from_pretrained(job.base),
            peft_config=_lora(),
            callbacks=[turns(gate)],
        )
        run(trainer, gate)


def run(trainer: Any, gate: Gate) -> None:
    """Initialize the adapter as for all contestants, and train."""
    start_adapter({name: value for name, value in trainer.model.named_parameters() if value.requires_grad})
    gate.digest = digest(_ids(row) for row in trainer.train_dataset)
    trainer.train()


@contextlib.contextmanager
def head_as_on_cuda() -> Iterator[None]:
    """Make TRL's output head project only the scored positions on a CPU, with the code that it uses on a GPU.

    Patching `_use_triton` in this module enables that path; the kernels check another name, and stay torch's. TRL still
    chooses the dtype of the products: 16-bit where the result may be rounded to 16 bits, float32 otherwise.
    """
    with mock.patch("trl.trainer.utils._use_triton", return_value=True):
        yield


def _load(base: Path, device: str) -> Any:
    from bitsandbytes.nn import Linear4bit
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=quantization, dtype=torch.bfloat16, device_map={"": device}
    )
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
    return model


def _lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=RANK, lora_alpha=2 * RANK, lora_dropout=0.0, target_modules=LINEAR, task_type="CAUSAL_LM")


def make_config(job: Job) -> Any:
    from trl import DPOConfig, KTOConfig

    contestant = job.contestant
    kind = DPOConfig if contestant.loss == "dpo" else KTOConfig
    at_once = contestant.pairs_per_microbatch or contestant.pairs_per_step
    return kind(
        output_dir=str(job.folder / "trl"),
        beta=0.1,
        max_length=None,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        per_device_train_batch_size=at_once * (2 if contestant.loss == "kto" else 1),
        gradient_accumulation_steps=contestant.pairs_per_step // at_once,
        num_train_epochs=1,
        train_sampling_strategy="sequential",
        gradient_checkpointing=contestant.checkpointing,
        precompute_ref_log_probs=not contestant.live_reference,
        bf16=True,
        use_cpu=job.device == "cpu",
        dataloader_pin_memory=job.device == "cuda",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def make_dataset(loss: str, pairs: Sequence[Pair]) -> Any:
    import datasets

    datasets.disable_progress_bars()
    if loss == "dpo":
        rows = [
            {"prompt": text(pair.prompt), "chosen": " " + text(pair.chosen), "rejected": " " + text(pair.rejected)}
            for pair in pairs
        ]
    else:
        rows = [
            {"prompt": text(single.prompt), "completion": " " + text(single.completion), "label": single.desirable}
            for single in as_singles(pairs)
        ]
    return datasets.Dataset.from_list(rows)


def _ids(row: dict[str, Any]) -> list[list[int]]:
    parts = ("prompt_ids", "chosen_ids", "rejected_ids")
    singles = ("prompt_ids", "completion_ids", "KL_completion_ids")
    return [row[part] for part in (parts if "chosen_ids" in row else singles)]


def trainer_class(loss: str, gate: Gate) -> type:
    """Subclass TRL's trainer to notify the gate once the model is loaded, and of each loss before it is rounded."""
    from trl import DPOTrainer, KTOTrainer

    parent: Any = DPOTrainer if loss == "dpo" else KTOTrainer

    class Observed(parent):
        def _prepare_dataset(self, *positional: Any, **named: Any) -> Any:
            prepared = super()._prepare_dataset(*positional, **named)
            gate.meter.note_loaded()
            return prepared

        def compute_loss(self, *positional: Any, **named: Any) -> Any:
            loss = super().compute_loss(*positional, **named)
            gate.loss = loss.item()
            return loss

    return Observed


def turns(gate: Gate) -> Any:
    from transformers import TrainerCallback

    class Turns(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            gate.wait()

    return Turns()
