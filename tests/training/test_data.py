"""A run on several sources, a held-out share and ranked rows; what it writes of its data; labels that look swapped."""

import json
from array import array

import pytest
import torch
from conftest import preference_rows, rows_of, write_jsonl

import qpref
from qpref.errors import CheckpointError, DataError
from qpref.policy import reference_cache
from qpref.policy.reference import row_keys
from qpref.policy.reference_cache import ReferenceCache
from qpref.policy.source import BaseFolder
from qpref.recipe.resolve import make_plan
from qpref.records import Source, TokenizedExample
from qpref.training.swapped_labels import MIN_PAIRS, SwapSearch


def without_heldout(recipe):
    del recipe["data"]["heldout"]
    return recipe


def test_a_run_on_mixed_sources_trains_on_each_as_often_as_it_weighs(make_recipe, tmp_path):
    (tmp_path / "b.csv").write_text(
        "question,good,bad\n" + "".join(f"What is {n}?,It is {n}.,NOBODY KNOWS {n}!\n" for n in range(6))
    )
    ranked = [{"prompt": f"Say {n}.", "ranked": [f"{n}.", f"Is it {n}?", "NO!"]} for n in range(2)]
    train = [
        {"path": str(write_jsonl(tmp_path / "a.jsonl", preference_rows(4))), "weight": 2.0},
        {"path": str(tmp_path / "b.csv"), "columns": {"prompt": "question", "chosen": "good", "rejected": "bad"}},
        {"path": str(write_jsonl(tmp_path / "c.jsonl", ranked))},
    ]
    qpref.train(make_recipe({"data.train": train}), output=tmp_path / "run")
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    # 4 rows twice, 6 once, and 2 rows of 3 ranked answers, 3 pairs each.
    assert facts["examples"] == {"train": 8 + 6 + 6, "heldout": 4}
    report = json.loads((tmp_path / "run" / "data.json").read_text())
    assert (report["read"], report["kept"], report["refused"]) == (4 + 6 + 2 + 4, 16, 0)


def test_a_held_out_share_is_scored_and_never_trained_on(make_recipe, tmp_path):
    rows = write_jsonl(tmp_path / "all.jsonl", preference_rows(24))
    recipe = without_heldout(make_recipe({"data.train": str(rows), "data.heldout_share": 0.3}))
    qpref.train(recipe, output=tmp_path / "run")
    examples = json.loads((tmp_path / "run" / "run.json").read_text())["examples"]
    assert sum(examples.values()) == 24
    assert 2 <= examples["heldout"] <= 14
    assert [row["split"] for row in rows_of(tmp_path / "run")].count("eval") == 2


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_bad_rows_within_the_allowed_share_are_left_out_and_reported(make_recipe, tmp_path, share):
    bad = [{"prompt": "Why?", "chosen": "", "rejected": "No."}, {"prompt": "Why?"}]
    rows = write_jsonl(tmp_path / "faulty.jsonl", [*preference_rows(8), *bad])
    recipe = without_heldout(make_recipe({"data.train": str(rows), "data.skip_bad": share}))
    if not share:
        with pytest.raises(DataError, match=r"faulty\.jsonl:9: chosen is empty"):
            qpref.train(recipe, output=tmp_path / "run")
        assert not (tmp_path / "run").exists()
        return
    qpref.train(recipe, output=tmp_path / "run")
    report = json.loads((tmp_path / "run" / "data.json").read_text())
    assert (report["read"], report["kept"], report["refused"]) == (10, 8, 2)
    assert {one["line"] for one in report["findings"] if one["severity"] == "error"} == {9, 10}


