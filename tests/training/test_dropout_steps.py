"""A step's gradient under dropout: the same in any micro-batches, in any layout, recomputed or not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_objective import STEP_LOSSES, gradients_of_step, make_trainer

from qpref.dropout import step_key
from qpref.training.loop import Trainer

__all__ = ["make_trainer"]

DROPOUT = {"adapter.dropout": 0.3, "train.batch_size": 6}
LOSSES = {"dpo": {"name": "dpo"}, "aot": STEP_LOSSES["aot"], "kto": STEP_LOSSES["kto"]}
"""Which see examples alone, whole steps, and whole steps by their mismatched completions."""


def gradient(trainer: Trainer, tokens: int, seed: int = 0, step: int = 0) -> torch.Tensor:
    """All of a step's gradient, in micro-batches of so many tokens."""
    trainer.state.budget = tokens
    trainer.policy.seed_dropout(seed, step)
    trainer.policy.model.zero_grad(set_to_none=True)
    return torch.cat([value.flatten() for value in gradients_of_step(trainer).values()])


def apart(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest difference, in units of the largest element."""
    return float((found - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("loss", LOSSES)
def test_the_gradient_is_the_same_in_any_micro_batches(make_trainer, loss):
    trainer = make_trainer(DROPOUT, LOSSES[loss])
    whole = gradient(trainer, 100_000)
    for tokens in (1, 150, 400):
        assert apart(gradient(trainer, tokens), whole) <= 1e-6
    assert apart(gradient(trainer, 100_000, step=1), whole) > 0.1


def test_examples_with_one_prompt_have_one_mask_on_it_in_different_micro_batches(make_trainer):
    trainer = make_trainer(DROPOUT | {"train.batch_size": 3})
    first, *others = trainer.examples[:3]
    trainer.examples = [first, *(replace(each, prompt=first.prompt) for each in others)]
    assert apart(gradient(trainer, 1), gradient(trainer, 100_000)) <= 1e-6


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "lm_head"]], ids=str)
def test_the_gradient_is_the_same_with_prompts_shared_or_not(make_trainer, targets):
    trainer = make_trainer(DROPOUT | {"adapter.targets": targets})
    assert trainer.policy.shares_prompts
    shared = gradient(trainer, 100_000)
    trainer.policy.share_prompts(False)
    for tokens in (1, 100_000):
        assert apart(gradient(trainer, tokens), shared) <= 2e-6


def test_the_gradient_is_the_same_to_the_bit_with_recomputed_layers(make_trainer):
    trainer = make_trainer(DROPOUT)
    kept = gradient(trainer, 400)
    trainer.policy.recompute_layers(trainer.policy.num_layers)
    assert torch.equal(gradient(trainer, 400), kept)


def test_another_step_or_seed_drops_something_else(make_trainer):
    trainer = make_trainer(DROPOUT)
    found = [gradient(trainer, 400, *each) for each in ((0, 0), (0, 1), (1, 0), (0, 0))]
    assert torch.equal(found[3], found[0])
    assert all(apart(one, found[0]) > 0.1 for one in found[1:3])


def test_what_a_step_drops_depends_on_no_generator(make_trainer):
    trainer = make_trainer(DROPOUT)
    torch.manual_seed(1)
    before = gradient(trainer, 400)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert torch.equal(gradient(trainer, 400), before)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_loop_drops_by_the_runs_seed_and_the_step(make_trainer):
    trainer = make_trainer(DROPOUT | {"train.seed": 5})
    keys = []
    for step in range(2):
        trainer.state.step = step
        trainer.step()
        keys.append(trainer.policy.step_key)
    assert keys == [step_key(5, 0), step_key(5, 1)]
    assert len({step_key(seed, step) for seed in range(3) for step in range(3)}) == 9
