"""What the processes of a shared base do in the tests; each function returns JSON."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from conftest import make_example
from torch import Tensor
from torch.distributed.tensor import DTensor

from qpref.data.pack import pack
from qpref.distributed.world import World
from qpref.errors import QprefError
from qpref.policy.load import load_base, load_policy
from qpref.policy.logprobs import completion_logprobs
from qpref.policy.partners import logprobs_with_partners
from qpref.policy.policy import Policy
from qpref.policy.projections import dense_weight
from qpref.policy.reference import ReferenceStore, as_reference
from qpref.policy.reference_cache import ReferenceCache
from qpref.policy.shard_loading import ShardLoader
from qpref.policy.sharded_base import ShardedBase
from qpref.policy.source import resolve_base
from qpref.recipe.resolve import make_plan
from qpref.recipe.sections import ModelSection, Recipe
from qpref.records import EXTRAS, TokenizedExample
from qpref.training.invariants import check_company, check_layout
from qpref.training.reference_check import check_cache
from qpref.training.run import train_plan

EXAMPLES = [make_example(line, *lengths) for line, lengths in enumerate([(5, 3, 4), (9, 6, 2), (3, 7, 7), (12, 4, 5)])]


def loaded(world: World, tables: dict[str, Any]) -> Policy:
    """A policy whose adapter is as after many steps; several processes share its base."""
    values = {"data": {"train": "none"}, "loss": {"name": "none"}, "train": {"gradient_checkpointing": True}}
    recipe = Recipe.model_validate(values | tables)
    policy = load_policy(recipe, resolve_base(recipe.model), world if world.size > 1 else None)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in policy.trained_parameters().items():
        if "lora_B" in name:
            parameter.data.normal_(std=0.2, generator=generator)
    policy.model.train()
    return policy


def computed(world: World, tables: dict[str, Any], counts: Sequence[int]) -> dict[str, Any]:
    """Scores of the first `counts[rank]` examples after those of the lower ranks, and the gradient of all processes'
    sum of squares. Each example is a micro-batch."""
    policy = loaded(world, tables)
    start = sum(counts[: world.rank])
    own = EXAMPLES[start : start + counts[world.rank]]
    found: dict[str, Any] = {"scores": [], "references": [], "partners": [], "squares": [], "entropy": []}
    for index, example in enumerate(own):
        batch = pack([example], policy.device)
        if index % 2 == 0:  # processes differ in their passes without a gradient too
            with as_reference(policy):
                found["references"] += completion_logprobs(policy, batch).values.tolist()
        partners = pack([_partner(example)], policy.device)
        scores, others = logprobs_with_partners(policy, batch, partners, extras=frozenset(EXTRAS if index == 0 else ()))
        found["scores"] += scores.values.tolist()
        found["partners"] += others.values.tolist()
        if scores.log_sum_squares is not None:
            found["squares"] += scores.log_sum_squares.tolist()
        if scores.entropy is not None:
            found["entropy"] += scores.entropy.tolist()
        scores.values.square().sum().backward()
    policy.finish_passes()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in policy.trained_parameters().values()]
    world.add(gradients, "the gradients")
    return found | {"gradients": torch.cat([each.flatten() for each in gradients]).tolist()}


def _partner(example: TokenizedExample) -> TokenizedExample:
    return replace(example, branches=(make_example(example.source.line + 50, 3, 4).branches[0],))


def verified(world: World, tables: dict[str, Any]) -> dict[str, str]:
    """What `verify_base` says of each fault, which rank 1 alone has."""
    policy = loaded(world, tables)
    assert policy.shards is not None
    found = {"sound": _refusal(policy.verify_base)}
    for name, damage in FAULTS.items():
        layer = policy.shards.layers[1].mlp.gate_proj.base_layer
        before = [each.clone() for each in _held(layer)]
        if world.rank == 1:
            damage(layer)
        found[name] = _refusal(policy.verify_base)
        for held, sound in zip(_held(layer), before, strict=True):
            held.copy_(sound)
    found["restored"] = _refusal(policy.verify_base)
    found["ungathered"] = _refusal(lambda: dense_weight(policy.shards.layers[0].mlp.up_proj.base_layer, torch.float32))
    return found


def _held(layer: Any) -> list[Tensor]:
    """Own rows of a 4-bit weight and of its scales, and its code."""
    return [layer.weight.to_local().detach(), layer.scales.to_local().detach(), layer.quant_state.code]


def _flip_a_bit(layer: Linear4bit) -> None:
    _held(layer)[0][7] ^= 1


def _canonicalize_nans(layer: Linear4bit) -> None:
    """What a copy of packed weights as 16-bit floats may do."""
    words = _held(layer)[0].view(-1).view(torch.bfloat16)
    assert bool(words.isnan().any())
    words[words.isnan()] = torch.nan


def _shift_the_scales(layer: Linear4bit) -> None:
    """Scales of other rows, as of another process's part."""
    scales = _held(layer)[1]
    scales.copy_(scales.roll(1))


