"""`qpref merge` as it is typed: what it prints, its exit codes, and what reaches the hub."""

from __future__ import annotations

import base64
import json
import os
import re
import signal

import pytest
from click.testing import CliRunner
from edited_runs import reseal
from hub import loopback_hub
from merge_cases import moved

from qpref.cli import main

TOKEN = "hf_" + "canary" * 5
NF4 = {"model.quantization": "nf4"}


def invoke(*arguments):
    return CliRunner().invoke(main, ["merge", *map(str, arguments)], catch_exceptions=False)


def test_the_verdict_is_printed(trained_run, make_base, tmp_path):
    done = invoke(trained_run(make_base(), **NF4), tmp_path / "out")
    assert done.exit_code == 0
    shape = re.sub(r"[-+]?\d+(\.\d+)?(e-\d+)?", "0", done.stdout.replace(str(tmp_path), ""))
    assert re.sub(" +", " ", shape) == (
        "bf0 keeps 0% of the learned change in the weights <- stored\n"
        "fp0 keeps 0% of the learned change in the weights\n"
        "float0 keeps 0% of the learned change in the weights\n"
        "verdict on 0 held-out pairs, merged model beside trained policy, both in float0\n"
        " margin, learned change 0 nats on average\n"
        " margin error 0 nats on average (0% of the learned change); at most 0 passes\n"
        " largest 0 nats, heldout.jsonl:0\n"
        " log-probability of a response 0 nats off on average\n"
        " KL per token 0 nats, 0 at most\n"
        " preference flips 0\n"
        "merged model: /out\n"
    )


def test_a_verdict_that_fails_exits_11_and_the_folder_is_there(trained_run, make_base, tmp_path):
    out = tmp_path / "out"
    done = invoke(trained_run(make_base(), **NF4), out, "--dtype", "bf16", "--max-margin-error", "1e-9")
    assert done.exit_code == 11
    assert re.fullmatch(
        r"device: CPU.*\nscoring 4 held-out pairs before and after training\n"
        r"writing the model in bf16, and scoring it as it is read back\n"
        rf"error: {out}: the mean margin error is \S+ nats, and at most 1e-09 passes\n"
        r"hint: leave out --dtype\n",
        done.stderr,
    )
    assert (out / "model.safetensors").is_file()
    assert json.loads((out / "merge.json").read_text())["verdict"]["passed"] is False


def test_the_original_prints_both_figures(trained_run, make_base, tmp_path):
    done = invoke(trained_run(make_base(), **NF4), tmp_path / "out", "--onto", "original", "--max-margin-error", "1e-4")
    assert done.exit_code == 11
    figures = [float(line.split("error")[1].split()[0]) for line in done.stdout.splitlines() if "margin error" in line]
    assert len(figures) == 2
    assert figures[0] > figures[1]
    assert "onto the trained weights, in the same type: margin error" in done.stdout
    assert "hint: leave out --onto original" in done.stderr


@pytest.mark.parametrize("dtype", ["auto", "bf16"])
def test_what_is_quantized_again_is_said_to_be_stored_so_and_to_be_lossy(trained_run, make_base, tmp_path, dtype):
    asked = ("--quantize", "nf4", "--dtype", dtype, "--max-margin-error", "1000")
    done = invoke(trained_run(make_base(), **NF4), tmp_path / "out", *asked)
    assert done.exit_code == 0
    (stored,) = [line for line in done.stdout.splitlines() if line.endswith("<- stored")]
    assert stored.startswith("nf4 ")
    assert "\nnf4 is lossy: its steps are far larger than what was learned\n" in done.stdout
    assert "nf4 is lossy" in json.loads((tmp_path / "out/merge.json").read_text())["notes"][0]


@pytest.mark.parametrize("value", ["two", "-1", "0", "nan", "inf", "2%%", ""])
def test_an_odd_tolerance_is_refused(trained_run, tmp_path, value):
    done = invoke(trained_run(), tmp_path / "out", f"--max-margin-error={value}")
    assert done.exit_code == 2
    assert "expected a share such as 2%, or nats such as 0.3" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_verdict_on_fewer_pairs_than_64_cannot_be_asked_for(trained_run, tmp_path):
    done = invoke(trained_run(), tmp_path / "out", "--pairs", "63")
    assert done.exit_code == 2
    assert "63 is not in the range x>=64" in done.stderr
    assert not (tmp_path / "out").exists()


def test_the_card_and_merge_json_tell_the_recipe_the_data_and_the_metrics(trained_run, make_base, tmp_path):
    run = trained_run(make_base(), **NF4)
    assert invoke(run, tmp_path / "out").exit_code == 0
    card, facts = (tmp_path / "out/README.md").read_text(), json.loads((run / "run.json").read_text())
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert facts["fingerprints"]["training data"] in card
    assert facts["fingerprints"]["held-out data"] in card
    assert "learning_rate = 0.02" in card
    assert "| rewards/margins | 0 |" in card
    said = json.loads((tmp_path / "out/merge.json").read_text())
    for folder in (make_base().parent, run.parent):
        assert str(folder) not in card + json.dumps(said)
    assert said["asked"] == {"onto": "trained", "quantize": None, "dtype": "auto", "pairs": 64}
    assert said["run"]["base_weights"] == facts["base_weights"]
    assert {"dtype", "verdict", "kept_in_weights"} <= said.keys()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_merge_that_a_signal_ends_leaves_nothing_behind(trained_run, tmp_path, monkeypatch, number):
    from qpref.merging import merge as module

    def killed(*arguments):
        assert list(tmp_path.glob(".tmp-out-*/model.safetensors"))
        os.kill(os.getpid(), number)

    monkeypatch.setattr(module, "write_card", killed)
    before = signal.signal(number, signal.SIG_DFL)  # nohup's tests would ignore it, and so would the command
    run = trained_run()
    found = set(tmp_path.iterdir())
    done = invoke(run, tmp_path / "out")
    assert done.exit_code == 128 + number
    assert re.fullmatch(rf"device: CPU.*\nscoring .*\nwriting .*\nerror: ended by {number.name}\n", done.stderr)
    assert set(tmp_path.iterdir()) == found
    assert signal.signal(number, before) == signal.SIG_DFL


