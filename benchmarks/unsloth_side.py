"""Unsloth's DPO recipe as a contestant, following its documentation. Written without a GPU; it hasn't been run."""

from __future__ import annotations

import torch

from benchmarks import trl_side
from benchmarks.adapter import RANK
from benchmarks.contestants import Job
from benchmarks.meter import Gate


def train(job: Job, gate: Gate) -> None:
    """Train on the pairs in their order, passing the gate before each step."""
    from unsloth import FastLanguageModel, PatchDPOTrainer  # before trl, which it patches

    PatchDPOTrainer()
    longest = max(len(pair.prompt) + max(len(pair.chosen), len(pair.rejected)) for pair in job.pairs)
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(job.base), max_seq_length=longest, dtype=torch.bfloat16, load_in_4bit=True
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=RANK,
        lora_alpha=2 * RANK,
        lora_dropout=0.0,
        target_modules=trl_side.LINEAR,
        bias="none",
        use_gradient_checkpointing="unsloth",
    )
    trainer = trl_side.trainer_class(job.contestant.loss, gate)(
        model=model,
        ref_model=None,
        args=trl_side.make_config(job),
        train_dataset=trl_side.make_dataset(job.contestant.loss, job.pairs),
        processing_class=tokenizer,
        callbacks=[trl_side.turns(gate)],
    )
    trl_side.run(trainer, gate)
