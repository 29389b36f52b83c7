"""The training loop: plain torch, one optimizer step after the other, each a function of the state before it."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qpref.data.mismatch import only_partner, without_partner
from qpref.data.pack import num_fed_tokens, pack, split_by_tokens
from qpref.errors import NonFiniteError, RecipeError
from qpref.memory.shrink import shrink_microbatch
from qpref.policy.load import Policy
from qpref.policy.reference import ReferenceStore, frozen
from qpref.recipe.sections import Recipe
from qpref.records import MetricRow, PackedBatch, TokenizedExample, TokenLogProbs
from qpref.training import heldout, optim
from qpref.training.best import Best, Watch
from qpref.training.inputs import Inputs, Mismatched, example_metrics, joined_inputs
from qpref.training.invariants import check_gradients
from qpref.training.metrics import Averages, Recorder
from qpref.training.objective import Objective, progress

log = logging.getLogger("qpref")

MAX_NONFINITE_STEPS = 3


@dataclass(slots=True)
class Progress:
    """What changes from step to step, beside the weights and the optimizer. All of it goes into checkpoints.

    Attributes:
        step: optimizer steps done.
        tokens: tokens fed for training.
        seconds: wall time of training.
        nonfinite: steps in a row that were left out for a non-finite gradient.
        budget: tokens per micro-batch in force; a step that runs out of memory halves it.
        averages: of the examples since the last training row.
        best: the best held-out row, where the recipe asks for one.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    nonfinite: int = 0
    budget: int = 0
    averages: Averages = field(default_factory=Averages)
    best: Best | None = None


