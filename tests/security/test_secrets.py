"""No password or token reaches a terminal or a file of qpref's, from the environment, from options or from rows."""

from __future__ import annotations

import contextlib
import json

import pytest
import tomli_w
from click.testing import CliRunner
from conftest import preference_rows, write_jsonl

from qpref.cli import main

CANARY = "c4nar"
OF_ENVIRONMENT = ("HF_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY", "AWS_SECRET_ACCESS_KEY", "GITHUB_TOKEN",
                  "CI_JOB_TOKEN", "MLFLOW_TRACKING_PASSWORD", "SERVICE_CREDENTIALS")  # fmt: skip
TOKENS = (
    "hf_c4narYc4narYc4narYc4narY",
    "sk-c4narY0c4narY0c4narY",
    "ghp_c4narYc4narYc4narYc4narY",
    "glpat-c4narYc4nar0123456789",
    "AKIAC4NARYC4NARYC4NA",
    "eyJc4narYc4nar.eyJc4narYc4nar.c4narYc4nary",
    "https://someone:c4naryc4nary@host/rows",
    "WANDB_API_KEY=c4naryc4naryc4nary",
)
TOKEN = TOKENS[0]


def invoke(*arguments):
    return CliRunner().invoke(main, list(map(str, arguments)), catch_exceptions=False)


def rows_with_tokens(count: int, start: int = 0):
    for row, token in zip(preference_rows(count, start), TOKENS * 4, strict=False):
        yield {name: f"{text} {token}" for name, text in row.items()}


@pytest.fixture(scope="module")
def place(tmp_path_factory, make_base):
    """A recipe whose rows hold a token of each kind, with rows that are refused for it, and a run of it."""
    folder = tmp_path_factory.mktemp("secrets")
    odd = [{"prompt": "x", "chosen": TOKEN, "rejected": TOKEN}, {TOKEN: TOKEN}]
    recipe = {
        "model": {"base": str(make_base()), "quantization": "none", "dtype": "float32", "device": "cpu"},
        "adapter": {"rank": 4, "alpha": 8},
        "data": {"train": str(write_jsonl(folder / "train.jsonl", [*rows_with_tokens(12), *odd])),
                 "heldout": str(write_jsonl(folder / "heldout.jsonl", list(rows_with_tokens(4, start=100)))),
                 "skip_bad": 0.5},
        "checks": {"too_short": "off"},
        "loss": {"name": "dpo"},
        "train": {"learning_rate": 1e-3, "batch_size": 4, "max_steps": 1, "tokens_per_microbatch": 400},
        "sinks": [{"name": "console"}],
    }  # fmt: skip
    (folder / "recipe.toml").write_text(tomli_w.dumps(recipe))
    return folder


def test_no_command_prints_or_stores_a_secret(place, monkeypatch):
    for name in OF_ENVIRONMENT:
        monkeypatch.setenv(name, f"{CANARY}y-{name.lower()}-0123456789")
    recipe, run, out = place / "recipe.toml", place / "run", place / "out"
    data = {place / "train.jsonl", place / "heldout.jsonl"}
    done = {
        "check": invoke("check", recipe, "--html", place / "check.html"),
        "check --json": invoke("check", recipe, "--json"),
        "plan": invoke("plan", recipe),
        "train": invoke("train", recipe, "--output", run),
        "eval": invoke("eval", run, "--json"),
        "generate": invoke("generate", run, "--max-new-tokens", 2, "--json"),
        "merge": invoke("merge", run, out, "--dtype", "float32"),
    }
    for name in ("eval", "generate"):
        (place / f"{name}.json").write_text(done[name].stdout)
    done["report"] = invoke("report", run, "--eval", place / "eval.json", "--samples", place / "generate.json",
                            "--merged", out)  # fmt: skip
    done |= {"cache": invoke("cache", "--json"), "plugins": invoke("plugins"), "losses": invoke("losses")}
    assert {name: each.exit_code for name, each in done.items() if each.exit_code} == {"check": 3, "check --json": 3}
    assert not [name for name, each in done.items() if CANARY in each.output.lower()]
    written = [path for path in place.rglob("*") if path.is_file() and path not in data]
    assert len(written) > 25
    assert not [path for path in written if CANARY.encode() in path.read_bytes().lower()]
    assert json.loads((run / "data.json").read_text())["findings"]


@pytest.mark.parametrize("token", TOKENS)
def test_no_refusal_repeats_a_token_that_an_option_or_a_variable_holds(place, monkeypatch, token):
    recipe, run = place / "recipe.toml", place / "run"
    refusals = [
        invoke("export", run, place / "x.gguf", "--converter", token),
        invoke("eval", run, "--data", token),
        invoke("eval", token),
        invoke("generate", run, "--prompts", token),
        invoke("merge", token, place / "nowhere"),
        invoke("report", token),
        invoke("losses", "show", token),
        invoke("cache", "clear", token),
        invoke("plan", recipe, "--set", f"model.revision={token}"),
    ]
    for name in ("QPREF_REFERENCE_CACHE_BYTES", "QPREF_TOKEN_CACHE_BYTES"):
        with monkeypatch.context() as patch:
            patch.setenv(name, token)
            refusals.append(invoke("train", recipe, "--output", place / "other"))
    with contextlib.suppress(OSError), monkeypatch.context() as patch:
        patch.setenv("LLAMA_CPP", token)
        refusals.append(invoke("export", run, place / "y.gguf"))
    assert all(each.exit_code for each in refusals)
    assert not [each.output for each in refusals if CANARY in each.output.lower()]


def test_a_model_card_has_no_token(place):
    """Its title is the name of the folder, which the card is uploaded with."""
    assert (place / "run" / "adapter").is_dir()
    assert invoke("merge", place / "run", place / TOKEN, "--dtype", "float32").exit_code == 0
    assert CANARY not in (place / TOKEN / "README.md").read_text().lower()