def test_a_run_that_goes_on_holds_the_same_prompts_out(make_recipe, tmp_path):
    rows = write_jsonl(tmp_path / "all.jsonl", preference_rows(24))
    changes = {"data.train": str(rows), "data.heldout_share": 0.3, "train.max_steps": 2, "train.save_every": 1}
    recipe = without_heldout(make_recipe(changes))
    qpref.train(recipe, output=tmp_path / "run")
    (tmp_path / "run" / "adapter").rename(tmp_path / "gone")
    qpref.train(recipe, output=tmp_path / "run", resume=True)  # would be refused if the data's fingerprints differed
    assert (tmp_path / "run" / "adapter").is_dir()
    (tmp_path / "run" / "result.json").unlink()
    (tmp_path / "run" / "adapter").rename(tmp_path / "gone too")
    other = recipe | {"train": recipe["train"] | {"seed": 5}}
    with pytest.raises(CheckpointError, match="data"):
        qpref.train(other, output=tmp_path / "run", resume=True)


# Labels that look swapped.


def example(line, prompt=1):
    return TokenizedExample(
        prompt=array("i", [prompt, line]),
        branches=(array("i", [2, 3]), array("i", [4, 5, 6])),
        truncated=(False, False),
        weight=1.0,
        margin=0.0,
        source=Source(path="pairs.x", line=line),
    )


@pytest.fixture
def known(tmp_path, monkeypatch):
    """`known(base, {line: (nats per token of chosen, of rejected)})`: fills a reference's cache."""
    monkeypatch.setenv("QPREF_CACHE", str(tmp_path / "cache"))

    def fill(base, scores):
        reference = {"weights": base.weights, "dtype": "float32"}
        folder = reference_cache.folder_of(reference)
        reference_cache.describe(folder, reference)
        cache = ReferenceCache.open(folder, "earlier")
        for line, (chosen, rejected) in scores.items():
            keys = row_keys(example(line))
            cache.add({keys[0]: torch.full((2,), chosen), keys[1]: torch.full((3,), rejected)})
        cache.close()

    return fill


BASE = BaseFolder(path=None, weights={"model.safetensors": "abc"})
ORDINARY = {line: (-1.0 - 0.01 * (line % 7), -1.0 - 0.01 * (line % 5)) for line in range(1, MIN_PAIRS + 20)}


def suspects(lines, base=BASE):
    search = SwapSearch(base)
    for line in lines:
        search.note(example(line))
    return [(finding.code, finding.severity, finding.source.line) for finding in search.findings()]


def test_a_pair_whose_rejected_answer_is_far_likelier_than_in_all_others_is_named(known):
    known(BASE, ORDINARY | {5: (-4.0, -0.5)})
    assert suspects(ORDINARY) == [("suspected_swap", "warning", 5)]


def test_pairs_that_are_all_alike_are_not_suspected(known):
    known(BASE, dict.fromkeys(ORDINARY, (-2.0, -1.0)))
    assert suspects(ORDINARY) == []


def test_a_chosen_answer_that_is_far_likelier_is_no_suspect(known):
    known(BASE, ORDINARY | {5: (-0.1, -6.0)})
    assert suspects(ORDINARY) == []


def test_of_few_known_pairs_none_is_called_odd(known):
    few = dict(list(ORDINARY.items())[: MIN_PAIRS - 1])
    known(BASE, few | {5: (-4.0, -0.5)})
    assert suspects(few) == []


def test_another_base_knows_nothing_of_these(known):
    known(BASE, ORDINARY | {5: (-4.0, -0.5)})
    assert suspects(ORDINARY, BaseFolder(path=None, weights={"model.safetensors": "other"})) == []


def test_a_run_leaves_what_the_search_needs(make_recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("QPREF_CACHE", str(tmp_path / "cache"))
    recipe = make_recipe({"train.max_steps": 1})
    qpref.train(recipe, output=tmp_path / "run")
    weights = json.loads((tmp_path / "run" / "run.json").read_text())["base_weights"]
    (described,) = reference_cache.root().glob(f"*/{reference_cache.DESCRIPTION}")
    assert json.loads(described.read_text())["weights"] == weights
    assert make_plan(recipe).recipe.reference.cache
