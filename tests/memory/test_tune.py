"""A step that runs out of memory is computed in smaller parts, to the same gradient, and counted once."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import make_example
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

import qpref
from qpref.data.pack import num_fed_tokens, pack, split_by_tokens, split_indices
from qpref.errors import DeviceMemoryError
from qpref.memory import tune
from qpref.memory.tune import smaller_budget
from qpref.policy.load import load_policy, recomputed_layers
from qpref.policy.logprobs import completion_logprobs
from qpref.policy.policy import Policy
from qpref.policy.reference import ReferenceStore
from qpref.policy.source import resolve_base
from qpref.recipe.resolve import make_plan
from qpref.recipe.sections import Recipe
from qpref.records import TokenizedExample
from qpref.training import checkpoint, optim
from qpref.training.loop import Trainer
from qpref.training.objective import Objective
from qpref.training.state import TrainingState
from qpref.training.step import StepResult, compute_gradient

CPU = torch.device("cpu")


EXAMPLES = [make_example(line, 5 + 3 * line, 6 + line % 4, 9 - line % 3) for line in range(8)]
"""16 to 39 tokens each, 219 together."""
BUDGET = 80
NUM_PARTS = 3


def test_the_examples_make_three_micro_batches_and_seven_after_halving():
    assert [len(part) for part in split_by_tokens(EXAMPLES, BUDGET)] == [2, 3, 3]
    assert [len(part) for part in split_by_tokens(EXAMPLES, BUDGET // 2)] == [1, 1, 1, 1, 1, 1, 2]


@pytest.fixture
def make_trainer(make_base, make_recipe, tmp_path: Path) -> Callable[..., Trainer]:
    """`make_trainer({"loss.name": "ipo"})`: a trainer on EXAMPLES whose adapter is not fresh."""
    base = make_base(initializer_range=0.2)

    def make(changes: dict[str, object] | None = None) -> Trainer:
        values = {"model.base": str(base), "train.tokens_per_microbatch": BUDGET, "train.batch_size": 8}
        plan = make_plan(make_recipe(values | (changes or {})), (), tmp_path / "run")
        policy = load_policy(plan.recipe, resolve_base(plan.recipe.model))
        randomize(policy)
        return Trainer(
            train=plan.recipe.train,
            policy=policy,
            objective=Objective.of(plan.losses),
            references=ReferenceStore(),
            optimizer=optim.make_optimizer(plan.recipe.train, policy.trained_parameters().values(), CPU),
            scaler=torch.amp.GradScaler("cpu", enabled=False),
            examples=EXAMPLES,
            heldout=EXAMPLES,
            state=TrainingState(),
            recorder=SimpleNamespace(write=lambda row: None),
            save=lambda: None,
            should_stop=lambda: False,
        )

    return make


def randomize(policy: Policy) -> None:
    generator = torch.Generator().manual_seed(5)
    for name, parameter in policy.trained_parameters().items():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05, generator=generator)


FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@dataclass
class Device:
    """A device's memory as a test wants it, checked in the middle of each pass through the model.

    Attributes:
        fits: takes the phase of a pass and the number of passes of that phase so far; returns whether memory suffices.
        passes: of each phase so far.
        refused: passes that had no memory.
    """

    policy: Policy
    fits: Callable[[str, int], bool]
    passes: dict[str, int] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)
    error: Exception = FULL

    def __post_init__(self) -> None:
        self.policy.decoder.layers[0].register_forward_hook(self._forward)

    def _forward(self, layer: Any, inputs: Any, output: Tensor) -> None:
        if layer.self_attn.q_proj.disable_adapters:
            self._take("reference")
        elif not torch.is_grad_enabled():
            self._take("scoring")
        else:
            self._take("forward")
            output.register_hook(lambda gradient: self._take("backward"))

    def _take(self, phase: str) -> None:
        self.passes[phase] = self.passes.get(phase, 0) + 1
        if not self.fits(phase, self.passes[phase]):
            self.refused.append(phase)
            assert len(self.refused) < 50, "it never ends"
            raise self.error.with_traceback(None)


def once(phase: str, number: int) -> Callable[[str, int], bool]:
    """Memory for all but one pass."""
    return lambda asked, count: (asked, count) != (phase, number)


def gradients(trainer: Trainer) -> dict[str, Tensor]:
    """Those that an optimizer step on EXAMPLES would see."""
    optim.seed_step(0, 0)
    trainer.policy.model.train()
    trainer.compute_gradient(EXAMPLES)
    found = {name: value.grad.clone() for name, value in trainer.policy.trained_parameters().items()}
    trainer.optimizer.zero_grad(set_to_none=True)
    return found


def apart(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The largest difference of any element, in units of the largest element."""
    largest = max(value.abs().max().item() for value in wanted.values())
    return max((found[name] - value).abs().max().item() for name, value in wanted.items()) / largest


