"""No text of others reaches the terminal as a control sequence, and none of it as a password or token."""

import io
import json
import logging
import os
import pty
import subprocess
import sys

import pytest
import tomli_w
from click.testing import CliRunner
from conftest import preference_rows, write_jsonl

from qpref.cli import main
from qpref.cli.output import StderrHandler, echo, make_console
from qpref.credentials import keys_with_credentials, redact
from qpref.printable import PrintableStream, printable

TITLE = "\x1b]0;owned\x07"
HOSTILE = {
    "colour": "\x1b[31mred",
    "clear": "\x1b[2J\x1b[1;1H",
    "title": TITLE,
    "clipboard": "\x1b]52;c;cm0gLXJmIC8=\x07",
    "eight-bit": "\x9b31m\x9d0;owned\x9c",
    "overwrite": "error: bad\rall is well",
    "backspace": "bad\b\b\bfine",
    "right-to-left": "a\u202egnp.exe\u2066b\u2069",
    "line separator": "one\u2028two",
    "marks": "a\u200fb\u061cc",
    "delete": "a\x7fb",
}
TOKENS = {
    "hugging face": ("use hf_AbCdEfGhIjKlMnOpQrStUvWxYz0123456789 here", "AbCdEf"),
    "openai": ("sk-proj-4f9A0abcdefghijklmnop", "4f9A0"),
    "github": ("ghp_16C7e42F292c6912E7710c838347Ae178B4a", "16C7e4"),
    "url": ("https://someone:pa55word@host/org/name.git", "pa55word"),
    "url without a user": ("https://hf_abcdefghij0@huggingface.co/x", "hf_abc"),
    "query": ("https://host/file?X-Amz-Signature=abcdef0123&part=2", "abcdef0123"),
    "assignment": ("WANDB_API_KEY=0123456789abcdef0123456789abcdef01234567", "89abcdef"),
    "header": ("Authorization: Bearer abcdefgh.ijkl", "abcdefgh"),
    "web token": ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.c2lnbmF0dXJl", "eyJzdWIi"),
    "aws": ("AKIAIOSFODNN7EXAMPLE", "IOSFODNN"),
}
KEPT = (
    "chosen and rejected are the same text; <|im_end|>\n\ttab",
    "eos_token: </s>, pad_token_id = 12345678, tokens_per_microbatch: 4096",
    "1a2b3c4d5e6f7a8b9c0d1a2b3c4d5e6f7a8b9c0d",
    "hf:org/name, hf_transfer, https://huggingface.co/org/name?download=true, user@example.org",
    "हिन्दी עברית 中文 👩‍👩‍👧",
)


def is_safe(text):
    return text == printable(text) and "\x1b" not in text


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_control_characters_are_escaped(text):
    shown = printable(text)
    assert shown != text
    assert is_safe(shown)
    assert json.loads(f'"{shown}"') == text


@pytest.mark.parametrize("text", KEPT)
def test_other_text_is_printed_as_it_is(text):
    assert printable(text) == text


@pytest.mark.parametrize(("text", "secret"), TOKENS.values(), ids=TOKENS)
def test_tokens_are_hidden(text, secret):
    assert secret in text
    assert secret not in redact(text)
    assert secret not in redact(json.dumps({"key": [text]}))


def test_a_secret_of_the_environment_is_hidden_wherever_it_is_printed(monkeypatch):
    monkeypatch.setenv("MY_SERVICE_TOKEN", "plain-looking-words")
    monkeypatch.setenv("MY_SETTING", "other-looking-words")
    assert redact("got plain-looking-words and other-looking-words") == "got *** and other-looking-words"


def test_every_key_with_a_credential_is_named():
    document = {"model": {"base": "https://a:b@host", "revision": "main"}, "loss": [{"note": "ghp_" + "a1" * 10}]}
    assert list(keys_with_credentials(document)) == ["model.base", "loss.0.note"]


# Each way out of the process.


def test_log_lines_are_printable(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)  # as under a progress bar, which stands before the guarded stream
    StderrHandler().emit(logging.makeLogRecord({"msg": "base %s", "args": (TITLE,), "levelno": logging.WARNING}))
    assert stream.getvalue() == "warning: base \\u001b]0;owned\\u0007\n"


def test_what_libraries_print_is_printable(monkeypatch):
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", PrintableStream(stderr))
    print("a library quotes", TITLE, file=sys.stderr)
    assert stderr.getvalue() == "a library quotes \\u001b]0;owned\\u0007\n"


def test_tracebacks_are_printable(monkeypatch):
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", PrintableStream(stderr))
    try:
        raise ValueError(f"{TITLE} https://someone:pa55word@host")
    except ValueError:
        sys.excepthook(*sys.exc_info())
    assert is_safe(stderr.getvalue())
    assert "pa55word" not in stderr.getvalue()
    assert "ValueError" in stderr.getvalue()


def test_table_cells_and_titles_are_printable(capsys):
    from rich.table import Table

    table = Table(title=f"title {TITLE}", caption=f"caption {TITLE}")
    table.add_column(f"head {TITLE}")
    table.add_row(f"cell {TITLE} [bold]:smile: \u202e")
    console = make_console(soft_wrap=True)
    console.width = 200
    console.print(table)
    console.print(f"line {TITLE}")
    shown = capsys.readouterr().out
    assert is_safe(shown)
    assert shown.count("\\u001b]0;owned\\u0007") == 5
    assert "[bold]:smile: \\u202e" in shown


