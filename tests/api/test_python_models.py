"""A run used from Python: its log-probabilities are training's, and each function returns what its command prints."""

from __future__ import annotations

import json

import pytest
import tomli_w
from click.testing import CliRunner
from conftest import preference_rows, write_jsonl

import qpref
from qpref.cli import main
from qpref.errors import DataError, PolicyError, RecipeError

HELDOUT = preference_rows(4, start=100)


@pytest.fixture(scope="module")
def run(make_base, tmp_path_factory):
    """Three large steps in float32 on 12 + 4 pairs."""
    folder = tmp_path_factory.mktemp("python")
    recipe = {
        "model": {"base": str(make_base()), "quantization": "none", "dtype": "float32"},
        "adapter": {"rank": 4, "alpha": 8},
        "data": {"max_length": 256, "max_prompt_length": 128},
        "checks": {"too_short": "off"},
        "loss": {"name": "dpo", "beta": 0.1},
        "train": {"learning_rate": 0.02, "batch_size": 4, "warmup_ratio": 0.0},
    }
    return qpref.train(recipe, rows=preference_rows(12), heldout=HELDOUT, output=folder / "run")


def printed(*arguments):
    done = CliRunner().invoke(main, [*map(str, arguments), "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_log_probs_are_those_of_training(run):
    model = qpref.load(run)
    last = run.metrics[-1].values
    for side in ("chosen", "rejected"):
        scores = [model.log_probs(row["prompt"], row[side]) for row in HELDOUT]
        references = [model.reference.log_probs(row["prompt"], row[side]) for row in HELDOUT]
        totals = [score.total for score in scores]
        changes = [score.total - reference.total for score, reference in zip(scores, references, strict=True)]
        assert last[f"eval_logps/{side}"] == pytest.approx(sum(totals) / 4, rel=1e-5)
        assert last[f"eval_rewards/{side}"] == pytest.approx(0.1 * sum(changes) / 4, abs=1e-4)
        assert abs(sum(changes)) > 0.1
    assert len(scores[0].values) == len(scores[0].tokens)
    assert scores[0].mean == pytest.approx(scores[0].total / len(scores[0].tokens))


def test_messages_and_a_text_are_the_same_and_answers_leave_the_scores_as_they_are(run):
    model = qpref.load(run)
    before = model.log_probs("What comes after 3?", "4")
    (greedy,) = model.generate(["What comes after 3?"], max_new_tokens=4)
    (answers,) = qpref.generate(run, ["What comes after 3?"], max_new_tokens=4)
    assert greedy == answers.model
    turns = [{"role": "user", "content": "What comes after 3?"}], [{"role": "assistant", "content": "4"}]
    assert model.log_probs(*turns).values.tolist() == before.values.tolist()
    assert model.tokenizer.decode(before.tokens[:1]) == "4"
    with pytest.raises(DataError, match=r"^prompt and response: "):
        model.log_probs([{"role": "user"}], "4")


def test_a_model_without_an_adapter_has_no_reference(run, make_base):
    model = qpref.load(make_base())
    assert model.log_probs("a", "b").total < 0
    with pytest.raises(PolicyError, match="has no reference"):
        model.reference.log_probs("a", "b")


def test_each_function_returns_what_its_command_prints(run, tmp_path):
    compared = qpref.evaluate(run, samples=50, max_pairs=3)
    assert compared.as_json() == printed("eval", run, "--samples", 50, "--max-pairs", 3)
    assert "--" not in json.dumps(compared.as_json())
    answers = qpref.generate(run, max_new_tokens=2)
    assert [one.as_json() for one in answers] == printed("generate", run, "--max-new-tokens", 2)
    merged = qpref.merge(run, tmp_path / "python", dtype="float32")
    assert merged.verdict.passed
    of_command = printed("merge", run, tmp_path / "command", "--dtype", "float32")
    assert of_command == merged.as_json() | {"path": str(tmp_path / "command")}


def test_what_is_missing_is_named_by_its_argument(make_base, run, tmp_path):
    with pytest.raises(RecipeError) as raised:
        qpref.generate(make_base(), max_new_tokens=1)
    assert raised.value.hint == "name prompts with prompts= or data="
    with pytest.raises(RecipeError, match=r'^max_margin_error="2nats": expected'):
        qpref.merge(run, tmp_path / "out", max_margin_error="2nats")


def test_a_check_and_a_plan_are_what_their_commands_print(make_recipe, tmp_path):
    recipe = make_recipe()
    path = tmp_path / "tiny.toml"
    path.write_text(tomli_w.dumps(recipe))
    checked = qpref.check(path)
    assert checked.as_json() == printed("check", path)
    assert qpref.check(recipe).as_json() == checked.as_json()
    assert (checked.read, checked.kept, checked.passed) == (16, 16, True)
    planned = qpref.plan(path, vram="8GiB", tflops=1)
    assert planned.as_json() == printed("plan", path, "--vram", "8GiB", "--tflops", 1)
    assert planned.fits
    assert planned.hours > 0
    assert not qpref.plan(path, vram="1MiB").fits


def test_rows_in_memory_are_checked_and_evaluated_as_those_of_a_file(run, make_recipe, tmp_path):
    rows = [*preference_rows(5), {"prompt": "p", "chosen": "same", "rejected": "same"}, {"prompt": "no pair"}]
    in_file = qpref.check(write_jsonl(tmp_path / "rows.jsonl", rows)).as_json()
    found = qpref.check(iter(rows)).as_json()
    assert (found["kept"], found["refused"]) == (in_file["kept"], in_file["refused"]) == (5, 2)
    places = [[(each["code"], each["line"]) for each in one["findings"]] for one in (found, in_file)]
    assert places[0] == places[1]
    assert {("identical", 6), ("not_a_pair", 7)} <= set(places[0])
    assert qpref.check(make_recipe(), rows=rows[:5], heldout=HELDOUT).kept == 5 + len(HELDOUT)
    assert qpref.evaluate(run, data=HELDOUT).as_json()["models"] == qpref.evaluate(run).as_json()["models"]
    with pytest.raises(DataError, match="data row 2: expected a dict of columns"):
        qpref.check([rows[0], "pair"])
    with pytest.raises(RecipeError, match="rows= and heldout= change a recipe"):
        qpref.check(tmp_path / "rows.jsonl", rows=rows)


def test_a_bare_source_is_checked_and_mixed_up_arguments_are_refused(make_recipe, tmp_path):
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "a", "good": "b c d e", "rejected": "b c d e"}])
    checked = qpref.check(rows, columns={"chosen": "good"})
    assert (checked.refused, checked.passed) == (1, False)
    assert [finding.code for finding in checked.findings if finding.severity == "error"] == ["identical"]
    with pytest.raises(RecipeError, match="overrides=, rows= and heldout= change a recipe"):
        qpref.check(rows, overrides={"loss.beta": 1})
    with pytest.raises(RecipeError, match="are for a bare source"):
        qpref.check(make_recipe(), base="x")
    with pytest.raises(RecipeError, match="card= and vram= exclude each other"):
        qpref.plan(make_recipe(), card="T4", vram="8")
