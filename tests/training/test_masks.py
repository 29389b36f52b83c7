"""Masked tokens have no part in a loss, whatever computes it; a loss that reads masks gets them beside the scores."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from conftest import load_worn, make_example, outcome, preference_rows, rows_of, write_jsonl

import qpref
from qpref.data.pack import pack
from qpref.distributed.world import World
from qpref.errors import DataError, RecipeError
from qpref.policy.logprobs import completion_logprobs
from qpref.policy.partners import logprobs_with_partners
from qpref.policy.reference import ReferenceStore, as_reference
from qpref.recipe.resolve import make_plan
from qpref.records import TokenizedExample
from qpref.training.loss_caller import LossCaller
from qpref.training.objective import Objective
from qpref.training.scoring import Scorer
from qpref.training.whole_batch import WholeBatch, values_of

SIDES = ("chosen", "rejected")
FLOAT32 = {"quantization": "none", "dtype": "float32"}


def with_masks(example: TokenizedExample, step: int) -> TokenizedExample:
    """Every `step`-th token of each branch is masked; the first and the last one of some too."""
    masks = tuple(bytes(int((index + 1) % step > 0) for index in range(len(each))) for each in example.branches)
    return replace(example, masks=masks)


EXAMPLES = [with_masks(make_example(line, 5, 6, 3), 2 + line % 2) for line in range(4)]
SCORED = [replace(each, scores_masked=True) for each in EXAMPLES]
COUNTED = torch.tensor([byte for each in EXAMPLES for mask in each.masks for byte in mask], dtype=torch.bool)


@pytest.fixture(params=["llama", "gemma3"])
def policy(request, make_base):
    adapter = {"rank": 4, "alpha": 4}
    made = load_worn({"model": FLOAT32 | {"base": str(make_base(request.param))}, "adapter": adapter})
    made.model.eval()
    return made


def assert_equal_scores(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "rows"])
def test_scores_are_those_of_the_counted_tokens_among_all(policy, shared):
    policy.share_prompts(shared)
    everything = completion_logprobs(policy, pack(SCORED, policy.device))
    found = completion_logprobs(policy, pack(EXAMPLES, policy.device))
    assert found.lengths == tuple(sum(mask) for each in EXAMPLES for mask in each.masks)
    assert_equal_scores(found.values, everything.values[COUNTED])
    assert_equal_scores(found.mean, torch.stack([part.mean() for part in found.values.split(list(found.lengths))]))


def test_partners_are_scored_at_their_counted_tokens(policy):
    others = [replace(with_masks(make_example(9, 3, 4), 3), prompt=each.prompt) for each in EXAMPLES]
    batches = [pack(examples, policy.device) for examples in (EXAMPLES, others)]
    for scores, batch in zip(logprobs_with_partners(policy, *batches), batches, strict=True):
        assert_equal_scores(scores.values, completion_logprobs(policy, batch).values)
        assert len(scores.values) == sum(batch.lengths)


def test_the_store_keeps_scores_of_other_masks_apart(policy):
    store = ReferenceStore()
    for examples in (SCORED, EXAMPLES, SCORED):
        batch = pack(examples, policy.device)
        with as_reference(policy):
            expected = completion_logprobs(policy, batch)
        found = store.logprobs(policy, batch)
        assert found.lengths == expected.lengths
        assert_equal_scores(found.values, expected.values)
    assert store.num_computed == 2 * len(EXAMPLES)


def reading(make_recipe, tmp_path, needs: frozenset[str]) -> Objective:
    """The objective of a recipe whose loss has these needs."""
    objective = Objective.of(make_plan(make_recipe(), (), tmp_path).losses)
    choice = objective.callers[0].choice
    record = replace(choice.plugin.record, needs=needs)
    caller = LossCaller.of(replace(choice, plugin=replace(choice.plugin, record=record)))
    return replace(objective, callers=(caller,))


@pytest.mark.parametrize("examples", [EXAMPLES, SCORED], ids=["exclude", "loss"])
def test_a_loss_gets_tokens_masks_and_entropies_in_the_order_of_the_scores(policy, make_recipe, tmp_path, examples):
    objective = reading(make_recipe, tmp_path, frozenset({"reference", "tokens", "entropy"}))
    scorer = Scorer(policy, objective, ReferenceStore())
    _, inputs = scorer.inputs(examples)
    for side, own, reference in (
        (0, inputs.policy.chosen, inputs.reference.chosen),
        (1, inputs.policy.rejected, inputs.reference.rejected),
    ):
        scored = [
            (token, bool(counts))
            for each in examples
            for token, counts in zip(each.branches[side], each.masks[side], strict=True)
            if counts or each.scores_masked
        ]
        assert list(zip(own.tokens.tolist(), own.mask.tolist(), strict=True)) == scored
        assert own.lengths == reference.lengths
        assert own.values.shape == own.entropy.shape == own.mask.shape == reference.values.shape
        assert bool((own.entropy > 0).all())
        assert bool((own.entropy <= math.log(policy.head.num_tokens) + 1e-4).all())
    whole = WholeBatch.of(scorer, examples)
    parts = [[0, 2], [3, 1]]
    pieces = [values_of(scorer.scores(each := [examples[i] for i in part], scorer.pack(each))) for part in parts]
    _, of_step = whole.rows, scorer.lay_out(whole.rows, whole.scores(whole.collect(World(), policy, parts, pieces)))
    order = [examples.index(each) for each in whole.rows.examples]
    for name, found in of_step.policy.chosen.by_token().items():
        expected = inputs.policy.chosen.by_token()[name].split(list(inputs.policy.chosen.lengths))
        expected = torch.cat([expected[index] for index in order])
        assert_equal_scores(found.to(torch.float32), expected.to(torch.float32))


def masked_rows(count: int) -> list[dict[str, object]]:
    """Rows whose first word on each side is masked."""
    rows = preference_rows(count)
    return [row | {f"{side}_masked": [[0, row[side].index(" ")]] for side in ("chosen", "rejected")} for row in rows]


def test_a_run_on_masked_rows_starts_at_ln_2_and_scores_less_of_each_response(make_recipe, tmp_path):
    changes = {"train.max_steps": 2, "train.eval_every": 1}
    folders = {}
    for name, rows in (("masked", masked_rows(12)), ("plain", preference_rows(12))):
        data = write_jsonl(tmp_path / f"{name}.jsonl", rows)
        recipe = make_recipe(changes | {"data.train": str(data)})
        folders[name] = qpref.train(recipe, output=tmp_path / name)
    first, plain = (next(row for row in rows_of(folders[name]) if "loss" in row) for name in ("masked", "plain"))
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert 0.3 * plain["logps/chosen"] > first["logps/chosen"] > plain["logps/chosen"]
    masked = recipe | {"data": {**recipe["data"], "train": str(tmp_path / "masked.jsonl")}}
    again = qpref.train(masked, output=tmp_path / "again")
    assert outcome(again) == outcome(folders["masked"])


def test_a_run_on_the_rows_of_step_dpo_compares_the_steps_after_the_shared_ones(make_recipe, tmp_path):
    """The row of docs/data.md#masks, beside the same answers with the shared steps as a part that counts."""
    rows = [
        {"prompt": f"{n} + 1 + 1?", "initial_reason_steps": f"Step 1: {n} + 1 = {n + 1}.\nStep 2:",
         "chosen": f" {n + 1} + 1 = {n + 2}.", "rejected": f" {n + 1} + 1 = {n}1."}
        for n in range(12)
    ]  # fmt: skip
    whole = [
        {"prompt": row["prompt"]} | {side: row["initial_reason_steps"] + row[side] for side in SIDES} for row in rows
    ]
    first = []
    for name, data in (("steps", rows), ("whole", whole)):
        path = write_jsonl(tmp_path / f"{name}.jsonl", data)
        run = qpref.train(make_recipe({"train.max_steps": 1, "data.train": str(path)}), output=tmp_path / name)
        first.append(next(row for row in rows_of(run) if "loss" in row))
    assert first[0]["loss"] == first[1]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert 0.5 * first[1]["logps/chosen"] < first[0]["logps/chosen"] < 0


def test_a_run_refuses_rows_of_which_nothing_counts_by_line(make_recipe, tmp_path):
    rows = masked_rows(6)
    rows[3]["chosen_masked"] = [[0, len(rows[3]["chosen"])]]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError, match=r"rows.jsonl:4: chosen: the whole response is masked"):
        qpref.train(make_recipe({"data.train": str(data)}), output=tmp_path / "run")


def test_masks_are_left_to_a_loss_only_if_it_reads_them(make_recipe, tmp_path):
    with pytest.raises(RecipeError, match=r'\[data\] mask: "loss" leaves masks to the loss, and .* reads none'):
        make_plan(make_recipe({"data.mask": "loss"}), (), tmp_path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"data.mask_patterns": ["(a+)+"]}, "a repeat inside a repeat"),
        ({"data.mask_patterns": ["("]}, "no regular expression"),
        ({"data.mask": "ignore", "data.mask_patterns": ["a"]}, "remove one of the two"),
    ],
)
def test_a_pattern_that_cannot_be_used_is_an_error_of_the_recipe(make_recipe, tmp_path, data, message):
    with pytest.raises(RecipeError, match=message):
        make_plan(make_recipe(data), (), tmp_path)