@pytest.fixture
def hub(monkeypatch):
    """A hub on the loopback; huggingface_hub is configured as by HF_ENDPOINT and HF_HUB_OFFLINE=0."""
    from huggingface_hub import constants

    with loopback_hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub.state


def test_what_passes_is_pushed_whole_to_a_private_repository(hub, trained_run, make_base, tmp_path):
    done = invoke(trained_run(make_base(), **NF4), tmp_path / "out", "--push", "org/model")
    assert done.exit_code == 0, done.stderr
    made = next(json.loads(body) for _, path, _, body in hub.calls if path == "/api/repos/create")
    assert (made["organization"], made["name"]) == ("org", "model")
    assert made.get("visibility") == "private" or made.get("private") is True
    (commit,) = [body for _, path, _, body in hub.calls if path == "/api/models/org/model/commit/main"]
    sent = {line["value"]["path"] for line in map(json.loads, commit.splitlines()) if line["key"] == "file"}
    assert sent == {file.name for file in (tmp_path / "out").iterdir()}
    assert {token for _, _, token, _ in hub.calls if token} == {f"Bearer {TOKEN}"}
    assert done.stdout.splitlines()[-1].startswith("pushed: ")
    assert TOKEN not in done.stdout + done.stderr
    assert all(TOKEN.encode() not in file.read_bytes() for file in (tmp_path / "out").iterdir())


def sent_to(hub, name):
    """The files of the only commit to a repository: path -> content."""
    (commit,) = [body for _, path, _, body in hub.calls if path == f"/api/models/{name}/commit/main"]
    lines = [json.loads(line) for line in commit.splitlines()]
    files = [line["value"] for line in lines if line["key"] == "file"]
    return {file["path"]: base64.b64decode(file["content"]) for file in files}


def test_an_adapter_is_pushed_without_a_path_of_this_machine(hub, trained_run, make_base):
    run = trained_run(make_base(), **NF4)
    done = CliRunner().invoke(main, ["export", str(run), "--push", "org/adapter"])
    assert done.exit_code == 0, done.stderr
    sent = sent_to(hub, "org/adapter")
    assert set(sent) == {file.name for file in (run / "adapter").iterdir()}
    for name, content in sent.items():
        assert str(make_base()).encode() not in content, name
        assert str(run.parent).encode() not in content, name
    assert b"A LoRA adapter of rank 4 for" in sent["README.md"]


def test_an_adapter_that_was_changed_or_names_a_folder_is_not_pushed(hub, trained_run, make_base, tmp_path):
    run, base = moved(trained_run(), make_base(), tmp_path)
    settings = run / "adapter/adapter_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"base_model_name_or_path": str(base)}))
    for expected in ("is not as training wrote it", f"names {base} as its base"):
        done = CliRunner().invoke(main, ["export", str(run), "--push", "org/adapter"])
        assert done.exit_code == 11
        assert expected in done.stderr
        reseal(run)
    assert hub.calls == []


def test_nothing_goes_out_where_the_verdict_fails(hub, trained_run, make_base, tmp_path):
    run = trained_run(make_base(), **NF4)
    done = invoke(run, tmp_path / "out", "--dtype", "bf16", "--max-margin-error", "1e-9", "--push", "org/model")
    assert done.exit_code == 11
    assert "nothing was pushed" in done.stderr
    assert hub.calls == []


def test_a_push_without_a_token_is_refused_before_any_work(trained_run, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    done = invoke(trained_run(), tmp_path / "out", "--push", "org/model")
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.startswith("error: --push needs a token with write access in HF_TOKEN\n")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["model", "a/b/c", "org/", "../model", "org/mo del"])
def test_a_name_that_the_hub_cannot_have_is_refused_before_any_work(trained_run, tmp_path, monkeypatch, name):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    done = invoke(trained_run(), tmp_path / "out", "--push", name)
    assert (done.exit_code, done.stderr) == (2, "error: --push: expected ORG/NAME, such as my-org/my-model\n")
    assert not (tmp_path / "out").exists()


def test_a_hub_that_refuses_is_told_and_the_folder_stays(hub, trained_run, make_base, tmp_path):
    hub.refuses = True
    done = invoke(trained_run(make_base(), **NF4), tmp_path / "out", "--push", "org/model")
    assert done.exit_code == 11
    assert "error: org/model: not pushed: " in done.stderr
    assert TOKEN not in done.stdout + done.stderr
    assert (tmp_path / "out/model.safetensors").is_file()


def test_a_hub_that_is_not_there_is_told_in_one_message(hub, trained_run, make_base, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    done = invoke(trained_run(make_base(), **NF4), tmp_path / "out", "--push", "org/model")
    assert done.exit_code == 11
    assert "error: org/model: not pushed: " in done.stderr


def test_a_damaged_run_is_one_message_and_leaves_nothing(trained_run, make_base, tmp_path):
    run, base = moved(trained_run(make_base(), **NF4), make_base(), tmp_path)
    (base / "model.safetensors").write_bytes(b"")
    done = invoke(run, tmp_path / "merged/out")
    assert (done.exit_code, done.stdout) == (11, "")
    assert done.stderr == f"error: {base}/model.safetensors: not the file used in training; its SHA-256 differs\n"
    assert not (tmp_path / "merged").exists()
