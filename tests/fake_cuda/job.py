"""What a driver runs: a recipe, a model of some shape, pairs of some length. Import it before torch."""

from __future__ import annotations

import argparse
import tempfile
from array import array
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers

from tests.fake_cuda import fake_cuda, names

SHAPES = {  # hidden, MLP, layers, heads, key heads, head width, vocabulary, tied head
    "tiny": (64, 128, 2, 4, 2, 16, 320, True),
    "1B": (2048, 8192, 16, 32, 8, 64, 128256, True),
    "7B": (3584, 18944, 28, 28, 4, 128, 152064, False),
    "8B": (4096, 14336, 32, 32, 8, 128, 128256, False),
}
FAMILIES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}


@dataclass(frozen=True, kw_only=True)
class Job:
    """Attributes: `recomputed` is the number of recomputed layers, -1 for all; `tokens` the micro-batch's budget;
    `prompt` and `response` are each pair's lengths."""

    family: str = "llama"
    shape: str = "tiny"
    pairs: int = 4
    prompt: int = 20
    response: int = 30
    tokens: int = 4096
    recomputed: int = 0
    dtype: str = "bf16"
    loss: str = "dpo"
    optimizer: str = "adamw"
    dropout: float = 0.0
    rank: int = 16
    capability: str = "8.9"

    @classmethod
    def parse(cls, text: str, **defaults: Any) -> tuple[Job, argparse.Namespace]:
        """From the command line; a driver's own flags stand in `defaults` as `--name`."""
        parser = argparse.ArgumentParser(description=text)
        flags = {name: value for name, value in defaults.items() if name not in {each.name for each in fields(cls)}}
        for field in fields(cls):
            default = defaults.get(field.name, field.default)
            parser.add_argument(f"--{field.name}", type=type(field.default), default=default)
        for name, value in flags.items():
            parser.add_argument(f"--{name}", type=type(value), default=value)
        options = parser.parse_args()
        return cls(**{field.name: getattr(options, field.name) for field in fields(cls)}), options

    @property
    def compute(self) -> tuple[int, int]:
        major, _, minor = self.capability.partition(".")
        return int(major), int(minor)

    def config(self) -> Any:
        hidden, mlp, layers, heads, key_heads, width, vocabulary, tied = SHAPES[self.shape]
        window = {"sliding_window": 64} if self.family == "gemma3_text" else {}
        config = transformers.AutoConfig.for_model(
            self.family, hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers, num_attention_heads=heads,
            num_key_value_heads=key_heads, head_dim=width, vocab_size=vocabulary, tie_word_embeddings=tied,
            max_position_embeddings=16384, **window,
        )  # fmt: skip
        config._attn_implementation = "sdpa"
        config.architectures = [FAMILIES[self.family]]
        return config

    def examples(self) -> list[names.TokenizedExample]:
        return [
            names.TokenizedExample(
                prompt=array("i", [8 + place] * self.prompt),
                branches=(array("i", [6] * self.response), array("i", [7] * (self.response + place % 3))),
                truncated=(False, False), weight=1.0, margin=0.0, label=bool(place % 2) if self.loss == "kto" else None,
                source=names.Source(path="made up", line=place + 1),
            )
            for place in range(self.pairs)
        ]  # fmt: skip


class Run:
    """A job under way inside `fake_cuda()`: the plan, the policy, a trainer."""

    def __init__(self, job: Job, folder: Path) -> None:
        config = job.config()
        config.save_pretrained(folder)
        (folder / "none.jsonl").touch()
        self.job, self.folder, self.config, self.examples = job, folder, config, job.examples()
        layers = bool(job.recomputed) if job.recomputed <= 0 else job.recomputed
        recipe = {
            "model": {"base": str(folder), "dtype": job.dtype, "device": "cuda", "quantization": "nf4"},
            "adapter": {"rank": job.rank, "alpha": 2 * job.rank, "dropout": job.dropout},
            "data": {"train": str(folder / "none.jsonl")},
            "loss": {"name": job.loss, "beta": 0.1},
            "train": {"learning_rate": 1e-5, "batch_size": job.pairs, "tokens_per_microbatch": job.tokens,
                      "gradient_checkpointing": layers, "optimizer": job.optimizer},
            "sinks": [],
        }  # fmt: skip
        self.plan = names.make_plan(recipe, (), folder / "run")
        names.use_stand_ins(lambda section: fake_cuda.fake_model(config, names.DTYPES[job.dtype]))
        self.policy = names.load_policy(self.plan.recipe, SimpleNamespace(path=folder, config={}, weights={}))
        self.objective = names.Objective.of(self.plan.losses, (2, 2))
        self.references = names.ReferenceStore()
        self.optimizer: Any = None

    def trainer(self) -> Any:
        parameters = self.policy.trained_parameters().values()
        self.optimizer = names.optim.make_optimizer(self.plan.recipe.train, parameters, self.policy.device)
        scaler = torch.amp.GradScaler("cuda", enabled=self.policy.dtype == torch.float16)
        return names.Trainer(
            train=self.plan.recipe.train, policy=self.policy, objective=self.objective, references=self.references,
            optimizer=self.optimizer, scaler=scaler, examples=self.examples, heldout=self.examples,
            state=names.TrainingState(), recorder=SimpleNamespace(write=lambda row: None), save=lambda: None,
            should_stop=lambda: False,
        )  # fmt: skip

    def parts(self) -> list[list[names.TokenizedExample]]:
        """The step's micro-batches."""
        return names.split_by_tokens(self.examples, self.job.tokens, self.policy.shares_prompts)

    def predicted(self) -> tuple[int, Any]:
        """Tokens of the largest micro-batch, and what the planner says of it: bytes by kind."""
        streams = [
            names.Stream.of([(len(each.prompt), [len(branch) for branch in each.branches]) for each in part])
            for part in self.parts()
        ]
        largest = max(streams, key=lambda stream: stream.tokens)
        shape = names.model_shape(self.plan.recipe.model, self.plan.recipe.adapter, str(self.folder))
        setup = names.Setup.of(self.plan.recipe, "cuda", shape)
        return largest.tokens, names.peak_memory(shape, setup, largest, self.policy.recomputed_layers)


def within(job: Job, work: Callable[[Run, fake_cuda.Meters], Any]) -> Any:
    """Do some work with a job under way on the fake device, in a folder that goes away."""
    with tempfile.TemporaryDirectory() as folder, fake_cuda.fake_cuda(job.compute) as meters:
        return work(Run(job, Path(folder)), meters)