@dataclass(slots=True, kw_only=True)
class Trainer:
    """One run's parts, and the few functions that need nearly all of them.

    Attributes:
        memory: reference scores of rows seen so far; None for a loss without a reference.
        scaler: fp16's loss scaling; passes everything through for other types.
        recorder: where rows go.
        save: writes a checkpoint of the present state.
        should_stop: whether a signal asked the run to stop; looked at between steps.
        suspicions: of the present step, which losses made values that are not finite.
        heldout_budget: tokens per micro-batch of held-out rows; theirs alone is halved when they run out of memory.
    """

    recipe: Recipe
    policy: Policy
    loss: Objective
    memory: ReferenceStore | None
    optimizer: Any
    scaler: torch.amp.GradScaler
    examples: Sequence[TokenizedExample]
    heldout: Sequence[TokenizedExample]
    progress: Progress
    recorder: Recorder
    save: Callable[[], None]
    should_stop: Callable[[], bool]
    suspicions: list[Tensor] = field(default_factory=list)
    heldout_budget: int = 0

    def __post_init__(self) -> None:
        asked = self.recipe.train.tokens_per_microbatch
        if not self.progress.budget and isinstance(asked, int):
            self.progress.budget = asked
        self.heldout_budget = self.progress.budget

    @property
    def total_steps(self) -> int:
        return optim.total_steps(self.recipe.train, len(self.examples))

    def run(self) -> bool:
        """Train to the end, which comes early where patience has run out; False where a signal stopped it, saved,
        between two steps.

        Raises:
            NonFiniteError: three steps in a row had no finite gradient.
            RecipeError: held-out rows don't have the metric that the best step is chosen by.
        """
        progress, before = self.progress, self.progress.seconds
        started = time.monotonic()
        if progress.step == 0:
            self._record_heldout()
        while not self._is_over():
            grad_norm, rate = self._step()
            progress.step += 1
            progress.seconds = before + time.monotonic() - started
            is_logged = self._is_due(self.recipe.train.log_every)
            if is_logged:
                self._record_training(grad_norm, rate)
            is_best = self._is_due(self.recipe.train.eval_every) and self._record_heldout()
            if self._is_over() and not is_logged:  # the held-out row was what ended it
                self._record_training(grad_norm, rate)
            self._stop_if_nonfinite()
            stopping = self.should_stop() and not self._is_over()
            if stopping or is_best or self._is_due(self.recipe.train.save_every):
                self.save()
            if stopping:
                return False
        return True

    def _is_over(self) -> bool:
        """Whether no step follows."""
        watch = Watch.of(self.recipe.train)
        out_of_patience = watch is not None and watch.is_over(self.progress.best)
        return out_of_patience or self.progress.step == self.total_steps

    def _is_due(self, every: int | str | None) -> bool:
        """Whether something that happens every so many steps, or every epoch, happens after this step.

        Training and held-out rows come at the end always.
        """
        step = self.progress.step
        if self._is_over():
            return True
        if every == "epoch":
            return step % optim.steps_per_epoch(len(self.examples), self.recipe.train.batch_size) == 0
        return isinstance(every, int) and step % every == 0

    def _step(self) -> tuple[float, float]:
        """One optimizer step on `batch_size` pairs; returns the gradient's norm and the learning rate."""
        train, step = self.recipe.train, self.progress.step
        optim.seed_step(train.seed, step)
        places = optim.step_order(len(self.examples), train.batch_size, train.seed, step)
        self.policy.model.train()
        self._compute_gradients([self.examples[place] for place in places])
        if step == 0:
            check_gradients(self.policy)
        self.scaler.unscale_(self.optimizer)
        length = torch.nn.utils.clip_grad_norm_(self.policy.trained_parameters().values(), train.max_grad_norm)
        norm, *faults = torch.cat([length[None], torch.stack(self.suspicions).any(0)]).tolist()  # one copy to the host
        self.loss.refuse_not_finite(faults, step + 1)
        rate = optim.learning_rate(train, step, self.total_steps)
        if math.isfinite(norm):
            optim.set_learning_rate(self.optimizer, rate)
            self.scaler.step(self.optimizer)
        self._count_nonfinite(norm)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return norm, rate

    def _compute_gradients(self, examples: Sequence[TokenizedExample]) -> None:
        """Accumulate the gradient of the step's weighted losses' sum, divided once by the number of examples.

        A step that runs out of memory is repeated in smaller micro-batches: the same examples, the same divisor.
        """
        self.loss = self.loss.at(progress(self.progress.step, self.total_steps))
        while (metrics := self._try_gradients(examples)) is None:
            self.progress.budget = shrink_microbatch(self.policy, examples, self.progress.budget)
        self.progress.tokens += sum(num_fed_tokens(example, self.policy.shares_prompts) for example in examples)
        for values in metrics:
            self.progress.averages.add(values)

    def _try_gradients(self, examples: Sequence[TokenizedExample]) -> list[Mapping[str, Tensor]] | None:
        """The metrics of each micro-batch; None, and no gradient, where the memory didn't suffice."""
        parts = split_by_tokens(examples, self.progress.budget, self.policy.shares_prompts)
        self.suspicions.clear()
        try:
            if self.loss.sees_whole_steps and len(parts) > 1:
                return [self._backward_whole_step(parts)]
            return [self._backward_part(members, len(examples)) for members in parts]
        except torch.OutOfMemoryError:
            self.optimizer.zero_grad(set_to_none=True)
            return None

    def _backward_part(self, members: Sequence[TokenizedExample], num_examples: int) -> Mapping[str, Tensor]:
        batch, inputs = self._score(members)
        return self._backward(inputs, batch.weight, num_examples)

    def _score(self, members: Sequence[TokenizedExample]) -> tuple[PackedBatch, Inputs]:
        """A micro-batch and what the loss sees of it."""
        batch, mismatched = self._pack(members), self._mismatched(members)
        reference = self._reference(batch)
        return batch, self.loss.inputs(batch, self.loss.score(self.policy, batch), reference, mismatched)

    def _backward_whole_step(self, parts: Sequence[Sequence[TokenizedExample]]) -> Mapping[str, Tensor]:
        """The same for a loss that has to see all examples at once, while only one micro-batch fits the memory.

        All micro-batches are scored without a graph; the loss of all gives the slope of each token's log-probability;
        each micro-batch is then scored again, under the same dropout, and its slopes passed back through it (Gao et al.
        2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", section 3).
        """
        batches = [self._pack(members) for members in parts]
        mismatched = [self._mismatched(members) for members in parts]
        references = [self._reference(batch) for batch in batches]
        leaves = []
        with torch.no_grad():
            for place, batch in enumerate(batches):
                leaves.append(self._score_again(batch, place))
        for leaf in leaves:
            leaf.values.requires_grad_()
        scored = zip(batches, leaves, references, mismatched, strict=True)
        inputs = joined_inputs([self.loss.inputs(*one) for one in scored])
        weight = torch.cat([batch.weight for batch in batches])
        metrics = self._backward(inputs, weight, len(weight))
        for place, (batch, leaf) in enumerate(zip(batches, leaves, strict=True)):
            self._score_again(batch, place).values.backward(leaf.values.grad)
        return metrics

    def _pack(self, members: Sequence[TokenizedExample]) -> PackedBatch:
        """The examples as one stream, their mismatched partners left out."""
        if self.loss.needs_mismatched:
            members = [without_partner(example) for example in members]
        return pack(members, self.policy.device)

    def _mismatched(self, members: Sequence[TokenizedExample]) -> Mismatched | None:
        """The scores of the examples' mismatched partners, without a graph; None for losses that don't need them."""
        if not self.loss.needs_mismatched:
            return None
        batch = pack([only_partner(example) for example in members], self.policy.device)
        with torch.no_grad():
            return Mismatched(self.loss.score(self.policy, batch), self._reference(batch))

    def _reference(self, batch: PackedBatch) -> TokenLogProbs | None:
        """The reference's scores, before the policy's: its pass leaves no graph behind. None for losses without one."""
        return None if self.memory is None else self.memory.logprobs(self.policy, batch)

    def _score_again(self, batch: PackedBatch, place: int) -> TokenLogProbs:
        """The policy's scores of a step's micro-batch, with the same dropout whenever it is asked."""
        optim.seed_step(self.recipe.train.seed, self.progress.step, place)
        return self.loss.score(self.policy, batch)

    def _backward(self, inputs: Inputs, weight: Tensor, num_examples: int) -> Mapping[str, Tensor]:
        output = self.loss(inputs)
        objective = (output.losses * weight).sum() / num_examples
        self.scaler.scale(objective).backward()
        self.suspicions.append(self.loss.not_finite(inputs, output))
        return example_metrics(inputs, output)

    def _count_nonfinite(self, norm: float) -> None:
        """fp16's scaling overflows now and then by design; that counts once the scale has nowhere left to fall."""
        searching = self.scaler.is_enabled() and self.scaler.get_scale() > 1
        if math.isfinite(norm):
            self.progress.nonfinite = 0
        elif not searching:
            self.progress.nonfinite += 1
            log.warning("step %d: the gradient is not finite; the step is left out", self.progress.step + 1)

    def _stop_if_nonfinite(self) -> None:
        if self.progress.nonfinite >= MAX_NONFINITE_STEPS:
            raise NonFiniteError(
                f"step {self.progress.step}: the gradient was not finite {MAX_NONFINITE_STEPS} times in a row",
                "lower [train] learning_rate, or look at the data of these steps; the last checkpoint is good",
            )

    def _record_training(self, grad_norm: float, rate: float) -> None:
        progress = self.progress
        means = heldout.with_margin(progress.averages.means())
        values = means | {"grad_norm": grad_norm, "learning_rate": rate}
        progress.averages.clear()
        self.recorder.write(
            MetricRow(
                step=progress.step, split="train", values=values, tokens=progress.tokens, seconds=progress.seconds
            )
        )

    def _record_heldout(self) -> bool:
        """Score the held-out examples; whether this step is the best so far by the recipe's measure."""
        progress, watch = self.progress, Watch.of(self.recipe.train)
        if self.heldout:
            means = self.heldout_means()
            if watch is not None:
                progress.best = watch.look(progress.best, progress.step, means)
            values = {f"eval_{name}": value for name, value in means.items()}
            self.recorder.write(
                MetricRow(
                    step=progress.step, split="eval", values=values, tokens=progress.tokens, seconds=progress.seconds
                )
            )
        return progress.best is not None and progress.best.step == progress.step

    def heldout_means(self) -> dict[str, float]:
        """Means over the held-out pairs.

        Before the first step all implicit rewards are 0, ties alone, so `rewards/accuracies` is by log-probability
        then; `logps/accuracies` is so always.
        """
        averages = Averages()
        with frozen(self.policy):
            for window in heldout.windows(self.heldout):
                while (metrics := self._try_heldout(window)) is None:
                    self.heldout_budget = shrink_microbatch(self.policy, window, self.heldout_budget)
                averages.add(metrics)
        means = heldout.with_margin(averages.means())
        known = {"rewards/accuracies", "logps/accuracies"} <= means.keys()
        if self.progress.step == 0 and known and self.memory is not None:
            means["rewards/accuracies"] = means["logps/accuracies"]
        return means

    def _try_heldout(self, window: Sequence[TokenizedExample]) -> dict[str, Tensor] | None:
        try:
            return self._heldout_metrics(window)
        except torch.OutOfMemoryError:
            return None

    def _heldout_metrics(self, window: Sequence[TokenizedExample]) -> dict[str, Tensor]:
        """[N] metrics of some held-out examples, seen by the loss all at once. Completions that were one row's pair are
        compared as one."""
        parts = split_by_tokens(window, self.heldout_budget, self.policy.shares_prompts)
        inputs = joined_inputs([self._score(members)[1] for members in parts])
        metrics = example_metrics(inputs, self.loss(inputs))
        singles = None if self.loss.is_paired else [example for members in parts for example in members]
        return heldout.with_accuracies(metrics, singles)


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
