"""Pages of hostile files: what they lead to, hide or repeat a million times stays out of the page."""

from __future__ import annotations

import json
import os

import pytest
from click.testing import CliRunner
from hostile_page import hostile_page
from run_folders import make_run, parsed, train_rows

from qpref.cli import main
from qpref.report import cells, curves
from qpref.report.text import MAX_CHARACTERS
from qpref.report.write import Extras, write_report

SECRET = '{"outside": "the key of somebody", "prompt": "the key of somebody"}\n'
HIDING = "a\x1b[31m\x07b\u202ec\u2066d\x00e\u200bf\x9bg"
SHOWN = "a⟨U+001B⟩[31m⟨U+0007⟩b⟨U+202E⟩c⟨U+2066⟩d⟨U+0000⟩e⟨U+200B⟩f⟨U+009B⟩g"
TOKENS = (
    "hf_c4narYc4narYc4narYc4narY",
    "sk-c4narY0c4narY0c4narY",
    "ghp_c4narYc4narYc4narYc4narY",
    "github_pat_c4narYc4narY0123456789",
    "AKIAC4NARYC4NARYC4NA",
    "eyJc4narYc4nar.eyJc4narYc4nar.c4narYc4nary",
    "https://someone:c4naryc4nary@host/rows",
    "WANDB_API_KEY=c4naryc4naryc4nary",
)
MEGABYTE = 2**20
LONG = 10 * MAX_CHARACTERS


def test_control_characters_and_those_of_text_direction_are_shown_by_their_codes(tmp_path):
    text = hostile_page(tmp_path, HIDING, name=HIDING.replace("\0", "")).read_text()
    assert text.count(SHOWN) > 30
    assert not set(text) & {character for character in HIDING if not character.isascii() or not character.isprintable()}


def test_curve_labels_reach_the_script_as_they_are_shown(tmp_path):
    """With several runs, each label is a run's name; the tooltip writes it past the template."""
    name = HIDING.replace("\0", "")
    runs = [make_run(tmp_path / name, train_rows([0.5])), make_run(tmp_path / "b", train_rows([0.5]))]
    page = parsed(write_report(runs, tmp_path / "page.html").read_text())
    points = [svg.attributes["data-points"] for svg in page.all("svg") if "data-points" in svg.attributes]
    labels = [trace["label"] for text in points for trace in json.loads(text)]
    assert labels[0] == f"{SHOWN.replace('⟨U+0000⟩', '')}, training"


@pytest.mark.parametrize("text", ["{{ 7 * 7 }}", "{% for x in y %}", "{# gone #}", "${7*7}", "<%= 7*7 %>"])
def test_template_syntax_is_text(tmp_path, text):
    page = parsed(hostile_page(tmp_path, text).read_text())
    assert page.text.count(text) > 30
    assert "49" not in page.one("section", id="answers").text


@pytest.mark.parametrize(
    "text", ["javascript:alert(1)", "data:text/html,<script>alert(1)</script>", "' onload='alert(1)"]
)
def test_an_address_is_text(tmp_path, text):
    page = parsed(hostile_page(tmp_path, text).read_text())
    assert page.text.count(text) > 30
    assert all(link.attributes["href"].startswith("#") for link in page.all("a"))
    assert len(page.all("script")) == 1


@pytest.mark.parametrize("token", TOKENS)
def test_no_token_of_any_file_is_on_the_page(tmp_path, token):
    assert "c4nary" not in hostile_page(tmp_path, f"a text with {token} inside").read_text().lower()


def test_a_secret_of_the_environment_is_not_on_the_page(tmp_path, monkeypatch):
    monkeypatch.setenv("SERVICE_PASSWORD", "c4nary of the environment")
    assert "c4nary" not in hostile_page(tmp_path, "so c4nary of the environment it is").read_text()


@pytest.mark.parametrize("name", ["recipe.lock.toml", "metrics.jsonl", "data.json", "result.json"])
@pytest.mark.parametrize("make", [os.symlink, lambda target, path: os.mkfifo(path), lambda target, path: path.mkdir()])
def test_a_file_of_the_run_that_is_no_file_is_named_and_not_read(tmp_path, name, make):
    outside = tmp_path / "outside"
    outside.write_text(SECRET)
    run = make_run(tmp_path / "run", train_rows([0.5]), data={}, result={})
    (run / name).unlink()
    make(outside, run / name)
    text = write_report([run]).read_text()
    assert "the key of somebody" not in text
    assert f"run: {name} is left out: " in text


@pytest.mark.parametrize("name", ["run.json", "merge.json"])
def test_a_linked_file_that_the_page_cannot_do_without_is_refused(tmp_path, name):
    (tmp_path / "outside").write_text(SECRET)
    run = make_run(tmp_path / "run")
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(tmp_path / "outside")
    done = CliRunner().invoke(main, ["report", str(run)], catch_exceptions=False)
    assert done.exit_code == 3
    assert f"error: {run / name}: cannot be read: it is a symbolic link" in done.stderr
    assert not (run / "report.html").exists()


