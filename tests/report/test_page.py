"""The page says what the files say, escapes all of it, and can load nothing."""

from __future__ import annotations

import base64
import hashlib
import json
import re

import pytest
from conftest import rows_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from run_folders import make_run, parsed, train_rows

import qpref
from qpref.report.text import number_text, size_text
from qpref.report.write import Extras, write_report

HOSTILE = "</script><script>alert(1)</script>\"'><img src=x onerror=alert(2)>&amp;"
EVIL_NAME = "<script>alert(3)<\\script>"


def page_of(*runs, extras=None, output=None):
    return parsed(write_report(runs, output, extras).read_text())


def table_under(page, heading: str) -> list[list[str]]:
    """The first table of the section with this heading."""
    section = next(part for part in page.all("section") if part.one("h2").text == heading)
    return section.all("table")[0].rows()


def tiles_of(page) -> list[list[str]]:
    return [[part.text for part in tile.all("div")] for tile in page.all("div", class_="tile")]


@pytest.fixture(scope="session")
def trained(make_base, tmp_path_factory):
    """A real run of 3 steps with held-out rows at 0 and 3."""
    from conftest import preference_rows, write_jsonl

    folder = tmp_path_factory.mktemp("trained")
    recipe = {
        "model": {"base": str(make_base()), "quantization": "none", "dtype": "float32", "device": "cpu"},
        "adapter": {"rank": 4, "alpha": 8},
        "data": {
            "train": str(write_jsonl(folder / "train.jsonl", preference_rows(12))),
            "heldout": str(write_jsonl(folder / "heldout.jsonl", preference_rows(4, start=100))),
        },
        "checks": {"too_short": "off"},
        "loss": {"name": "dpo", "beta": 0.1},
        "train": {"learning_rate": 1e-3, "batch_size": 4, "tokens_per_microbatch": 400},
        "sinks": [],
    }
    return qpref.train(recipe, output=folder / "tiny").path


def test_heldout_table_of_a_real_run_has_the_numbers_of_its_metrics(trained):
    rows = [row for row in rows_of(trained) if row["split"] == "eval"]
    header, *body = table_under(page_of(trained), "Held-out metrics")
    assert header == ["", "step 0", "step 3"]
    shown = {name: cells for name, *cells in body}
    assert shown["loss"] == [number_text(row["eval_loss"]) for row in rows] != ["0.69315", "0.69315"]
    margins = [number_text(row["eval_rewards/margins"]) for row in rows]
    assert shown["reward margin, chosen - rejected"] == margins
    assert len(body) == len({name for row in rows for name in row if name.startswith("eval_")})


def test_each_chart_of_a_real_run_has_its_rows_in_the_table_beneath(trained):
    rows = [row for row in rows_of(trained) if row["split"] == "train"]
    figures = {figure.one("figcaption").text: figure for figure in page_of(trained).all("figure")}
    header, *body = figures["loss"].one("table").rows()
    assert header == ["step", "training", "held-out"]
    assert [line[1] for line in body] == ["", *(number_text(row["loss"]) for row in rows)]
    together = figures["rewards of chosen and rejected"].one("table").rows()
    assert together[0] == ["step", "chosen, training", "chosen, held-out", "rejected, training", "rejected, held-out"]
    assert [line[3] for line in together[2:]] == [number_text(row["rewards/rejected"]) for row in rows]


def test_a_real_runs_memory_and_work_stand_beside_the_plan(trained):
    facts, result = (json.loads((trained / name).read_text()) for name in ("run.json", "result.json"))
    found = {name: cells for name, *cells in table_under(page_of(trained), "Memory and speed, planned and measured")}
    planned, measured = facts["forecast"]["memory"]["total"], result["peak_bytes"]["resident"]
    assert found["peak memory"] == [size_text(planned), size_text(measured), f"{measured / planned:.2f}"]
    assert found["tokens per step"][:2] == [
        f"{facts['forecast']['tokens_per_step']:,}",
        f"{round(result['tokens'] / 3):,}",
    ]
    assert found["optimizer steps"][:2] == ["3", "3"]


