"""Run folders made line by line, and a page taken apart."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

VOID = {"meta", "br", "hr", "img", "input", "link"}


def make_run(folder: Path, rows=(), *, recipe: str = "", finished: bool = True, **files) -> Path:
    """`make_run(folder, rows, facts={...}, result={...}, data={...})`: a run folder with these JSON files."""
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(files.pop("facts", {})))
    (folder / "recipe.lock.toml").write_text(recipe)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if finished:
        (folder / "adapter").mkdir()
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def train_rows(losses, **more) -> list[dict[str, object]]:
    """A training row for each loss, from step 1; 100 tokens and 2 seconds a step."""
    return [
        {"step": step, "split": "train", "loss": loss, "tokens": 100 * step, "seconds": 2.0 * step} | more
        for step, loss in enumerate(losses, 1)
    ]


@dataclass
class Element:
    tag: str
    attributes: dict[str, str | None]
    children: list[Element | str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(child if isinstance(child, str) else child.text for child in self.children)

    def all(self, tag: str, **attributes: str) -> list[Element]:
        """Elements below with this tag and these attributes; `class_` has to be among the classes."""
        found = []
        for child in self.children:
            if isinstance(child, Element):
                if child.tag == tag and all(child._has(name, value) for name, value in attributes.items()):
                    found.append(child)
                found += child.all(tag, **attributes)
        return found

    def one(self, tag: str, **attributes: str) -> Element:
        (found,) = self.all(tag, **attributes)
        return found

    def _has(self, name: str, value: str) -> bool:
        own = self.attributes.get(name.rstrip("_")) or ""
        return value in own.split() if name == "class_" else own == value

    def rows(self) -> list[list[str]]:
        """The texts of a table's cells."""
        return [[cell.text.strip() for cell in row.children if isinstance(cell, Element)] for row in self.all("tr")]


class _Builder(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.root = Element("", {})
        self.open = [self.root]

    def handle_starttag(self, tag, attrs):
        element = Element(tag, dict(attrs))
        self.open[-1].children.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag, attrs):
        self.open[-1].children.append(Element(tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open[-1].tag == tag, f"</{tag}> closes <{self.open[-1].tag}>"
        self.open.pop()

    def handle_data(self, data):
        self.open[-1].children.append(data)


def parsed(html: str) -> Element:
    """The page as a tree; every element has to be closed where it was opened."""
    builder = _Builder()
    builder.feed(html)
    builder.close()
    assert len(builder.open) == 1, [element.tag for element in builder.open]
    return builder.root
