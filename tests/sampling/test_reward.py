"""Rewards by name, what breaks their contract, and `qpref sample`."""

from __future__ import annotations

import hashlib
import json
import math

import pytest
from click.testing import CliRunner

from qpref.cli import main
from qpref.errors import InstallError, PluginError, RecipeError
from qpref.hooks import Options, Reward
from qpref.hooks.manager import Loaded, Offer
from qpref.recipe.choices import Choice
from qpref.records import Message, SampledResponse
from qpref.sampling import reward as module
from qpref.sampling.reward import Scorer

PROMPT = (Message(role="user", content="?"),)


def responses(*texts, ended=True):
    return [SampledResponse(prompt=PROMPT, text=text, ended=ended) for text in texts]


def test_length_is_best_at_its_target():
    found = Scorer("length", {"target": 10})(responses("a" * 10, "a" * 5, "a" * 20, "a" * 30))
    assert found == pytest.approx([1.0, 0.5, 0.0, -1.0])


def test_a_pattern_matches_anywhere_or_the_whole():
    texts = responses("So: 42.", "42", "none\n42")
    assert Scorer("pattern", {"pattern": r"\d+"})(texts) == [1.0, 1.0, 1.0]
    assert Scorer("pattern", {"pattern": r"\d+", "where": "whole"})(texts) == [0.0, 1.0, 0.0]
    assert Scorer("pattern", {"pattern": "4", "unended": -0.5})(responses("42", "1", ended=False)) == [0.5, -0.5]


def test_sentiment_tells_praise_from_blame():
    good, bad = Scorer("sentiment", {})(responses("What a wonderful, happy day!", "This is terrible and sad."))
    assert good > 0.5
    assert bad < -0.5
    assert Scorer("sentiment", {"sign": "negative"})(responses("What a wonderful, happy day!")) == [-good]


def test_a_reward_that_is_not_there_is_refused_with_the_nearest():
    with pytest.raises(RecipeError, match="did you mean 'length'"):
        Scorer("lenght", {})
    with pytest.raises(RecipeError, match="target"):
        Scorer("length", {"target": 0})
    with pytest.raises(RecipeError, match="unknown option of reward 'length'"):
        Scorer("length", {"aim": 3})


ONE = """
from qpref.hooks import Field, Options, Reward, hookimpl

class Words(Options):
    words: int = Field(default=2, description="how many")

def build(options):
    return lambda responses: [-abs(len(one.text.split()) - options.words) for one in responses]

@hookimpl
def qpref_rewards():
    yield Reward(name="words", summary="a number of words", options=Words, build=build)
"""


def test_a_file_with_one_reward_is_executed_and_its_digest_kept(tmp_path):
    path = tmp_path / "my_reward.py"
    path.write_text(ONE)
    score = Scorer(str(path), {"words": 3})
    assert score(responses("a b c", "a")) == [0.0, -2.0]
    assert score.settings == {
        "name": "words",
        "version": hashlib.sha256(path.read_bytes()).hexdigest()[:12],
        "options": {"words": 3},
    }


def test_a_file_with_no_reward_or_with_two_is_refused(tmp_path):
    path = tmp_path / "my_rewards.py"
    for body, found in (
        (ONE + "    yield Reward(name='more', summary='again', options=Words, build=build)\n", "words, more"),
        (
            ONE.replace("qpref_rewards", "qpref_losses")
            .replace("Reward(name", "PairedLoss(name")
            .replace("Reward, hook", "PairedLoss, hook"),
            "none",
        ),
    ):
        path.write_text(body)
        with pytest.raises(RecipeError, match=f"expected one reward, found {found}"):
            Scorer(str(path), {})


@pytest.mark.parametrize(
    ("returned", "words"),
    [([1.0], "returned 1 numbers for 2"), ([1.0, math.nan], "scored 'b' with nan"), (["x", 1.0], "raised")],
)
def test_a_broken_reward_is_named(monkeypatch, returned, words):
    offer = Offer("reward", "odd", "acme", "1.0", "acme_reward")
    record = Reward(name="odd", summary="", options=Options, build=lambda options: lambda given: returned)
    monkeypatch.setattr(module, "choose_reward", lambda name, options: Choice(Loaded(record, offer), Options()))
    with pytest.raises(PluginError, match=f"acme 1.0.*{words}"):
        Scorer("odd", {})(responses("a", "b"))


def test_a_reward_whose_package_is_missing_says_what_installs_it(monkeypatch):
    monkeypatch.setattr(module, "missing", lambda requires: list(requires))
    with pytest.raises(InstallError) as raised:
        Scorer("sentiment", {})
    assert "vaderSentiment" in str(raised.value)
    assert 'pip install "qpref[sentiment]"' in str(raised.value.hint)


@pytest.fixture
def prompts(tmp_path):
    (tmp_path / "prompts.txt").write_text("Hi?\nWho are you, and why?\n\nWhat is it?\n")
    return str(tmp_path / "prompts.txt")


def sampled(make_base, prompts, tmp_path, *more):
    arguments = ["sample", str(make_base()), "--prompts", prompts, "--output", str(tmp_path / "out.jsonl"),
                 "--max-new-tokens", "4", *more]  # fmt: skip
    return CliRunner().invoke(main, arguments)


def test_the_command_writes_pairs_that_check_takes(make_base, prompts, tmp_path):
    done = sampled(make_base, prompts, tmp_path, "--reward", "length", "--reward-option", "target=3", "--form", "pairs",
                   "--k", "3", "--json")  # fmt: skip
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert (facts["prompts"], facts["rows"]) == (3, len(rows))
    assert rows
    assert all(row["score_chosen"] > row["score_rejected"] for row in rows)
    checked = CliRunner().invoke(main, ["check", str(tmp_path / "out.jsonl"), "--json"])
    assert json.loads(checked.stdout)["read"] == len(rows)


def test_the_command_says_what_it_wrote_and_refuses_to_replace_it(make_base, prompts, tmp_path):
    more = ("--reward", "pattern", "--reward-option", "pattern=.", "--reward-option", "where=whole")
    done = sampled(make_base, prompts, tmp_path, *more)
    assert done.exit_code == 0, done.output
    assert "rows of 3 prompts" in done.stdout
    again = sampled(make_base, prompts, tmp_path, *more)
    assert (again.exit_code, "--overwrite" in again.output) == (3, True)
    assert sampled(make_base, prompts, tmp_path, *more, "--overwrite").exit_code == 0


def test_greedy_sampling_and_options_without_a_value_are_refused(make_base, prompts, tmp_path):
    assert "same response" in sampled(make_base, prompts, tmp_path, "--reward", "length", "--temperature", "0").output
    done = sampled(make_base, prompts, tmp_path, "--reward", "length", "--reward-option", "target")
    assert (done.exit_code, "KEY=VALUE" in done.output) == (2, True)
