"""Shell completion: the words of each shell's protocol, and bash's script in a real bash."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qpref.hooks.manager import installed_offers

QPREF = Path(sys.executable).with_name("qpref")
LOSSES = {offer.name for offer in installed_offers() if offer.kind == "loss"}


def completions(shell, *words):
    """The words that the shell would offer for the last of `words`."""
    last = words[-1] if shell == "fish" else str(len(words) - 1)
    environment = {"_QPREF_COMPLETE": f"{shell}_complete", "COMP_WORDS": " ".join(words), "COMP_CWORD": last}
    done = subprocess.run([QPREF], env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    if shell == "zsh":
        return set(lines[1::3])
    return {line.partition(",")[2].partition("\t")[0] for line in lines}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_gets_the_names_of_losses(shell):
    assert completions(shell, "qpref", "losses", "show", "ap") == {name for name in LOSSES if name.startswith("ap")}


@pytest.mark.parametrize(
    ("words", "some"),
    [
        (("tr",), {"train"}),
        (("train", "r.toml", "--re"), {"--resume"}),
        (("losses", "check", "dpo", "ip"), {"ipo"}),
        (("plan", "r.toml", "--shape", "Qwen2.5-7"), {"Qwen2.5-7B"}),
        (("plan", "r.toml", "--card", "rtx"), {"RTX 4090 24GB", "RTX 3060 12GB"}),
        (("train", "r.toml", "--set", "train.lea"), {"train.learning_rate="}),
        (("train", "r.toml", "--set", "loss.name=kt"), {"loss.name=kto"}),
        (("check", "a.csv", "--reader", "parq"), {"parquet"}),
        (("check", "a.csv", "--format", "share"), {"sharegpt"}),
        (("init", "--goal", ""), {"align", "base", "noisy", "short"}),
    ],
)
def test_names_are_completed_where_they_belong(words, some):
    found = completions("bash", "qpref", *words)
    assert some <= found
    if words[-1]:
        assert all(word.lower().startswith(words[-1].lower()) for word in found)


def test_a_data_file_is_completed_by_the_shell():
    environment = {"_QPREF_COMPLETE": "bash_complete", "COMP_WORDS": "qpref check pai", "COMP_CWORD": "2"}
    done = subprocess.run([QPREF], env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.stdout == "file,pai\n"


def test_the_script_works_in_bash():
    bash = shutil.which("bash")
    script = (
        f'export PATH="{QPREF.parent}:$PATH"; eval "$(_QPREF_COMPLETE=bash_source qpref)"; complete -p qpref; '
        "COMP_WORDS=(qpref losses show or); COMP_CWORD=3; _qpref_completion qpref; echo ${COMPREPLY[@]}"
    )
    done = subprocess.run([bash, "-c", script], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    registered, words = done.stdout.splitlines()
    assert registered.startswith("complete ")
    assert words == "orpo"


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_the_other_shells_scripts_are_printed(shell):
    environment = {"_QPREF_COMPLETE": f"{shell}_source"}
    done = subprocess.run([QPREF], env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert f"_QPREF_COMPLETE={shell}_complete" in done.stdout


def test_completing_imports_nothing_heavy():
    code = (
        "import sys\nfrom qpref.cli import completion as c\n"
        "for complete in (c.losses, c.readers, c.cards, c.shapes, c.row_formats, c.settings):\n"
        "    assert complete(None, None, '')\n"
        "assert not {'torch', 'transformers', 'trl', 'peft', 'bitsandbytes'} & set(sys.modules), sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