def test_speed_and_work_follow_from_tokens_seconds_and_the_forecast(tmp_path):
    run = make_run(
        tmp_path / "run",
        train_rows([0.5, 0.4]),
        facts={"forecast": {"flops_per_step": 3e12, "tokens_per_step": 200, "memory": {"total": 2**31}}},
        result={"peak_bytes": {"resident": 2**30, "allocated": 3 * 2**30}, "first_step": 1},
    )
    found = table_under(page_of(run), "Memory and speed, planned and measured")
    assert ["speed", "", "50 tokens per second", ""] in found
    assert ["", "", "1.5 TFLOP per second", ""] in found
    assert ["tokens per step", "200", "100", "0.50"] in found
    assert ["peak memory", "2.00 GiB", "3.00 GiB", "1.50"] in found
    assert ["", "", "allocated on the GPU, since the run was resumed at step 1", ""] in found


@pytest.mark.parametrize(("peak", "scale", "length"), [(16, 1.0, 800), (40, 0.5, 1000)])
def test_memory_bars_fill_what_the_plan_says(tmp_path, peak, scale, length):
    parts = {"weights": 4, "adapters": 1, "optimizer": 1, "activations": 2, "live": 3, "head_tile": 9, "reserve": 3}
    memory = {name: size * 2**30 for name, size in parts.items()} | {"total": 20 * 2**30}
    run = make_run(
        tmp_path / "run", facts={"forecast": {"memory": memory}}, result={"peak_bytes": {"resident": peak * 2**30}}
    )
    (bars,) = page_of(run).all("div", class_="memory")
    planned, measured = bars.all("svg")
    widths = [float(bar.attributes["width"]) for bar in planned.all("rect")]
    assert widths == [scale * width for width in (200, 50, 50, 100, 450, 150)]
    assert [float(bar.attributes["width"]) for bar in measured.all("rect")] == [length]
    assert "scoring responses: 9.00 GiB" in bars.text
    assert "the backward pass in one layer" not in bars.text  # smaller, and never there at the same time


def test_several_runs_are_overlaid_and_their_settings_compared(tmp_path):
    recipe = 'beta = {}\n[train]\nlearning_rate = 1e-6\nkeep = 2\n[loss]\nname = "{}"\n'
    runs = [
        make_run(tmp_path / name, train_rows(losses), recipe=recipe.format(beta, loss))
        for name, losses, beta, loss in (("a", [0.7, 0.6], 0.1, "dpo"), ("b", [0.5], 0.1, "ipo"))
    ]
    page = page_of(*runs, output=tmp_path / "both.html")
    assert page.one("title").text == "2 runs: a, b - qpref report"
    (comparison,) = page.one("section", id="runs").all("table")
    assert [row[:2] for row in comparison.rows()] == [["run", "loss.name"], ["a", "dpo"], ["b", "ipo"]]
    (loss,) = [figure for figure in page.all("figure") if figure.one("figcaption").text == "loss"]
    assert loss.one("table").rows() == [["step", "a, training", "b, training"], ["1", "0.7", "0.5"], ["2", "0.6", ""]]
    assert [group.attributes["class"] for group in loss.one("g", class_="linear").all("g")] == ["c0", "c1"]


def test_many_differing_settings_have_a_table_of_their_own(tmp_path):
    runs = [
        make_run(tmp_path / name, recipe="".join(f"key{index} = {value}\n" for index in range(8)))
        for name, value in (("a", 1), ("b", 2))
    ]
    comparison, differences = (
        table.rows() for table in page_of(*runs, output=tmp_path / "both.html").one("section", id="runs").all("table")
    )
    assert comparison[0][:2] == ["run", "held-out accuracy by reward margin"]
    assert differences[:2] == [["setting", "a", "b"], ["key0", "1", "2"]]
    assert len(differences) == 9


