"""The frame of every page: one HTML file with its own style and script, which loads nothing.

Its Content-Security-Policy allows only that style and that script, by their hashes. Every text is made visible, loses
passwords and tokens, and is escaped by the template; no code of the pages produces markup.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from qpref import fsio
from qpref.credentials import redact
from qpref.report.text import visible
from qpref.version import __version__

STYLE = "page.css"


def render_page(template: str, *, script: str, styles: Sequence[str] = (), **values: Any) -> str:
    """Render a template that extends `frame.html.j2`.

    Args:
        template, script, styles: files of this package; the styles come after the one of all pages.
        values: for the template; the frame takes `title`, `command` (that writes the page) and `origin` (of its data).
    """
    style, code = "".join(map(_packaged, (STYLE, *styles))), _packaged(script)
    policy = (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(code)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    return _environment().get_template(template).render(
        policy=policy,
        style=Markup(style),  # noqa: S704 - the package's own files
        script=Markup(code),  # noqa: S704
        version=__version__,
        **values,
    )  # fmt: skip


def write_page(path: Path, page: str) -> None:
    """Write a page to a file that other users may read; an existing one is replaced."""
    fsio.write_bytes(path, page.encode(errors="replace"))  # JSON may hold lone surrogates
    fsio.make_readable(path)


@cache
def _packaged(name: str) -> str:
    return files("qpref.report").joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("qpref.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=_shown,
    )


def _shown(value: Any) -> Any:
    """Make a text safe to look at, before the template escapes it: no character that hides or reorders others, no
    password or token. Markup is the package's own, and a macro's texts have been here already."""
    if isinstance(value, Markup) or not isinstance(value, str | Path):
        return value
    return visible(redact(str(value)))
