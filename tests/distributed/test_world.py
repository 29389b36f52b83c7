"""What processes tell each other arrives whole, in the order of ranks, and the same in all of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from processes import fork_ranks

from qpref.distributed.world import World


def collectives(world: World) -> dict:
    generator = torch.Generator().manual_seed(world.rank)
    sums = [torch.full((2, 3), float(world.rank + 1)), torch.rand(1000, generator=generator)]
    world.add(sums, "the sums")
    pieces = world.gather(torch.arange(world.rank, dtype=torch.float32), "the pieces")
    world.wait("the others")
    return {
        "sums": [each.tolist() for each in sums],
        "pieces": [piece.tolist() for piece in pieces],
        "facts": world.exchange({"rank": world.rank, "text": "é" * world.rank}, "the facts"),
        "shared": world.share([world.rank, None], "rank 0's fact"),
        "is_first": world.is_first,
    }


@pytest.mark.parametrize("size", [2, 3])
def test_collectives_of_several_processes(size):
    results = fork_ranks(size, collectives)
    assert [result.pop("is_first") for result in results] == [True] + [False] * (size - 1)
    assert all(result == results[0] for result in results)
    draws = [torch.rand(1000, generator=torch.Generator().manual_seed(rank)) for rank in range(size)]
    assert results[0]["sums"][0] == [[size * (size + 1) / 2] * 3] * 2
    torch.testing.assert_close(torch.tensor(results[0]["sums"][1]), torch.stack(draws).sum(0))
    assert results[0]["pieces"] == [[float(n) for n in range(rank)] for rank in range(size)]
    assert results[0]["facts"] == [{"rank": rank, "text": "é" * rank} for rank in range(size)]
    assert results[0]["shared"] == [0, None]


def test_a_process_alone_keeps_what_it_has():
    values = torch.tensor([1.0, 2.0])
    world = World()
    world.add([values], "a sum")
    assert values.tolist() == [1.0, 2.0]
    assert [piece.tolist() for piece in world.gather(values, "the pieces")] == [[1.0, 2.0]]
    assert world.exchange("here", "a fact") == ["here"]
    assert world.share("here", "a fact") == "here"
    assert world.is_first


def tensors_on_the_host(world: World) -> dict[str, Any]:
    devices: Any = "a group that takes tensors of GPUs alone"
    world = replace(world, devices=devices)
    own = torch.full((3,), float(world.rank + 1))
    world.copy_first([own], "a paged optimizer's state")
    total = torch.full((2,), float(world.rank + 1))
    world.add([total], "a sum on the host")
    pieces = world.gather(torch.full((world.rank,), world.rank), "pieces on the host")
    return {"own": own.tolist(), "total": total.tolist(), "pieces": [piece.tolist() for piece in pieces]}


def test_tensors_on_the_cpu_do_not_travel_between_gpus():
    expected = {"own": [1.0] * 3, "total": [3.0] * 2, "pieces": [[], [1]]}
    assert fork_ranks(2, tensors_on_the_host) == [expected] * 2


def rank_0s_tensors(world: World) -> dict[str, Any]:
    tensors = {"empty": torch.empty(0), "scalar": torch.tensor(3.0), "bf16": torch.ones(3, 2, dtype=torch.bfloat16).t()}
    found = world.share_tensors(tensors if world.is_first else None, "the tensors")
    return {name: [str(each.dtype), list(each.shape), each.tolist()] for name, each in found.items()}


def test_tensors_of_any_shape_arrive_whole():
    expected = {
        "empty": ["torch.float32", [0], []],
        "scalar": ["torch.float32", [], 3.0],
        "bf16": ["torch.bfloat16", [2, 3], [[1.0] * 3] * 2],
    }
    assert fork_ranks(2, rank_0s_tensors) == [expected] * 2
