"""A process that dies, hangs, fails or does something else ends the run of all, in one message that names it."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch
from processes import Outcome, fork_ranks, start_forks

from qpref.distributed.world import World
from qpref.errors import DataError

TIMEOUT = 3


def dies(world: World) -> None:
    world.wait("the start")
    world.begin("step 12")
    if world.rank == 1:
        time.sleep(1)  # so that its note is in the store
        os.kill(os.getpid(), signal.SIGKILL)
    world.add([torch.ones(3)], "the gradients")


def stands_still(world: World) -> None:
    world.wait("the start")
    world.begin("step 12")
    if world.rank == 1:
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGSTOP)
    world.add([torch.ones(3)], "the gradients")


def never_returns(world: World) -> None:
    world.wait("the start")
    world.begin("step 12")
    if world.rank == 1:
        world.note("the loss of step 12")
        while True:
            time.sleep(0.1)
    world.add([torch.ones(3)], "the gradients")


def fails(world: World, rank: int) -> None:
    world.wait("the start")
    if world.rank == rank:
        raise DataError("pairs.jsonl:7: no such thing")
    world.add([torch.ones(3)], "the gradients")


def all_fail(world: World) -> None:
    world.wait("the start")
    raise DataError("pairs.jsonl:7: no such thing")


def skips_a_sum(world: World) -> None:
    world.begin("step 12")
    if world.rank != 1:
        world.add([torch.ones(3)], "the gradients")
    world.exchange([1], "the metrics")


def skips_a_step(world: World) -> None:
    for step in [12] if world.rank == 1 else [11, 12]:
        world.begin(f"step {step}")
        world.add([torch.ones(3)], "the gradients")


def leaves_early(world: World) -> None:
    if world.rank != 1:
        world.begin("step 13")
        world.add([torch.ones(3)], "the gradients")


def brings_another_shape(world: World) -> None:
    world.add([torch.ones(3 + world.rank)], "the gradients")


def limits(world: World) -> list[float]:
    """Seconds of the world's timeout, and those after which torch ends a message between hosts, and one of devices."""
    groups = [group._get_backend(torch.device("cpu")) for group in (world.hosts, world.devices)]
    return [world.peers.timeout, *(group.options._timeout.total_seconds() for group in groups)]


def is_slow(world: World) -> int:
    if world.rank == 1:
        for _ in world.noted(range(3 * TIMEOUT), "micro-batch"):
            time.sleep(0.7)
    world.add([torch.ones(3)], "the gradients")
    return 1


def only_message(outcomes: list[Outcome]) -> str:
    """The one error message of a run."""
    lines = [line for each in outcomes for line in each.output.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, [each.output for each in outcomes]
    return lines[0]


def codes(outcomes: list[Outcome]) -> list[int]:
    return [each.code for each in outcomes]


@pytest.mark.parametrize("size", [2, 3])
def test_a_killed_process_is_named(size):
    outcomes = start_forks(size, dies, timeout=TIMEOUT)
    assert codes(outcomes) == [13, -signal.SIGKILL, 13][:size]
    assert "rank 1 died at step 12" in only_message(outcomes)


@pytest.mark.parametrize("size", [2, 3])
def test_a_stopped_process_is_named_within_the_timeout(size):
    outcomes = start_forks(size, stands_still, timeout=TIMEOUT, abandoned=[1])
    assert [each.code for each in outcomes if each.rank != 1] == [13, 13][: size - 1]
    message = only_message(outcomes)
    assert f"rank 1 didn't come to the gradients of step 12 within {TIMEOUT} s; " in message
    assert "at step 12" in message


def test_a_process_in_an_endless_call_is_named_and_ends_too():
    outcomes = start_forks(2, never_returns, timeout=TIMEOUT)
    assert codes(outcomes) == [13, 13]
    assert "it is alive, at the loss of step 12" in only_message(outcomes)


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_of_one_process_is_the_error_of_all(rank):
    outcomes = start_forks(3, fails, rank, timeout=TIMEOUT)
    assert codes(outcomes) == [3, 3, 3]
    prefix = f"rank {rank}: " if rank else ""
    assert only_message(outcomes) == f"error: {prefix}pairs.jsonl:7: no such thing"


def test_an_error_of_all_processes_is_said_once():
    outcomes = start_forks(3, all_fail, timeout=TIMEOUT)
    assert codes(outcomes) == [3, 3, 3]
    assert only_message(outcomes) == "error: pairs.jsonl:7: no such thing"


def test_processes_that_come_to_different_collectives_are_told_apart():
    outcomes = start_forks(3, skips_a_sum, timeout=TIMEOUT)
    assert codes(outcomes) == [13, 13, 13]
    message = only_message(outcomes)
    assert "the gradients of step 12" in message
    assert "the metrics of step 12" in message


def test_a_process_that_is_a_step_ahead_is_found():
    outcomes = start_forks(2, skips_a_step, timeout=TIMEOUT)
    assert codes(outcomes) == [13, 13]
    message = only_message(outcomes)
    assert "the gradients of step 11" in message
    assert "the gradients of step 12" in message


def test_a_process_that_calls_one_collective_less_is_found():
    outcomes = start_forks(2, leaves_early, timeout=TIMEOUT)
    assert codes(outcomes) == [13, 13]
    message = only_message(outcomes)
    assert "the gradients of step 13" in message
    assert "the end of the run" in message


def test_sums_of_different_shapes_are_refused():
    outcomes = start_forks(2, brings_another_shape, timeout=TIMEOUT)
    assert codes(outcomes) == [13, 13]
    assert "to the gradients: rank 0 3, rank 1 4" in only_message(outcomes)


def test_a_slow_process_that_makes_progress_is_waited_for():
    outcomes = start_forks(2, is_slow, timeout=TIMEOUT)
    assert codes(outcomes) == [0, 0]
    assert [each.result for each in outcomes] == [1, 1]


def test_torch_ends_no_wait_before_the_process_that_is_missing_is_named():
    """One that makes progress may be waited for longer than the timeout, which none of the tests here takes."""
    for timeout, between_hosts, between_devices in fork_ranks(2, limits):
        assert between_hosts > 100 * timeout
        assert 10 * timeout > between_devices > timeout
