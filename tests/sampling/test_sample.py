"""Files of preferences from sampled responses: what is in them, and after a kill."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from qpref.errors import DataError, DeviceMemoryError
from qpref.evaluation.generate import as_prompt
from qpref.evaluation.subjects import identify
from qpref.records import Message
from qpref.sampling import batches as module
from qpref.sampling.decode import Draws
from qpref.sampling.preferences import ScoredResponses, preference_rows
from qpref.sampling.sample import Request, sample_to

PROMPTS = [as_prompt(f"{text}?") for text in ("Hi", "How many are there of these, please", "Who", "Why not", "When")]


@pytest.fixture(scope="module")
def request_(make_base):
    return Request(
        subject=identify(str(make_base())),
        prompts=PROMPTS,
        draws=Draws(num_responses=3, max_new_tokens=5, seed=2),
        form="ranked",
        min_gap=0.0,
        batch_size=6,
        reward={"name": "length"},
    )


def by_length(responses):
    return [float(len(one.text)) for one in responses]


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_stand_in_the_prompts_order_with_their_scores(request_, tmp_path):
    found = sample_to(tmp_path / "out.jsonl", request_, by_length)
    rows = rows_of(tmp_path / "out.jsonl")
    assert [row["prompt"][0]["content"] for row in rows] == [one.prompt[0].content for one in PROMPTS]
    assert all(row["scores"] == sorted(map(len, row["responses"]), reverse=True) for row in rows)
    assert (found.prompts, found.rows) == (5, len(rows))
    assert found.best > found.reward
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


def test_a_killed_call_goes_on_and_ends_with_the_same_file(request_, tmp_path, monkeypatch):
    whole = tmp_path / "whole.jsonl"
    sample_to(whole, request_, by_length)
    drawn = []

    def dies(responses):
        drawn.append(len(responses))
        if len(drawn) == 2:
            raise KeyboardInterrupt
        return by_length(responses)

    with pytest.raises(KeyboardInterrupt):
        sample_to(tmp_path / "out.jsonl", request_, dies)
    assert not (tmp_path / "out.jsonl").exists()
    journal = tmp_path / "out.jsonl.sampling"
    journal.write_bytes(journal.read_bytes() + b'[3, ["a ha')  # a kill while it was written
    again = []
    sample_to(tmp_path / "out.jsonl", request_, lambda responses: again.append(len(responses)) or by_length(responses))
    assert (tmp_path / "out.jsonl").read_bytes() == whole.read_bytes()
    assert sum(again) == 9  # of 15: the first batch of two prompts was not drawn again


def test_other_settings_do_not_go_on_from_there(request_, tmp_path):
    def dies(responses):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample_to(tmp_path / "out.jsonl", request_, dies)
    for changed, name in (
        (replace(request_, draws=replace(request_.draws, seed=3)), "seed"),
        (replace(request_, prompts=PROMPTS[1:]), "prompts"),
        (replace(request_, reward={"name": "other"}), "reward"),
    ):
        with pytest.raises(DataError, match=f"other settings: {name}"):
            sample_to(tmp_path / "out.jsonl", changed, by_length)


def test_overwrite_starts_over_what_was_interrupted_with_other_settings(request_, tmp_path):
    def dies(responses):
        raise KeyboardInterrupt

    output = tmp_path / "out.jsonl"
    with pytest.raises(KeyboardInterrupt):
        sample_to(output, replace(request_, draws=replace(request_.draws, seed=3)), dies)
    sample_to(output, request_, by_length, overwrite=True)
    sample_to(tmp_path / "whole.jsonl", request_, by_length)
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not (tmp_path / "out.jsonl.sampling").exists()


def test_prompts_of_other_rotary_frequencies_share_no_batch(request_, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "sharing_a_batch", lambda policy, indices, ids, new: indices[:1])
    drawn, sizes = module.sample, []
    monkeypatch.setattr(module, "sample", lambda policy, prompts, *rest: (
        sizes.append(len(prompts)), drawn(policy, prompts, *rest))[1])  # fmt: skip
    sample_to(tmp_path / "out.jsonl", request_, by_length)
    assert sizes == [1] * 5


def test_an_output_that_exists_is_kept(request_, tmp_path):
    (tmp_path / "out.jsonl").write_text("mine")
    with pytest.raises(DataError, match="exists"):
        sample_to(tmp_path / "out.jsonl", request_, by_length)
    assert (tmp_path / "out.jsonl").read_text() == "mine"


def test_memory_that_runs_out_makes_the_batch_smaller_and_no_other_response(request_, tmp_path, monkeypatch, said):
    sample_to(tmp_path / "whole.jsonl", request_, by_length)
    drawn, most = module.sample, 1

    def small(policy, prompts, draws, stops):
        if len(prompts) > most:
            raise DeviceMemoryError("full")
        return drawn(policy, prompts, draws, stops)

    monkeypatch.setattr(module, "attempt", lambda work: _or_none(work))
    monkeypatch.setattr(module, "sample", small)
    sample_to(tmp_path / "out.jsonl", request_, by_length)
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    most = 0
    with pytest.raises(DeviceMemoryError, match="one prompt"):
        sample_to(tmp_path / "none.jsonl", request_, by_length)


def _or_none(work):
    try:
        return work()
    except DeviceMemoryError:
        return None


SCORED = ScoredResponses(
    prompt=(Message(role="user", content="?"),),
    responses=("a", "b", "b", "c", " "),
    scores=(0.5, 2.0, 2.0, 1.0, 9.0),
)


def chosen_over_rejected(form, min_gap=0.0):
    return [(row["chosen"], row["rejected"]) for row in preference_rows(SCORED, form, min_gap)]


def test_pairs_are_of_distinct_responses_whose_scores_differ_enough():
    assert chosen_over_rejected("extremes") == [("b", "a")]
    assert chosen_over_rejected("pairs") == [("b", "c"), ("b", "a"), ("c", "a")]
    assert chosen_over_rejected("pairs", 1.0) == [("b", "c"), ("b", "a")]
    assert chosen_over_rejected("extremes", 1.6) == []
    (ranked,) = preference_rows(SCORED, "ranked", 0.0)
    assert (ranked["responses"], ranked["scores"]) == (["b", "c", "a"], [2.0, 1.0, 0.5])


def test_a_tie_makes_no_pair():
    tied = replace(SCORED, scores=(1.0,) * 5)
    assert [list(preference_rows(tied, form, 0.0)) for form in ("extremes", "pairs", "ranked")] == [[], [], []]