# One step.


@pytest.mark.parametrize("number", range(1, NUM_PARTS + 1))
@pytest.mark.parametrize("phase", ["reference", "forward", "backward"])
@pytest.mark.parametrize("loss", ["dpo", "ipo"])
def test_a_step_that_ran_out_of_memory_is_the_step_that_did_not(loss, phase, number, make_trainer, said, monkeypatch):
    results: list[StepResult] = []

    def noted(*call: Any) -> StepResult:
        results.append(compute_gradient(*call))
        return results[-1]

    monkeypatch.setattr("qpref.training.loop.compute_gradient", noted)
    plain, short = make_trainer({"loss.name": loss}), make_trainer({"loss.name": loss})
    wanted = gradients(plain)
    device = Device(short.policy, once(phase, number))
    found = gradients(short)
    assert device.refused == [phase]
    assert apart(found, wanted) <= 1e-6
    assert short.state.budget == BUDGET // 2
    assert short.state.tokens == plain.state.tokens == sum(map(num_fed_tokens, EXAMPLES))
    assert short.state.averages.means() == pytest.approx(plain.state.averages.means(), rel=1e-5)
    assert set(short.state.averages.counts.values()) == {len(EXAMPLES)}
    assert len(results[-1].parts) == len(split_by_tokens(EXAMPLES, BUDGET // 2))
    assert said == ["out of memory: 40 tokens per micro-batch instead of 80; the step is repeated"]


@pytest.mark.parametrize("number", range(1, NUM_PARTS + 1))
@pytest.mark.parametrize("phase", ["reference", "scoring", "forward", "backward"])
def test_a_step_of_a_loss_that_sees_it_whole_is_the_same_too(phase, number, make_trainer):
    plain, short = make_trainer({"loss.name": "aot"}), make_trainer({"loss.name": "aot"})
    assert short.objective.sees_whole_steps
    wanted = gradients(plain)
    device = Device(short.policy, once(phase, number))
    found = gradients(short)
    assert device.refused == [phase]
    assert apart(found, wanted) <= 1e-6
    assert short.state.averages.means() == pytest.approx(plain.state.averages.means(), rel=1e-5)
    assert set(short.state.averages.counts.values()) == {len(EXAMPLES)}


def test_a_step_that_ran_out_of_memory_again_and_again_is_the_step_that_did_not(make_trainer, said):
    plain, short = make_trainer(), make_trainer({"train.tokens_per_microbatch": 1000})
    wanted = gradients(plain)
    device = Device(short.policy, lambda phase, count: len(device.refused) == 4 or phase != "backward")
    assert apart(gradients(short), wanted) <= 1e-6
    assert device.refused == ["backward"] * 4
    # 250 tokens would be the same single micro-batch of 219, so the first try to change anything is 125.
    assert [line.split()[3] for line in said] == ["125", "62", "31", "all"]


def test_reference_scores_from_before_memory_ran_out_are_kept(make_trainer):
    trainer = make_trainer()
    Device(trainer.policy, once("forward", NUM_PARTS))
    gradients(trainer)
    assert trainer.references.num_computed == len(EXAMPLES)


def test_the_policy_is_itself_again_after_its_reference_ran_out_of_memory(make_trainer):
    plain, trainer = make_trainer(), make_trainer()
    Device(trainer.policy, once("reference", 1))
    gradients(trainer)
    assert trainer.policy.model.training
    batch = pack(EXAMPLES, CPU)
    assert torch.equal(*(completion_logprobs(each.policy, batch).values for each in (plain, trainer)))


def test_an_example_that_is_too_large_by_itself_has_all_layers_recomputed(make_trainer, said, monkeypatch):
    plain, short = make_trainer(), make_trainer()
    wanted, budgets, tried = gradients(plain), [], []

    def split(examples: Sequence[TokenizedExample], budget: int, shared: bool = True) -> list[Any]:
        budgets.append(budget)
        return split_indices(examples, budget, shared)

    monkeypatch.setattr("qpref.memory.tune.split_indices", split)

    def fits(phase: str, count: int) -> bool:
        if phase == "forward":
            tried.append((budgets[-1], short.policy.recomputed_layers))
            assert len(tried) < 50, "it never ends"
        return phase != "forward" or short.policy.recomputed_layers == short.policy.num_layers

    Device(short.policy, fits)
    assert apart(gradients(short), wanted) <= 1e-6
    # At 40 tokens two examples share a micro-batch, but the largest micro-batch is one example.
    assert tried[:3] == [(80, 0), (40, 0), (40, 2)]
    assert set(tried[3:]) == {(40, 2)}
    assert said[-1] == "out of memory: all layers are recomputed from here on; the step is repeated"


def test_an_example_that_is_too_large_even_so_is_an_error(make_trainer):
    trainer = make_trainer()
    device = Device(trainer.policy, lambda phase, count: phase != "backward")
    with pytest.raises(DeviceMemoryError, match="ran out of memory on one example of 41 tokens") as caught:
        gradients(trainer)
    assert caught.value.exit_code == 5
    assert "max_length" in caught.value.hint
    assert device.refused == ["backward"] * 3
    assert all(parameter.grad is None for parameter in trainer.policy.trained_parameters().values())


def test_an_error_of_another_kind_is_not_taken_for_a_lack_of_memory(make_trainer):
    trainer = make_trainer()

    def fault(phase: str, count: int) -> bool:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    Device(trainer.policy, fault)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        gradients(trainer)
    assert trainer.state.budget == BUDGET


KINDS = [
    torch.AcceleratorError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to"),
    MemoryError("std::bad_alloc"),
]


def test_a_step_is_the_same_whichever_kind_of_out_of_memory_it_met(make_trainer):
    trainer = make_trainer()
    wanted = gradients(trainer)
    device = Device(trainer.policy, lambda phase, count: True)
    for error in KINDS:
        trainer.state.budget, device.error = BUDGET, error
        device.passes.clear()
        device.refused.clear()
        device.fits = once("backward", 2)
        assert apart(gradients(trainer), wanted) <= 1e-6
        assert (device.refused, trainer.state.budget) == (["backward"], BUDGET // 2)


@pytest.mark.parametrize("error", KINDS[:2], ids=["driver", "cublas"])
def test_a_loss_that_runs_out_of_memory_is_no_broken_plugin(error, make_trainer):
    plain, short = make_trainer(), make_trainer()
    caller, calls = short.objective.callers[0], []

    def function(inputs: Any) -> Any:
        calls.append(len(inputs.policy.chosen.lengths))
        if len(calls) == 1:
            raise error
        return caller.function(inputs)

    short.objective = replace(short.objective, callers=(replace(caller, function=function),))
    assert apart(gradients(short), gradients(plain)) <= 1e-6
    assert short.state.budget == BUDGET // 2


def test_a_loss_that_ran_out_of_memory_leaves_no_graph_behind(make_trainer):
    trainer = make_trainer()
    caller, held = trainer.objective.callers[0], []

    def function(inputs: Any) -> Any:
        if not held:
            losses = caller.function(inputs).losses
            held.append(weakref.ref(losses))
            raise torch.OutOfMemoryError("CUDA out of memory")
        assert held[0]() is None, "the failed try's graph is still in memory"
        return caller.function(inputs)

    trainer.objective = replace(trainer.objective, callers=(replace(caller, function=function),))
    gradients(trainer)
    assert trainer.state.budget == BUDGET // 2


# The optimizer's first step.


def parameters_after(trainer: Trainer) -> dict[str, Tensor]:
    trainer.step()
    return {name: value.detach().clone() for name, value in trainer.policy.trained_parameters().items()}


def out_of_memory_halfway(trainer: Trainer, times: int) -> list[str]:
    """Let the optimizer run out of memory after it has updated a parameter, as bitsandbytes' would."""
    optimizer, real, calls = trainer.optimizer, trainer.optimizer.step, []

    def step(*call: Any, **options: Any) -> Any:
        calls.append("step")
        if len(calls) > times:
            return real(*call, **options)
        first = optimizer.param_groups[0]["params"][0]
        optimizer.state[first] = {"step": torch.tensor(1.0)}  # its moments didn't fit
        first.data.add_(1.0)
        raise torch.OutOfMemoryError("CUDA out of memory")

    optimizer.step = step
    return calls


def test_a_first_optimizer_step_that_ran_out_of_memory_is_the_step_that_did_not(make_trainer):
    plain, short = make_trainer(), make_trainer()
    calls = out_of_memory_halfway(short, 1)
    wanted, found = parameters_after(plain), parameters_after(short)
    assert calls == ["step", "step"]
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    again, once_more = parameters_after(plain), parameters_after(short)  # with the state of the first
    assert all(torch.equal(once_more[name], value) for name, value in again.items())


def test_an_optimizer_whose_state_does_not_fit_is_an_error_that_says_so(make_trainer):
    trainer = make_trainer()
    calls = out_of_memory_halfway(trainer, 9)
    with pytest.raises(DeviceMemoryError, match="for the optimizer's state") as caught:
        trainer.step()
    assert calls == ["step", "step"]
    assert "adamw_8bit" in caught.value.hint


def test_a_later_optimizer_step_that_runs_out_of_memory_is_an_error_that_says_so(make_trainer):
    trainer = make_trainer()
    trainer.step()
    out_of_memory_halfway(trainer, 9)
    with pytest.raises(DeviceMemoryError, match="for the optimizer's state"):
        trainer.step()


# Held-out rows.


@pytest.mark.parametrize("phase", ["reference", "scoring"])
def test_held_out_rows_that_ran_out_of_memory_say_the_same(phase, make_trainer):
    plain, short = make_trainer(), make_trainer()
    device = Device(short.policy, once(phase, 2))
    short.policy.model.train()
    assert short.heldout_means() == pytest.approx(plain.heldout_means(), rel=1e-5, abs=1e-6)
    assert device.refused == [phase]
    assert (short.heldout_budget, short.state.budget) == (BUDGET // 2, BUDGET)
    assert short.policy.model.training


def test_a_training_step_that_ran_out_of_memory_leaves_the_held_out_rows_budget(make_trainer):
    trainer = make_trainer()
    Device(trainer.policy, once("backward", 1))
    gradients(trainer)
    assert (trainer.heldout_budget, trainer.state.budget) == (BUDGET, BUDGET // 2)


def test_a_held_out_example_that_is_too_large_is_an_error_and_recomputes_nothing(make_trainer):
    trainer = make_trainer()
    Device(trainer.policy, lambda phase, count: phase != "scoring")
    trainer.policy.model.train()
    with pytest.raises(DeviceMemoryError, match="one example of 41 tokens"):
        trainer.heldout_means()
    assert trainer.policy.recomputed_layers == 0
    assert trainer.state.budget == BUDGET


# Whole runs.


@pytest.fixture
def train(make_recipe, tmp_path, monkeypatch) -> Callable[..., Path]:
    """`train("name", fits, save_every=1)`: a run of 3 steps of 4 pairs on a device with that memory.

    `fits` is asked of the step, from 0, the phase, and how many passes of that phase there have been in all.
    """
    monkeypatch.setenv("QPREF_CACHE", str(tmp_path / "cache"))
    real = Trainer.run

    def train(name: str, fits: Callable[[int, str, int], bool], resume: bool = False, **changes: object) -> Path:
        def run(trainer: Trainer) -> bool:
            Device(trainer.policy, lambda phase, count: fits(trainer.state.step, phase, count))
            return real(trainer)

        values = {"reference.cache": False, "train.save_every": 1, "train.log_every": 1, "train.eval_every": 1}
        recipe = make_recipe(values | {f"train.{key}": value for key, value in changes.items()})
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Trainer, "run", run)
            return qpref.train(recipe, output=tmp_path / name, resume=resume).path

    return train


def always(step: int, phase: str, count: int) -> bool:
    return True


def rows_of(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def state_of(folder: Path, step: int) -> dict[str, Any]:
    return json.loads((folder / "checkpoints" / f"step-{step:06}" / "state.json").read_text())


@dataclass
class ShortOnce:
    """Memory for all but one pass of one step."""

    step: int
    phase: str
    refused: int = 0

    def __call__(self, step: int, phase: str, count: int) -> bool:
        if self.refused or (step, phase) != (self.step, self.phase):
            return True
        self.refused += 1
        return False


@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_a_run_that_ran_out_of_memory_once_is_the_run_that_did_not(phase, train):
    plain, fits = rows_of(train("plain", always)), ShortOnce(1, phase)
    folder = train("short", fits)
    assert fits.refused == 1
    short = rows_of(folder)
    exact = ("step", "split", "tokens", "learning_rate")
    assert [[row.get(name) for name in exact] for row in short] == [[row.get(name) for name in exact] for row in plain]
    for found, wanted in zip(short, plain, strict=True):
        assert found.pop("split") == wanted.pop("split")
        assert found == pytest.approx(wanted, rel=1e-3, abs=1e-5)
    budgets = [state_of(folder, step)["budget"] for step in (2, 3)]
    assert budgets[0] == budgets[1] < 400


class Killed(BaseException):
    """The process dies here."""


@pytest.fixture
def dying_after_step_2() -> Iterator[pytest.MonkeyPatch]:
    """The process dies right after the checkpoint of step 2 is on the disk, until this is undone."""
    real = checkpoint.save_checkpoint

    def save(folder: Path, current: checkpoint.Checkpoint, keep: int) -> Path:
        path = real(folder, current, keep)
        if current.step == 2:
            raise Killed
        return path

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save_checkpoint", save)
        yield patch


AT_ANY_STEP = [
    *((phase, step) for phase in ("scoring", "forward", "backward") for step in range(24)),
    *(("reference", step) for step in range(3)),  # scored in the first epoch alone
]


@pytest.fixture(scope="module")
def plain() -> list[dict[str, Any]]:
    """Rows of the run that has memory enough, once it has been trained."""
    return []


@pytest.mark.soak
@pytest.mark.parametrize(("phase", "step"), AT_ANY_STEP)
def test_a_run_that_ran_out_of_memory_at_any_step_is_the_run_that_did_not(phase, step, train, plain, tally):
    settings = {"epochs": 8, "log_every": 8, "eval_every": 1, "save_every": 24}
    plain[:] = plain or rows_of(train("plain", always, **settings))
    fits = ShortOnce(step, phase)
    short = rows_of(train("short", fits, **settings))
    assert fits.refused == 1
    exact = ("step", "split", "tokens", "learning_rate")
    assert [[row.get(name) for name in exact] for row in short] == [[row.get(name) for name in exact] for row in plain]
    tally["passes that ran out of memory"] += fits.refused
    for found, wanted in zip(short, plain, strict=True):
        numbers = {name: value for name, value in wanted.items() if name != "split"}
        assert found.pop("split") == wanted["split"]
        assert found == pytest.approx(numbers, rel=1e-2, abs=1e-3)


def test_a_process_without_examples_has_no_smaller_budget():
    assert smaller_budget([], 100, True) is None


def test_a_smaller_budget_is_remembered_over_a_resume(train, dying_after_step_2, monkeypatch):
    budgets = []

    def split(examples: Sequence[TokenizedExample], budget: int, shared: bool = True) -> list[Any]:
        if torch.is_grad_enabled():  # not those of held-out rows
            budgets.append(budget)
        return split_indices(examples, budget, shared)

    with pytest.raises(Killed):
        train("run", ShortOnce(1, "backward"))
    dying_after_step_2.undo()
    monkeypatch.setattr("qpref.memory.tune.split_indices", split)
    folder = train("run", always, resume=True)
    assert budgets == [200]
    assert [state_of(folder, step)["budget"] for step in (2, 3)] == [200, 200]


def test_recomputed_layers_are_remembered_over_a_resume(train, dying_after_step_2):
    with pytest.raises(Killed):
        train("run", ShortOnce(1, "backward"), tokens_per_microbatch=1)  # an example each: no budget is smaller
    dying_after_step_2.undo()
    folder = train("run", always, resume=True, tokens_per_microbatch=1)
    layers = [state_of(folder, step)["recomputed_layers"] for step in (2, 3)]
    assert layers == [2, 2]


def test_a_run_without_memory_for_one_example_ends_with_exit_code_5(train):
    with pytest.raises(DeviceMemoryError, match="ran out of memory on one example") as caught:
        train("run", lambda step, phase, count: phase != "backward")
    assert caught.value.exit_code == 5


def test_a_run_without_memory_for_its_first_checks_ends_with_exit_code_5(make_recipe, tmp_path, monkeypatch):
    def exhausted(*call: Any, **keywords: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("qpref.training.invariants.check_start", exhausted)
    with pytest.raises(DeviceMemoryError) as caught:
        qpref.train(make_recipe(), output=tmp_path / "run")
    assert caught.value.exit_code == 5


# What a smaller budget is.


def lengths_of_a_row() -> st.SearchStrategy[tuple[int, int, int]]:
    return st.tuples(st.integers(1, 30), st.integers(1, 30), st.integers(1, 30))


def smaller(examples: Sequence[TokenizedExample], budget: int, shared: bool = True) -> int | None:
    """`smaller_budget`, with an end even where it would have none."""
    calls = []

    def split(*call: Any) -> list[Any]:
        calls.append(call)
        assert len(calls) < 50, "it never ends"
        return split_by_tokens(*call)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tune, "split_by_tokens", split)
        return smaller_budget(examples, budget, shared)


def test_no_budget_is_smaller_where_one_example_is_as_large_as_the_largest_part():
    examples = [make_example(1, 8, 2, 2), make_example(2, 3, 2, 2), make_example(3, 3, 2, 2)]
    assert [sum(map(num_fed_tokens, part)) for part in split_by_tokens(examples, 10)] == [10, 10]
    assert smaller(examples, 10) is None


@given(rows=st.lists(lengths_of_a_row(), min_size=1, max_size=12), budget=st.integers(1, 1000), shared=st.booleans())
@settings(deadline=None, max_examples=200)
def test_smaller_budgets_shrink_the_largest_part_until_it_is_no_larger_than_an_example(rows, budget, shared):
    examples = [make_example(line, *lengths) for line, lengths in enumerate(rows)]
    longest = max(num_fed_tokens(example, shared) for example in examples)

    def largest(limit: int) -> int:
        parts = split_by_tokens(examples, limit, shared)
        return max(sum(num_fed_tokens(member, shared) for member in part) for part in parts)

    while largest(budget) > longest:
        found = smaller(examples, budget, shared)
        assert 0 <= found <= budget // 2
        assert largest(found) < largest(budget)
        halved = budget // 2
        while halved > found:  # it is the first half, or half of a half, that changes anything
            assert largest(halved) >= largest(budget)
            halved //= 2
        assert halved == found
        budget = found
    assert smaller(examples, budget, shared) is None


# Recomputed layers.


@pytest.fixture
def deep(make_base, make_recipe) -> Callable[..., Policy]:
    """`deep(2)`: a policy of three layers with this setting of gradient_checkpointing."""
    base = make_base(num_hidden_layers=3, initializer_range=0.2)

    def load(setting: bool | int | str) -> Policy:
        values = {"model.base": str(base), "train.gradient_checkpointing": setting, "adapter.dropout": 0.2}
        recipe = Recipe.model_validate(make_recipe(values))
        policy = load_policy(recipe, resolve_base(recipe.model))
        randomize(policy)
        policy.model.train()
        return policy

    return load


def step(policy: Policy) -> tuple[list[int], dict[str, Tensor]]:
    """How often each layer computes its attention in one step, and the gradients, under the same dropout."""
    counts = [0] * policy.num_layers

    def count(index: int) -> None:
        counts[index] += 1

    hooks = [
        layer.self_attn.register_forward_hook(lambda *call, index=index: count(index))
        for index, layer in enumerate(policy.decoder.layers)
    ]
    policy.model.zero_grad(set_to_none=True)
    completion_logprobs(policy, pack(EXAMPLES, CPU)).values.square().sum().backward()
    for hook in hooks:
        hook.remove()
    return counts, {name: value.grad for name, value in policy.trained_parameters().items()}


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_just_so_many_layers_are_recomputed_to_the_same_gradients(count, deep):
    policy = deep(False)
    once_each, wanted = step(policy)
    assert once_each == [1, 1, 1]
    policy.recompute_layers(count)
    counts, found = step(policy)
    assert counts == [2] * count + [1] * (3 - count)
    assert policy.recomputed_layers == count
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


def test_recomputed_layers_can_become_fewer(deep):
    policy = deep(True)
    for count in (3, 1, 0):
        policy.recompute_layers(count)
        assert step(policy)[0] == [2] * count + [1] * (3 - count)


def test_each_recomputed_layer_keeps_less_of_their_activations(deep):
    policy, held = deep(False), []
    for count in range(4):
        policy.recompute_layers(count)
        total = [0]

        def note(tensor: Tensor, total: list[int] = total) -> Tensor:
            total[0] += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            completion_logprobs(policy, pack(EXAMPLES, CPU))
        held.append(total[0])
    assert held == sorted(held, reverse=True)
    assert len(set(held)) == 4


@pytest.mark.parametrize(("setting", "count"), [(False, 0), (True, 3), (1, 1), (2, 2), (7, 3), ("auto", 3)])
def test_a_recipe_says_how_many_layers_are_recomputed(setting, count, deep):
    assert deep(setting).recomputed_layers == count
    assert recomputed_layers(setting, 3) == count


@pytest.mark.parametrize("setting", [0, -1, "all", 1.5])
def test_a_recipe_that_names_no_number_of_layers_is_refused(setting, make_recipe):
    with pytest.raises(ValidationError, match="gradient_checkpointing"):
        Recipe.model_validate(make_recipe({"train.gradient_checkpointing": setting}))
