"""Tiny models of many families, as fused policies and as the same policies unfused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import TINY, load_worn, make_example, make_tokenizer
from torch import Tensor

from qpref.data.pack import pack
from qpref.policy import load
from qpref.policy.gated_mlp import GatedMLP
from qpref.policy.logprobs import completion_logprobs
from qpref.policy.norms import RMSNorm
from qpref.policy.policy import Policy
from qpref.policy.self_attention import SelfAttention
from qpref.records import PackedBatch

SHARP = TINY | {"initializer_range": 0.2}
"""Weights that are large enough for scores and gates to matter."""
WINDOWS = {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}

FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**SHARP),
    "qwen2": lambda: transformers.Qwen2Config(**SHARP),
    "qwen3": lambda: transformers.Qwen3Config(**SHARP),
    "mistral": lambda: transformers.MistralConfig(**SHARP, sliding_window=7),
    "gemma2": lambda: transformers.Gemma2Config(**SHARP, **WINDOWS, attn_logit_softcapping=None),
    "gemma3": lambda: transformers.Gemma3TextConfig(**SHARP, **WINDOWS),
    "granite": lambda: transformers.GraniteConfig(
        **SHARP, attention_multiplier=0.1, residual_multiplier=0.5, embedding_multiplier=3.0
    ),
    "smollm3": lambda: transformers.SmolLM3Config(**SHARP, no_rope_layers=[1, 0]),
    "olmo": lambda: transformers.OlmoConfig(**SHARP),
    "olmo, clipped": lambda: transformers.OlmoConfig(**SHARP, clip_qkv=1.0),
    "olmo2": lambda: transformers.Olmo2Config(**SHARP),
    "cohere": lambda: transformers.CohereConfig(**SHARP),
    "phi3": lambda: transformers.Phi3Config(**SHARP),
    "glm4_moe": lambda: transformers.Glm4MoeConfig(**SHARP, **EXPERTS, n_routed_experts=4, first_k_dense_replace=2),
    "mixtral": lambda: transformers.MixtralConfig(**SHARP, num_local_experts=4),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(**SHARP, **EXPERTS, num_experts=4),
    "gpt_oss": lambda: transformers.GptOssConfig(**SHARP, num_local_experts=2, num_experts_per_tok=1),
    "nanochat": lambda: transformers.NanoChatConfig(**SHARP),
    "gemma3n": lambda: transformers.Gemma3nTextConfig(
        **SHARP,
        **WINDOWS,
        num_kv_shared_layers=0,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=SHARP["vocab_size"],
        laurel_rank=4,
        activation_sparsity_pattern=[0.5, 0.0],
    ),
}
TARGETS = {"gpt_oss": ["q_proj", "v_proj"], "glm4_moe": ["q_proj", "v_proj"]}
"""Of families whose experts PEFT would adapt too."""
FUSED_KINDS = (SelfAttention, GatedMLP, RMSNorm)

BATCH_LENGTHS = ((9, 7, 5), (4, 1, 12))


@pytest.fixture(scope="session")
def make_family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`make_family("qwen3")`: a folder with a tiny model, its norms' weights and its biases random too."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(FAMILIES[family]())
            for name, parameter in model.named_parameters():
                if parameter.ndim == 1:
                    torch.nn.init.normal_(parameter, 0.0 if "bias" in name else 1.0, 0.1)
            made[family] = tmp_path_factory.mktemp("family")
            model.save_pretrained(made[family])
            make_tokenizer().save_pretrained(made[family])
        return made[family]

    return make


@contextmanager
def unfused() -> Iterator[None]:
    """Load policies inside without fused layers, but for the linear ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load, "fuse_layers", lambda *call: None)
        yield


def load_family(base: Path, family: str, dtype: str = "float32", **changes: Any) -> Policy:
    """A policy whose adapters have learned something; whole rows where the family can't share prompts."""
    adapter = {"rank": 4, "alpha": 8, "targets": TARGETS.get(family, "all-linear")}
    tables = {
        "model": {"base": str(base), "quantization": changes.pop("quantization", "none"), "dtype": dtype},
        "train": {"gradient_checkpointing": changes.pop("recomputed", False)},
        "adapter": changes.pop("adapter", None) or adapter | changes,
    }
    policy = load_worn(tables)
    if family == "gpt_oss":
        policy.share_prompts(False)
    return policy


def make_batch(seed: int = 0) -> PackedBatch:
    lines = range(10 * seed, 10 * seed + len(BATCH_LENGTHS))
    examples = [make_example(line, *lengths) for line, lengths in zip(lines, BATCH_LENGTHS, strict=True)]
    return pack(examples, torch.device("cpu"))


def num_fused(policy: Policy) -> tuple[int, ...]:
    """Attention layers, MLPs and norms that are fused."""
    kinds = Counter(type(module) for module in policy.decoder.modules())
    return tuple(kinds[kind] for kind in FUSED_KINDS)


def outcome(policy: Policy, batch: PackedBatch) -> dict[str, Tensor]:
    """Log-probabilities, and every adapter's gradient of chosen less rejected."""
    policy.model.zero_grad(set_to_none=True)
    scores = completion_logprobs(policy, batch)
    signs = torch.tensor([1.0, -1.0]).repeat(len(batch.examples))
    (scores.total * signs).sum().backward()
    gradients = {name: each.grad for name, each in policy.trained_parameters().items() if each.grad is not None}
    return {"values": scores.values.detach(), **gradients}


def apart(found: Tensor, wanted: Tensor) -> float:
    """Relative Euclidean difference."""
    wanted = wanted.detach().double()
    return float((found.detach().double() - wanted).norm() / wanted.norm().clamp_min(1e-30))


def furthest(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    assert found.keys() == wanted.keys()
    return max(apart(value, wanted[name]) for name, value in found.items())


def squared_errors(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> Tensor:
    """[2] relative, of the values and of all gradients together."""
    of_gradients, of_wanted = (
        torch.cat([each[name].double().flatten() for name in wanted if name != "values"]) for each in (found, wanted)
    )
    return torch.tensor([apart(found["values"], wanted["values"]), apart(of_gradients, of_wanted)]).square()
