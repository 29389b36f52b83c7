"""What lies between losses and the loop: steps that are seen whole, single completions, mixtures, schedules, extras."""

from __future__ import annotations

import json
import math
from array import array
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import preference_rows, write_jsonl

import qpref
from qpref.data.load import load_rows
from qpref.data.mismatch import only_partner, with_mismatched, without_partner
from qpref.data.pack import pack
from qpref.data.source import DataSource
from qpref.errors import DataError, RecipeError
from qpref.hooks.types import SinkContext
from qpref.policy.logprobs import completion_logprobs
from qpref.policy.reference import ReferenceStore
from qpref.recipe.resolve import make_plan
from qpref.recipe.schedule import Schedule
from qpref.records import EXTRAS, Source, TokenizedExample
from qpref.training import optim
from qpref.training.inputs import Mismatched
from qpref.training.loop import Trainer
from qpref.training.metrics import Recorder
from qpref.training.objective import Objective
from qpref.training.prepare import prepare
from qpref.training.scoring import Scorer
from qpref.training.state import TrainingState

STEP_LOSSES = {
    "kto": {"name": "kto"},
    "bco_pair": {"name": "bco_pair", "baseline": "step"},
    "aot": {"name": "aot"},
    "aot_unpaired": {"name": "aot_unpaired"},
}


def unpaired_rows(count: int, start: int = 0, label: bool | None = None) -> list[dict[str, object]]:
    """Single completions, calm ones desirable; every other one, unless all are to have one label."""
    rows = []
    for number, row in enumerate(preference_rows(count, start)):
        desirable = number % 2 == 0 if label is None else label
        side = "chosen" if desirable else "rejected"
        rows.append({"prompt": row["prompt"], "completion": row[side], "label": desirable})
    return rows


@pytest.fixture
def make_trainer(make_recipe, tmp_path: Path):
    """`make_trainer(changes)`: a trainer whose adapter is away from its start, so that every gradient is there."""
    made = []

    def make(changes: dict[str, object] | None = None, loss: object = None) -> Trainer:
        folder = tmp_path / f"run-{len(made)}"
        folder.mkdir()
        recipe = make_recipe(changes) | ({"loss": loss} if loss else {})
        plan = make_plan(recipe, (), folder)
        prepared = prepare(plan, load_rows(plan))
        torch.manual_seed(5)
        for name, parameter in prepared.policy.trained_parameters().items():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
        parameters = prepared.policy.trained_parameters().values()
        context = SinkContext(run_folder=folder, first_step=0, total_steps=1)
        made.append(Recorder(folder / "metrics.jsonl", 0, (), context))
        return Trainer(
            train=plan.recipe.train,
            policy=prepared.policy,
            objective=prepared.objective,
            references=ReferenceStore() if prepared.objective.needs_reference else None,
            optimizer=optim.make_optimizer(plan.recipe.train, parameters, prepared.policy.device),
            scaler=torch.amp.GradScaler("cpu", enabled=False),
            examples=prepared.examples,
            heldout=prepared.heldout,
            state=TrainingState(),
            recorder=made[-1],
            save=lambda: None,
            should_stop=lambda: False,
        )

    yield make
    for recorder in made:
        recorder.close()


def gradients_of_step(trainer: Trainer) -> dict[str, torch.Tensor]:
    trainer.policy.model.train()
    trainer.compute_gradient(trainer.examples[: trainer.train.batch_size])
    return {name: value.grad.clone() for name, value in trainer.policy.trained_parameters().items()}


