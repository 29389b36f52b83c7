"""Every micro-batch of a step is noted: one that takes long is progress to the processes that wait for this one."""

from __future__ import annotations

from typing import Any

import pytest
from test_objective import STEP_LOSSES, make_trainer

from qpref.distributed.world import World
from qpref.training.heldout import heldout_means

__all__ = ["make_trainer"]

LOSSES = {"dpo": {"name": "dpo"}, "aot": STEP_LOSSES["aot"], "kto": STEP_LOSSES["kto"]}


class Notes:
    """Stands for the peers of a process alone, and collects what it notes."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def begin(self, stage: str) -> None:
        self.found.clear()

    def note(self, where: str) -> None:
        self.found.append(where)


def noted_by(work: Any) -> list[str]:
    notes: Any = Notes()
    work(World(peers=notes))
    return list(notes.found)


@pytest.mark.parametrize("loss", LOSSES)
def test_each_micro_batch_is_noted(make_trainer, loss):
    trainer = make_trainer({"train.batch_size": 4}, LOSSES[loss])
    trainer.state.budget = 1  # an example a micro-batch

    def step(world: World) -> None:
        trainer.world = world
        trainer.step()

    found = noted_by(step)
    assert found[-4:] == [f"micro-batch {number}/4" for number in range(1, 5)]
    assert len(set(found)) == len(found) == {"dpo": 4, "aot": 8, "kto": 8}[loss]


def test_held_out_micro_batches_are_noted(make_trainer):
    trainer = make_trainer({"train.batch_size": 4})
    found = noted_by(lambda world: heldout_means(trainer.scorer, trainer.examples[:3], 1, world))
    assert found == [f"held-out micro-batch {number}/3" for number in range(1, 4)]
