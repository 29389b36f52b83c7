"""Write the tree of docs/architecture.md from each module's first line: `python docs/make_architecture.py`."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/architecture.md"
BEGIN, END = "<!-- tree: python docs/make_architecture.py -->\n", "<!-- end of tree -->"
WIDTH = 24


def page() -> str:
    """Render the page with the current tree."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{tree()}\n{END}{after}"


def tree() -> str:
    """List every module of qpref and every built-in plugin, with the first line of its docstring."""
    lines = []
    for package in (ROOT / "qpref", ROOT / "plugins/qpref_plugins"):
        lines += _package(package, 0)
    return "".join(f"    {line}\n" for line in lines)


def _package(folder: Path, depth: int) -> list[str]:
    name = folder.relative_to(ROOT) if depth == 0 else folder.name
    lines = [_line(f"{name}/", folder / "__init__.py", depth)]
    modules = sorted(path for path in folder.glob("*.py") if path.name != "__init__.py")
    packages = sorted(path.parent for path in folder.glob("*/__init__.py"))
    if "plugins" in folder.parts and depth == 1:
        return lines  # a plugin's modules are private
    lines += [_line(path.name, path, depth + 1) for path in modules]
    for package in packages:
        lines += _package(package, depth + 1)
    return lines


def _line(name: str, module: Path, depth: int) -> str:
    docstring = ast.get_docstring(ast.parse(module.read_text()))
    assert docstring, f"{module} has no docstring"
    title = docstring.split("\n\n")[0].replace("\n", " ").split(". ")[0].rstrip(".")
    return f"{'  ' * depth + name:{WIDTH}} {title}"


if __name__ == "__main__":
    PAGE.write_text(page())
