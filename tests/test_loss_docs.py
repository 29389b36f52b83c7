"""The pages of docs/losses say what the installed losses are."""

from __future__ import annotations

import re
import sys
import tomllib
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from qpref.hooks.manager import LOSS, PluginHost, installed_offers
from qpref.recipe.loss_section import LossSection
from qpref.recipe.schedule import Schedule, can_be_scheduled
from qpref.testing import RULES, assert_conforms

PAGES = Path(__file__).parents[1] / "docs/losses"
GUIDE = PAGES / "write-your-own.md"
HOST = PluginHost()
OURS = sorted(offer.name for offer in installed_offers() if offer.kind == LOSS.prefix and offer.distribution == "qpref")


def record_of(name: str) -> Any:
    return HOST.load(LOSS, name).record


def page_of(name: str) -> str:
    return (PAGES / f"{name}.md").read_text()


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)


def first_author(paper: str) -> str | None:
    """The family name before "et al." or a year; None where no author is named."""
    found = re.match(r"([^\W\d_][\w'-]*)(?=(?:,| and| et al\.| \d{4}))", paper)
    return found[1] if found else None


def listed_options(name: str) -> dict[str, str]:
    """Option -> what stands first in the parentheses after it, in the list of the page's options."""
    listing = re.search(r"^## Options\n(.*?)^## ", page_of(name), re.DOTALL | re.MULTILINE)[1]
    options = {}
    for names, default in re.findall(r"^- ((?:`\w+`(?:, )?)+) \(`?([^,)`]+)", listing, re.MULTILINE):
        options |= dict.fromkeys(re.findall(r"`(\w+)`", names), default)
    return options


def loss_tables() -> Iterator[Any]:
    """The table of each loss in a TOML block."""
    for page in sorted(PAGES.glob("*.md")):
        for block in blocks(page, "toml"):
            tables = tomllib.loads(block).get("loss", [])
            for table in tables if isinstance(tables, list) else [tables]:
                yield pytest.param(table, id=f"{page.stem}-{table['name']}")


def option_tables(table: dict[str, Any]) -> list[dict[str, Any]]:
    """The options of a recipe's loss at the run's start and at its end, without name and weight."""
    model = record_of(table["name"]).options
    ends: list[dict[str, Any]] = [{}, {}]
    for key, value in table.items():
        if key in LossSection.model_fields:
            continue
        start = end = value
        if isinstance(value, dict):
            assert can_be_scheduled(model, key), f"{key} can't be scheduled"
            schedule = Schedule.model_validate(value)
            start, end = schedule.start, schedule.end
        ends[0][key], ends[1][key] = start, end
    return ends


def test_each_loss_has_a_page_and_each_page_a_loss():
    pages = {page.stem for page in PAGES.glob("*.md")} - {"README", GUIDE.stem}
    assert pages == set(OURS)


def test_the_index_links_each_page_once_in_its_table():
    rows = [line for line in (PAGES / "README.md").read_text().splitlines() if line.startswith("| [")]
    assert sorted(re.match(r"\| \[(\w+)\]\(\1\.md\) ", row)[1] for row in rows) == OURS


@pytest.mark.parametrize("name", OURS)
def test_the_index_says_what_the_loss_needs(name):
    record = record_of(name)
    row = next(line for line in (PAGES / "README.md").read_text().splitlines() if line.startswith(f"| [{name}]"))
    data, reference = (cell.strip() for cell in row.split("|")[2:4])
    assert data == {"PairedLoss": "pairs", "ListLoss": "lists"}.get(type(record).__name__, "single, labeled")
    assert (reference == "yes") == ("reference" in record.needs_of(record.options()))


@pytest.mark.parametrize("name", OURS)
def test_a_page_lists_every_option_and_no_other(name):
    assert sorted(listed_options(name)) == sorted(record_of(name).options.model_fields)


@pytest.mark.parametrize("name", OURS)
def test_a_page_gives_each_option_its_default(name):
    defaults = {option: field.default for option, field in record_of(name).options.model_fields.items()}
    listed = listed_options(name)
    for option, default in defaults.items():
        assert default is None or tomllib.loads(f"default = {listed[option]}")["default"] == default, option


