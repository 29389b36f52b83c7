"""Bases that processes can't share are refused by their config, and so is another try where memory has run out."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import load_worn, make_example
from tiny_models import TinyModel

from qpref.distributed.world import World
from qpref.errors import DeviceMemoryError, PolicyError
from qpref.memory.tune import shrink_microbatch
from qpref.policy.shard_limits import refuse_unshardable
from qpref.policy.source import resolve_base
from qpref.recipe.sections import ModelSection


def refusal(base: Path, **settings: str) -> str:
    section = ModelSection.model_validate({"base": str(base), "quantization": "nf4"} | settings)
    with pytest.raises(PolicyError) as refused:
        refuse_unshardable(section, resolve_base(section))
    assert refused.value.hint
    return str(refused.value.what)


def test_a_plain_decoder_can_be_shared(make_base):
    section = ModelSection(base=str(make_base()), quantization="nf4")
    refuse_unshardable(section, resolve_base(section))


def test_a_base_without_4_bit_weights_is_refused(make_base):
    assert refusal(make_base(), quantization="none") == "[distributed] shard_base: processes share 4-bit bases alone"


@pytest.mark.parametrize(
    ("kind", "config", "reason"),
    [
        ("nemotron_h", {}, "has layers with a state"),
        (
            "zamba",
            {"num_hidden_layers": 4, "layer_types": ["mamba", "hybrid"] * 2},
            "has layers that share their weights",
        ),
    ],
)
def test_layers_that_cannot_be_gathered_one_by_one_are_refused(kind, config, reason, tmp_path):
    said = refusal(TinyModel(model_type=kind, config=config).write(tmp_path / "base"))
    assert said.startswith(f"[distributed] shard_base: this {kind} model {reason}, the first is ")


def test_a_process_that_shares_a_base_does_not_repeat_a_step_alone(make_base):
    policy = load_worn({"model": {"base": str(make_base()), "quantization": "nf4", "dtype": "float32"}})
    examples = [make_example(line, 5, 3, 4) for line in range(4)]
    assert shrink_microbatch(policy, examples, 100) < 100
    policy.shards = SimpleNamespace(world=World(rank=1, size=2))
    with pytest.raises(
        DeviceMemoryError, match="ran out of memory with 100 tokens per micro-batch; processes that share a base"
    ) as raised:
        shrink_microbatch(policy, examples, 100)
    assert raised.value.exit_code == 5
    assert "tokens_per_microbatch to 50 or less" in (raised.value.hint or "")
