"""A run on ranked lists: each prompt once, each response once, in any packing; what it reads, says and refuses."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import outcome, write_jsonl

import qpref
from qpref.data.lists import lists_of
from qpref.data.load import load_rows
from qpref.data.pack import num_fed_tokens, pack
from qpref.errors import DataError, PluginError, RecipeError
from qpref.hooks import ListLoss, Options, list_reward_metrics
from qpref.memory.planned_data import planned_data
from qpref.policy.logprobs import completion_logprobs
from qpref.recipe.resolve import make_plan
from qpref.records import LossOutput, Message, PreferencePair, Row, Source
from qpref.rows.formats import records_of_row
from qpref.testing import assert_conforms
from qpref.training.prepare import prepare
from qpref.training.whole_batch import Sequences

SOURCE = Source(path="ranked.jsonl", line=1)


def ranked_rows(count: int, start: int = 0) -> list[dict]:
    """Rows of two, three and four responses, with ties, scores and a margin in some."""
    rows = []
    for number in range(start, start + count):
        answers = [f"{number} and {more}" + "!" * more for more in range(2 + number % 3)]
        scores = [3 - more for more in range(len(answers))]
        if number % 3 == 2:
            scores[1] = scores[2]
        rows.append({"prompt": f"count from {number}", "responses": answers, "scores": scores, "margin": number % 2})
    return rows


@pytest.fixture
def list_recipe(make_recipe, tmp_path):
    def make(changes: dict | None = None, rows: list[dict] | None = None, loss: object = None):
        files = {
            "data.train": str(write_jsonl(tmp_path / "ranked.jsonl", rows or ranked_rows(9))),
            "data.heldout": str(write_jsonl(tmp_path / "ranked_heldout.jsonl", ranked_rows(4, start=100))),
        }
        return make_recipe(files | (changes or {})) | {"loss": loss or {"name": "plackett_luce", "beta": 0.5}}

    return make


def records(values: dict):
    return records_of_row(Row(values=values, source=SOURCE))


def text(turns: tuple[Message, ...]) -> str:
    return turns[0].content


def test_pairs_of_a_ranked_row_join_to_its_list_again():
    row = {"prompt": "p", "responses": ["worst", "tied", "best", "also tied"], "scores": [0, 4, 9, 4], "weight": 2}
    (ranked,) = lists_of(records(row))
    assert list(map(text, ranked.responses)) == ["best", "tied", "also tied", "worst"]
    assert (ranked.ranks, ranked.scores) == ((1, 2, 2, 4), (9, 4, 4, 0))
    assert (ranked.weight, ranked.margin, ranked.source) == (2, 0, SOURCE)


def test_ranks_are_no_scores():
    (ranked,) = lists_of(records({"prompt": "p", "responses": ["b", "a", "c"], "ranks": [2, 1, 3]}))
    assert (list(map(text, ranked.responses)), ranked.ranks, ranked.scores) == (["a", "b", "c"], (1, 2, 3), ())


def test_several_chosen_and_rejected_responses_are_a_list_of_two_ranks():
    (ranked,) = lists_of(records({"prompt": "p", "chosen": ["a", "b"], "rejected": ["c", "d"]}))
    assert (list(map(text, ranked.responses)), ranked.ranks) == (["a", "b", "c", "d"], (1, 1, 3, 3))


def test_a_response_preferred_to_itself_stays_a_list_of_two_for_the_checks_to_drop():
    turns = (Message(role="assistant", content="same"),)
    prompt = (Message(role="user", content="p"),)
    (ranked,) = lists_of([PreferencePair(prompt=prompt, chosen=turns, rejected=turns, source=SOURCE)])
    assert (ranked.responses, ranked.ranks) == ((turns, turns), (1, 2))


def test_prompt_and_each_response_of_a_list_are_fed_once(list_recipe, tmp_path):
    plan = make_plan(list_recipe(), (), tmp_path / "run")
    prepared = prepare(plan, load_rows(plan))
    example = max(prepared.examples, key=lambda one: len(one.branches))
    assert len(example.branches) == 4
    batch = pack([example], prepared.policy.device)
    assert batch.num_tokens == len(example.prompt) + sum(len(branch) - 1 for branch in example.branches)
    assert batch.num_tokens == num_fed_tokens(example)


def test_log_probabilities_of_lists_of_several_lengths_are_those_of_each_response_alone(list_recipe, tmp_path):
    plan = make_plan(list_recipe(), (), tmp_path / "run")
    prepared = prepare(plan, load_rows(plan))
    policy, examples = prepared.policy, prepared.examples[:4]
    together = completion_logprobs(policy, pack(examples, policy.device), prompts=True)
    alone = [
        completion_logprobs(
            policy,
            pack([replace(one, branches=(branch,), truncated=(False,), ranks=(1,))], policy.device),
            prompts=True,
        )
        for one in examples
        for branch in one.branches
    ]
    rows = together.values.split(list(together.lengths))
    assert len({len(one.branches) for one in examples}) > 1
    for row, single in zip(rows, alone, strict=False):
        torch.testing.assert_close(row, single.values.split(list(single.lengths))[0], rtol=1e-4, atol=1e-4)
    first = 0
    for row, example in zip(rows[-len(examples) :], examples, strict=True):
        torch.testing.assert_close(row, alone[first].values.split(list(alone[first].lengths))[1], rtol=1e-4, atol=1e-4)
        first += len(example.branches)


def test_sequences_of_lists_merge_back_from_any_parts(list_recipe, tmp_path):
    plan = make_plan(list_recipe(), (), tmp_path / "run")
    examples = prepare(plan, load_rows(plan)).examples[:5]
    layout = Sequences.of(examples, prompts=True)
    values = torch.arange(sum(layout.lengths), dtype=torch.float32)
    parts = [[3, 0], [4], [1, 2]]
    pieces = [layout.select(values, members) for members in parts]
    assert torch.equal(layout.merge(parts, pieces, values.device), values)


def losses_of(folder) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row["split"] == "train"]


def test_a_run_on_lists_learns_the_order_whatever_the_micro_batches(list_recipe, tmp_path, caplog):
    caplog.set_level(logging.INFO, "qpref")
    changes = {"train.max_steps": 4, "train.batch_size": 3, "train.learning_rate": 0.01, "train.log_every": 1}
    whole = qpref.train(list_recipe(changes), output=tmp_path / "whole")
    assert "9 lists of 2 to 4 responses, 3 of them pairs; batch_size counts lists" in caplog.text
    small = changes | {"train.tokens_per_microbatch": 60}
    split = qpref.train(list_recipe(small), output=tmp_path / "split")
    assert losses_of(split) == pytest.approx(losses_of(whole), rel=1e-4)
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if row["split"] == "eval"][-1]
    assert {"eval_rewards/accuracies", "eval_list/top1", "eval_logps/accuracies", "eval_rewards/margins"} <= set(last)
    assert last["eval_rewards/margins"] > 0
    assert json.loads((whole / "run.json").read_text())["losses"]["is_listed"] is True
    assert " lists " in json.loads((whole / "result.json").read_text())["verdict"]["sentence"]


def test_single_completions_are_refused_under_a_list_loss(list_recipe, tmp_path):
    rows = [{"prompt": "p", "completion": "c", "label": True}]
    with pytest.raises(DataError, match="single completion"):
        load_rows(make_plan(list_recipe(rows=rows), (), tmp_path / "run"))


def test_lists_without_scores_are_refused_where_the_loss_needs_them(list_recipe, tmp_path):
    rows = [{"prompt": "p", "ranked": ["a", "b", "c"]}]
    plan = make_plan(list_recipe({}, rows, {"name": "lipo", "gain": "scores"}), (), tmp_path / "run")
    with pytest.raises(DataError, match="its responses have no scores, which the loss 'lipo' needs"):
        load_rows(plan)


def test_losses_on_lists_and_on_pairs_cannot_be_added(list_recipe, tmp_path):
    mixed = list_recipe(loss=[{"name": "lipo"}, {"name": "dpo"}])
    with pytest.raises(RecipeError, match="'lipo' and 'dpo': one is on lists, another on pairs"):
        make_plan(mixed, (), tmp_path / "run")


def test_a_plan_counts_every_response_of_a_list(list_recipe, tmp_path):
    plan = make_plan(list_recipe(), (), tmp_path / "run")
    assert [len(responses) for _, responses in planned_data(plan).lengths] == [2 + number % 3 for number in range(9)]


def test_two_responses_of_different_ranks_that_are_cut_to_the_same_tokens_drop_the_list(list_recipe, tmp_path):
    rows = [*ranked_rows(4), {"prompt": "p", "ranked": ["x" * 300 + "a", "y", "x" * 300 + "b"]}]
    plan = make_plan(list_recipe({"data.on_overflow": "truncate"}, rows), (), tmp_path / "run")
    assert {one.source.line for one in prepare(plan, load_rows(plan)).examples} == {1, 2, 3, 4}


def reading(name: str = "reading", **changes) -> ListLoss:
    """A loss on lists that reads all that one can read: masks, ids, entropies, a column of the rows, and a state."""

    def build(options):
        def reading(inputs):
            policy, reference = inputs.policy, inputs.reference
            weights = policy.mask / (1 + policy.entropy) * (1 + policy.tokens.remainder(7) / 7)
            rewards = policy.sum(weights * (policy.values - reference.values))
            level, strength = inputs.state["level"], inputs.columns["strength"].sigmoid()
            losses = torch.stack(
                [
                    -(each.log_softmax(0)[ranks == 1].mean() - factor * (margin + level))
                    for each, ranks, margin, factor in zip(
                        inputs.by_list(rewards), inputs.by_list(inputs.ranks), inputs.margin, strength, strict=True
                    )
                ]
            )
            after = 0.5 * level + 0.5 * losses.detach().mean()
            metrics = list_reward_metrics(rewards, inputs) | {"reading/level": level.expand(len(losses))}
            return LossOutput(losses=losses, metrics=metrics, state={"level": after})

        return reading

    needs = frozenset({"reference", "tokens", "entropy"})
    fields = {"scope": "step", "detaches": lambda options: True, "state": {"level": 0.0}, "columns": ("strength",)}
    record = {"name": name, "summary": "reads all", "options": Options, "build": build, "needs": needs} | fields
    return ListLoss(**record | changes)


def test_a_list_loss_may_read_tokens_a_column_and_a_state_by_every_rule():
    assert_conforms(reading())


@pytest.fixture
def read_recipe(list_recipe):
    """Four steps of two lists, each with a row and a checkpoint; parts of some responses are masked."""
    rows = [row | {"strength": row["margin"] - 0.5} for row in ranked_rows(8)]
    heldout = [row | {"strength": 0} for row in ranked_rows(4, start=100)]
    changes = {"train.max_steps": 4, "train.batch_size": 2, "train.learning_rate": 0.01, "train.log_every": 1,
               "train.save_every": 1, "train.tokens_per_microbatch": 60, "data.mask": "loss",
               "data.mask_patterns": [r"\d+"]}  # fmt: skip

    def make(**loss: object):
        recipe = list_recipe(changes, rows, {"name": "reading"} | loss)
        write_jsonl(Path(recipe["data"]["heldout"]), heldout)
        return recipe

    return make


def killed_at(call: int, record: ListLoss) -> ListLoss:
    """The loss that fails at its `call`-th call with a gradient."""
    calls = [0]

    def build(options):
        function = record.build(options)

        def failing(inputs):
            calls[0] += torch.is_grad_enabled()
            if calls[0] == call:
                raise RuntimeError("killed here")
            return function(inputs)

        return failing

    return replace(record, build=build)


def test_a_resumed_run_on_lists_is_the_whole_one_to_the_bit(read_recipe, tmp_path):
    recipe, record = read_recipe(), reading()
    whole = qpref.train(recipe, output=tmp_path / "whole", plugins=[record])
    with pytest.raises(PluginError, match="killed here"):
        qpref.train(recipe, output=tmp_path / "cut", plugins=[killed_at(4, record)])
    assert sorted(path.name for path in (tmp_path / "cut" / "checkpoints").iterdir())
    resumed = qpref.train(recipe, output=tmp_path / "cut", plugins=[record], resume=True)
    assert outcome(resumed.path) == outcome(whole.path)
    levels = [row.values["reading/level"] for row in whole.metrics if row.split == "train"]
    assert len(set(levels)) == 4


def test_a_column_of_a_list_loss_is_a_number_of_the_row_not_of_a_response(list_recipe, tmp_path):
    recipe, record = list_recipe(loss={"name": "reading"}), reading(columns=("score_chosen",))
    plan = make_plan(recipe, (), tmp_path / "run", plugins=[record])
    with pytest.raises(RecipeError, match="reads the column 'score_chosen', which is about one response"):
        load_rows(plan)
