"""What an optimizer step does to the adapter, and what it never does to the base."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import preference_rows, write_jsonl
from safetensors.torch import load_file
from torch import Tensor

import qpref
from qpref.data.load import load_rows
from qpref.data.pack import pack, split_by_tokens
from qpref.errors import NonFiniteError, PluginError
from qpref.hooks.types import SinkContext
from qpref.policy.logprobs import completion_logprobs
from qpref.policy.reference import ReferenceStore, as_reference
from qpref.recipe.resolve import make_plan
from qpref.records import LossOutput, PairedInputs, TokenizedExample
from qpref.training import optim
from qpref.training.loop import Trainer
from qpref.training.loss_caller import LossCaller
from qpref.training.metrics import Recorder
from qpref.training.objective import Objective
from qpref.training.prepare import prepare
from qpref.training.state import TrainingState

NF4 = {"model.quantization": "nf4", "model.dtype": "bf16"}


@pytest.fixture
def make_trainer(make_recipe, tmp_path: Path):
    """`make_trainer({"train.batch_size": 2}, moved=True)`: a trainer; `moved` starts B off 0: A has a gradient."""
    made = []

    def make(changes: dict[str, object] | None = None, moved: bool = False) -> Trainer:
        folder = tmp_path / f"run-{len(made)}"
        folder.mkdir()
        plan = make_plan(make_recipe(changes), (), folder)
        prepared = prepare(plan, load_rows(plan))
        if moved:
            torch.manual_seed(5)
            for name, parameter in prepared.policy.trained_parameters().items():
                if "lora_B" in name:
                    torch.nn.init.normal_(parameter, std=0.05)
        parameters = prepared.policy.trained_parameters().values()
        recorder = Recorder(
            folder / "metrics.jsonl", 0, (), SinkContext(run_folder=folder, first_step=0, total_steps=1)
        )
        made.append(recorder)
        return Trainer(
            train=plan.recipe.train,
            policy=prepared.policy,
            objective=prepared.objective,
            references=ReferenceStore(),
            optimizer=optim.make_optimizer(plan.recipe.train, parameters, prepared.policy.device),
            scaler=torch.amp.GradScaler("cpu", enabled=False),
            examples=prepared.examples,
            heldout=prepared.heldout,
            state=TrainingState(),
            recorder=recorder,
            save=lambda: None,
            should_stop=lambda: False,
        )

    yield make
    for recorder in made:
        recorder.close()


def gradient(trainer: Trainer, examples: Sequence[TokenizedExample], tokens: int | None = None) -> dict[str, Tensor]:
    """The gradient that an optimizer step on `examples` would see, with another `tokens_per_microbatch` if given."""
    if tokens is not None:
        trainer.state.budget = tokens
    optim.seed_step(0, 0)
    trainer.policy.model.train()
    trainer.compute_gradient(examples)
    found = {name: value.grad.clone() for name, value in trainer.policy.trained_parameters().items()}
    trainer.optimizer.zero_grad(set_to_none=True)
    return found


def relative_difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference of any element, in units of the largest element."""
    largest = max(value.abs().max().item() for value in expected.values())
    return max((found[name] - value).abs().max().item() for name, value in expected.items()) / largest


def weighted_mean(gradients: Sequence[dict[str, Tensor]], weights: Sequence[float]) -> dict[str, Tensor]:
    """Sum of weight times gradient over the number of gradients, in float64."""
    return {
        name: sum(weight * each[name].double() for weight, each in zip(weights, gradients, strict=True))
        / len(gradients)
        for name in gradients[0]
    }


@pytest.mark.parametrize("loss", ["dpo", "ipo"])
@pytest.mark.parametrize("tokens", [1, 150, 300, 500, 100_000])
def test_gradient_is_the_mean_of_the_pairs_own_for_any_microbatch(make_trainer, loss, tokens):
    trainer = make_trainer({"loss.name": loss}, moved=True)
    examples = trainer.examples[:8]
    alone = weighted_mean([gradient(trainer, [example]) for example in examples], [1.0] * 8)
    assert relative_difference(gradient(trainer, examples, tokens), alone) <= 1e-6


def test_those_microbatches_really_differ(make_trainer):
    examples = make_trainer().examples[:8]
    assert [len(split_by_tokens(examples, tokens)) for tokens in (1, 150, 300, 500, 100_000)] == [8, 8, 3, 2, 1]


