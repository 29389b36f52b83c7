"""Each command of the manual is one of ours as written, and runs: here, in a test that is named, or where it can't."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import jsonschema
import pytest
from manual_commands import NOTEBOOK, PAGES, ROOT, commands_of, inline_commands, is_synopsis, problem_of
from manual_workspace import run, workspace  # noqa: F401 - a fixture

NEEDS = ("a GPU", "a network", "a cluster", "a container runtime", "another program")
NOT_RUN_HERE = {
    r"git clone .*": "a network",
    r"cd qpref": "a network",
    r"pip install .*": "a network",
    r"python3 -m venv .*": ".ci/run",
    r"\. .*": ".ci/run",
    r"docker .*": "a container runtime",
    r"pytest .*": ".ci/run",
    r"qpref init": "tests/cli/test_init.py",
    r"qpref init --model Qwen/.*": "a network",
    r"qpref train my.toml --resume": "tests/training/test_kills.py",
    r"qpref train .*--gpus .*": "a GPU",
    r"qpref train .*--processes .*": "tests/distributed/test_launch.py",
    r"torchrun .*": "tests/distributed/test_launch.py",
    r"python docs/distributed/ray_train.py .*": "a cluster",
    r"sbatch .*": "a cluster",
    r"kubectl .*": "a cluster",
    r"qpref losses check ./qpref_squared_hinge.py": "tests/plugins/test_plugin_files.py",
    r"qpref losses check squared_hinge": "tests/thirdparty/test_foreign_distribution.py",
    r"qpref train recipe.toml --set loss.name=squared_hinge": "tests/thirdparty/test_foreign_distribution.py",
    r"qpref rounds .*": "tests/sweep/test_rounds.py",
    r"python -m benchmarks\.frontier.*": "tests/benchmarks/test_frontier_runs.py",
    r"python -m benchmarks\.rlhf .*": "tests/benchmarks/test_rlhf_arms.py",
    r"qpref sweep .*": "tests/sweep/test_sweep.py",
    r"qpref eval .*quickstart-sweep/.*": "tests/cli/test_eval.py",
    r"qpref init-plugin .*": "tests/test_new_plugin.py",
    r"(cd qpref-squared-hinge|pytest)": "tests/test_new_plugin.py",
    r"qpref plugins check .*": "tests/cli/test_plugin_check.py",
    r"HF_TOKEN=.*": "a network",
    r"vllm .*": "a GPU",
    r"llama-cli .*": "another program",
    r"(ollama|lms) .*": "another program",
    r"qpref export out/ .*": "tests/cli/test_export.py",
    r"qpref .* --push .*": "tests/merge/test_merge_command.py",
}
"""Commands that aren't run here: a pattern of the whole command, and what it needs or the test that runs its like."""
PYTHON_RUN_BY = {
    "docs/plugins.md": "tests/test_docs.py",
    "docs/losses/write-your-own.md": "tests/test_loss_docs.py",
    "docs/python.md": "tests/manual/test_python_page.py",
    "docs/use.md": "tests/manual/test_use_page.py",
}
ALL = [*PAGES, NOTEBOOK]
TRANSLATIONS = ("README.zh-CN.md", "tutorial.zh-CN.md")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def reason_of(command: str) -> str | None:
    """The reason why a command isn't run here."""
    if is_synopsis(command):
        return "a synopsis"
    return next((reason for pattern, reason in NOT_RUN_HERE.items() if re.fullmatch(pattern, command)), None)


WITH_COMMANDS = [
    page for page in PAGES if page.name not in TRANSLATIONS and any(not reason_of(one) for one in commands_of(page))
]


@pytest.mark.parametrize("page", ALL, ids=name_of)
def test_each_command_and_option_of_the_manual_exists(page):
    ours = [command for command in commands_of(page) if command.startswith("qpref ")]
    quoted = inline_commands(page.read_text()) if page.suffix == ".md" else []
    assert {command: problem for command in ours + quoted if (problem := problem_of(command))} == {}


def test_a_command_that_does_not_exist_would_be_seen():
    assert problem_of("qpref trian my.toml") == "main has no command trian"
    assert problem_of("qpref train my.toml --lr 1") == "train has no option --lr"
    assert problem_of("qpref train my.toml --set train.lr=1") == "[train] has no key lr"
    assert problem_of("qpref losses show kto --jsn") == "show has no option --jsn"


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=name_of)
@pytest.mark.usefixtures("workspace")
def test_the_commands_of_a_page_run_in_their_order(page):
    if "runs/quickstart" in page.read_text() and "qpref train recipes/quickstart.toml" not in commands_of(page):
        run("qpref train recipes/quickstart.toml")
    for command in commands_of(page):
        if reason_of(command) is None:
            run(command)


@pytest.mark.parametrize("pattern", NOT_RUN_HERE)
def test_what_is_not_run_here_is_in_the_manual_and_is_run_where_it_is_said(pattern):
    assert any(re.fullmatch(pattern, command) for page in ALL for command in commands_of(page))
    reason = NOT_RUN_HERE[pattern]
    assert reason in NEEDS or (ROOT / reason).is_file()


@pytest.mark.parametrize("page", [page for page in PAGES if "```python" in page.read_text()], ids=name_of)
@pytest.mark.usefixtures("workspace")
def test_the_python_of_a_page_runs_here_or_in_a_test_of_its_own(page):
    if test := PYTHON_RUN_BY.get(name_of(page)):
        assert page.name in (ROOT / test).read_text()
        return
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        exec(compile(block, name_of(page), "exec"), {})


def partial(schema: object) -> object:
    """The schema of a part of a document: nothing is required."""
    if isinstance(schema, dict):
        return {key: partial(value) for key, value in schema.items() if key != "required"}
    return [partial(value) for value in schema] if isinstance(schema, list) else schema


RECIPES = partial(json.loads((ROOT / "recipes/recipe.schema.json").read_text()))


def toml_blocks(page: Path) -> list[dict[str, object]]:
    return [tomllib.loads(block) for block in re.findall(r"```toml\n(.*?)```", page.read_text(), re.DOTALL)]


@pytest.mark.parametrize("page", [page for page in PAGES if "```toml" in page.read_text()], ids=name_of)
def test_each_part_of_a_recipe_fits_the_schema(page):
    for document in toml_blocks(page):
        if "project" not in document:
            jsonschema.validate(document, RECIPES)


def test_a_wrong_key_in_a_part_of_a_recipe_would_be_seen():
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"train": {"lr": 1}}, RECIPES)
