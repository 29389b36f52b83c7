"""RLHF with TRL as shipped: its reward trainer and its RLOO trainer, whose objective is the one DPO is derived from.

RLOO (Ahmadian et al. 2024, https://arxiv.org/abs/2402.14740) maximizes the reward minus `beta` times the log-ratio of
the whole response to the reference, as in the DPO paper's section 3; GRPO's KL term is per token and inside the loss.
Only configuration and a callback, nothing of TRL is subclassed or patched. Every 4-bit layer gets
`support_avx512bf16_for_cpu = False`, for the reason in `benchmarks.trl_side`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.frontier import task
from benchmarks.rlhf.meter import Meter
from benchmarks.rlhf.qpref_arms import read_pairs
from benchmarks.rlhf.settings import ALPHA, RANK, Job
from qpref.records import SampledResponse
from qpref.sampling.reward import Scorer

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def with_the_true_reward(job: Job, meter: Meter) -> None:
    """Train on the program's reward itself; each completion's score is a label."""

    scorer = Scorer("sentiment", {})

    def reward(completions: Sequence[str], **_: Any) -> list[float]:
        meter.labels += len(completions)
        return scorer([SampledResponse(prompt=(), text=text, ended=True) for text in completions])

    reinforce(job, meter, reward_funcs=reward)


def with_a_learned_reward(job: Job, meter: Meter) -> None:
    """Train a reward model on the pairs that offline DPO has, then the policy on its reward."""
    model, tokenizer = learn_reward(job, meter)
    reinforce(job, meter, reward_funcs=model, reward_processing_classes=tokenizer)


def learn_reward(job: Job, meter: Meter) -> tuple[Any, Any]:
    """Train a reward model: the same base in NF4, a LoRA of the same rank and a scalar head."""
    import datasets
    from transformers import AutoModelForSequenceClassification
    from trl import RewardTrainer

    tokenizer = load_tokenizer(job.base, "right")
    rows = [{part: row[part] for part in ("prompt", "chosen", "rejected")} for row in read_pairs(Path(job.pairs))]
    meter.labels += len(rows)
    trainer = RewardTrainer(
        model=load(AutoModelForSequenceClassification, job.base, num_labels=1),
        args=reward_config(job),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=lora("SEQ_CLS"),
    )
    trainer.train()
    return trainer.model.eval(), tokenizer


def reinforce(job: Job, meter: Meter, **reward: Any) -> None:
    """Train the policy by RLOO, saving an adapter at each checkpoint."""
    import datasets
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl import RLOOTrainer

    tokenizer = load_tokenizer(job.base, "left")

    class Saved(TrainerCallback):  # type: ignore[misc]
        def on_save(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
            meter.count_models()
            meter.note_saved(state.global_step, Path(args.output_dir) / f"checkpoint-{state.global_step}")

    model = load(AutoModelForCausalLM, job.base)
    model.generation_config.eos_token_id = list(ends(tokenizer))
    trainer = RLOOTrainer(
        model=model,
        args=rloo_config(job),
        train_dataset=datasets.Dataset.from_list([{"prompt": opening} for opening in job.openings]),
        processing_class=tokenizer,
        peft_config=lora("CAUSAL_LM"),
        callbacks=[Saved()],
        **reward,
    )
    assert trainer.ref_model is None, "with a LoRA, TRL's reference is the policy with the adapter off"
    trainer.train()


def rloo_settings(job: Job) -> dict[str, Any]:
    """Return what a user writes; the other settings are TRL's defaults."""
    sizes = job.sizes
    return {
        "beta": job.beta_of_the_reward,
        "learning_rate": sizes.learning_rate,
        "lr_scheduler_type": "constant",
        "num_generations": sizes.k,
        "per_device_train_batch_size": sizes.completions_per_step,
        "steps_per_generation": 2,
        "max_completion_length": task.NEW_TOKENS,
        "max_steps": sizes.rl_steps,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "seed": job.seed,
    }


def reward_settings(job: Job) -> dict[str, Any]:
    sizes = job.sizes
    return {
        "learning_rate": sizes.learning_rate,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": sizes.pairs_per_step,
        "num_train_epochs": sizes.epochs,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "seed": job.seed,
    }


def rloo_config(job: Job) -> Any:
    from trl import RLOOConfig

    every = max(1, job.sizes.rl_steps // job.sizes.checkpoints)
    saving = {"save_strategy": "steps", "save_steps": every, "save_only_model": True}
    return RLOOConfig(output_dir=str(Path(job.folder) / "policy"), **rloo_settings(job), **saving, **QUIET)


def reward_config(job: Job) -> Any:
    from trl import RewardConfig

    folder = str(Path(job.folder) / "reward")
    return RewardConfig(output_dir=folder, **reward_settings(job), save_strategy="no", **QUIET)


QUIET: dict[str, Any] = {
    "report_to": "none",
    "disable_tqdm": True,
    "logging_steps": 1,
    "dataloader_pin_memory": False,
}


def quantization_settings() -> dict[str, Any]:
    return {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.bfloat16,
    }


def lora_settings(kind: str) -> dict[str, Any]:
    return {"r": RANK, "lora_alpha": ALPHA, "target_modules": list(LINEAR), "task_type": kind}


def lora(kind: str) -> Any:
    from peft import LoraConfig

    return LoraConfig(**lora_settings(kind))


def load(kind: Any, base: str, **more: Any) -> Any:
    """Load a base in NF4."""
    from bitsandbytes.nn import Linear4bit
    from transformers import BitsAndBytesConfig

    quantization = BitsAndBytesConfig(**quantization_settings())
    model = kind.from_pretrained(
        base, quantization_config=quantization, dtype=torch.bfloat16, device_map={"": "cpu"}, **more
    )
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
    return model


def load_tokenizer(base: str, padding_side: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(base, padding_side=padding_side)


def ends(tokenizer: Any) -> list[int]:
    """List the tokens that end a response, as in `benchmarks.frontier.task.load`."""
    sentence = [token for token in range(len(tokenizer)) if task.SENTENCE_END.search(tokenizer.decode([token]))]
    return [tokenizer.eos_token_id, *sentence]
