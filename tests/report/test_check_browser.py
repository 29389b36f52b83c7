"""The page of `qpref check` in a real browser: nothing on its console, nothing loaded, filters, and narrow screens.

Needs a Chromium (Debian: apt-get install chromium), so it stays out of the default run.
"""

from __future__ import annotations

import pytest
from browser import Browser
from click.testing import CliRunner
from conftest import preference_rows, write_jsonl

from qpref.cli import main

pytestmark = pytest.mark.soak

SHOWN = (
    "[...document.querySelectorAll('.row:not([hidden]) h3')].map((heading) => heading.firstChild.textContent.trim())"
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    made = Browser(tmp_path_factory.mktemp("browser"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    rows = [
        *preference_rows(2),
        {"prompt": "Why?", "chosen": "", "rejected": "x" * 500},
        {"prompt": "Which word?", "chosen": "<p>Sesame</p></pre><script>alert(1)</script>", "rejected": "No."},
        {f"a very long name of a column that says much {at}": at for at in range(9)},
        {"prompt": "Why?", "chosen": "As an AI language model, I cannot say.", "rejected": "So it is."},
    ]
    path = write_jsonl(folder / "a-long-name-of-a-file-of-preferences-as-they-were-exported-last-week.jsonl", rows)
    done = CliRunner().invoke(main, ["check", str(path), "--html", str(folder / "page.html")], catch_exceptions=False)
    assert done.exit_code == 3
    return folder / "page.html"


@pytest.fixture
def shown(browser, page):
    browser.ask("Emulation.setScriptExecutionDisabled", value=False)
    browser.ask("Emulation.setDeviceMetricsOverride", width=390, height=844, deviceScaleFactor=1, mobile=True)
    browser.open(page)
    return browser


def choose(browser, name: str, value: str) -> None:
    browser.evaluate(f"""(() => {{
        const control = document.querySelector({name!r});
        control.value = {value!r};
        control.dispatchEvent(new Event('input', {{bubbles: true}}));
    }})()""")


def test_the_console_stays_empty_and_nothing_is_loaded(shown, page):
    assert shown.complaints() == []
    assert shown.requests() == [page.as_uri()]


@pytest.mark.parametrize("width", [320, 390, 1280])
def test_no_width_needs_sideways_scrolling(browser, page, width):
    browser.ask("Emulation.setDeviceMetricsOverride", width=width, height=844, deviceScaleFactor=1, mobile=width < 600)
    browser.open(page)
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    outside = f"[...document.querySelectorAll('main *')].filter((part) => part.getBoundingClientRect().right > {width})"
    assert browser.evaluate(f"{outside}.map((part) => part.className || part.tagName)") == []


def test_filters_by_code_severity_split_and_words(shown):
    everything = shown.evaluate(SHOWN)
    assert len(everything) == 4
    choose(shown, "[data-filter=severities]", "error")
    assert [heading.rpartition(" ")[2] for heading in shown.evaluate(SHOWN)] == ["3", "5"]
    choose(shown, "[data-filter=codes]", "empty")
    assert [heading.rpartition(" ")[2] for heading in shown.evaluate(SHOWN)] == ["3"]
    choose(shown, "[data-filter=severities]", "")
    choose(shown, "[data-filter=codes]", "")
    choose(shown, "input", "SESAME word")
    assert [heading.rpartition(" ")[2] for heading in shown.evaluate(SHOWN)] == ["4"]
    assert shown.evaluate("document.querySelector('output').textContent") == f"1 of {len(everything)} rows"
    choose(shown, "[data-filter=split]", "training")
    choose(shown, "input", "no such word")
    assert shown.evaluate(SHOWN) == []


def test_the_button_of_a_code_shows_its_rows(shown):
    choose(shown, "input", "no such word")
    shown.evaluate("document.querySelector('button[data-code=empty]').click()")
    assert [heading.rpartition(" ")[2] for heading in shown.evaluate(SHOWN)] == ["3"]


def test_without_scripts_the_rows_are_all_shown_and_the_filters_are_not(browser, page):
    browser.ask("Emulation.setScriptExecutionDisabled", value=True)
    browser.open(page)
    browser.ask("Emulation.setScriptExecutionDisabled", value=False)
    assert len(browser.evaluate(SHOWN)) == 4
    assert browser.evaluate("getComputedStyle(document.querySelector('.filters')).display") == "none"