def test_the_page_opens_with_the_verdict_and_what_was_trained(tmp_path):
    rows = [{"step": 0, "split": "eval", "eval_rewards/accuracies": 0.5},
            {"step": 2, "split": "eval", "eval_rewards/accuracies": 0.75}]  # fmt: skip
    recipe = (
        '[loss]\nname = "acme"\nbeta = { start = 0.1, end = 0.5, schedule = "linear" }\ngamma = 2.0\nsmooth = 0.0\n'
        'kind = "x"\nwpo = true\n[train]\nlearning_rate = 5e-6\nbatch_size = 8\n[adapter]\nrank = 16\n'
        '[model]\nquantization = "nf4"\n'
    )
    facts = {"base": "org/model", "examples": {"train": 1234, "heldout": 32}}
    run = make_run(tmp_path / "run", rows, recipe=recipe, facts=facts)
    header = page_of(run).one("header")
    # 24 of 32; Wilson's interval by hand: (0.75 + z²/64) / (1 + z²/32) -+ z / (1 + z²/32) sqrt(0.1875/32 + z²/4096)
    assert header.one("p", class_="verdict").text == (
        "held-out accuracy 0.50 → 0.75 of 32 (95 % interval 0.58 to 0.87)"
    )
    assert [item.text for item in header.one("ul").all("li")] == [
        "loss acme, beta 0.1 → 0.5, gamma 2", "learning rate 5e-06", "batch size 8", "rank 16",
        "data 1,234 examples, 32 held out", "base org/model", "quantization nf4",
    ]  # fmt: skip
    (run / "result.json").write_text(json.dumps({"verdict": {"sentence": "it learned"}}))
    assert page_of(run).one("p", class_="verdict").text == "it learned"
    going = make_run(tmp_path / "going", rows, finished=False)
    assert page_of(going).one("p", class_="verdict").text == "so far, held-out accuracy 0.50 → 0.75"


def test_held_out_shares_have_intervals_in_every_table(tmp_path):
    rows = [{"step": 0, "split": "eval", "eval_rewards/accuracies": 0.5, "eval_logps/accuracies": 0.5}]
    run = make_run(tmp_path / "run", rows, facts={"examples": {"train": 9, "heldout": 8}})
    other = make_run(tmp_path / "other", rows)  # of an unknown number
    page = page_of(run, other, output=tmp_path / "both.html")
    assert [row[1] for row in page.one("section", id="runs").one("table").rows()] == [
        "held-out accuracy by reward margin", "50.0 % (22 to 78 %)", "50.0 %"
    ]  # fmt: skip
    assert [row[1:] for row in table_under(page, "Held-out metrics")[1:]] == [["50.0 % (22 to 78 %)", "50.0 %"]] * 2
    assert (
        "95 % interval 22 to 78 %"
        in dict(row[::2] for row in tiles_of(page_of(run)))["held-out accuracy by reward margin"]
    )


def test_scheduled_values_are_not_smoothed(tmp_path):
    rows = train_rows([0.7] * 30, learning_rate=1e-6, **{"option/beta": 0.1})
    figures = page_of(make_run(tmp_path / "run", rows)).one("section", id="curves").all("figure")
    smoothed = [figure.one("figcaption").text for figure in figures if figure.all("path", class_="smooth")]
    assert [figure.one("figcaption").text for figure in figures] == ["loss", "learning rate", "option/beta"]
    assert smoothed == ["loss"]


def test_a_run_at_work_is_shown_with_what_it_has(tmp_path):
    run = make_run(tmp_path / "run", train_rows([0.7]), finished=False, facts={"steps": 12})
    with (run / "metrics.jsonl").open("a") as file:
        file.write('no row\n{"step": 2, "spl')
    page = page_of(run)
    assert tiles_of(page)[0] == ["state", "not finished", "step 1 of 12"]
    warnings = [part.text for part in page.all("p", class_="warn")]
    assert warnings == [
        "run: 1 unreadable line(s) of metrics.jsonl are left out, the first is line 2.",
        "run: the last line of metrics.jsonl is incomplete and left out; the run is still writing it, or was killed.",
    ]
    assert "qpref train --resume" in page.text


