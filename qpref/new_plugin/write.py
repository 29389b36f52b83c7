"""Write the tree of a new plugin's distribution from the templates beside this module."""

from __future__ import annotations

import re
from pathlib import Path

import jinja2

from qpref.errors import RecipeError
from qpref.hooks.manager import KINDS, installed_offers
from qpref.installed import version_of

TEMPLATES = Path(__file__).with_name("templates")
NAME = re.compile(r"[a-z][a-z0-9]*([_-][a-z0-9]+)*")
MAX_LENGTH = 50


def write_plugin(kind: str, name: str, folder: Path | None = None) -> list[Path]:
    """Write the distribution `qpref-NAME`, and return its files.

    Args:
        kind: prefix of the plugin's entry point, a key of `KINDS`.
        folder: the new folder; by default `qpref-NAME` in the current one.

    Raises:
        RecipeError: the name is none that a plugin can have, or is taken; or the folder exists.
    """
    if not NAME.fullmatch(name) or len(name) > MAX_LENGTH:
        raise RecipeError(
            f"the name '{name}' isn't lower-case letters and digits, with single - or _ between them",
            "such as squared_hinge",
        )
    for offer in installed_offers():
        if (offer.kind, offer.name) == (kind, name):
            raise RecipeError(f"{KINDS[kind].noun} '{name}' is offered by {offer}", "choose another name")
    distribution = f"qpref-{name.replace('_', '-')}"
    module = distribution.replace("-", "_")
    root = Path(distribution) if folder is None else folder
    if root.exists():
        raise RecipeError(f"{root} exists", "choose another folder with --output")
    if not root.absolute().parent.is_dir():
        raise RecipeError(f"{root.parent}: no such folder")
    files = {
        "pyproject.toml": "pyproject.toml.j2",
        "README.md": "README.md.j2",
        f"src/{module}/__init__.py": f"{kind}.py.j2",
        f"src/{module}/py.typed": None,
        f"tests/test_{module}.py": f"test_{kind}.py.j2",
    }
    values = {
        "kind": kind,
        "noun": KINDS[kind].noun,
        "name": name,
        "distribution": distribution,
        "module": module,
        "title": "".join(map(str.capitalize, re.split("[-_]", name))),
        **_supported(),
    }
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True, autoescape=False)  # noqa: S701 - Python and TOML, no HTML
    for path, template in files.items():
        text = "" if template is None else environment.from_string((TEMPLATES / template).read_text()).render(values)
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return [root / path for path in files]


def _supported() -> dict[str, str]:
    """Return this version of qpref, and the first that may break its plugins: the next minor one."""
    numbers = [int(number) for number in re.findall(r"\d+", version_of("qpref") or "0.0")[:2]]
    return {"at_least": ".".join(map(str, numbers)), "below": f"{numbers[0]}.{numbers[1] + 1}"}