def test_a_linked_file_that_the_user_names_is_read(tmp_path):
    (tmp_path / "outside").write_text(SECRET)
    (tmp_path / "link").symlink_to(tmp_path / "outside")
    page = write_report([make_run(tmp_path / "run")], extras=Extras(samples=[tmp_path / "link"]))
    assert "the key of somebody" in page.read_text()


def test_a_run_folder_that_is_a_link_in_a_circle_is_refused(tmp_path):
    (tmp_path / "run").symlink_to(tmp_path / "run")
    done = CliRunner().invoke(main, ["report", str(tmp_path / "run")], catch_exceptions=False)
    assert done.exit_code == 2
    assert "no run of qpref" in done.stderr


NO_JSON = {
    "deep": ("[" * 100_000, "not JSON: "),
    "a number of 5,000 digits": ("1" * 5000, "not JSON: "),
    "no UTF-8": (b"\xff\xfe", "not JSON: "),
    "empty": ("", "not JSON: "),
}


@pytest.mark.parametrize("option", ["--eval", "--samples", "--merged"])
@pytest.mark.parametrize("case", [*NO_JSON, "a FIFO", "a device", "a folder"])
def test_a_file_of_another_command_that_is_none_is_one_sentence(tmp_path, option, case):
    file, words = tmp_path / "file", "cannot be read: "
    if case in NO_JSON:
        content, words = NO_JSON[case]
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    elif case == "a FIFO":
        os.mkfifo(file)
    elif case == "a device":
        file.symlink_to("/dev/zero")
    else:
        file.mkdir()
    run = make_run(tmp_path / "run")
    done = CliRunner().invoke(main, ["report", str(run), option, str(file)], catch_exceptions=False)
    assert done.exit_code == 3
    assert done.stderr.startswith(f"error: {file}")
    assert words in done.stderr
    assert done.stderr.count("\n") == 1


def test_long_texts_make_no_long_page(tmp_path):
    text = hostile_page(tmp_path, "x" * LONG).read_text()
    assert len(text) < 10 * LONG
    assert f"[... {LONG - MAX_CHARACTERS:,} characters left out]" in text


def test_what_stands_there_a_thousand_times_is_shown_a_hundred_times(tmp_path):
    many = {f"name {index}": {"value": 1} for index in range(1000)}
    rows = [{"step": step, "split": split} | {f"m{index}": 1.0 for index in range(1100)}
            for step, split in ((1, "train"), (2, "train"), (2, "eval"))]  # fmt: skip
    lengths = {f"length {index}": [{"from": one, "to": one, "count": 1} for one in range(200)] for index in range(110)}
    findings = [{"severity": "error", "code": f"code {index}"} for index in range(1000)]
    run = make_run(tmp_path / "run", rows, facts={"versions": many, "plugins": [{}] * 1000},
                   data={"lengths": lengths, "findings": findings, "others": many})  # fmt: skip
    files = {
        "merged": {"verdict": {"flips": [many, *[{}] * 200]}, "tried": many},
        "evaluations": {"models": [{"model": "m", "metrics": many, "by": {"length": many} | many}, *[{}] * 100],
                        "warnings": ["w"] * 1000},
        "samples": [{"prompt": "p", "turns": [{"text": "t"}] * 200, **dict.fromkeys(map(str, range(200)), "a")},
                    *[{"prompt": "p"}] * 200],
    }  # fmt: skip
    for kind, value in files.items():
        (tmp_path / f"{kind}.json").write_text(json.dumps(value))
    extras = Extras(**{kind: [tmp_path / f"{kind}.json"] for kind in files})
    text = write_report([run], extras=extras).read_text()
    page = parsed(text)
    assert len(page.all("figure")) == curves.MAX_CHARTS
    assert f"{1000 - curves.MAX_CHARTS} more metrics are not shown." in text
    assert len(page.all("article")) == cells.MAX_ROWS
    assert all(len(table.all("tr")) <= 5 * cells.MAX_ROWS + 1 for table in page.all("table"))
    assert all(len(row.children) <= 2 * cells.MAX_COLUMNS + 5 for row in page.all("tr"))


def test_a_line_of_many_megabytes_is_no_row(tmp_path):
    run = make_run(tmp_path / "run", train_rows([0.5]))
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "split": "train", "loss": 1, "x": "' + "x" * 3 * MEGABYTE + '"}\n')
        file.write('{"step": 3, "split": "train", "loss": 0.25}\n')
    text = write_report([run]).read_text()
    assert "1 unreadable line(s) of metrics.jsonl are left out, the first is line 2." in text
    assert "0.25" in text