def test_the_summary_is_of_the_step_that_the_adapter_is_of(tmp_path):
    rows = [
        {"step": step, "split": "eval", "eval_loss": 0.7, "eval_rewards/accuracies": accuracy}
        for step, accuracy in enumerate([0.5, 0.6, 0.9, *[0.8] * 20])
    ]
    run = make_run(tmp_path / "best", rows, result={"adapter_step": 2})
    page = page_of(run)
    assert tiles_of(page)[:2] == [
        ["state", "finished", "step 22, adapter of step 2"],
        ["held-out accuracy by reward margin", "90.0 %", "50.0 % at step 0"],
    ]
    header, *body = table_under(page, "Held-out metrics")
    assert dict(zip(header, body[1], strict=True))["step 2"] == "90.0 %"
    both = page_of(run, make_run(tmp_path / "last", rows), output=tmp_path / "both.html")
    assert [row[1] for row in both.one("section", id="runs").one("table").rows()] == [
        "held-out accuracy by reward margin", "90.0 %", "80.0 %"
    ]  # fmt: skip


def test_runs_whose_accuracies_are_of_different_measures_name_each(tmp_path):
    made = [
        make_run(tmp_path / name, [{"step": 0, "split": "eval", f"eval_{name.partition('/')[0]}/accuracies": 0.5}])
        for name in ("rewards", "logps", "logps/again")
    ]
    table = page_of(*made[:2], output=tmp_path / "both.html").one("section", id="runs").one("table")
    assert [row[1] for row in table.rows()] == [
        "held-out accuracy", "50.0 % by reward margin", "50.0 % by log-probability"
    ]  # fmt: skip
    alone = page_of(*made[1:], output=tmp_path / "same.html").one("section", id="runs").one("table")
    assert [row[1] for row in alone.rows()][:2] == ["held-out accuracy by log-probability", "50.0 %"]


def test_options_that_the_recipe_leaves_at_their_defaults_are_not_among_what_was_trained(tmp_path):
    recipe = '[[loss]]\nname = "acme"\nbeta = 0.1\ngamma = 2.0\n[[loss]]\nname = "sft"\nweight = 0.5\nalpha = 3.0\n'
    run = make_run(tmp_path / "run", recipe=recipe, facts={"losses": {"given": [["beta"], []]}})
    assert page_of(run).one("header").one("li").text == "loss acme, beta 0.1 + sft, weight 0.5"
    older = make_run(tmp_path / "older", recipe=recipe, facts={"losses": {"given": [["beta"]]}})
    assert page_of(older).one("header").one("li").text == "loss acme, beta 0.1, gamma 2 + sft, weight 0.5, alpha 3"


@pytest.mark.parametrize(("margin", "noted"), [(0.0, True), (0.4, False), (None, False)])
def test_the_first_accuracy_is_explained_where_all_rewards_start_at_0(tmp_path, margin, noted):
    row = {"step": 0, "split": "eval", "eval_loss": 0.7, "eval_rewards/margins": margin}
    assert ("at step 0 is computed by log-probability" in page_of(make_run(tmp_path / "run", [row])).text) == noted


def test_the_summary_tells_the_two_accuracies_apart(tmp_path):
    rows = [
        {"step": step, "split": "eval", "eval_rewards/margins": margin, "eval_rewards/accuracies": share}
        for step, margin, share in ((0, 0.0, 0.8), (2, 1.7, 1.0))
    ]
    (tile,) = [row for row in tiles_of(page_of(make_run(tmp_path / "dpo", rows))) if "accuracy" in row[0]]
    assert tile == ["held-out accuracy by reward margin", "100.0 %", "80.0 % at step 0, by log-probability"]
    rows = [{"step": step, "split": "eval", "eval_logps/accuracies": 0.8} for step in (0, 2)]
    (tile,) = [row for row in tiles_of(page_of(make_run(tmp_path / "sft", rows))) if "accuracy" in row[0]]
    assert tile == ["held-out accuracy by log-probability", "80.0 %", "80.0 % at step 0"]