def test_gradient_does_not_depend_on_the_order_of_the_pairs(make_trainer):
    trainer = make_trainer(moved=True)
    examples = trainer.examples[:8]
    forward = gradient(trainer, examples, 300)
    assert relative_difference(gradient(trainer, examples[::-1], 300), forward) <= 1e-6


def test_gradient_does_not_depend_on_sharing_prompts(make_trainer):
    trainer = make_trainer(moved=True)
    shared = gradient(trainer, trainer.examples[:8], 300)
    trainer.policy.share_prompts(False)
    trainer.references = ReferenceStore()
    assert relative_difference(gradient(trainer, trainer.examples[:8], 300), shared) <= 1e-6


@pytest.mark.parametrize("size", [1, 3])
def test_gradient_of_a_last_partial_step_is_the_mean_of_its_own_pairs(make_trainer, size):
    # batch_size is 4; an epoch's last step has what is left, and divides by that.
    trainer = make_trainer(moved=True)
    examples = trainer.examples[:size]
    alone = weighted_mean([gradient(trainer, [example]) for example in examples], [1.0] * size)
    assert relative_difference(gradient(trainer, examples, 150), alone) <= 1e-6


def test_row_weights_multiply_the_gradients_of_their_pairs(make_trainer):
    trainer = make_trainer(moved=True)
    weights = [0.0, 0.5, 1.0, 3.0]
    examples = trainer.examples[:4]
    expected = weighted_mean([gradient(trainer, [example]) for example in examples], weights)
    weighted = [replace(example, weight=weight) for example, weight in zip(examples, weights, strict=True)]
    assert relative_difference(gradient(trainer, weighted, 300), expected) <= 1e-6


def test_weights_come_from_the_rows(make_trainer, tmp_path):
    rows = [row | {"weight": 0.25 * place} for place, row in enumerate(preference_rows(12))]
    trainer = make_trainer({"data.train": str(write_jsonl(tmp_path / "weighted.jsonl", rows))})
    assert [example.weight for example in trainer.examples] == [0.25 * place for place in range(12)]


@pytest.mark.parametrize("changes", [{}, {"adapter.dropout": 0.1}, NF4], ids=["plain", "dropout", "nf4"])
def test_gradient_is_the_same_with_checkpointing(make_trainer, changes):
    plain, recomputing = (
        make_trainer(changes | {"train.gradient_checkpointing": on}, moved=True) for on in (False, True)
    )
    expected = gradient(plain, plain.examples[:4])
    assert relative_difference(gradient(recomputing, recomputing.examples[:4]), expected) <= 1e-6


def test_checkpointing_recomputes(make_trainer):
    calls = []
    trainer = make_trainer({"train.gradient_checkpointing": True})
    trainer.policy.decoder.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    gradient(trainer, trainer.examples[:1])
    assert len(calls) == 3  # the reference's pass, the policy's, and the policy's again for the backward pass


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_two_steps_at_rate_5e_7_move_nearly_every_element(make_trainer, optimizer):
    # Two, since A has no gradient at the first step: B is 0 then. In bf16 an A of 0.1 could only move by 5e-4.
    rates = {"train.learning_rate": 5e-7, "train.schedule": "constant", "train.optimizer": optimizer}
    trainer = make_trainer(NF4 | rates)
    before = {name: value.detach().clone() for name, value in trainer.policy.trained_parameters().items()}
    for _ in range(2):
        trainer.step()
        trainer.state.step += 1
    moved = [(value != before[name]).flatten() for name, value in trainer.policy.trained_parameters().items()]
    assert torch.cat(moved).float().mean().item() >= 0.99


def test_adapter_is_float32_on_a_bf16_base(make_trainer):
    types = {value.dtype for value in make_trainer(NF4).policy.trained_parameters().values()}
    assert types == {torch.float32}