def _change_the_code(layer: Linear4bit) -> None:
    _held(layer)[2][3] += 1e-3


FAULTS: dict[str, Callable[[Any], None]] = {
    "bit": _flip_a_bit,
    "nan": _canonicalize_nans,
    "scales": _shift_the_scales,
    "code": _change_the_code,
}


def read_bases(world: World, bases: Sequence[str]) -> str:
    """What loading says where each process has a base of its own."""
    model = {"base": bases[world.rank], "quantization": "nf4", "dtype": "float32"}
    return _refusal(lambda: loaded(world, {"model": model}))


def _refusal(work: Callable[[], object]) -> str:
    try:
        work()
    except (QprefError, AttributeError) as error:
        return f"{type(error).__name__} {getattr(error, 'exit_code', '')}: {error}"
    return ""


def check_of_the_cache(policy: Policy, folder: str) -> None:
    """The check of a run's reference cache, in which nothing is yet."""
    references = ReferenceStore(ReferenceCache.open(Path(folder), "0" * 32))
    check_cache(references, policy, pack(EXAMPLES[:1], policy.device), EXAMPLES)


CHECKS: dict[str, Callable[[Policy, str], None]] = {
    "layout": lambda policy, folder: check_layout(policy, make_example(4, 40, 20, 30)),  # it could be shortened
    "company": lambda policy, folder: check_company(policy, EXAMPLES),
    "cache": check_of_the_cache,
}


def checked(world: World, tables: dict[str, Any], check: str, event: str, folder: str) -> None:
    """Run a check of the start, in which rank 1 alone runs out of memory, or is killed, in the first layer of a pass:
    the first pass, or the first one on a path that shares prompts."""
    policy = loaded(world, tables)
    use_attention = Policy.use_attention

    def happen(*_: Any) -> None:
        if event.startswith("killed"):
            os.kill(os.getpid(), signal.SIGKILL)
        raise torch.OutOfMemoryError("CUDA out of memory")

    def armed(policy: Policy, path: str) -> None:
        if path in policy.sharing_paths:
            policy.shards.layers[0].mlp.register_forward_pre_hook(happen)
        use_attention(policy, path)

    if world.rank == 1 and event == "killed while sharing":
        Policy.use_attention = armed  # type: ignore[method-assign]  # of this process, which ends with the check
    elif world.rank == 1:
        policy.shards.layers[0].mlp.register_forward_pre_hook(happen)
    CHECKS[check](policy, folder)
    policy.finish_passes()


def loading(world: World, base: str) -> dict[str, int]:
    """Bytes of tensors that a process has after it has loaded a base or its part, and the most that it had while a
    weight was whole."""
    section = ModelSection(base=base, quantization="nf4", dtype="bf16", double_quantization=False)
    folder, peak = resolve_base(section), [0]
    gc.collect()
    gc.freeze()  # tensors of this moment don't count

    class Watched(ShardLoader):
        def keep_linear(self, name: str, weight: Any) -> torch.nn.Parameter:
            kept = super().keep_linear(name, weight)
            peak[0] = max(peak[0], _tensor_bytes())
            return kept

    loader = Watched(world) if world.size > 1 else None
    model = load_base(section, folder, torch.device("cpu"), loader)
    shards = None if loader is None else ShardedBase.of(model, loader)
    held = _tensor_bytes()
    assert model is not shards
    return {"held": held, "peak": peak[0]}


def _tensor_bytes() -> int:
    """Bytes of all storages that Python has tensors of, one of FSDP2's parameters by its local part."""
    found = [each for each in gc.get_objects() if isinstance(each, Tensor)]
    local = [each.to_local() if isinstance(each, DTensor) else each for each in found]
    storages = [each.untyped_storage() for each in local if each.device.type == "cpu"]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def trained(world: World, document: dict[str, Any], folder: str) -> str:
    """Train with a base that these processes share, of which the last finds out its own sizes; returns the run's
    folder."""
    if world.rank == world.size - 1:
        document["train"] |= {"tokens_per_microbatch": "auto"}
    return str(train_plan(make_plan(document, output=Path(folder) / "shared")))
