"""No message that the Python interface can give names an option of the command line, whichever module it comes from."""

from __future__ import annotations

import ast
import logging
import re
from pathlib import Path

import pytest

from qpref.api.words import in_python, python_words
from qpref.errors import RecipeError

ROOT = Path(__file__).parents[2] / "qpref"
NOT_CALLED = ("cli", "sweep", "sampling", "convert", "first_recipe", "doctor", "report", "testing", "aliases")
"""Packages of commands that Python has no function for."""
NOT_CALLED_MODULES = ("export.py", "hub.py", "adapter_to_push.py", "gguf_lora.py", "links.py", "scaling.py",
                      "finding_codes.py", "modelfile.py", "pypi.py", "words.py")  # fmt: skip
"""Modules of such commands, and those whose options are pip's own."""
OF_OTHER_PROGRAMS = re.compile(
    r"pip (install|download) --[\w-]+|nvidia-smi.*|--query-gpu.*|--format=csv.*|`--gpus all`|wsl --install"
)
OPTION = re.compile(r"(?<![\w-])--[a-z][\w-]*")


def texts(path: Path) -> list[str]:
    """Every text of a module but its docstrings; of a formatted one, with a word in place of each value."""
    tree = ast.parse(path.read_text())
    parts = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in ast.walk(node)}
    shown = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            found.append("".join(one.value if isinstance(one, ast.Constant) else "value" for one in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts | shown:
            found.append(node.value)
    return found


MODULES = [
    path
    for path in sorted(ROOT.rglob("*.py"))
    if path.relative_to(ROOT).parts[0] not in NOT_CALLED and path.name not in NOT_CALLED_MODULES
]


def test_no_message_names_an_option():
    named = [(path.name, text) for path in MODULES for text in texts(path) if OPTION.search(text)]
    assert len(named) > 30
    left = {text: name for name, text in named if OPTION.search(OF_OTHER_PROGRAMS.sub("", in_python(text)))}
    assert left == {}


@pytest.mark.parametrize(
    ("text", "python"),
    [
        ("continue with --resume, or use --output", "continue with resume=True, or use output="),
        ("finish it with qpref train --resume", "finish it with qpref.train(recipe, resume=True)"),
        ("choose --dtype bf16 or float32", 'choose dtype="bf16" or float32'),
        ("plan with --set model.device=auto", 'plan with overrides=["model.device=auto"]'),
        ("name prompts with --prompt or --prompts", "name prompts with prompts= or data="),
        ("`qpref check` lists all of them", "qpref.check lists all of them"),
        ("use --quantization nf4 if it was", 'use quantization="nf4" if it was'),
        ("lower --max-length", "lower max_length="),
        ("a container needs `--gpus all`", "a container needs `--gpus all`"),
        ("pip install --force-reinstall torch", "pip install --force-reinstall torch"),
    ],
)
def test_options_become_arguments(text, python):
    assert in_python(text) == python


def test_errors_and_logs_are_rewritten_inside_alone(caplog):
    logger = logging.getLogger("qpref")
    logger.propagate = True

    def fail():
        with python_words():
            logger.warning("%s; --overwrite deletes it", "runs/x")
            raise RecipeError("--output x: is a file", "use another --output")

    with pytest.raises(RecipeError) as raised:
        fail()
    logger.warning("--overwrite")
    assert str(raised.value) == "output= x: is a file\nhint: use another output"
    assert [record.getMessage() for record in caplog.records] == ["runs/x; overwrite=True deletes it", "--overwrite"]
