"""Prepare pages of docs/ for the manual (a hook of mkdocs); the repository's site shows the same pages as they are.

A link that leaves docs/ leads to the repository. A line break within Chinese text is removed: a browser shows it as a
space.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(\]\()(?!\w+:|#|/)([^)\s#]+)([^)]*\))")
WIDE = "[\u3001-\u3002\u4e00-\u9fff\uff01-\uff1f]"
"""Chinese characters and punctuation."""
BREAK = re.compile(f"(?<={WIDE})\n *(?={WIDE}|[`*\\[]*{WIDE})")


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """Rewrite a page before it is rendered."""
    folder = posixpath.join("docs", posixpath.dirname(page.file.src_uri))

    def rewritten(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, link[2]))
        if target.startswith("docs/") or not (ROOT / target).exists():
            return link[0]
        kind = "tree" if (ROOT / target).is_dir() else "blob"
        return f"{link[1]}{config.extra['repository']}/{kind}/main/{target}{link[3]}"

    return BREAK.sub("", LINK.sub(rewritten, markdown))
