"""The manual builds without a warning, is searchable, and loads nothing from another host."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from manual_commands import ROOT

LOADED = re.compile(r"<(?:script|link|img|iframe|source)\b[^>]*?\b(?:src|href|srcset)=[\"']?((?:https?:)?//[^\"' >]+)")
"""What a browser fetches by itself, as far as it is at another host; a link (`<a>`) is the reader's choice."""


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_every_page_is_built(site):
    pages = {path.relative_to(ROOT / "docs") for path in (ROOT / "docs").rglob("*.md")}
    built = {str(path.parent.relative_to(site)) for path in site.rglob("index.html")}
    for page in pages:
        folder = page.parent if page.stem in ("README", "index") else page.with_suffix("")
        assert str(folder) in built


def test_nothing_is_loaded_from_another_host(site):
    pages = list(site.rglob("*.html"))
    assert {found for page in pages for found in LOADED.findall(page.read_text())} == set()
    styles = "".join(path.read_text() for path in site.rglob("*.css"))
    assert re.findall(r"url\(\s*[\"']?(?:https?:)?//[^)]*\)|@import\s+[\"']http", styles) == []
    assert not any('class="mermaid"' in page.read_text() for page in pages), "mermaid is loaded from a CDN"


def test_a_foreign_script_would_be_seen():
    assert LOADED.findall('<script async src="https://cdn.example/x.js">') == ["https://cdn.example/x.js"]
    assert LOADED.findall('<a href="https://arxiv.org/abs/2305.18290">') == []


def test_the_search_finds_english_and_chinese_words(site):
    entries = json.loads((site / "search/search_index.json").read_text())["docs"]
    assert any("likelihood displacement" in entry["text"].lower() for entry in entries)
    chinese = [entry["text"] for entry in entries if entry["location"].startswith("tutorial.zh-CN/")]
    assert any("\u200b" in text for text in chinese), "words of Chinese text aren't divided"


def test_the_interface_of_plugins_is_on_its_pages(site):
    from qpref import hooks, testing

    for module in (hooks, testing):
        page = (site / f"api/{module.__name__.rpartition('.')[2]}/index.html").read_text()
        ours = [name for name in module.__all__ if is_documented_here(getattr(module, name))]
        assert [name for name in ours if f'id="{module.__name__}.{name}"' not in page] == []
        assert [name for name in module.__all__ if name not in page] == []


def is_documented_here(value: object) -> bool:
    """A class or function of ours; values such as pydantic's Field are named in the page's text."""
    return getattr(value, "__module__", "").startswith("qpref.") and bool(value.__doc__)


def test_links_out_of_the_manual_lead_to_the_repository(site):
    page = (site / "speed/index.html").read_text()
    assert "https://github.com/qpref/qpref/blob/main/benchmarks/README.md" in page
    assert 'href="../benchmarks/' not in page