def base_digest(trainer: Trainer) -> str:
    """SHA-256 of everything in the model but the adapter: weights, scales of the 4-bit blocks, buffers."""
    digest = hashlib.sha256()
    state = dict(trainer.policy.model.state_dict()) | dict(trainer.policy.model.named_buffers())
    for name in sorted(name for name in state if "lora_" not in name):
        digest.update(name.encode() + state[name].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_leaves_the_bases_bytes_alone(make_trainer, checkpointing):
    trainer = make_trainer(NF4 | {"train.learning_rate": 1e-2, "train.gradient_checkpointing": checkpointing})
    before = base_digest(trainer)
    trainer.run()
    assert base_digest(trainer) == before


def test_reference_is_untouched_by_training(make_trainer):
    trainer = make_trainer(NF4 | {"train.learning_rate": 1e-2, "adapter.dropout": 0.1})
    probe = pack(trainer.examples[:4], trainer.policy.device)

    def reference() -> list[float]:
        with as_reference(trainer.policy):
            return completion_logprobs(trainer.policy, probe).values.tolist()

    before = reference()
    trainer.run()
    assert reference() == before


def test_policy_does_move(make_trainer):
    # The counterpart of the two tests above: they would pass on a run that does nothing.
    trainer = make_trainer(NF4 | {"train.learning_rate": 1e-2})
    probe = pack(trainer.examples[:4], trainer.policy.device)
    before = completion_logprobs(trainer.policy, probe).values
    trainer.run()
    assert (completion_logprobs(trainer.policy, probe).values - before).abs().max().item() > 0.1


def with_faults(loss: Objective, fault: Callable[[Tensor], Tensor], calls: Sequence[int]) -> Objective:
    """A loss whose first pair is spoilt by `fault` in the calls of those numbers, counted from 0."""
    number = iter(range(10**9))
    (caller,) = loss.callers

    def spoilt(inputs: PairedInputs) -> LossOutput:
        output = caller.function(inputs)
        if next(number) not in calls:
            return output
        first = torch.zeros_like(output.losses, dtype=torch.bool)
        first[0] = True
        return replace(output, losses=torch.where(first, fault(output.losses), output.losses))

    return replace(loss, callers=(LossCaller(caller.choice, spoilt),))


def steep(losses: Tensor) -> Tensor:
    """The same values, with a gradient that is not finite, as an overflow in the backward pass leaves it."""
    return losses + (losses - losses.detach()).sqrt()


FAULTS = {
    "nan": lambda losses: losses * torch.nan,
    "inf": lambda losses: losses * torch.inf,
    "-inf": lambda losses: losses * -torch.inf,
    "nan, with a gradient that is finite": lambda losses: losses + (losses * torch.nan).detach(),
}
FOUR_LOSSES = ("dpo", "ipo", "orpo", "simpo")
WHOLE_STEPS = {"train.tokens_per_microbatch": 10_000, "data.heldout": None}


def everything(trainer: Trainer) -> list[list[float]]:
    tensors, _ = optim.optimizer_tensors(trainer.optimizer)
    return [value.tolist() for value in (*trainer.policy.trained_parameters().values(), *tensors.values())]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_loss_that_is_not_finite_stops_the_run_by_name_and_changes_nothing(make_trainer, fault):
    trainer = make_trainer(WHOLE_STEPS, moved=True)
    trainer.step()
    trainer.state.step += 1
    before = everything(trainer)
    trainer.objective = with_faults(trainer.objective, FAULTS[fault], calls=[0])
    with pytest.raises(
        PluginError, match=r"loss 'dpo' \(qpref .* \[loss-dpo\]\) returned a value that is not finite at step 2"
    ):
        trainer.step()
    assert everything(trainer) == before


def test_step_with_a_non_finite_gradient_changes_nothing(make_trainer):
    trainer = make_trainer(WHOLE_STEPS, moved=True)
    trainer.step()
    trainer.state.step += 1
    before = everything(trainer)
    trainer.objective = with_faults(trainer.objective, steep, calls=[0])
    trainer.step()
    assert everything(trainer) == before


NUMBERS = {"nan": torch.nan, "inf": torch.inf, "-inf": -torch.inf}


def spoilt_gradient(parameter: Tensor, value: float) -> Callable[[], None]:
    """Put a number into each gradient of a parameter; returns what ends that."""

    def spoil(parameter: Tensor) -> None:
        parameter.grad.view(-1)[-1] = value

    return parameter.register_post_accumulate_grad_hook(spoil).remove


def spoilt_states(model: torch.nn.Module, value: float) -> Callable[[], None]:
    """Put a number into the hidden states before the head; returns what ends that."""

    def spoil(module, inputs, output: Tensor) -> Tensor:
        output = output.clone()
        output[..., 0] = value
        return output

    (norm,) = (module for name, module in model.named_modules() if name.endswith("model.norm"))
    return norm.register_forward_hook(spoil).remove


@pytest.mark.parametrize(
    ("loss", "every"), [("dpo", 9), *(pytest.param(name, 1, marks=pytest.mark.soak) for name in FOUR_LOSSES)]
)
def test_no_number_that_is_not_finite_changes_a_parameter(make_trainer, tally, loss, every):
    """In the gradient of each tensor of the adapter, and in the hidden states, which is no fault of the loss."""
    trainer = make_trainer(WHOLE_STEPS | {"loss.name": loss, "loss.beta": 0.1}, moved=True)
    trainer.step()
    trainer.state.step += 1
    before = everything(trainer)
    faults = [partial(spoilt_gradient, each) for each in trainer.policy.trained_parameters().values()]
    for fault in [*faults[::every], partial(spoilt_states, trainer.policy.model)]:
        for value in NUMBERS.values():
            end = fault(value)
            trainer.state.nonfinite = 0
            assert not math.isfinite(trainer.step()["grad_norm"])
            end()
            assert trainer.state.nonfinite == 1
            assert everything(trainer) == before
            tally["steps with a number that isn't finite"] += 1
    assert math.isfinite(trainer.step()["grad_norm"])
    assert everything(trainer) != before


def test_training_goes_on_after_two_non_finite_steps(make_trainer):
    trainer = make_trainer(WHOLE_STEPS | {"train.epochs": 3}, moved=True)
    trainer.objective = with_faults(trainer.objective, steep, calls=[1, 2, 4, 5, 7])
    assert trainer.run()
    assert all(bool(value.isfinite().all()) for value in trainer.policy.trained_parameters().values())


def test_third_non_finite_step_in_a_row_stops_the_run(make_trainer):
    trainer = make_trainer(WHOLE_STEPS | {"train.epochs": 3}, moved=True)
    trainer.objective = with_faults(trainer.objective, steep, calls=[1, 3, 4, 5])
    with pytest.raises(NonFiniteError, match="step 6: the gradient was not finite 3 times in a row") as stopped:
        trainer.run()
    assert stopped.value.exit_code == 9


def test_non_finite_step_stands_as_null_in_the_metrics(make_trainer, tmp_path):
    trainer = make_trainer(WHOLE_STEPS, moved=True)
    trainer.objective = with_faults(trainer.objective, steep, calls=[1])
    trainer.run()
    rows = [json.loads(line) for line in (tmp_path / "run-0" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["grad_norm"] is None] == [2]


PLUGIN = """
import torch
from qpref.hooks import Options, PairedLoss, hookimpl
from qpref.records import LossOutput


class NoOptions(Options):
    pass


def build(options):
    calls = []

    def bursting(inputs):
        # A loss whose gradient becomes infinite from the third training step on.
        calls.append(torch.is_grad_enabled())
        losses = -inputs.policy.chosen.mean + inputs.policy.rejected.mean
        steep = losses + (losses - losses.detach()).sqrt()
        return LossOutput(losses=steep if sum(calls) > 2 else losses, metrics={})

    return bursting


@hookimpl
def qpref_losses():
    yield PairedLoss(name="bursting", summary="", options=NoOptions, build=build, needs=frozenset())
"""


def test_checkpoints_of_a_run_that_blew_up_hold_its_last_finite_adapter(make_recipe, tmp_path, monkeypatch):
    site = tmp_path / "site"
    (site / "acme_bursting-1.0.dist-info").mkdir(parents=True)
    (site / "acme_bursting.py").write_text(PLUGIN)
    (site / "acme_bursting-1.0.dist-info" / "METADATA").write_text("Name: acme-bursting\nVersion: 1.0\n")
    (site / "acme_bursting-1.0.dist-info" / "entry_points.txt").write_text("[qpref]\nloss-bursting = acme_bursting\n")
    monkeypatch.syspath_prepend(site)
    many = {"train.tokens_per_microbatch": 10_000, "train.epochs": 3, "train.save_every": 1, "train.log_every": 2}
    recipe = make_recipe(many | {"train.keep": 9}) | {"loss": {"name": "bursting"}}
    with pytest.raises(NonFiniteError):
        qpref.train(recipe, output=tmp_path / "run")
    kept = sorted((tmp_path / "run" / "checkpoints").iterdir())
    adapters = [load_file(folder / "adapter.safetensors") for folder in kept]
    assert [folder.name for folder in kept] == [f"step-{step:06}" for step in (1, 2, 3, 4)]
    assert all(bool(value.isfinite().all()) for adapter in adapters for value in adapter.values())
    assert all(torch.equal(adapters[3][name], value) for name, value in adapters[1].items())
