"""Which pairs are compared, and which of their prompts were trained on."""

from __future__ import annotations

import pytest
from conftest import make_tokenizer, preference_rows, write_jsonl

from qpref.data.tokenize import PairTokenizer
from qpref.errors import DataError, RecipeError
from qpref.evaluation import heldout_pairs
from qpref.recipe.data_section import DataSection
from qpref.recipe.reopen import RecordedRun

LIMITS = DataSection(train="none", max_length=200, max_prompt_length=100)


def pairs_of(tmp_path, table):
    return heldout_pairs.pairs_of(heldout_pairs.data_at(str(write_jsonl(tmp_path / "pairs.jsonl", table))))


def tokenizer():
    made = make_tokenizer()
    return PairTokenizer.of(made, "chat", [made.eos_token_id])


def test_pairs_are_read_in_order_with_their_places(tmp_path):
    pairs = pairs_of(tmp_path, preference_rows(3))
    assert [pair.source.line for pair in pairs] == [1, 2, 3]


def test_single_completions_are_refused_with_a_way_out(tmp_path):
    table = [*preference_rows(2), {"prompt": "a", "completion": "b", "label": True}]
    with pytest.raises(
        DataError, match=r"3: a single completion with a label \(1 such rows of 3\); accuracy and margins"
    ):
        pairs_of(tmp_path, table)


def test_a_row_that_is_no_pair_is_refused_with_its_location(tmp_path):
    with pytest.raises(DataError, match=r"pairs\.jsonl:2: not a preference pair: no rejected"):
        pairs_of(tmp_path, [*preference_rows(1), {"prompt": "a", "chosen": "b"}])


def test_a_file_without_a_reader_is_refused(tmp_path):
    (tmp_path / "pairs.xyz").write_text("")
    with pytest.raises(RecipeError, match=r"no reader for 'pairs\.xyz'"):
        heldout_pairs.data_at(str(tmp_path / "pairs.xyz"))


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        heldout_pairs.data_at(str(tmp_path / "none.jsonl"))


def test_a_sample_is_seeded_and_in_order(tmp_path):
    pairs = pairs_of(tmp_path, preference_rows(20))
    first, again, other = (heldout_pairs.sample_pairs(pairs, 6, seed) for seed in (0, 0, 1))
    assert first == again != other
    lines = [pair.source.line for pair in first]
    assert lines == sorted(lines)
    assert len(lines) == 6
    assert heldout_pairs.sample_pairs(pairs, 99, 0) == pairs


def test_overlap_counts_exact_and_normalized_prompts(tmp_path):
    table = preference_rows(4)
    for row, prompt in zip(table, ["What is it?", "WHAT  is\nit?", "What was it?", "\uff37hat is it?"], strict=True):
        row["prompt"] = prompt
    found = heldout_pairs.overlap(pairs_of(tmp_path, table), ["What is it?", "Nothing else"])
    assert (found.exact, found.normalized, found.pairs) == (1, 3, frozenset({0, 1, 3}))


def test_overlap_compares_the_whole_conversation(tmp_path):
    turns = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": "What is it?"},
    ]
    table = preference_rows(2)
    table[0]["prompt"], table[1]["prompt"] = turns, turns[-1:]
    found = heldout_pairs.overlap(pairs_of(tmp_path, table), ["What is it?"])
    assert found.pairs == {1}


def test_a_runs_data_are_split_as_in_training(make_recipe, tmp_path):
    """Half of 40 prompts are held out, by the run's seed, and none is on both sides."""
    path = write_jsonl(tmp_path / "all.jsonl", preference_rows(40))
    document = make_recipe({"data.train": str(path), "data.heldout_share": 0.5})
    del document["data"]["heldout"]
    data = heldout_pairs.data_of_run(RecordedRun(path=tmp_path, document=document, facts={}, report={}))
    train, heldout = ({heldout_pairs.text_of(row.prompt) for row in part.rows()} for part in (data.train, data.heldout))
    assert train | heldout == {row["prompt"] for row in preference_rows(40)}
    assert not train & heldout
    assert 10 < len(heldout) < 30
    assert [pair.prompt for pair in heldout_pairs.pairs_of(data.heldout)] == [row.prompt for row in data.heldout.rows()]


def test_pairs_that_cannot_be_asked_are_left_out_with_their_reason(tmp_path):
    table = preference_rows(3)
    table[0]["chosen"] = "long " * 100
    table[1]["rejected"] = "now <|im_end|>"
    kept, left_out = heldout_pairs.tokenize_pairs(pairs_of(tmp_path, table), tokenizer(), LIMITS)
    assert list(kept) == [2]
    assert [problem.code for problem in left_out] == ["too_long", "control_token"]


def test_a_run_that_cuts_its_pairs_has_them_cut_here_too(tmp_path):
    table = preference_rows(2)
    table[0]["chosen"] = "long " * 100
    cutting = LIMITS.model_copy(update={"on_overflow": "truncate"})
    kept, refused = heldout_pairs.tokenize_pairs(pairs_of(tmp_path, table), tokenizer(), cutting)
    assert (list(kept), refused) == ([0, 1], [])
    assert len(kept[0].prompt) + len(kept[0].branches[0]) == 200


def test_a_pair_has_to_be_known_to_all_models(tmp_path):
    pairs = pairs_of(tmp_path, preference_rows(3))
    kept, _ = heldout_pairs.tokenize_pairs(pairs, tokenizer(), LIMITS)
    fewer = {number: example for number, example in kept.items() if number != 1}
    assert heldout_pairs.same_for_all([kept, fewer], pairs) == [0, 2]
    with pytest.raises(DataError, match="no pair is left"):
        heldout_pairs.same_for_all([kept, {}], pairs)
