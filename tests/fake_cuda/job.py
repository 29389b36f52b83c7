"""What a driver runs: a recipe, a model of some shape, pairs of some length. Import it before torch."""

from __future__ import annotations

import argparse
import functools
import json
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
    "mistral": "MistralForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
WINDOWS = {
    "mistral": {"sliding_window": 16},
    "gemma3_text": {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]},
}
"""Windows shorter than the default pairs; at full size Gemma3 keeps its own pattern of layers."""
EXPERTS = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 64, "num_experts_per_tok": 2, "decoder_sparse_step": 1},
}
SINGLES = ("kto", "apo_zero_unpaired")
"""Losses of single completions."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """Attributes: `recomputed` is the number of recomputed layers, -1 for all; `tokens` the micro-batch's budget;
    `prompt` and `response` are each pair's lengths; `start` is 1 for a run that starts from an adapter; `width`
    replaces the shape's head width."""

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
    start: int = 0
    width: int = 0

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

    @property
    def has_flash(self) -> bool:
        """Whether the card and the model's heads suit the one-call kernels."""
        width = self.width or SHAPES[self.shape][5]
        return self.compute >= (8, 0) and width % 8 == 0 and width <= 256

    def config(self) -> Any:
        hidden, mlp, layers, heads, key_heads, width, vocabulary, tied = SHAPES[self.shape]
        width = self.width or width
        changes = WINDOWS.get(self.family, {}) | EXPERTS.get(self.family, {})
        if layers != 2:
            changes.pop("layer_types", None)
        config = transformers.AutoConfig.for_model(
            self.family, hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers, num_attention_heads=heads,
            num_key_value_heads=key_heads, head_dim=width, vocab_size=vocabulary, tie_word_embeddings=tied,
            max_position_embeddings=16384, **changes,
        )  # fmt: skip
        config._attn_implementation = "sdpa"
        config.architectures = [FAMILIES[self.family]]
        return config

    def examples(self) -> list[names.TokenizedExample]:
        """Pairs, or single completions where the loss takes those, each with a prompt of its own."""
        is_single = self.loss in SINGLES
        sides = slice(1 if is_single else 2)
        return [
            names.TokenizedExample(
                prompt=array("i", [8 + place] * self.prompt),
                branches=(array("i", [6] * self.response), array("i", [7] * (self.response + place % 3)))[sides],
                truncated=(False, False)[sides], weight=1.0, margin=0.0,
                label=bool(place % 2) if is_single else None, source=names.Source(path="made up", line=place + 1),
            )
            for place in range(self.pairs)
        ]  # fmt: skip


class Run:
    """A job under way inside `fake_cuda()`: the plan, the policy, a trainer."""

    def __init__(self, job: Job, folder: Path) -> None:
        config = job.config()
        config.save_pretrained(folder)
        (folder / "none.jsonl").touch()
        self.job, self.folder, self.config = job, folder, config
        self.plan = self.plan_of(job.loss)
        self.base: Any = None
        names.use_stand_ins(self._make_base, self._start_tensors)
        self.policy = names.load_policy(self.plan.recipe, self.base_folder)
        if job.compute < (8, 0):  # a real kernel refuses the card there, and the layout check leaves the last path
            self.policy.use_attention(self.policy.sharing_paths[-1])
        self.objective = names.Objective.of(self.plan.losses, (2, 2))
        self.examples = job.examples()
        if self.objective.needs_mismatched:
            self.examples = names.with_mismatched(self.examples, 0, 16384)
        self.references = names.ReferenceStore() if self.objective.needs_reference else None
        self.optimizer: Any = None

    def plan_of(self, loss: str) -> Any:
        """The run's plan with some loss."""
        job = self.job
        layers = bool(job.recomputed) if job.recomputed <= 0 else job.recomputed
        recipe = {
            "model": {"base": str(self.folder), "dtype": job.dtype, "device": "cuda", "quantization": "nf4"},
            "adapter": self._adapter(),
            "data": {"train": str(self.folder / "none.jsonl")},
            "loss": {"name": loss},
            "train": {"learning_rate": 1e-5, "batch_size": job.pairs, "tokens_per_microbatch": job.tokens,
                      "gradient_checkpointing": layers, "optimizer": job.optimizer, "max_steps": 8},
            "sinks": [],
        }  # fmt: skip
        return names.make_plan(recipe, (), self.folder / "run")

    @property
    def base_folder(self) -> Any:
        return SimpleNamespace(path=self.folder, config={}, weights={})

    def _adapter(self) -> dict[str, Any]:
        """The recipe's table, and the folder of the start adapter where there is one."""
        job = self.job
        if not job.start:
            return {"rank": job.rank, "alpha": 2 * job.rank, "dropout": job.dropout}
        start = self.folder / "start"
        start.mkdir(exist_ok=True)
        settings = {"peft_type": "LORA", "r": job.rank, "lora_alpha": 2 * job.rank, "target_modules": self._targets()}
        (start / "adapter_config.json").write_text(json.dumps(settings))
        (start / "adapter_model.safetensors").touch()
        return {"start": str(start), "dropout": job.dropout}

    def _targets(self) -> list[str]:
        """The linear layers by their last names, as PEFT saves them; a mixture's experts are none."""
        attention, mlp = [f"{each}_proj" for each in "qkvo"], ["gate_proj", "up_proj", "down_proj"]
        return attention if self.job.family in EXPERTS else attention + mlp

    def _make_base(self, section: Any) -> Any:
        self.base = fake_cuda.fake_model(self.config, names.DTYPES[section.dtype], section.quantization == "nf4")
        return self.base

    def _start_tensors(self) -> dict[str, torch.Tensor]:
        """The start adapter's file: matrices on the CPU for each linear layer of the decoder."""
        return {
            f"base_model.model.{name}.lora_{side}.weight": torch.empty(shape)
            for name, out, inputs in self.linears
            for side, shape in (("A", (self.job.rank, inputs)), ("B", (out, self.job.rank)))
        }

    @functools.cached_property
    def linears(self) -> list[tuple[str, int, int]]:
        """Name, outputs and inputs of each linear layer of the decoder, as in the base before it has adapters."""
        head = self.base.get_output_embeddings()
        return [
            (name, module.out_features, module.in_features)
            for name, module in self.base.named_modules()
            if isinstance(module, torch.nn.Linear) and module is not head
        ]

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
        demand = names.tune.demand_of(self.policy, self.plan.recipe, self.folder, self.examples)
        return largest.tokens, names.peak_memory(demand.shape, demand.setup, largest, self.policy.recomputed_layers)


def within(job: Job, work: Callable[[Run, fake_cuda.Meters], Any]) -> Any:
    """Do some work with a job under way on the fake device, in a folder that goes away."""
    as_by_default = names.deterministic(True, torch.device("cuda"))
    with tempfile.TemporaryDirectory() as folder, fake_cuda.fake_cuda(job.compute) as meters, as_by_default:
        return work(Run(job, Path(folder)), meters)