def test_empty_sections_are_left_out_and_the_last_says_which_command_fills_them(tmp_path):
    run = make_run(tmp_path / "run")
    page = page_of(run)
    text = " ".join(page.text.split())
    shown = ["Curves", "Data", "Memory and speed, planned and measured", "About"]
    assert [section.one("h2").text for section in page.all("section")] == shown
    assert [link.text for link in page.one("nav").all("a")] == ["curves", "data", "memory and speed", "about"]
    for command in (
        f"qpref eval {run} --json > eval.json; qpref report ... --eval eval.json",
        f"qpref generate {run} --json > samples.json; qpref report ... --samples samples.json",
        f"qpref merge {run} OUT; qpref report ... --merged OUT",
        f"qpref plan {run}/recipe.lock.toml",
    ):
        assert command in text
    assert "No metrics yet" in text


DATA = {
    "sources": ["a.jsonl", "b.jsonl"],
    "read": 200,
    "kept": 150,
    "refused": 50,
    "dropped": 0,
    "cut": 0,
    "repeated": 20,
    "counts": [{"severity": "error", "code": "identical", "count": 1},
               {"severity": "warning", "code": "short", "count": 1008}],
    "findings": [
        *({"code": "short", "severity": "warning", "path": "a.jsonl", "line": line, "message": "12 characters"}
          for line in range(1, 9)),
        {"code": "identical", "severity": "error", "path": "a.jsonl", "line": 1412, "message": "the same text"},
    ],
    "findings_not_listed": {"short": 1000},
    "lengths": {"prompt tokens": [{"from": 0, "to": 0, "count": 5}, {"from": 1, "to": 1023, "count": 20}]},
}  # fmt: skip


def test_histograms_stand_in_the_order_of_qpref_check(tmp_path):
    names = ["prompt characters", "chosen characters", "rejected characters", "chosen - rejected characters",
             "prompt tokens", "chosen tokens", "rejected tokens", "chosen - rejected tokens"]  # fmt: skip
    lengths = {name: [{"from": 1, "to": 1, "count": 1}] for name in sorted(names)}  # as data.json is written
    page = page_of(make_run(tmp_path / "run", data={"read": 1, "lengths": lengths}))
    assert [heading.text for heading in page.one("section", id="data").all("h4")] == names


def test_data_report_counts_groups_findings_and_draws_histograms(tmp_path):
    page = page_of(make_run(tmp_path / "run", data=DATA))
    section = page.one("section", id="data")
    assert tiles_of(section) == [
        ["rows read", "200", ""],
        ["rows kept", "150", "75.0 %"],
        ["rows refused", "50", "25.0 %"],
        ["rows dropped", "0", "0.0 %"],
        ["rows cut", "0", "0.0 %"],
        ["rows repeated", "20", "10.0 %"],
    ]
    header, *rows = section.one("table").rows()
    assert header == ["severity", "code", "rows", "location", "message"]
    assert rows[0] == ["error", "identical", "1", "a.jsonl:1412", "the same text"]
    assert rows[1] == ["warning", "short", "1,008", "a.jsonl:1", "12 characters"]
    assert rows[-1][3] == "and 1,003 more"
    bars = section.one("div", class_="histogram")
    assert [bar.text for bar in bars.all("div", class_="label")] == ["0", "1 to 1,023"]
    assert [float(bar.attributes["width"]) for bar in bars.all("rect")] == [250, 1000]
    assert section.all("dt")[0].text == "sources"


def test_a_real_runs_data_report_is_its_own(trained):
    data = json.loads((trained / "data.json").read_text())
    section = page_of(trained).one("section", id="data")
    assert tiles_of(section)[0] == ["rows read", str(data["read"]), ""]
    assert {heading.text for heading in section.all("h4")} == set(data["lengths"])


