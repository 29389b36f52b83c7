"""The Python of docs/use.md runs, with tiny models in the place of those that it names."""

from __future__ import annotations

import re

import pytest
from manual_commands import ROOT
from manual_workspace import run, workspace  # noqa: F401 - a fixture


@pytest.mark.usefixtures("workspace")
def test_the_adapter_and_the_merged_model_are_loaded_as_the_page_says(capsys):
    run("qpref train recipes/quickstart.toml --set train.max_steps=1")
    run("qpref merge runs/quickstart out/")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/use.md").read_text(), re.DOTALL)
    names = {"Qwen/Qwen2.5-7B-Instruct": "my-base", "runs/7b-24gb/adapter": "runs/quickstart/adapter"}
    capsys.readouterr()
    for block in blocks:
        for public, tiny in names.items():
            block = block.replace(public, tiny)
        found: dict[str, object] = {}
        exec(compile(block, "docs/use.md", "exec"), found)
        assert found["tokenizer"].chat_template
    assert len(blocks) == 2
    assert capsys.readouterr().out.strip()