@pytest.mark.parametrize("name", OURS)
def test_a_page_names_the_first_author_of_its_paper(name):
    author = first_author(record_of(name).paper)
    assert author is not None or name == "sft", "the record's paper names no author"
    assert author is None or f"Paper: {author} " in page_of(name)


@pytest.mark.parametrize("name", OURS)
def test_a_page_holds_a_recipe_of_its_loss(name):
    documents = [tomllib.loads(block) for block in blocks(PAGES / f"{name}.md", "toml")]
    tables = [document["loss"] for document in documents if "loss" in document]
    assert name in {table["name"] for entry in tables for table in (entry if isinstance(entry, list) else [entry])}


@pytest.mark.parametrize("table", list(loss_tables()))
def test_options_in_the_documents_are_valid(table):
    LossSection.model_validate(table)
    for options in option_tables(table):
        record_of(table["name"]).options.model_validate(options)


def test_a_wrong_option_in_a_document_would_be_seen():
    with pytest.raises(ValidationError):
        record_of("dpo").options.model_validate(option_tables({"name": "dpo", "weight": 0.5, "betaa": 0.1})[0])


@pytest.mark.parametrize("page", sorted(PAGES.glob("*.md")), ids=lambda page: page.stem)
def test_links_between_pages_lead_somewhere(page):
    targets = [target for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()) if "://" not in target]
    assert [target for target in targets if not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", sorted(PAGES.glob("*.md")), ids=lambda page: page.stem)
def test_lines_are_no_longer_than_120_columns(page):
    assert [line for line in page.read_text().splitlines() if len(line) > 120] == []


@pytest.fixture(scope="module")
def guide_module():
    """The guide's loss, run as the module that the guide calls it."""
    source = next(block for block in blocks(GUIDE, "python") if "def qpref_losses" in block)
    module = types.ModuleType("qpref_squared_hinge")
    exec(compile(source, "qpref_squared_hinge.py", "exec"), module.__dict__)
    return module


def test_the_guide_is_true_to_its_twenty_lines():
    source = next(block for block in blocks(GUIDE, "python") if "def qpref_losses" in block)
    assert sum(bool(line.strip()) for line in source.splitlines()) <= 20


@pytest.mark.parametrize("rule", list(RULES))
def test_the_loss_of_the_guide_conforms(guide_module, rule):
    (record,) = guide_module.qpref_losses()
    assert_conforms(record, rule)


def test_the_test_of_the_guide_passes(guide_module, monkeypatch):
    monkeypatch.setitem(sys.modules, guide_module.__name__, guide_module)
    test = next(block for block in blocks(GUIDE, "python") if "def test_" in block)
    scope: dict[str, Any] = {}
    exec(compile(test, "test_squared_hinge.py", "exec"), scope)
    (record,) = guide_module.qpref_losses()
    for rule in scope["RULES"]:
        scope["test_loss_conforms"](record, rule)


def test_the_entry_point_of_the_guide_names_its_record(guide_module):
    (table,) = [tomllib.loads(block) for block in blocks(GUIDE, "toml")]
    (record,) = guide_module.qpref_losses()
    assert table["project"]["entry-points"]["qpref"] == {f"loss-{record.name}": guide_module.__name__}


def test_the_unpaired_example_of_the_guide_is_the_built_in_loss():
    import torch

    from qpref.records import TokenLogProbs, UnpairedInputs

    source = next(block for block in blocks(GUIDE, "python") if "def apo_zero_unpaired" in block)
    scope: dict[str, Any] = {}
    exec(compile(source, "example.py", "exec"), scope)
    inputs = UnpairedInputs(
        policy=TokenLogProbs(values=torch.tensor([-1.0, -2.0, -3.0, -9.0]), lengths=(1, 2, 1)),
        reference=TokenLogProbs(values=torch.tensor([-3.0, -1.0, -1.0, -4.0]), lengths=(1, 2, 1)),
        desirable=torch.tensor([True, False, True]),
        class_counts=(2, 1),
    )
    record = record_of("apo_zero_unpaired")
    options = record.options(beta=0.5)
    torch.testing.assert_close(scope["build"](options)(inputs).losses, record.build(options)(inputs).losses)