def assert_close(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    for name, value in wanted.items():
        assert (found[name] - value).abs().max() <= 1e-5 * value.abs().max(), name


# Losses that see a whole optimizer step.


@pytest.mark.parametrize("budget", [1, 250])
@pytest.mark.parametrize("loss", STEP_LOSSES)
def test_micro_batches_give_the_gradient_of_the_whole_step(make_trainer, loss, budget):
    whole = make_trainer({"train.tokens_per_microbatch": 100_000, "train.batch_size": 8}, STEP_LOSSES[loss])
    pieces = make_trainer({"train.tokens_per_microbatch": budget, "train.batch_size": 8}, STEP_LOSSES[loss])
    assert_close(gradients_of_step(pieces), gradients_of_step(whole))
    assert pieces.state.averages.means() == pytest.approx(whole.state.averages.means(), rel=1e-5, nan_ok=True)


def num_fed(trainer: Trainer) -> tuple[int, int]:
    """Tokens that a step feeds to the decoder without and with a backward pass."""
    fed = {False: 0, True: 0}

    def note(module: torch.nn.Module, inputs: object, result: torch.Tensor) -> None:
        fed[result.requires_grad] += result.shape[1]

    hook = trainer.policy.decoder.layers[-1].mlp.register_forward_hook(note)
    gradients_of_step(trainer)
    hook.remove()
    return fed[False], fed[True]


@pytest.mark.parametrize("budget", [1, 100_000], ids=["an example each", "one micro-batch"])
def test_kto_feeds_each_completion_once_and_its_partner_without_a_backward_pass(make_trainer, budget):
    trainer = make_trainer({"train.tokens_per_microbatch": budget, "train.batch_size": 4}, STEP_LOSSES["kto"])
    gradients_of_step(trainer)  # so that the reference is known
    examples = trainer.examples[:4]
    own, partners = (sum(len(each.branches[side]) - 1 for each in examples) for side in (0, 1))
    if budget == 1:
        prompts = sum(len(each.prompt) for each in examples)
        assert num_fed(trainer) == (prompts + partners, prompts + own)
    else:  # completions of one pair share their prompt, and partners continue it
        prompts = sum(map(len, {tuple(each.prompt) for each in examples}))
        assert num_fed(trainer) == (partners, prompts + own)


@pytest.mark.parametrize("budget", [1, 100_000], ids=["an example each", "one micro-batch"])
def test_kto_estimates_a_divergence_of_exactly_0_before_training(make_trainer, budget):
    """Policy and reference compute partners in one layout, whatever that is."""
    trainer = make_trainer({"train.tokens_per_microbatch": budget, "train.batch_size": 4}, STEP_LOSSES["kto"])
    for name, parameter in trainer.policy.trained_parameters().items():
        if "lora_B" in name:
            torch.nn.init.zeros_(parameter)
    gradients_of_step(trainer)
    means = trainer.state.averages.means()
    assert (means["kl"], means["rewards/chosen"], means["rewards/rejected"]) == (0, 0, 0)


def test_a_loss_on_its_own_mismatched_completions_beside_one_on_the_steps_sees_whole_steps(make_recipe, tmp_path):
    """A call for each micro-batch, with the mismatched completions of all, would hand it too many."""
    plan = make_plan(make_recipe() | {"loss": [{"name": "kto"}, {"name": "kto"}]}, (), tmp_path / "run")
    both = Objective.of(plan.losses)
    assert (both.sees_steps_mismatched, both.sees_whole_steps) == (True, False)
    first, second = both.callers
    record = replace(second.choice.plugin.record, scope="example")
    choice = replace(second.choice, plugin=replace(second.choice.plugin, record=record))
    mixed = replace(both, callers=(first, replace(second, choice=choice)))
    assert mixed.sees_whole_steps


@pytest.mark.parametrize("changes", [{"adapter.dropout": 0.5}, {"train.gradient_checkpointing": True}], ids=str)
def test_both_passes_over_a_micro_batch_are_the_same(make_trainer, monkeypatch, changes):
    trainer = make_trainer({"train.tokens_per_microbatch": 1, "train.batch_size": 4} | changes, STEP_LOSSES["aot"])
    passes, score = [], Scorer.policy_scores

    def noted(*call):
        passes.append(score(*call))
        return passes[-1]

    monkeypatch.setattr(Scorer, "policy_scores", noted)
    gradients_of_step(trainer)
    assert len(passes) == 8
    for first, second in zip(passes[:4], passes[4:], strict=True):
        assert torch.equal(first.values.detach(), second.values.detach())


# Single completions.


@pytest.mark.parametrize("budget", [1, 100_000])
@pytest.mark.parametrize("label", [None, True, False], ids=["both classes", "all desirable", "all undesirable"])
def test_unpaired_data_train_at_any_micro_batch_and_balance(make_recipe, tmp_path, label, budget):
    rows = write_jsonl(tmp_path / "unpaired.jsonl", unpaired_rows(12, label=label))
    heldout = write_jsonl(tmp_path / "held.jsonl", unpaired_rows(4, start=100))
    changes = {"data.train": str(rows), "data.heldout": str(heldout), "train.tokens_per_microbatch": budget}
    folder = qpref.train(make_recipe(changes) | {"loss": {"name": "kto"}}, output=tmp_path / "run").path
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if line["split"] == "train"]
    assert all(line["loss"] is not None and line["grad_norm"] > 0 for line in trained)
    if label is None:
        assert trained[0]["loss"] == 0.5
    assert lines[0]["eval_loss"] == 0.5
    assert lines[-1]["eval_loss"] < 0.5