VERDICT = {
    "pairs": 32, "origin": "held-out pairs", "tokens": 900, "learned": 14.2, "margin_error": 0.05, "allowed": 0.284,
    "largest_margin_error": 0.2, "logprob_error": 0.03, "kl": 1e-6, "largest_kl": 1e-4, "flips": [], "passed": True,
    "share_of_learned": 0.0035,
}  # fmt: skip
MERGE = {
    "dtype": "fp16",
    "verdict": VERDICT,
    "tried": {"bf16": VERDICT | {"passed": False, "margin_error": 4.3}},
    "kept_in_weights": {"bf16": 0.42, "fp16": 0.985},
    "notes": ["a note"],
}


def test_merge_verdict_is_said_with_its_figures(tmp_path):
    run, out = make_run(tmp_path / "run"), tmp_path / "out"
    out.mkdir()
    (out / "merge.json").write_text(json.dumps(MERGE))
    section = page_of(run, extras=Extras(merged=[out])).one("section", id="merge")
    assert section.one("p", class_="good").text.strip() == (
        "passed: on 32 held-out pairs, read back from disk as fp16, the mean margin error is 0.05 nats, "
        "0.35 % of the learned change; preference flips: 0."
    )
    rows = section.all("table")[0].rows()
    assert rows[:2] == [["", "fp16, stored", "bf16, tried"], ["passed", "yes", "no"]]
    assert ["mean margin error, nats", "0.05", "4.3"] in rows
    assert rows[-1] == ["learned change retained in the weights", "98.5 %", "42.0 %"]


def test_a_merge_that_quantized_again_shows_what_nf4_kept(tmp_path):
    run, out = make_run(tmp_path / "run"), tmp_path / "out"
    out.mkdir()
    merged = MERGE | {"dtype": "bf16", "asked": {"quantize": "nf4"}, "tried": {}, "kept_in_weights": {"nf4": 0.5}}
    (out / "merge.json").write_text(json.dumps(merged))
    section = page_of(run, extras=Extras(merged=[out])).one("section", id="merge")
    assert section.all("table")[0].rows()[-1] == ["learned change retained in the weights", "50.0 %"]


def test_a_merge_that_did_not_pass_is_no_good_news(tmp_path):
    run, file = make_run(tmp_path / "run"), tmp_path / "merge.json"
    file.write_text(json.dumps({"dtype": "bf16", "verdict": VERDICT | {"passed": False}}))
    section = page_of(run, extras=Extras(merged=[file])).one("section", id="merge")
    assert section.one("p", class_="warn").text.startswith("NOT passed")


EVALUATION = {
    "data": "heldout.jsonl", "pairs": 32, "warnings": ["only 32 pairs"],
    "models": [
        {"model": "runs/a", "metrics": {"logps/accuracies": {"value": 0.8125, "low": 0.7, "high": 0.9, "pairs": 32},
                                        "rewards/accuracies": {"value": 1.0, "low": None, "high": None, "pairs": 32}},
         "by": {"length": {"short": {"logps/accuracies": {"value": 0.5, "low": 0.4, "high": 0.6, "pairs": 9}}}}},
        {"model": "base", "metrics": {"logps/accuracies": {"value": 0.75, "low": 0.6, "high": 0.85, "pairs": 32}},
         "difference_from_first": {"logps/accuracies": {"value": -0.0625, "low": -0.2, "high": 0.1, "pairs": 32}}},
    ],
}  # fmt: skip