def test_a_terminal_gets_no_sequence_of_a_message_but_those_of_a_progress_bar():
    master, slave = pty.openpty()
    with os.fdopen(slave, "w") as terminal:
        stream = PrintableStream(terminal)
        stream.write(f"\x1b[2K\x1b[1A\x1b[32m10 %\x1b[0m {TITLE}\x1b[2J\x1b[6n")
        terminal.flush()
        shown = os.read(master, 1000).decode()
    os.close(master)
    assert shown == "\x1b[2K\x1b[1A\x1b[32m10 %\x1b[0m \\u001b]0;owned\\u0007\\u001b[2J\\u001b[6n"


def test_a_message_on_a_terminal_has_no_sequence_at_all(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    monkeypatch.setattr(sys, "stdout", PrintableStream(stream))
    echo(HOSTILE["colour"])
    assert stream.getvalue() == "\\u001b[31mred\n"


# The real commands.


def invoke(*arguments):
    return CliRunner().invoke(main, list(map(str, arguments)), catch_exceptions=False)


@pytest.mark.parametrize("form", [(), ("--json",)], ids=["text", "json"])
def test_check_prints_hostile_rows_safely(tmp_path, form):
    rows = preference_rows(3)
    for row, text in zip(rows, ("\x1b[31m", "\x9b2J\u202e", TITLE), strict=True):
        row["chosen"] += text
        row["rejected"] = row["chosen"]
        row[f"column {text}"] = text
    path = write_jsonl(tmp_path / f"rows{TITLE}.jsonl", rows)
    done = invoke("check", path, *form)
    assert done.exit_code == 3
    assert is_safe(done.output)
    if form:
        assert json.loads(done.stdout)["findings"][0]["path"] == str(path)


def test_a_hostile_recipe_is_refused_in_printable_words(tmp_path, make_recipe):
    recipe = make_recipe({f"model.{TITLE}": TITLE, "train.learning_rate": "\u202ehot", f"loss.{TITLE}": "\x9b"})
    path = tmp_path / f"a{TITLE}.toml"
    path.write_text(tomli_w.dumps(recipe))
    done = invoke("train", path, "--set", f"data.{TITLE}={TITLE}")
    assert done.exit_code == 2
    assert is_safe(done.output)
    assert "owned" in done.output


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.base", "https://someone:c4naryc4nary@huggingface.co/org/name"),
        ("model.revision", "hf_c4narYc4narYc4narYc4narY"),
        ("model.tokenizer", "/models/sk-c4nary0c4nary0c4nary"),
        ("data.train", "https://c4naryc4nary@host/train.jsonl"),
        ("data.heldout", "https://host/rows.jsonl?token=c4naryc4nary"),
    ],
)
def test_a_recipe_with_a_credential_is_refused_without_echoing_or_storing_it(tmp_path, make_recipe, key, value):
    path = tmp_path / "tiny.toml"
    path.write_text(tomli_w.dumps(make_recipe()))
    done = invoke("train", path, "--set", f"{key}={value}", "--output", tmp_path / "run")
    assert done.exit_code == 2
    assert key in done.output
    assert "c4nary" not in done.output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ("check", "https://someone:c4naryc4nary@host/rows.jsonl"),
        ("check", "hf:org/name", "--model", "https://someone:c4naryc4nary@host/org"),
        ("eval", "https://someone:c4naryc4nary@host/org/name"),
        ("generate", "hf_c4narYc4narYc4narYc4narY", "--prompt", "Hi"),
        ("train", "https://someone:c4naryc4nary@host/recipe.toml"),
        ("train", "x.toml", "--set", "hf_c4narYc4narYc4narYc4narY"),
        ("merge", "hf_c4narYc4narYc4narYc4narY", "out"),
        ("hf_c4narYc4narYc4narYc4narY",),
    ],
)
def test_a_credential_on_the_command_line_is_not_echoed(arguments):
    done = invoke(*arguments)
    assert done.exit_code
    assert done.output
    assert "c4nar" not in done.output


def test_no_byte_of_a_run_has_a_secret_of_the_environment(tmp_path, make_recipe, monkeypatch):
    names = ("HF_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY", "AWS_SECRET_ACCESS_KEY", "GITHUB_TOKEN", "CI_JOB_TOKEN")
    for name in (*names, "MLFLOW_TRACKING_PASSWORD", "SERVICE_CREDENTIALS"):
        monkeypatch.setenv(name, f"c4nary-{name.lower()}-0123456789")
    path = tmp_path / "tiny.toml"
    path.write_text(tomli_w.dumps(make_recipe({"train.max_steps": 1}) | {"sinks": [{"name": "console"}]}))
    outputs = [invoke("train", path, "--output", tmp_path / "run"), invoke("report", tmp_path / "run")]
    assert [done.exit_code for done in outputs] == [0, 0]
    files = [file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()]
    assert len(files) > 10
    assert not [content for content in (*files, *(done.output.encode() for done in outputs)) if b"c4nary" in content]


def test_a_byte_outside_utf8_in_a_name_is_printed_escaped(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "qpref", "check", os.fsencode(tmp_path) + b"/\xff\x1b[31m.jsonl"],
        capture_output=True,
        check=False,
    )
    assert done.returncode in (2, 3)
    assert b"\\udcff\\u001b[31m" in done.stderr
    assert b"\x1b" not in done.stderr