def test_pairs_become_completions_and_the_run_says_so(make_recipe, tmp_path, caplog):
    with caplog.at_level("INFO", logger="qpref"):
        plan = make_plan(make_recipe() | {"loss": {"name": "kto"}}, (), tmp_path / "run")
        checked = load_rows(plan).train
    rows, report = list(checked.rows()), checked.report
    assert "the loss 'kto' is on single completions: 12 pairs become 24 of them" in caplog.text
    assert [row.label for row in rows[:4]] == [True, False, True, False]
    assert (report.read, report.kept) == (16, 16)  # 4 of them held out


def test_completions_under_a_loss_of_pairs_are_refused_by_place(make_recipe, tmp_path):
    rows = write_jsonl(tmp_path / "unpaired.jsonl", preference_rows(4) + unpaired_rows(1))
    with pytest.raises(
        DataError, match=r"unpaired\.jsonl:5: a single completion with a label; the loss needs pairs"
    ) as stop:
        qpref.train(make_recipe({"data.train": str(rows)}), output=tmp_path / "run")
    assert stop.value.exit_code == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": "good"}, "label: expected true or false, found 'good'"),
        ({"label": 0.5}, "label: expected true or false, found 0.5"),
        ({"label": None}, "not a labelled completion: no label"),
        ({"completion": " "}, "completion is empty"),
        ({"weight": -1}, "weight: -1 is below 0"),
    ],
)
def test_bad_completion_is_named_by_file_and_line(make_recipe, tmp_path, change, message):
    good = unpaired_rows(4)
    rows = write_jsonl(tmp_path / "unpaired.jsonl", [*good, good[0] | change])
    recipe = make_recipe({"data.train": str(rows)}) | {"loss": {"name": "kto"}}
    with pytest.raises(DataError) as stopped:
        qpref.train(recipe, output=tmp_path / "run")
    assert f"unpaired.jsonl:5: {message}" in stopped.value.what


def test_class_counts_are_those_of_the_training_set(make_trainer, tmp_path):
    rows = write_jsonl(tmp_path / "unpaired.jsonl", unpaired_rows(5) + unpaired_rows(4, start=50, label=True))
    trainer = make_trainer({"data.train": str(rows)}, {"name": "kto"})
    assert trainer.objective.class_counts == (7, 2)


def test_held_out_completions_of_one_pair_are_compared(make_trainer):
    trainer = make_trainer(None, {"name": "kto"})
    trainer.state.step = 1
    means = trainer.heldout_means()
    chosen = make_trainer({"loss.name": "dpo"})
    chosen.state.step = 1
    wanted = chosen.heldout_means()
    for name in ("logps/chosen", "logps/rejected", "rewards/margins", "rewards/accuracies", "logps/accuracies"):
        assert means[name] == pytest.approx(wanted[name], rel=1e-4), name


def make_example(prompt: int, completion: list[int], line: int = 1) -> TokenizedExample:
    return TokenizedExample(
        prompt=array("i", [prompt] * 3),
        branches=(array("i", completion),),
        truncated=(False,),
        weight=1.0,
        margin=0.0,
        label=True,
        source=Source(path="made", line=line),
    )