def test_evaluation_has_a_column_for_each_model_with_intervals(tmp_path):
    run, file = make_run(tmp_path / "run"), tmp_path / "eval.json"
    file.write_text(json.dumps(EVALUATION))
    section = page_of(run, extras=Extras(evaluations=[file])).one("section", id="held-out")
    metrics, by_length, difference, *_ = (table.rows() for table in section.all("table"))
    assert metrics == [
        ["", "runs/a", "base"],
        ["accuracy by log-probability", "0.8125 (0.7 to 0.9)", "0.75 (0.6 to 0.85)"],
        ["accuracy by reward margin", "1", ""],
    ]
    assert by_length[1] == ["short", "0.5 (0.4 to 0.6)", ""]
    assert difference[1] == ["accuracy by log-probability", "-0.0625 (-0.2 to 0.1)"]
    assert section.one("p", class_="warn").text.strip() == "only 32 pairs"


@pytest.mark.parametrize(
    "samples",
    [
        [{"prompt": "Why?", "model": "Because.", "base": "Dunno.", "ended": [True, False]}],
        {"samples": [{"prompt": [{"role": "user", "content": "Why?"}],
                      "answers": {"model": "Because.", "base": "Dunno."}, "ended": [True, False]}]},
        [{"prompt": "Why?", "answers": [{"name": "model", "text": "Because."}, {"name": "base", "text": "Dunno."}],
          "ended": [True, False]}],
    ],
    ids=["generate", "nested", "listed"],
)  # fmt: skip
def test_sample_answers_stand_under_their_prompt_the_base_first(tmp_path, samples):
    run, file = make_run(tmp_path / "run"), tmp_path / "samples.json"
    file.write_text(json.dumps(samples))
    (sample,) = page_of(run, extras=Extras(samples=[file])).all("article")
    assert sample.one("div", class_="prompt").text == "Why?"
    answers = [[part.text for part in answer.all("div")] for answer in sample.all("div", class_="answer")]
    assert answers == [["base", "Dunno."], ["model", "Because."]]
    assert "ended yes, no" in sample.text


@pytest.mark.parametrize("value", [[], {}, 7, None, [1, {"a": [[1, [2, [3, [4, [5, [6]]]]]]]}], {"models": 3}])
def test_files_of_another_shape_are_shown_and_never_fail(tmp_path, value):
    run, file = (
        make_run(tmp_path / "run", data=dict.fromkeys(("findings", "counts", "lengths", "read"), value)),
        tmp_path / "f",
    )
    file.write_text(json.dumps(value))
    page_of(run, extras=Extras(merged=[file], evaluations=[file], samples=[file]))


