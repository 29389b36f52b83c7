"""Each code that qpref finds has one explanation, and docs/data.md shows the same table."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import get_args

import pytest

from qpref.data.finding_codes import CODES, OTHER, explanation_of
from qpref.hooks.checks import Severity, SourceSeverity
from qpref.hooks.manager import CHECK, PluginHost, installed_offers

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "qpref/data/finding_codes.py"
RAISED = re.compile(r'(?:BadRowError\(\s*|RefusedRowError\(\s*|code=|warnings\.append\(\(|refused\(\s*)"(\w+)"')
SEVERITIES = {get_args(Severity), get_args(SourceSeverity)}


def sources():
    folders = ("qpref/data", "qpref/rows", "qpref/training", "plugins/qpref_plugins")
    return [path for folder in folders for path in (ROOT / folder).rglob("*.py") if path != TABLE]


def option_codes():
    """The codes of the built-in checks: each has an option of its name, its severity."""
    names = [offer.name for offer in installed_offers() if (offer.kind, offer.distribution) == ("check", "qpref")]
    for name in names:
        options = PluginHost().load(CHECK, name).record.options
        yield from (key for key, field in options.model_fields.items() if get_args(field.annotation) in SEVERITIES)


def test_every_code_that_the_core_and_the_readers_find_has_an_explanation():
    found = {code for path in sources() for code in RAISED.findall(path.read_text())}
    assert len(found) > 15
    assert sorted(found - CODES.keys()) == []


def test_every_code_of_a_check_has_an_explanation():
    found = set(option_codes())
    assert len(found) > 20
    assert sorted(found - CODES.keys()) == []


def test_no_explanation_is_of_a_code_that_nothing_finds():
    text = "".join(path.read_text() for path in sources())
    known = set(re.findall(r'"(\w+)"', text)) | set(option_codes())
    assert sorted(CODES.keys() - known) == []


@pytest.mark.parametrize("code", CODES)
def test_an_explanation_is_two_sentences_that_say_what_and_what_to_do(code):
    for text in (CODES[code].meaning, CODES[code].remedy):
        assert text.endswith(".")
        assert text.count("`") % 2 == 0
        assert "|" not in text
    assert CODES[code].meaning != CODES[code].remedy


def test_a_code_of_another_package_has_the_general_explanation():
    assert explanation_of("acme_toxic") == OTHER
    assert explanation_of("tied") is CODES["tied"]


def test_the_data_page_has_the_table():
    spec = importlib.util.spec_from_file_location("make_finding_codes", ROOT / "docs/make_finding_codes.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.page() == (ROOT / "docs/data.md").read_text(), "run python docs/make_finding_codes.py"
