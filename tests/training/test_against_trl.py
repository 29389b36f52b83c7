"""DPO and IPO against TRL's DPOTrainer: one tiny Llama in float32, the same rows, adapter and optimizer.

The adapter starts away from zero (the reference is the bare base on both sides), so that the first step's rewards are
numbers to compare and not 0.

TRL differs on purpose in two things, both of them metrics. Its IPO loss takes log-ratios per token, as ours does by
default, but the rewards that it logs beside it are those of DPO, beta times the summed log-ratio; ours are what the
loss compares, per token. And a tie between rewards counts as wrong there, as half right here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CHAT_TEMPLATE, make_tokenizer, preference_rows, write_jsonl

from qpref.data.load import load_rows
from qpref.data.order import step_order
from qpref.hooks.types import SinkContext
from qpref.policy.reference import ReferenceStore, row_keys
from qpref.recipe.resolve import make_plan
from qpref.records import TokenizedExample
from qpref.training import optim
from qpref.training.loop import Trainer
from qpref.training.metrics import Recorder
from qpref.training.prepare import Prepared
from qpref.training.prepare import prepare as prepare_plan
from qpref.training.state import TrainingState

BETA, RATE, CLIP, BATCH, STEPS = 0.1, 2e-3, 0.5, 4, 5
TRL_LOSS = {"dpo": "sigmoid", "ipo": "ipo"}


@dataclass(frozen=True, kw_only=True)
class Trajectories:
    """One row a step on each side, and what both trained on.

    Attributes:
        batches: qpref's examples, step by step, as in TRL's data.
        references: summed reference log-probabilities, by example, chosen and rejected.
        trl_ids: TRL's token ids of prompt, chosen and rejected, row by row.
    """

    ours: list[dict[str, float]]
    trl: list[dict[str, float]]
    batches: list[list[TokenizedExample]]
    references: list[list[tuple[float, float]]]
    trl_ids: list[tuple[list[int], list[int], list[int]]]


def prepare(loss: str, base: Path, folder: Path) -> Prepared:
    # TRL scores all that the template puts after a response; without the newline there both score the same tokens.
    make_tokenizer(CHAT_TEMPLATE.replace("<|im_end|>\n", "<|im_end|>")).save_pretrained(folder / "tokenizer")
    recipe = {
        "model": {
            "base": str(base),
            "tokenizer": str(folder / "tokenizer"),
            "quantization": "none",
            "dtype": "float32",
        },
        "adapter": {"rank": 4, "alpha": 8},
        "data": {"train": str(write_jsonl(folder / "train.jsonl", preference_rows(BATCH * STEPS)))},
        "checks": {"too_short": "off"},
        "loss": {"name": loss, "beta": BETA},
        "train": {
            "learning_rate": RATE,
            "schedule": "constant",
            "warmup_ratio": 0.0,
            "batch_size": BATCH,
            "max_grad_norm": CLIP,
            "tokens_per_microbatch": 250,
        },
        "sinks": [],
    }
    plan = make_plan(recipe, (), folder / "run")
    prepared = prepare_plan(plan, load_rows(plan))
    torch.manual_seed(5)
    for name, parameter in prepared.policy.trained_parameters().items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return prepared


def train_ours(prepared: Prepared, folder: Path) -> tuple[list[dict[str, float]], ReferenceStore]:
    policy, references = prepared.policy, ReferenceStore()
    train = prepared.plan.recipe.train
    context = SinkContext(run_folder=folder, first_step=0, total_steps=STEPS)
    recorder = Recorder(folder / "metrics.jsonl", 0, (), context)
    finished = Trainer(
        train=train,
        policy=policy,
        objective=prepared.objective,
        references=references,
        optimizer=optim.make_optimizer(train, policy.trained_parameters().values(), policy.device),
        scaler=torch.amp.GradScaler("cpu", enabled=False),
        examples=prepared.examples,
        heldout=[],
        state=TrainingState(),
        recorder=recorder,
        save=lambda: None,
        should_stop=lambda: False,
    ).run()
    recorder.close()
    assert finished
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()], references


def train_trl(loss: str, base: Path, folder: Path, rows: list[dict], start: dict[str, torch.Tensor]) -> Any:
    """TRL's trainer, trained on `rows` in their order from the adapter `start`; losses unrounded in `losses`."""
    import datasets
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    class Recording(DPOTrainer):
        def compute_loss(self, *positional, **named):
            value = super().compute_loss(*positional, **named)
            self.losses.append(value.item())
            return value

    datasets.disable_progress_bars()
    targets = sorted({name.split(".lora_")[0].rpartition(".")[2] for name in start})
    trainer = Recording(
        model=AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        args=DPOConfig(
            output_dir=str(folder / "trl"),
            loss_type=[TRL_LOSS[loss]],
            beta=BETA,
            max_length=None,
            learning_rate=RATE,
            lr_scheduler_type="constant",
            warmup_steps=0,
            weight_decay=0.0,
            max_grad_norm=CLIP,
            optim="adamw_torch",
            per_device_train_batch_size=BATCH,
            gradient_accumulation_steps=1,
            num_train_epochs=1,
            train_sampling_strategy="sequential",
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            dataloader_pin_memory=False,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(folder / "tokenizer"),
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM"),
    )
    trainer.losses = []
    adapter = {name: value for name, value in trainer.model.named_parameters() if value.requires_grad}
    assert set(adapter) == set(start)
    with torch.no_grad():
        for name, value in start.items():
            adapter[name].copy_(value)
    trainer.train()
    return trainer


def conversation(row: dict[str, object]) -> dict[str, list[dict[str, object]]]:
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    return {side: [{"role": role, "content": row[side]}] for side, role in roles.items()}


def both(loss: str, base: Path, folder: Path) -> Trajectories:
    prepared = prepare(loss, base, folder)
    order = [step_order(BATCH * STEPS, BATCH, 0, step) for step in range(STEPS)]
    start = {name: value.detach().clone() for name, value in prepared.policy.trained_parameters().items()}
    ours, references = train_ours(prepared, folder)
    rows = preference_rows(BATCH * STEPS)
    trainer = train_trl(loss, base, folder, [conversation(rows[place]) for step in order for place in step], start)
    logs = [log for log in trainer.state.log_history if "rewards/chosen" in log]
    batches = [[prepared.examples[place] for place in step] for step in order]
    return Trajectories(
        ours=ours,
        trl=[log | {"loss": value} for log, value in zip(logs, trainer.losses, strict=True)],
        batches=batches,
        references=[
            [tuple(references.rows[key].sum().item() for key in row_keys(example)) for example in batch]
            for batch in batches
        ],
        trl_ids=[(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for row in trainer.train_dataset],
    )


@pytest.fixture(scope="module")
def dpo(make_base, tmp_path_factory) -> Trajectories:
    return both("dpo", make_base(), tmp_path_factory.mktemp("dpo"))


@pytest.fixture(scope="module")
def ipo(make_base, tmp_path_factory) -> Trajectories:
    return both("ipo", make_base(), tmp_path_factory.mktemp("ipo"))


def apart(trajectories: Trajectories, name: str) -> list[float]:
    """Step by step, how far the two sides' values of a metric are from each other."""
    assert len(trajectories.ours) == len(trajectories.trl) == STEPS
    return [abs(ours[name] - trl[name]) for ours, trl in zip(trajectories.ours, trajectories.trl, strict=True)]


def summed_rewards(trajectories: Trajectories) -> list[float]:
    """TRL's logged IPO rewards, by our means: beta times (summed log-probability - the reference's), over the batch."""
    return [
        BETA * (ours["logps/chosen"] - sum(chosen for chosen, _ in references) / BATCH)
        for ours, references in zip(trajectories.ours, trajectories.references, strict=True)
    ]


def test_both_train_on_the_same_token_ids(dpo):
    ours = [(list(example.prompt), *map(list, example.branches)) for batch in dpo.batches for example in batch]
    assert ours == dpo.trl_ids


@pytest.mark.parametrize(
    "name", ["loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"]
)
def test_dpo_first_step_is_trls(dpo, name):
    assert apart(dpo, name)[0] <= 1e-5


@pytest.mark.parametrize("name", ["loss", "rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected"])
def test_dpo_trajectory_is_trls(dpo, name):
    assert max(apart(dpo, name)) <= 1e-4


def test_dpo_gradient_norms_are_trls(dpo):
    assert max(apart(dpo, "grad_norm")) <= 1e-4


def test_dpo_rewards_at_the_first_step_are_not_all_zero(dpo):
    assert min(abs(dpo.trl[0][f"rewards/{side}"]) for side in ("chosen", "rejected")) > 1e-3


def test_dpo_clips_the_gradient_on_the_way(dpo):
    assert min(row["grad_norm"] for row in dpo.ours) > CLIP


def test_ipo_first_loss_is_trls(ipo):
    assert apart(ipo, "loss")[0] <= 1e-5


@pytest.mark.parametrize("name", ["loss", "logps/chosen", "logps/rejected"])
def test_ipo_trajectory_is_trls(ipo, name):
    assert max(apart(ipo, name)) <= 1e-4


def test_ipo_rewards_that_trl_logs_are_summed_over_tokens(ipo):
    summed = summed_rewards(ipo)
    assert [log["rewards/chosen"] for log in ipo.trl] == pytest.approx(summed, abs=1e-4)
