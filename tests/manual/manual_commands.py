"""Commands of the manual: the lines of its code blocks that a reader types, and the code cells of its notebook."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from click import Command, Context, Group, Option

from qpref.cli import main
from qpref.recipe.sections import Recipe

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "docs/tutorial.ipynb"
PAGES = [
    *sorted(ROOT.glob("README*.md")),
    *sorted(path for path in (ROOT / "docs").rglob("*.md")),
]
PROGRAMS = (
    *("qpref", "python", "python3", "pip", "git", "cd", "torchrun", "pytest", "mkdocs", "export"),
    *("kubectl", "sbatch", "srun", "docker"),
    *("ollama", "vllm", "llama-cli", "llama-server", "lms"),
    *("tensorboard", "wandb", "mlflow", "trackio", "swanlab", "aim"),
)
"""First words of a typed line; a line of a block that begins with another is output, code or a file."""
SYNOPSIS = re.compile(r"\[--?\w|\.\.\.|\[[A-Z]+\]")
"""A line that shows the form of a command, not one to type."""
NEXT = re.compile(r"\s+&&\s+")


def typed_lines(text: str) -> Iterator[str]:
    """Yield the lines to type of a page's code blocks, without what a column behind them says."""
    fence = ""
    for line in text.replace("\\\n", " ").splitlines():
        if opened := re.match(r"\s*(```+)(\w*)", line):
            fence = "" if fence else opened[2] or "text"
            continue
        if fence in ("", "text", "bash", "sh", "console") and (fence or line.startswith("    ")):
            typed = line.strip().removeprefix("$ ")
            if fence == "text" and not line.startswith("$ "):
                continue  # what a command prints
            if re.match(rf"(\w+=\S+ )*({'|'.join(PROGRAMS)})(?=\s|$)", typed):
                yield re.split(r"\s{2,}(?!-)", re.sub(r"\s+#.*", "", typed))[0]


def commands_of(path: Path) -> list[str]:
    """List a page's or the notebook's commands in their order."""
    if path.suffix == ".ipynb":
        cells = json.loads(path.read_text())["cells"]
        source = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
        lines = [line.lstrip("!%") for line in source.splitlines() if line.startswith(("!", "%"))]
    else:
        lines = list(typed_lines(path.read_text()))
    return [command for line in lines for command in NEXT.split(line)]


def is_synopsis(command: str) -> bool:
    return bool(SYNOPSIS.search(command)) or bool(re.search(r" [A-Z][A-Z|.]*\b(?![-\w/])", command.partition('"')[0]))


def inline_commands(text: str) -> list[str]:
    """List the commands of ours that are quoted in a sentence."""
    return re.findall(r"`(qpref \w[^`]*)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL).replace("\n", " "))


def problem_of(command: str) -> str | None:
    """Find what a qpref command names that doesn't exist: a command, an option, a recipe's key."""
    words = shlex.split(re.sub(r"[\[\]]|\.\.\.", " ", command))[1:]
    node: Command = main
    while isinstance(node, Group) and words and not words[0].startswith("-"):
        name, *rest = words
        found = node.get_command(Context(node), name)
        if found is None:
            return f"{node.name} has no command {name}"
        node, words = found, rest
    options = {name for parameter in node.params if isinstance(parameter, Option)
               for name in (*parameter.opts, *parameter.secondary_opts)} | {"--help", "-h"}  # fmt: skip
    for word in words:
        if word.startswith("-") and word.partition("=")[0] not in options:
            return f"{node.name} has no option {word}"
        if setting := re.fullmatch(r"(\w+)\.(\w+)=.*", word):
            table, key = setting.groups()
            section = Recipe.model_fields.get(table)
            if section is None:
                return f"no table {table}"
            keys = getattr(section.annotation, "model_fields", None)
            if table != "loss" and keys is not None and key not in keys:
                return f"[{table}] has no key {key}"
    return None
