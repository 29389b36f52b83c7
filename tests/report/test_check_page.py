"""The page of `qpref check`: what is wrong and what to do, and the rows themselves, whatever they hold."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from conftest import preference_rows, write_jsonl
from run_folders import parsed

from qpref.data import flagged
from qpref.data.audit import Audit
from qpref.data.check import check_data
from qpref.data.finding_codes import CODES, OTHER
from qpref.data.flagged import shortened
from qpref.data.split import HeldOutShare
from qpref.errors import PluginError
from qpref.hooks import Options, Validator
from qpref.hooks.manager import READER, Loaded, Offer, PluginHost
from qpref.recipe.choices import Choice, SourceChoice
from qpref.records import Finding, Source
from qpref.report.check_page import render_check_page
from qpref.report.text import visible

HOSTILE = "</script><script>alert(1)</script>\"'><img src=x onerror=alert(2)>&amp;"


def source(path, split="train"):
    return SourceChoice(location=str(path), split=split, reader=PluginHost().load(READER, "jsonl"))


def judge(*findings, each=None):
    """A third-party check: fixed findings, and one for each example where `each` makes one."""
    check = SimpleNamespace(look=lambda example, split: [each(example)] if each else [], finish=lambda: findings)
    record = Validator(name="v", summary="", options=Options, start=lambda options: check)
    return Choice(Loaded(record, Offer("check", "v", "acme", "2.0", "acme_v")), Options())


def warn(example, code="odd", message="is odd"):
    return Finding(code=code, severity="warning", message=message, source=example.source)


def page_of(sources, *validators, title="pairs.jsonl", first_row=None, share=None, pairs_only=True):
    checked = check_data(sources, validators, share=share, pairs_only=pairs_only)
    return parsed(render_check_page(Audit(checked, first_row), title))


def cards(page):
    return page.all("article", class_="row")


def headings(page):
    return [card.one("h3").text.strip() for card in cards(page)]


def texts_of(card):
    """Label -> text of a card's turns."""
    return {
        turn.one("div", class_="name").text: turn.one("div", class_="text").text
        for turn in card.all("div", class_="turn")
    }


@pytest.fixture
def path(tmp_path):
    return write_jsonl(tmp_path / "pairs.jsonl", preference_rows(12))


def test_the_title_is_a_name(path):
    page = page_of([source(path)], title="my.toml")
    assert page.one("title").text == "my.toml - qpref check"
    assert page.one("h1").text == "my.toml"
    assert [part.text for part in page.all("p", class_="path")] == [str(path)]


def test_training_rows_come_first_and_lines_in_numeric_order(path, tmp_path):
    held_out = write_jsonl(tmp_path / "held.jsonl", preference_rows(2, start=50))
    page = page_of([source(held_out, "heldout"), source(path)], judge(each=warn))
    training = [f"pairs.jsonl, line {line} training" for line in range(1, 13)]
    assert headings(page) == [*training, "held.jsonl, line 1 held-out", "held.jsonl, line 2 held-out"]


def test_rows_of_a_held_out_share_are_told_from_training_rows(tmp_path):
    path = write_jsonl(tmp_path / "pairs.jsonl", preference_rows(40))
    page = page_of([source(path)], judge(each=warn), share=HeldOutShare(0.25, seed=1))
    splits = [card.attributes["data-split"] for card in cards(page)]
    assert splits == sorted(splits, key=["training", "held-out"].index)
    assert {"training", "held-out"} == set(splits)
    assert len(splits) == 40


def test_files_of_the_same_name_are_told_apart(tmp_path):
    paths = []
    for name in "ab":
        (tmp_path / name).mkdir()
        paths.append(write_jsonl(tmp_path / name / "pairs.jsonl", preference_rows(1)))
    page = page_of([source(path) for path in paths], judge(each=warn))
    assert headings(page) == [f"{path}, line 1 training" for path in paths]


def test_a_flagged_pair_is_shown_with_its_turns_and_both_sides(tmp_path):
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    row = {"prompt": turns, "chosen": "Hello.", "rejected": [{"role": "assistant", "content": "x", "name": "Ann"}]}
    (card,) = cards(page_of([source(write_jsonl(tmp_path / "pairs.jsonl", [row]))], judge(each=warn)))
    assert texts_of(card) == {
        "system": "Be brief.",
        "user": "Hi",
        "chosen": "Hello.",
        "rejected": 'x\n{"name": "Ann"}',
    }
    assert [item.text.strip() for item in card.all("li")] == ["odd is odd"]


def test_ranked_responses_are_shown_once_each(tmp_path):
    row = {"prompt": "Best?", "responses": ["one", "two", "three"], "ranks": [1, 3, 2]}
    (card,) = cards(page_of([source(write_jsonl(tmp_path / "pairs.jsonl", [row]))], judge(each=warn)))
    assert texts_of(card) == {"user": "Best?", "chosen": "one", "rejected": "two", "rejected and chosen": "three"}
    assert len(card.all("li")) == 3  # a finding for each of the three pairs