@pytest.mark.parametrize("seed", range(20))
def test_partner_is_of_another_prompt_and_fixed_by_the_seed(seed):
    examples = [make_example(number // 5, [number, 7]) for number in range(17)]
    joined = with_mismatched(examples, seed, 64)
    assert [example.branches[0] for example in joined] == [example.branches[0] for example in examples]
    assert all(example.branches[1][0] // 5 != example.prompt[0] for example in joined)
    assert [example.branches for example in with_mismatched(examples, seed, 64)] == [
        example.branches for example in joined
    ]


def test_partners_are_spread_over_the_data():
    joined = with_mismatched([make_example(number, [number]) for number in range(50)], 0, 64)
    assert len({example.branches[1][0] for example in joined}) == 50


def test_partner_is_cut_to_the_longest_length():
    joined = with_mismatched([make_example(1, [1, 2, 3, 4]), make_example(2, [5])], 0, 5)
    assert joined[1].branches[1] == array("i", [1, 2])
    assert joined[1].truncated == (False, True)


def test_partner_says_something_else_where_it_can():
    """Of yes and no alone: never its own answer, though half of all others say the same."""
    joined = with_mismatched([make_example(number, [number % 2]) for number in range(40)], 0, 64)
    assert all(example.branches[0] != example.branches[1] for example in joined)


def test_partner_of_another_prompt_will_do_where_all_say_the_same():
    joined = with_mismatched([make_example(number, [7]) for number in range(10)], 0, 64)
    assert all(example.branches[1] == array("i", [7]) for example in joined)


def test_held_out_file_of_one_prompt_has_partners(make_recipe, tmp_path):
    heldout = write_jsonl(tmp_path / "held.jsonl", unpaired_rows(1, start=100))
    recipe = make_recipe({"data.heldout": str(heldout), "train.max_steps": 1}) | {"loss": {"name": "kto"}}
    qpref.train(recipe, output=tmp_path / "run")


def test_pair_of_which_one_side_is_too_long_is_left_out_whole(make_trainer, tmp_path, caplog):
    rows = preference_rows(12)
    rows[3]["chosen"] = "It is four. " * 30
    data = write_jsonl(tmp_path / "long.jsonl", rows)
    with caplog.at_level("INFO", logger="qpref"):
        trainer = make_trainer({"data.train": str(data), "data.on_overflow": "drop"}, {"name": "kto"})
    assert trainer.objective.class_counts == (11, 11)
    assert "of 12 rows, 1 dropped and 0 truncated for their length" in caplog.text


def test_cut_rows_are_counted_once(make_trainer, tmp_path, caplog):
    rows = preference_rows(12)
    rows[3] |= {"chosen": "It is four. " * 30, "rejected": "NOT ME! " * 40}
    data = write_jsonl(tmp_path / "long.jsonl", rows)
    with caplog.at_level("INFO", logger="qpref"):
        make_trainer({"data.train": str(data), "data.on_overflow": "truncate"}, {"name": "kto"})
    assert "of 12 rows, 0 dropped and 1 truncated for their length" in caplog.text


def test_pair_that_cutting_makes_the_same_is_dropped_as_completions_too(make_trainer, tmp_path, caplog):
    rows = preference_rows(12)
    rows[3] |= {"chosen": "It is four. " * 40 + "Yes.", "rejected": "It is four. " * 40 + "NO!"}
    data = write_jsonl(tmp_path / "long.jsonl", rows)
    with caplog.at_level("INFO", logger="qpref"):
        trainer = make_trainer({"data.train": str(data), "data.on_overflow": "truncate"}, {"name": "kto"})
    assert trainer.objective.class_counts == (11, 11)
    assert "long.jsonl:4: dropped: cut to their first" in caplog.text
    assert "1 dropped and 0 truncated for their length" in caplog.text


def test_margins_of_pairs_that_become_completions_are_mentioned(make_recipe, tmp_path, caplog):
    data = write_jsonl(tmp_path / "margins.jsonl", [row | {"margin": 0.5} for row in preference_rows(4)])
    load_rows(make_plan(make_recipe({"data.train": str(data)}) | {"loss": {"name": "kto"}}, (), tmp_path / "run"))
    assert "margins.jsonl: the rows' margins have no meaning for single completions" in caplog.text


def test_a_plan_and_its_objective_join_the_needs_of_all_losses(make_recipe, tmp_path):
    losses = [{"name": "dpo", "beta": 0.1}, {"name": "orpo"}]
    plan = make_plan(make_recipe() | {"loss": losses}, (), tmp_path / "run")
    assert plan.needs == Objective.of(plan.losses).needs == {"reference", "prompt"}


def test_refused_pairs_and_their_margins_are_not_counted(make_recipe, tmp_path, caplog):
    rows = preference_rows(6)
    rows[2] |= {"rejected": rows[2]["chosen"], "margin": 0.5}
    changes = {"data.train": str(write_jsonl(tmp_path / "same.jsonl", rows)), "data.skip_bad": 0.5}
    with caplog.at_level("INFO", logger="qpref"):
        load_rows(make_plan(make_recipe(changes) | {"loss": {"name": "kto"}}, (), tmp_path / "run"))
    assert "5 pairs become 10 of them" in caplog.text
    assert "have no meaning" not in caplog.text


def test_loading_reads_the_data_as_often_for_single_completions_as_for_pairs(make_recipe, tmp_path, monkeypatch):
    real, read = DataSource.records, []
    monkeypatch.setattr(DataSource, "records", lambda source, row: (read.append(row), real(source, row))[1])
    for loss in ("dpo", "kto"):
        read.clear()
        load_rows(make_plan(make_recipe() | {"loss": {"name": loss}}, (), tmp_path / loss))
        assert len(read) == 16 + 2, loss  # every row once, and the first of each split to see that there is one


def test_completions_of_a_row_stay_in_one_held_out_window(make_trainer, monkeypatch):
    trainer = make_trainer(None, {"name": "kto"})
    wanted = trainer.heldout_means()
    monkeypatch.setattr("qpref.training.heldout.WINDOW", 1)
    found = trainer.heldout_means()
    assert found["logps/accuracies"] == wanted["logps/accuracies"]
    assert found["rewards/chosen"] == pytest.approx(wanted["rewards/chosen"], rel=1e-4)


@pytest.mark.parametrize("window", [1, 3, 256])
def test_held_out_scores_are_in_the_order_of_the_examples(make_trainer, monkeypatch, window):
    """Lengths rise and fall, and packing puts the longest first."""
    trainer = make_trainer()
    trainer.heldout = [trainer.examples[index] for index in (3, 8, 1, 11, 6)]
    monkeypatch.setattr("qpref.training.heldout.WINDOW", window)
    trainer.heldout_means()
    scores = trainer.state.last_scores
    for index, example in enumerate(list(trainer.heldout)):
        trainer.heldout = [example]
        alone = trainer.heldout_means()
        assert float(scores.chosen[index]) == pytest.approx(alone["logps/chosen"], rel=1e-4), index
        assert float(scores.rejected[index]) == pytest.approx(alone["logps/rejected"], rel=1e-4), index


def test_one_prompt_alone_has_no_partners():
    with pytest.raises(DataError, match="all examples have the same prompt"):
        with_mismatched([make_example(1, [1]), make_example(1, [2])], 0, 64)


# Prompts' log-probabilities, sums of squares and entropies.


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "rows"])
def test_prompts_squares_and_entropies_are_those_of_all_logits(make_trainer, shared):
    trainer = make_trainer()
    policy, examples = trainer.policy, trainer.examples[:3]
    policy.model.eval()
    policy.share_prompts(shared)
    scores = completion_logprobs(policy, pack(examples, policy.device), prompts=True, extras=frozenset(EXTRAS))
    model = policy.model.get_base_model()
    policy.share_prompts(False)
    tokens, squares, entropies = [], [], []
    prompts, prompt_squares, prompt_entropies = [], [], []
    for example in examples:
        for place, branch in enumerate(example.branches):
            ids = torch.tensor([[*example.prompt, *branch]])
            full = model(input_ids=ids).logits[0].double().log_softmax(-1)
            picked = full[:-1].gather(1, ids[0, 1:, None]).squeeze(1)
            sums = full.exp().square().sum(-1).log()[:-1]
            spread = -(full.exp() * full).sum(-1)[:-1]
            start = len(example.prompt) - 1
            tokens.append(picked[start:])
            squares.append(sums[start:])
            entropies.append(spread[start:])
            if place == 0:
                prompts.append(picked[:start])
                prompt_squares.append(sums[:start])
                prompt_entropies.append(spread[:start])
    assert scores.lengths == tuple(map(len, tokens + prompts))
    torch.testing.assert_close(scores.values.double(), torch.cat(tokens + prompts), atol=1e-5, rtol=0)
    assert scores.log_sum_squares is not None
    torch.testing.assert_close(scores.log_sum_squares.double(), torch.cat(squares + prompt_squares), atol=1e-5, rtol=0)
    assert scores.entropy is not None
    torch.testing.assert_close(scores.entropy.double(), torch.cat(entropies + prompt_entropies), atol=1e-5, rtol=0)
    assert not scores.log_sum_squares.requires_grad
    assert not scores.entropy.requires_grad


def test_prompts_have_gradients(make_trainer):
    trainer = make_trainer(None, {"name": "orpo", "nll": "all"})
    alone = make_trainer(None, {"name": "orpo", "nll": "response"})
    first, second = gradients_of_step(trainer), gradients_of_step(alone)
    assert any((first[name] - second[name]).abs().max() > 1e-3 * first[name].abs().max() for name in first)


def test_a_loss_without_reference_computes_none(make_recipe, tmp_path):
    recipe = make_recipe({"train.save_every": 1}) | {"loss": {"name": "orpo"}}
    folder = qpref.train(recipe, output=tmp_path / "run").path
    newest = sorted((folder / "checkpoints").iterdir())[-1]
    assert not (newest / "reference.safetensors").exists()


# Mixtures.


def test_mixture_is_the_weighted_sum(make_trainer):
    tables = [{"name": "dpo", "weight": 0.25, "beta": 0.2}, {"name": "sft", "weight": 2.0}, {"name": "orpo"}]
    mixed = gradients_of_step(make_trainer(None, tables))
    parts = [gradients_of_step(make_trainer(None, {**table, "weight": 1.0})) for table in tables]
    weights = [table.get("weight", 1.0) for table in tables]
    wanted = {name: sum(weight * part[name] for weight, part in zip(weights, parts, strict=True)) for name in mixed}
    assert_close(mixed, wanted)


def test_mixture_reports_each_loss(make_recipe, tmp_path):
    tables = [{"name": "dpo", "weight": 0.5}, {"name": "sft", "weight": 0.25}]
    folder = qpref.train(make_recipe() | {"loss": tables}, output=tmp_path / "run").path
    row = next(json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines() if '"train"' in line)
    assert row["loss/dpo"] == pytest.approx(math.log(2), rel=1e-5)
    assert row["loss"] == pytest.approx(0.5 * row["loss/dpo"] + 0.25 * row["loss/sft"], rel=1e-5)
    assert "rewards/margins" in row


def test_losses_of_one_name_are_told_apart(make_recipe, tmp_path):
    tables = [{"name": "ipo", "beta": 0.1}, {"name": "ipo", "beta": 0.5}]
    folder = qpref.train(make_recipe() | {"loss": tables}, output=tmp_path / "run").path
    row = next(json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines() if '"train"' in line)
    assert (row["loss/ipo.0"], row["loss/ipo.1"]) == (pytest.approx(25.0), pytest.approx(1.0))


def test_a_loss_is_not_blamed_for_scores_that_are_not_finite(make_trainer):
    trainer = make_trainer(None, {"name": "kto"})
    own, partners = (
        pack([side(example) for example in trainer.examples[:2]], trainer.policy.device)
        for side in (without_partner, only_partner)
    )
    scores, spoilt = (trainer.objective.score(trainer.policy, batch) for batch in (own, partners))
    reference, other = (replace(said, values=said.values.detach().clone()) for said in (scores, spoilt))
    with torch.no_grad():
        spoilt.values[-1] = torch.nan
    inputs = trainer.objective.inputs(own, scores, reference, Mismatched(spoilt, other))
    assert not inputs.mismatched_policy.values.requires_grad
    output = trainer.objective(inputs)
    assert not output.losses.isfinite().any()
    assert not trainer.objective.not_finite(inputs, output).any()


def test_mixture_in_toml_and_its_lock_file_resolve_to_the_same(make_recipe, tmp_path):
    tables = [{"name": "dpo", "beta": {"start": 0.1, "end": 0.3}}, {"name": "sft", "weight": 0.25}]
    plan = make_plan(make_recipe() | {"loss": tables}, (), tmp_path / "run")
    again = make_plan(plan.document, (), tmp_path / "run")
    assert [(loss.options, loss.weight) for loss in again.losses] == [
        (loss.options, loss.weight) for loss in plan.losses
    ]
    assert again.fingerprint == plan.fingerprint


def test_pairs_and_completions_do_not_mix(make_recipe, tmp_path):
    with pytest.raises(RecipeError, match="'dpo' and 'kto': one is on pairs, another on single completions"):
        make_plan(make_recipe() | {"loss": [{"name": "dpo"}, {"name": "kto"}]}, (), tmp_path / "run")


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ({"name": "dpo", "weight": 0}, "[loss] weight: expected greater than 0, got 0"),
        ([{"name": "dpo"}, {"name": "sft", "weight": -1}], "[loss.1] weight: expected greater than 0, got -1"),
        ([{"name": "dpo"}, {"name": "stf"}], "[loss.1] name: no loss 'stf' is installed; did you mean 'sft'?"),
        ([{"beta": 1}], "[loss.0] name: missing"),
        ({"name": "dpo", "beta": {"start": 0.1}}, "[loss.beta] end: missing"),
        ({"name": "dpo", "beta": {"start": 0.1, "end": 0}}, "[loss] beta: expected greater than 0, got 0"),
        (
            {"name": "dpo", "beta": {"start": 0.1, "end": 0.2, "schedule": "steps"}},
            "[loss.beta] schedule: expected 'linear' or 'cosine', got 'steps'",
        ),
        (
            {"name": "dpo", "beta": {"start": 0.1, "end": -1}},
            "[loss] beta: expected greater than 0, got -1.0 (end of the schedule)",
        ),
        ([], "[loss] expected a table, got []"),
        ("dpo", "[loss] expected a table, got 'dpo'"),
        ({"name": "ipo", "normalize": {"start": 0, "end": 1}}, "[loss] normalize: expected 'mean' or 'sum'"),
    ],
    ids=str,
)
def test_mistake_in_a_loss_table_is_named(make_recipe, tmp_path, loss, message):
    with pytest.raises(RecipeError) as stopped:
        make_plan(make_recipe() | {"loss": loss}, (), tmp_path / "run")
    assert message in stopped.value.what