KEYS = (
    *("forecast", "memory", "total", "live", "head_tile", "steps", "examples", "plugins", "versions", "base", "models"),
    *("peak_bytes", "resident", "findings", "lengths", "counts", "count", "from", "to", "verdict", "flips", "tried"),
    *(
        "metrics",
        "by",
        "value",
        "low",
        "high",
        "difference_from_first",
        "warnings",
        "prompt",
        "content",
        "role",
        "dtype",
    ),
    *("step", "split", "loss", "tokens", "seconds", "eval_loss", "first_step", "read", "line", "path"),
)
SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["train", "eval"])
)
ANY_JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=5),
    max_leaves=25,
)
ROW = st.fixed_dictionaries(
    {"step": st.integers(0, 9) | SCALARS, "split": st.sampled_from(["train", "eval"])},
    optional=dict.fromkeys(("loss", "eval_loss", "tokens", "seconds", "rewards/margins"), st.floats() | SCALARS),
)
OBJECT = st.dictionaries(st.sampled_from(KEYS), ANY_JSON, max_size=6)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(facts=OBJECT, result=OBJECT, data=OBJECT, rows=st.lists(ROW | ANY_JSON, max_size=6), other=ANY_JSON)
def test_no_json_of_any_shape_breaks_the_page(tmp_path_factory, facts, result, data, rows, other):
    folder = tmp_path_factory.mktemp("any")
    run = make_run(folder / "run", rows, facts=facts, result=result, data=data)
    second = make_run(folder / "second", rows, facts=data)
    (folder / "f").write_text(json.dumps(other))
    files = [folder / "f"]
    page_of(run, second, output=folder / "p.html", extras=Extras(merged=files, evaluations=files, samples=files))
    page_of(run)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A page all of whose sources are hostile, with the text that it has to show."""
    folder = tmp_path_factory.mktemp("hostile")
    estimate = {"value": 1, "low": 0, "high": 1}
    row = {"step": 1, "split": "train", HOSTILE: 1.0, "loss": 0.5, "tokens": 1, "seconds": 1}
    runs = [
        make_run(
            folder / name,
            [row, row | {"step": 2}, {"step": 2, "split": "eval", f"eval_{HOSTILE}": 1.0}],
            recipe=f"[loss]\nname = '''{HOSTILE}{name}'''\n",
            facts=dict.fromkeys(("base", "created", "versions", "device"), HOSTILE)
            | {"plugins": [{"name": HOSTILE}], "fingerprints": {HOSTILE: HOSTILE}},
            data={
                "read": 1,
                "findings": [dict.fromkeys(("code", "severity", "path", "line", "message"), HOSTILE)],
                "lengths": {HOSTILE: [{"from": 1, "to": 2, "count": 3}], "b": HOSTILE},
                "counts": [{HOSTILE: HOSTILE}],
                HOSTILE: HOSTILE,
            },
        )
        for name in (EVIL_NAME, "b")
    ]
    files = {
        "merged": MERGE | {"dtype": HOSTILE, "verdict": VERDICT | {"origin": HOSTILE, "flips": [{HOSTILE: HOSTILE}]}},
        "evaluations": {"models": [{"model": HOSTILE, "metrics": {HOSTILE: estimate}}], "warnings": [HOSTILE],
                        HOSTILE: HOSTILE},
        "samples": [{"prompt": HOSTILE, "model": HOSTILE, HOSTILE: HOSTILE, "ended": [HOSTILE], "n": [[HOSTILE]]}],
    }  # fmt: skip
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    extras = Extras(**{name: [folder / f"{name}.json"] for name in files})
    return write_report(runs, folder / "page.html", extras)


def test_no_text_of_a_run_becomes_markup(hostile):
    page = parsed(hostile.read_text())
    assert [len(page.all(tag)) for tag in ("script", "style", "img", "iframe", "link")] == [1, 1, 0, 0, 0]
    assert not [name for element in _elements(page) for name in element.attributes if name.startswith("on")]
    assert "alert" not in page.one("script").text
    # Names of metrics and runs, findings, verdicts, evaluations, prompts, answers, facts, recipes: shown as they are.
    assert page.text.count("alert(1)") > 30
    assert "<script>alert(3)<\\script>" in page.one("h1").text


def test_the_page_may_load_nothing_and_run_only_its_own_script(hostile):
    page = parsed(hostile.read_text())
    policy = next(meta.attributes["content"] for meta in page.all("meta") if "http-equiv" in meta.attributes)
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    for kind in ("style", "script"):
        digest = base64.b64encode(hashlib.sha256(page.one(kind).text.encode()).digest()).decode()
        assert rules[f"{kind}-src"] == f"'sha256-{digest}'"
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"


def test_the_page_names_no_address(hostile):
    page = parsed(hostile.read_text())
    for element in _elements(page):
        assert not {"src", "srcset", "action", "data", "style"} & element.attributes.keys()
        assert (element.attributes.get("href") or "#").startswith("#")
    own = page.one("script").text + page.one("style").text
    assert not re.search(r"https?:|url\(|@import|fetch|XMLHttp|innerHTML", own)


def test_every_link_of_the_page_leads_somewhere(trained):
    page = page_of(trained)
    places = {element.attributes.get("id") for element in _elements(page)}
    assert {link.attributes["href"].removeprefix("#") for link in page.all("a")} <= places


def test_a_half_of_a_character_does_not_stop_the_page(tmp_path):
    run = make_run(tmp_path / "run", facts={"base": "a\ud800b"})
    assert "a⟨U+D800⟩b" in page_of(run).text


def _elements(element):
    for child in element.children:
        if not isinstance(child, str):
            yield child
            yield from _elements(child)
