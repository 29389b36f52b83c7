"""What single processes of a sharded base compute, for the tests."""

from __future__ import annotations

from typing import Any

import torch
from conftest import make_example

from qpref.data.pack import pack
from qpref.distributed.world import World
from qpref.policy.load import load_policy
from qpref.policy.logprobs import completion_logprobs
from qpref.policy.policy import Policy
from qpref.policy.reference import as_reference
from qpref.policy.source import resolve_base
from qpref.recipe.sections import Recipe

LENGTHS = ((5, 3, 4), (9, 6, 2), (3, 7, 7), (12, 4, 5))


def loaded(world: World, tables: dict[str, Any]) -> Policy:
    """The policy that `load_worn` gives, its base shared by the processes."""
    values = {"data": {"train": "none"}, "loss": {"name": "none"}, "train": {"gradient_checkpointing": False}}
    recipe = Recipe.model_validate(values | tables)
    policy = load_policy(recipe, resolve_base(recipe.model), world if world.size > 1 else None)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in policy.trained_parameters().items():
        if "lora_B" in name:
            parameter.data.normal_(std=0.2, generator=generator)
    policy.model.train()
    return policy


def scores_and_gradients(world: World, tables: dict[str, Any], counts: list[int]) -> dict[str, Any]:
    """Scores of this process's examples, and the gradient of all processes' sum."""
    policy = loaded(world, tables)
    examples = [make_example(line, *lengths) for line, lengths in enumerate(LENGTHS)]
    start = sum(counts[: world.rank])
    own = examples[start : start + counts[world.rank]] if world.size > 1 else examples
    values, references = [], []
    for example in own:
        batch = pack([example], policy.device)
        with as_reference(policy):
            references += completion_logprobs(policy, batch).values.tolist()
        found = completion_logprobs(policy, batch).values
        values += found.tolist()
        found.square().sum().backward()
    policy.finish_passes()
    grads = [
        torch.zeros_like(each) if each.grad is None else each.grad for each in policy.trained_parameters().values()
    ]
    world.add(grads)
    return {"values": values, "references": references, "grads": [each.tolist() for each in grads]}