def test_a_completion_is_shown_with_its_label(tmp_path):
    rows = [{"prompt": "Why?", "completion": "So.", "label": label} for label in (True, False)]
    page = page_of([source(write_jsonl(tmp_path / "x.jsonl", rows))], judge(each=warn), pairs_only=False)
    assert [list(texts_of(card))[1] for card in cards(page)] == ["desirable completion", "undesirable completion"]


def test_a_row_that_is_no_example_is_shown_as_it_was_read_and_one_that_is_no_json_with_its_reason(tmp_path):
    path = write_jsonl(tmp_path / "pairs.jsonl", [{"question": "Why?", "n": [1, None]}])
    path.write_text(path.read_text() + "{torn\n")
    first, second = cards(page_of([source(path)]))
    assert texts_of(first) == {"question": "Why?", "n": "[1, null]"}
    assert texts_of(second) == {}
    assert second.one("li").text.startswith("unreadable ")


def test_findings_of_a_whole_source_are_above_the_codes_and_no_row(path):
    whole = Finding(code="odd", severity="warning", message="is odd", source=Source(path=str(path), line=0))
    page = page_of([source(path)], judge(whole))
    assert [item.text.strip() for item in page.one("section", id="findings").all("li")] == ["odd pairs.jsonl: is odd"]
    assert cards(page) == []
    assert page.all("section", id="rows") == []


def test_the_first_rows_of_comparisons_show_who_won(tmp_path):
    rows = [{"history": "1 + 1?", "human_ref_A": "21", "human_ref_B": "<b>2</b>", "labels": 0}] * 5
    page = page_of([source(write_jsonl(tmp_path / "shp.jsonl", rows))])
    shown = page.one("section", id="verdicts").all("article")
    assert [card.one("h3").text for card in shown] == [f"shp.jsonl, line {line}" for line in (1, 2, 3)]
    assert shown[0].one("code").text == "labels = 0: human_ref_B won"
    assert texts_of(shown[0]) == {"chosen": "<b>2</b>", "rejected": "21"}
    assert cards(page) == []


def test_each_code_is_explained_once_with_what_to_do(path):
    twice = [Finding(code="tied", severity="error", message=f"m{line}", source=Source(path=str(path), line=line))
             for line in (2, 3)]  # fmt: skip
    page = page_of([source(path)], judge(*twice, each=lambda example: warn(example, code="acme_toxic")))
    kinds = {kind.one("h3").one("code").text: kind for kind in page.all("article", class_="kind")}
    assert list(kinds) == ["tied", "acme_toxic"]
    assert kinds["tied"].one("span").text == "error, 2"
    assert kinds["tied"].all("p")[0].text.strip() == CODES["tied"].meaning
    assert CODES["tied"].remedy in kinds["tied"].one("p", class_="todo").text
    assert OTHER.remedy.replace("`", "") in kinds["acme_toxic"].one("p", class_="todo").text


def test_no_text_of_rows_findings_or_names_becomes_markup(tmp_path):
    rows = [
        {"prompt": [{"role": "user", "content": HOSTILE, HOSTILE: HOSTILE}], "chosen": HOSTILE, "rejected": "No."},
        {HOSTILE: HOSTILE},
    ]
    path = write_jsonl(tmp_path / "<img src=x>.jsonl", rows)
    finding = Finding(code="odd", severity="warning", message=HOSTILE, source=Source(path=HOSTILE, line=0))
    each = judge(finding, each=lambda example: warn(example, message=HOSTILE))
    page = page_of([source(path)], each, title=HOSTILE, first_row=HOSTILE)
    assert [len(page.all(tag)) for tag in ("script", "style", "img")] == [1, 1, 0]
    assert page.one("h1").text == HOSTILE
    assert page.one("pre").text == HOSTILE
    assert HOSTILE in texts_of(cards(page)[0])["chosen"]
    assert texts_of(cards(page)[1]) == {HOSTILE: HOSTILE}
    assert json.loads(cards(page)[0].attributes["data-codes"]) == ["odd"]
    assert [option.text for option in page.all("select")[0].all("option")] == ["all", "odd", "unknown_format"]


def test_a_finding_whose_code_is_markup_is_refused(tmp_path):
    path = write_jsonl(tmp_path / "pairs.jsonl", [{"prompt": "Hi?", "chosen": "Yes.", "rejected": "No."}])
    with pytest.raises(PluginError, match="a code is a short name"):
        page_of([source(path)], judge(each=lambda example: warn(example, code=HOSTILE)))