# Schedules.


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        ("linear", [0.1, 0.14, 0.18, 0.22, 0.26, 0.3]),
        ("cosine", [0.2 - 0.1 * math.cos(math.pi * step / 5) for step in range(6)]),
    ],
)
def test_scheduled_beta_is_what_the_loss_gets(make_trainer, kind, wanted):
    beta = {"start": 0.1, "end": 0.3, "schedule": kind}
    trainer = make_trainer({"train.epochs": 2, "data.heldout": None}, {"name": "dpo", "beta": beta})
    seen = []
    for _ in range(trainer.total_steps):
        trainer.step()
        seen.append(trainer.objective.callers[0].choice.options.beta)
        trainer.state.step += 1
    assert seen == pytest.approx(wanted, rel=1e-12)
    assert (seen[0], seen[-1]) == (0.1, 0.3)


def test_schedule_that_leaves_an_options_range_on_the_way_is_refused_before_training(make_recipe, tmp_path):
    """alpha = 1 is refused by the loss itself; both ends are good, and the middle of three steps is not."""
    loss = {"name": "dpo", "divergence": "alpha", "alpha": {"start": 0.5, "end": 1.5}}
    with pytest.raises(
        RecipeError, match=r"\[loss\] alpha: after 50% of its schedule: must be 0\.01 or more away from 1"
    ):
        qpref.train(make_recipe() | {"loss": loss}, output=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_schedule_stays_between_its_ends(kind):
    for start, end in ((0.1, 0.3), (40.0, 40.0), (0.7, 0.1)):
        schedule = Schedule(start=start, end=end, schedule=kind)
        values = [schedule.at(step / 97) for step in range(98)]
        assert (values[0], values[-1]) == (start, end)
        assert min(start, end) <= min(values) <= max(values) <= max(start, end)
        assert values in (sorted(values), sorted(values, reverse=True))


def test_scheduled_run_resumes_to_the_bit(make_recipe, tmp_path):
    beta = {"start": 0.1, "end": 0.5}
    recipe = make_recipe({"train.epochs": 2, "train.save_every": 2}) | {"loss": {"name": "dpo", "beta": beta}}
    straight = qpref.train(recipe, output=tmp_path / "straight").path
    broken = qpref.train(recipe, output=tmp_path / "broken").path
    (broken / "adapter" / "adapter_model.safetensors").unlink()
    for path in (broken / "adapter").iterdir():
        path.unlink()
    (broken / "adapter").rmdir()
    newest = sorted((broken / "checkpoints").iterdir())[-1]
    for path in newest.iterdir():
        path.unlink()
    newest.rmdir()
    qpref.train(recipe, output=broken, resume=True)
    name = Path("adapter") / "adapter_model.safetensors"
    assert (broken / name).read_bytes() == (straight / name).read_bytes()
