"""`qpref check`: what it prints, what it writes, what it exits with."""

import json
import re
from pathlib import Path

import pytest
import tomli_w
from click.testing import CliRunner
from conftest import preference_rows, write_jsonl

from qpref.cli import main


def check(*arguments, code=0):
    done = CliRunner().invoke(main, ["check", *map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == code, done.output
    return done


def facts(*arguments, code=0):
    return json.loads(check(*arguments, "--json", code=code).stdout)


def rows(*changes):
    """Good rows, each with a change; None for an unreadable line."""
    return [row | change for row, change in zip(preference_rows(len(changes)), changes, strict=True)]


@pytest.fixture
def write_recipe(tmp_path, make_recipe):
    def write(changes=None):
        path = tmp_path / "tiny.toml"
        path.write_text(tomli_w.dumps(make_recipe(changes)))
        return path

    return write


FAULTY = rows({}, {"rejected": ""}, {}, {"chosen": True}, {})


def test_a_good_file_exits_with_0_and_counts_its_rows(tmp_path):
    path = write_jsonl(tmp_path / "good.jsonl", preference_rows(9))
    assert [facts(path)[key] for key in ("read", "kept", "refused", "dropped")] == [9, 9, 0, 0]
    assert f"{path}: 9 rows read, 9 kept, 0 refused" in check(path).stdout


def test_a_hub_dataset_without_its_prefix_is_told_it():
    done = check("org/name", code=2)
    assert done.stderr == (
        "error: org/name: 1 problem\n  [data] train: no such path; a dataset of the hub is 'hf:org/name'\n"
    )


def test_refused_rows_are_named_by_line_and_exit_with_3(tmp_path):
    path = write_jsonl(tmp_path / "faulty.jsonl", FAULTY)
    found = facts(path, code=3)
    assert [found[key] for key in ("read", "kept", "refused")] == [5, 3, 2]
    errors = [one for one in found["findings"] if one["severity"] == "error"]
    assert next((one["path"], one["line"], one["code"]) for one in errors) == (str(path), 2, "empty")
    assert errors[1]["line"] == 4
    printed = check(path, code=3).stdout
    assert f"{path}: 5 rows read, 3 kept, 2 refused" in printed
    assert "rejected is empty" in " ".join(printed.split())


def test_an_unreadable_line_is_a_refused_row(tmp_path):
    path = write_jsonl(tmp_path / "torn.jsonl", preference_rows(3))
    path.write_text(path.read_text() + '{"prompt": "Wh')
    found = facts(path, code=3)
    assert [found[key] for key in ("read", "kept", "refused")] == [4, 3, 1]
    assert [one["line"] for one in found["findings"] if one["code"] == "unreadable"] == [4]


def test_warnings_alone_exit_with_0(tmp_path):
    path = write_jsonl(tmp_path / "short.jsonl", rows({}, {"chosen": "Oh."}))
    found = facts(path)
    assert found["refused"] == 0
    assert "too_short" in {one["code"] for one in found["findings"]}


def test_a_file_without_rows_exits_with_3(tmp_path):
    path = tmp_path / "none.jsonl"
    path.write_text("\n")
    assert facts(path, code=3)["kept"] == 0


def test_a_missing_file_is_an_error_in_one_line(tmp_path):
    done = check(tmp_path / "none.jsonl", code=3)
    assert done.stderr == f"error: {tmp_path}/none.jsonl: no such file\n"


def test_pairs_and_single_completions_may_stand_in_a_bare_file(tmp_path):
    single = {"prompt": "Why is that so?", "completion": "Because it has always been like that.", "label": True}
    path = write_jsonl(tmp_path / "mixed.jsonl", [*preference_rows(2), single])
    assert facts(path)["kept"] == 3


def test_a_bare_file_is_not_tokenized_unless_a_model_is_named(tmp_path, make_base):
    path = write_jsonl(tmp_path / "good.jsonl", preference_rows(3))
    assert facts(path)["first_row"] is None
    found = facts(path, "--model", make_base("llama"))
    assert found["first_row"].count("⟦") == 2
    assert "chosen tokens" in found["lengths"]


def test_a_recipes_data_are_looked_at_with_its_lengths(write_recipe):
    recipe = write_recipe()
    good = facts(recipe)
    assert (good["read"], good["kept"], good["refused"]) == (good["kept"], good["read"], 0)
    assert good["first_row"].count("⟦") == 2
    long = {"data.max_length": 12, "data.max_prompt_length": 4}
    refused = facts(write_recipe(long), code=3)
    assert refused["refused"] > 0
    assert {one["code"] for one in refused["findings"] if one["severity"] == "error"} == {"too_long"}
    dropped = facts(write_recipe(long | {"data.on_overflow": "drop"}), code=3)
    assert dropped["kept"] == dropped["read"] - dropped["dropped"] - dropped["refused"]
    assert dropped["dropped"] > 0


def test_read_is_kept_and_refused_over_both_splits(write_recipe, tmp_path):
    held_out = write_jsonl(tmp_path / "heldout-faulty.jsonl", FAULTY)
    found = facts(write_recipe({"data.heldout": str(held_out)}), code=3)
    assert found["read"] == found["kept"] + found["refused"]
    assert found["refused"] == 2


def test_weights_are_not_read(write_recipe, make_recipe):
    recipe = write_recipe()
    base = make_recipe()["model"]["base"]
    weights = next(Path(base).glob("*.safetensors"))
    content = weights.read_bytes()
    try:
        weights.write_bytes(b"no weights at all")
        assert facts(recipe)["refused"] == 0
    finally:
        weights.write_bytes(content)


def test_fix_writes_the_kept_rows_with_their_own_columns_and_the_refused_with_reasons(tmp_path):
    faulty = [row | {"agreement": number} for number, row in enumerate(FAULTY)]
    path = write_jsonl(tmp_path / "faulty.jsonl", faulty)
    path.write_text(path.read_text() + "{torn\n")
    check(path, "--fix", tmp_path / "clean.jsonl", code=3)
    kept = [json.loads(line) for line in (tmp_path / "clean.jsonl").read_text().splitlines()]
    assert kept == [faulty[0], faulty[2], faulty[4]]
    refused = [json.loads(line) for line in (tmp_path / "clean.refused.jsonl").read_text().splitlines()]
    assert [(one["line"], one.get("row")) for one in refused] == [(2, faulty[1]), (4, faulty[3]), (6, None)]
    assert refused[0]["reasons"] == ["rejected is empty"]
    assert all(one["reasons"] for one in refused)
    assert facts(tmp_path / "clean.jsonl")["refused"] == 0


def test_fix_keeps_held_out_rows_apart(make_recipe, tmp_path):
    document = make_recipe({"data.heldout_share": 0.5})
    del document["data"]["heldout"]
    recipe = tmp_path / "share.toml"
    recipe.write_text(tomli_w.dumps(document))
    done = check(recipe, "--fix", tmp_path / "clean.jsonl")
    assert "clean.heldout.jsonl, in place of" in done.stdout
    assert "with [data] heldout in place of heldout_share" in done.stdout
    kept = [(tmp_path / name).read_text().splitlines() for name in ("clean.jsonl", "clean.heldout.jsonl")]
    assert all(kept)
    prompts = [{json.loads(line)["prompt"] for line in lines} for lines in kept]
    assert not prompts[0] & prompts[1]
    assert sum(map(len, kept)) == facts(recipe)["read"]


@pytest.mark.parametrize("name", ["clean.jsonl", "clean.refused.jsonl"])
def test_fix_replaces_no_file(tmp_path, name):
    path = write_jsonl(tmp_path / "good.jsonl", preference_rows(3))
    (tmp_path / name).write_text("mine")
    done = check(path, "--fix", tmp_path / "clean.jsonl", code=2)
    assert f"{tmp_path / name}: exists already" in done.stderr
    assert (tmp_path / name).read_text() == "mine"


def test_the_page_escapes_what_rows_say_and_needs_no_network(tmp_path):
    script = "<script>alert(1)</script>"
    path = write_jsonl(tmp_path / "odd.jsonl", rows({}, {"prompt": [{"role": script, "content": "x"}]}))
    check(path, "--html", tmp_path / "page.html", code=3)
    page = (tmp_path / "page.html").read_text()
    assert script not in page
    assert "<title>odd.jsonl - qpref check</title>" in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "2 rows read, 1 kept, 1 refused" in " ".join(page.split())
    assert not re.search(r"(src|href)=", page)


def test_json_is_one_object_on_standard_output_whatever_else_is_written(tmp_path):
    path = write_jsonl(tmp_path / "good.jsonl", preference_rows(3))
    done = check(path, "--json", "--fix", tmp_path / "clean.jsonl", "--html", tmp_path / "page.html")
    assert json.loads(done.stdout)["read"] == 3
    assert "clean.jsonl" in done.stderr


def test_a_recipe_takes_changes_and_a_file_does_not(write_recipe, tmp_path):
    assert facts(write_recipe(), "--set", "data.on_overflow=truncate")["refused"] == 0
    path = write_jsonl(tmp_path / "good.jsonl", preference_rows(3))
    assert "--set changes a recipe" in check(path, "--set", "a.b=1", code=2).stderr
    assert "--model is for a bare source" in check(write_recipe(), "--model", "x", code=2).stderr


def test_nothing_is_said_of_a_file_that_no_reader_reads(tmp_path):
    (tmp_path / "pairs.zip").write_text("")
    assert "no reader for 'pairs.zip'" in check(tmp_path / "pairs.zip", code=2).stderr


@pytest.mark.parametrize(
    ("name", "content"), [("none.jsonl", None), ("cut.jsonl.gz", b"\x1f\x8b\x08\x00"), ("no.json", b'{"prompt": "x"}')]
)
def test_json_is_an_object_though_the_data_cannot_be_read(tmp_path, name, content):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    found = facts(tmp_path / name, code=3)
    (finding,) = found["findings"]
    assert (finding["severity"], finding["path"]) == ("error", str(tmp_path / name))
    assert found["read"] == found["kept"] + found["refused"]


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_a_split_of_which_nothing_is_left_exits_with_3(write_recipe, tmp_path, split):
    (tmp_path / "none.jsonl").write_text("\n")
    recipe = write_recipe({f"data.{split}": str(tmp_path / "none.jsonl")})
    assert facts(recipe, code=3)["kept"] > 0
    assert f"{tmp_path}/none.jsonl: no pair is left of 0 rows" in check(recipe, code=3).stdout


@pytest.mark.parametrize("name", ["clean.json", "clean.csv", "clean.jsonl.gz", "clean"])
def test_fix_writes_json_lines_alone(tmp_path, name):
    path = write_jsonl(tmp_path / "good.jsonl", preference_rows(3))
    assert "name a .jsonl file" in check(path, "--fix", tmp_path / name, code=2).stderr


def test_a_page_replaces_no_data(tmp_path):
    path = write_jsonl(tmp_path / "good.jsonl", preference_rows(3))
    before = path.read_text()
    assert "a page's name ends in .html" in check(path, "--html", path, code=2).stderr
    assert path.read_text() == before


def test_fix_names_the_file_that_stands_in_for_each_source(make_recipe, tmp_path):
    other = [{"q": "What is it?", "chosen": "It is that, I think.", "rejected": "No idea at all."}, {}]
    train = [
        {"path": str(write_jsonl(tmp_path / "a.jsonl", preference_rows(2)))},
        {"path": str(write_jsonl(tmp_path / "b.jsonl", other)), "columns": {"prompt": "q"}},
    ]
    recipe = tmp_path / "mixed.toml"
    recipe.write_text(tomli_w.dumps(make_recipe({"data.train": train})))
    written = check(recipe, "--fix", tmp_path / "clean.jsonl", code=3).stdout.splitlines()[:4]
    assert written == [
        f"written: {tmp_path / 'clean.1.jsonl'}, in place of {tmp_path / 'a.jsonl'}",
        f"written: {tmp_path / 'clean.2.jsonl'}, in place of {tmp_path / 'b.jsonl'}",
        f"written: {tmp_path / 'clean.heldout.jsonl'}, in place of {tmp_path / 'heldout.jsonl'}",
        f"written: {tmp_path / 'clean.refused.jsonl'}, the refused rows with the reasons",
    ]
    for number, source in enumerate(train, 1):
        source["path"] = str(tmp_path / f"clean.{number}.jsonl")
    recipe.write_text(tomli_w.dumps(make_recipe({"data.train": train})))
    assert [facts(recipe)[key] for key in ("read", "kept")] == [7, 7]


# A file without a recipe: its reader, its format and its columns.


def test_a_bare_file_is_read_with_the_reader_format_and_columns_that_are_named(tmp_path):
    renamed = [{"post": row["prompt"], "good": row["chosen"], "bad": row["rejected"]} for row in preference_rows(3)]
    path = write_jsonl(tmp_path / "pairs.data", renamed)
    columns = ("--columns", "prompt=post", "--columns", "chosen=good", "--columns", "rejected=bad")
    assert facts(path, "--reader", "jsonl", *columns)["kept"] == 3
    assert facts(path, "--reader", "jsonl", *columns, "--format", "pair")["kept"] == 3
    as_completions = facts(path, "--reader", "jsonl", *columns, "--shape", "unpaired", code=3)
    assert {one["code"] for one in as_completions["findings"]} == {"not_an_example"}


def test_the_columns_that_would_fit_are_those_that_the_option_takes(tmp_path):
    renamed = [{"post": row["prompt"], "good": row["chosen"], "bad": row["rejected"]} for row in preference_rows(2)]
    path = write_jsonl(tmp_path / "pairs.jsonl", renamed)
    message = facts(path, code=3)["findings"][0]["message"]
    mapping = re.search(r"columns = \{ (.*) \} would fit", message)
    assert mapping
    pairs = [option for pair in mapping[1].split(", ") for option in ("--columns", re.sub(r"[ \"]", "", pair))]
    assert facts(path, *pairs)["kept"] == 2


@pytest.mark.parametrize(
    ("options", "wording"),
    [
        (("--columns", "prompt"), "'prompt' is not NAME=COLUMN, such as prompt=question"),
        (("--columns", "=post"), "'=post' is not NAME=COLUMN"),
        (("--columns", "prompt="), "'prompt=' is not NAME=COLUMN"),
        (("--columns", "prompt=a", "--columns", "prompt=b"), "'prompt' is mapped twice"),
        (("--columns", "promt=post"), "no row format has a column 'promt'; did you mean 'prompt'?"),
        (("--format", "pairs"), "[data] format: expected 'auto', 'pair'"),
        (("--reader", "pairs"), "[data] reader: no reader 'pairs' is installed"),
    ],
)
def test_a_wrong_option_is_named(tmp_path, options, wording):
    path = write_jsonl(tmp_path / "pairs.jsonl", preference_rows(2))
    assert wording in check(path, *options, code=2).stderr


@pytest.mark.parametrize("options", [("--reader", "jsonl"), ("--shape", "pair"), ("--columns", "prompt=post")])
def test_a_recipe_says_itself_how_its_data_are_read(write_recipe, options):
    key = options[0].replace("shape", "format")
    assert f"error: {key} is for a bare source of data" in check(write_recipe(), *options, code=2).stderr


def test_who_won_is_printed_for_the_first_rows_of_comparisons(tmp_path):
    rows = [
        {"prompt": f"Why {number}?", "response_0": "Left.", "response_1": "Right.", "better_response_id": number % 2}
        for number in range(5)
    ]
    path = write_jsonl(tmp_path / "compared.jsonl", rows)
    printed = check(path).stdout
    assert f"{path}: who won, in the first rows" in printed
    assert "2: better_response_id = 1: response_1 won\n    chosen:   Right.\n    rejected: Left.\n" in printed
    assert printed.count(" won\n") == 3
    assert [one["winner"] for one in facts(path)["verdicts"]] == ["response_0", "response_1", "response_0"]


def test_a_source_whose_verdicts_fit_no_outcome_is_refused_as_a_whole(write_recipe, tmp_path):
    rows = [{"prompt": f"Why {number}?", "a": "Left.", "b": "Right.", "label": number} for number in (1, 2, 7)]
    path = write_jsonl(tmp_path / "compared.jsonl", rows)
    contest = {"first": "a", "second": "b", "winner": "label", "first_wins": [1], "second_wins": [2]}
    heldout = write_jsonl(tmp_path / "judged.jsonl", preference_rows(4))
    sources = {"data.train": str(path), "data.heldout": [{"path": str(heldout), "format": "pair"}]}
    recipe = write_recipe(sources | {"data.contest": contest})
    found = facts(recipe, code=3)
    assert (found["kept"], found["refused"]) == (4, 3)  # the held-out rows stay
    assert [one["line"] for one in found["findings"] if one["code"] == "refused_source"] == [0]
    printed = check(recipe, "--fix", tmp_path / "clean.jsonl", code=3).stdout
    assert "1 of 3 verdicts fit no outcome: label = 7 (1 row, first: 3)" in printed
    assert (tmp_path / "clean.jsonl").read_text() == ""
    refused = [json.loads(line) for line in (tmp_path / "clean.refused.jsonl").read_text().splitlines()]
    assert [one["row"] for one in refused] == rows
    assert all("fit no outcome" in one["reasons"][-1] for one in refused)


def test_rows_that_make_several_pairs_are_counted(tmp_path):
    path = write_jsonl(tmp_path / "pairs.jsonl", rows({}, {"rejected": ["No.", "Never.", "Not at all."]}, {}))
    counted = f"{path}: 3 rows read, 3 kept, 0 refused; 1 row has more than two responses, which make 3 pairs"
    assert counted in check(path).stdout
    assert facts(path)["several_responses"] == {"rows": 1, "pairs": 3}
    assert facts(write_jsonl(tmp_path / "one.jsonl", preference_rows(2)))["several_responses"] == {}