def test_invisible_and_reordering_characters_are_shown_by_their_numbers():
    assert visible("a\u202eb\u200bc\x07\ud800") == "a⟨U+202E⟩b⟨U+200B⟩c⟨U+0007⟩⟨U+D800⟩"
    kept = "a\tb\nc\r\nd é \U0001f468\u200d\U0001f469 م"
    assert visible(kept) == kept


def test_the_page_is_of_bounded_size_and_counts_what_it_leaves_out(tmp_path):
    long = {"prompt": "why " * 1000, "chosen": "so " * 2000, "rejected": "no " * 2000}
    path = write_jsonl(tmp_path / "pairs.jsonl", [long] * (flagged.MAX_ROWS_PER_CODE + 5))
    checked = check_data([source(path)], [judge(each=warn)])
    text = render_check_page(Audit(checked), "x")
    page = parsed(text)
    assert len(cards(page)) == flagged.MAX_ROWS_PER_CODE
    assert f"{flagged.MAX_ROWS_PER_CODE} rows with it are shown" in page.one("article", class_="kind").text
    assert len(text) < flagged.MAX_ROWS_PER_CODE * 8_000
    assert "characters left out" in texts_of(cards(page)[0])["chosen"]


def test_rows_of_many_codes_are_bounded_together(tmp_path, monkeypatch):
    monkeypatch.setattr(flagged, "MAX_ROWS", 6)
    path = write_jsonl(tmp_path / "pairs.jsonl", preference_rows(12))
    page = page_of([source(path)], judge(each=lambda example: warn(example, code=f"code{example.source.line}")))
    assert len(cards(page)) == 6


def test_many_sources_codes_and_verdicts_are_bounded_and_counted(tmp_path):
    row = {"prompt": "Why?", "human_ref_A": "21", "human_ref_B": "2", "labels": 1}
    paths = [write_jsonl(tmp_path / f"{number}.jsonl", [row] * 3) for number in range(22)]
    wholes = [Finding(code="odd", severity="warning", message="is odd", source=Source(path="x", line=0))] * 103
    codes = [warn(SimpleNamespace(source=Source(path=str(paths[0]), line=1)), code=f"c{at}") for at in range(101)]
    page = page_of([source(path) for path in paths], judge(*wholes, *codes))
    assert len(page.all("p", class_="path")) == 20
    assert len(page.one("section", id="verdicts").all("article")) == 30
    assert len(page.one("section", id="findings").one("ul").all("li")) == 100
    assert len(page.all("article", class_="kind")) == 100
    notes = [note.text for note in page.all("p", class_="note") if "more" in note.text and "not shown" in note.text]
    assert notes == [f"{number} more {what} are not shown."
                     for number, what in ((2, "sources"), (36, "rows"), (3, "of them"), (2, "codes"))]  # fmt: skip


def test_a_rare_code_is_not_crowded_out_by_a_frequent_one(path, monkeypatch):
    monkeypatch.setattr(flagged, "MAX_ROWS", 6)
    rare = Finding(code="rare", severity="error", message="is rare", source=Source(path=str(path), line=12))
    page = page_of([source(path)], judge(rare, each=warn))
    assert headings(page) == [f"pairs.jsonl, line {line} training" for line in (1, 2, 3, 12)]


def test_many_columns_turns_and_responses_are_bounded(tmp_path):
    turns = [{"role": role, "content": f"turn {at}"} for at, role in enumerate(["user", "assistant"] * 20 + ["user"])]
    rows = [
        {f"c{at}": at for at in range(99)},
        {"prompt": turns, "responses": [f"answer {at}" for at in range(20)], "ranks": list(range(20))},
    ]
    first, second = cards(page_of([source(write_jsonl(tmp_path / "x.jsonl", rows))], judge(each=warn)))
    assert list(texts_of(first).items())[-1] == ("75 more columns", "not shown")
    assert second.all("div", class_="turn")[0].text == "29 earlier turnsnot shown"
    assert second.all("div", class_="turn")[-1].text == "12 more responsesnot shown"
    assert len(second.all("li")) == flagged.MAX_FINDINGS


def test_a_long_text_keeps_its_start_and_its_end():
    text = "a" * 5_000 + "z"
    assert shortened(text).startswith("a" * 1400 + "\n[... 3,001 characters left out ...]\n")
    assert shortened(text).endswith("az")
    assert shortened("a" * 2_000) == "a" * 2_000


def test_without_scripts_all_rows_are_there_and_no_dead_control(path):
    page = page_of([source(path)], judge(each=warn))
    assert all("hidden" not in card.attributes for card in cards(page))
    assert "hidden" in page.one("div", class_="filters").attributes
    assert all("hidden" in button.attributes for button in page.all("button"))


def test_a_file_without_findings_says_so(path):
    page = page_of([source(path)])
    assert page.one("p", class_="absent").text == "The checks found nothing."
    assert page.one("p", class_="good").text == "No row is refused."
