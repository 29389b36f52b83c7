"""The training loop: plain torch, one optimizer step after the other, each a function of the state before it."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from qpref.data.deal import deal
from qpref.data.order import step_order, steps_per_epoch, total_steps
from qpref.data.pack import num_fed_tokens
from qpref.distributed.world import ALONE, World
from qpref.errors import NonFiniteError, RecipeError
from qpref.policy.policy import Policy
from qpref.policy.reference import ReferenceStore
from qpref.recipe.sections import Recipe, TrainSection
from qpref.records import TokenizedExample
from qpref.training import heldout, optim
from qpref.training.best import Criterion
from qpref.training.gradient_check import check_gradients
from qpref.training.length_bias import LengthGroups
from qpref.training.metrics import Recorder
from qpref.training.objective import Objective, progress
from qpref.training.scoring import Scorer
from qpref.training.state import TrainingState
from qpref.training.step import Step, StepResult, apply_gradient, compute_gradient

log = logging.getLogger("qpref")

MAX_NONFINITE_STEPS = 3


@dataclass(slots=True, kw_only=True)
class Trainer:
    """The loop over optimizer steps: when to step, log, evaluate, save and stop.

    Attributes:
        world: the processes of the run, which have the same examples and weights and take each step together.
        train: the recipe's [train].
        objective: the losses, with the options of the step computed last.
        references: reference scores; None for a loss without a reference.
        scaler: fp16's loss scaling; passes everything through in other dtypes.
        state: counters and averages, changed by every step.
        recorder: writes the metric rows.
        save: writes a checkpoint of the current state, or puts it off, see `qpref.training.saving`.
        should_stop: True once a signal asked the run to stop; asked between steps.
        heldout_budget: tokens per micro-batch of held-out rows, lowered when those run out of memory.
        dealt_budget: tokens per micro-batch that steps are dealt by: those of the first step, as each process lowers
            its own where memory runs out.
    """

    world: World = ALONE
    train: TrainSection
    policy: Policy
    objective: Objective
    references: ReferenceStore | None
    optimizer: Any
    scaler: torch.amp.GradScaler
    examples: Sequence[TokenizedExample]
    heldout: Sequence[TokenizedExample]
    state: TrainingState
    recorder: Recorder
    save: Callable[[], None]
    should_stop: Callable[[], bool]
    heldout_budget: int = 0
    dealt_budget: int = 0

    def __post_init__(self) -> None:
        requested = self.train.tokens_per_microbatch
        if not self.state.budget and isinstance(requested, int):
            self.state.budget = requested
        self.heldout_budget = self.state.budget

    @property
    def total_steps(self) -> int:
        return total_steps(self.train, len(self.examples))

    @property
    def scorer(self) -> Scorer:
        objective = replace(self.objective, state=self.state.of_losses)
        return Scorer(self.policy, objective, self.references)

    def run(self) -> bool:
        """Train to the end, which comes early once patience has run out.

        Returns:
            False where a signal stopped the run, saved, between two steps.

        Raises:
            NonFiniteError: three steps in a row had no finite gradient.
            RecipeError: held-out rows lack the metric that the best step is chosen by.
            DiskError: the disk refused two saves in a row, or that of a run that is to stop.
        """
        state, before = self.state, self.state.seconds
        started = time.monotonic()
        if state.step == 0:
            self._evaluate()
        while not self._is_finished():
            values = self.step()
            state.step += 1
            state.seconds = before + time.monotonic() - started
            is_logged = self._is_due(self.train.log_every)
            if is_logged:
                self._record_training(values)
            is_best = self._is_due(self.train.eval_every) and self._evaluate()
            if self._is_finished() and not is_logged:  # this evaluation exhausted the patience
                self._record_training(values)
            self._stop_if_nonfinite()
            stopping = self.should_stop() and not self._is_finished()
            if stopping or is_best or self._is_due(self.train.save_every):
                self.policy.verify_base()
                state.averages.settle(self.world)
                self.save()
            if stopping:
                return False
        return True

    def _is_finished(self) -> bool:
        criterion = Criterion.of(self.train)
        out_of_patience = criterion is not None and criterion.is_out_of_patience(self.state.best)
        return out_of_patience or self.state.step == self.total_steps

    def _is_due(self, every: int | str | None) -> bool:
        """Return whether an event of every `every` steps, or of every epoch, is due after this step.

        Every event is due at the end.
        """
        step = self.state.step
        if self._is_finished():
            return True
        if every == "epoch":
            return step % steps_per_epoch(len(self.examples), self.train.batch_size) == 0
        return isinstance(every, int) and step % every == 0

    def step(self) -> dict[str, float]:
        """Take one optimizer step on `batch_size` examples.

        Returns:
            Its gradient norm, learning rate and scheduled options, by metric name.
        """
        train, index = self.train, self.state.step
        self.world.begin(f"step {index + 1}")
        optim.seed_step(train.seed, index)
        self.policy.seed_dropout(train.seed, index)
        positions = step_order(len(self.examples), train.batch_size, train.seed, index)
        self.policy.model.train()
        examples = [self.examples[position] for position in positions]
        result = self.compute_gradient(examples)
        if index == 0:
            check_gradients(self.policy, examples[0])
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.policy.trained_parameters().values(), train.max_grad_norm)
        grad_norm, *faults = torch.cat([norm[None], result.nonfinite]).tolist()  # one copy to the host
        self.objective.refuse_not_finite(faults, index + 1)
        rate = optim.learning_rate(train, index, self.total_steps)
        if math.isfinite(grad_norm):
            optim.set_learning_rate(self.optimizer, rate)
            apply_gradient(self.scaler, self.optimizer)
            self.state.of_losses = result.state
        self._count_nonfinite(grad_norm)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return {"grad_norm": grad_norm, "learning_rate": rate} | self.objective.scheduled_options()

    def compute_gradient(self, examples: Sequence[TokenizedExample]) -> StepResult:
        """Accumulate the gradient of the current step on these examples, and count their tokens and metrics."""
        state = self.state
        self.dealt_budget = self.dealt_budget or state.budget
        self.objective = self.objective.at(progress(state.step, self.total_steps))
        step = Step(
            scorer=self.scorer,
            scaler=self.scaler,
            examples=examples,
            share=deal(examples, self.world.size, self.policy.shares_prompts, self.dealt_budget)[self.world.rank],
            world=self.world,
        )
        result = compute_gradient(step, state.budget)
        state.budget = result.budget
        state.tokens += sum(num_fed_tokens(example, self.policy.shares_prompts) for example in examples)
        for part in result.parts:
            state.averages.add(part.metrics)
        return result

    def _count_nonfinite(self, grad_norm: float) -> None:
        """Count consecutive steps without a finite gradient.

        fp16's loss scaling overflows occasionally by design; that counts only at the lowest scale.
        """
        searching = self.scaler.is_enabled() and self.scaler.get_scale() > 1
        if math.isfinite(grad_norm):
            self.state.nonfinite = 0
        elif not searching:
            self.state.nonfinite += 1
            if self.world.is_first:
                log.warning("step %d: the gradient is not finite; the step is skipped", self.state.step + 1)

    def _stop_if_nonfinite(self) -> None:
        if self.state.nonfinite >= MAX_NONFINITE_STEPS:
            raise NonFiniteError(
                f"step {self.state.step}: the gradient was not finite {MAX_NONFINITE_STEPS} times in a row",
                "lower [train] learning_rate, or look at the data of these steps; the last checkpoint is good",
            )

    def _record_training(self, values: dict[str, float]) -> None:
        """Write a training row: means since the last one, and the last step's own values."""
        self.state.averages.settle(self.world)
        means = heldout.with_margin(self.state.averages.means())
        self.state.averages.clear()
        self.recorder.write(self.state.row("train", means | values))

    def _evaluate(self) -> bool:
        """Score the held-out examples and write their row; returns whether this step is the best so far."""
        state, criterion = self.state, Criterion.of(self.train)
        if self.heldout:
            means = self.heldout_means()
            if criterion is not None:
                state.best = criterion.update(state.best, state.step, means)
            values = means | self._length_bias()
            self.recorder.write(state.row("eval", {f"eval_{name}": value for name, value in values.items()}))
        return state.is_best

    def _length_bias(self) -> dict[str, float]:
        """Compute the new preference for long answers since the first evaluation; nothing at the first."""
        before, after = self.state.first_scores, self.state.last_scores
        if before is None or after is None or before.step == after.step:
            return {}
        bias = LengthGroups.of(self.heldout).bias(before, after)
        return {} if math.isnan(bias) else {"logps/length_bias": bias}

    def heldout_means(self) -> dict[str, float]:
        """Compute the metrics' means over the held-out examples, and keep the examples' scores.

        Before the first step `rewards/accuracies` is by log-probability; `logps/accuracies` always is.
        """
        means, pairs, self.heldout_budget = heldout.heldout_means(
            self.scorer, self.heldout, self.heldout_budget, self.world
        )
        self.state.note_heldout(*pairs)
        means = self.world.share(means, "the held-out metrics")  # the same bits: the best step and patience need them
        return heldout.untrained(means) if self.state.step == 0 and self.references is not None else means


def refuse_empty_steps(recipe: Recipe, num_examples: int) -> None:
    """Say so where the data make less than one full optimizer step.

    Raises:
        RecipeError: the batch is larger than the data, so its size would not be what the recipe says.
    """
    if not num_examples:
        raise RecipeError("[data] train: the sources' weights leave no training example", "raise them")
    if num_examples < recipe.train.batch_size:
        raise RecipeError(
            f"[train] batch_size is {recipe.train.batch_size}, and there are {num_examples} training examples",
            f"set batch_size to {num_examples} or less",
        )
