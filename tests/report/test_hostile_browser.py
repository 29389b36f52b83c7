"""Hostile texts in every field of both pages, in a real browser that ignores their Content-Security-Policy: markup that
got through would run there.

Needs a Chromium (Debian: apt-get install chromium), so it stays out of the default run.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from browser import Browser
from click.testing import CliRunner
from hostile_page import hostile_page

from qpref.cli import main

pytestmark = pytest.mark.soak

RUN = "window.ran=1"
TEXTS = {
    "a script": f"<script>{RUN}</script>",
    "the end of the script": f"</script><script>{RUN}</script>",
    "the end of the style": f"</style><script>{RUN}</script>",
    "the end of the title": f"</title><script>{RUN}</script>",
    "the end of a text area": f"</textarea></pre></svg><script>{RUN}</script>",
    "a picture": f"<img src=x onerror={RUN}>",
    "an attribute in double quotes": f'" onmouseover="{RUN}" autofocus onfocus="{RUN}" x="',
    "an attribute in single quotes": f"' onmouseover='{RUN}' autofocus onfocus='{RUN}' x='",
    "a drawing": f"<svg onload={RUN}><animate onbegin={RUN} attributeName=x dur=1s>",
    "formulas": f"<math><mtext><table><mglyph><style><img src=x onerror={RUN}>",
    "a frame": f"<iframe srcdoc='<script>parent.{RUN}</script>'></iframe>",
    "another base": '<base href="//127.0.0.1:9/"><link rel=stylesheet href=x><meta http-equiv=refresh content="0;x">',
    "a comment": f"<!--><script>{RUN}</script>-->",
    "a CDATA section": f"<![CDATA[><script>{RUN}</script>]]>",
    "references": f"&lt;script&gt;{RUN}&lt;/script&gt;&#60;img src=x onerror={RUN}&#62;",
    "an end of JSON": f"\"]}}</svg><script>{RUN}</script>\u2028\u2029\\",
    "a lone surrogate": f"\ud800<img src=x onerror={RUN}>",
    "NUL inside a tag": f"<scr\0ipt>{RUN}</scr\0ipt><img\0src=x onerror={RUN}>",
}  # fmt: skip
STRUCTURE = """[...document.querySelectorAll('*')].map((one) =>
    [one.tagName.toLowerCase(), ...one.getAttributeNames().sort()].join(' '))"""
FOREIGN = """[...document.querySelectorAll('*')].filter((one) =>
    one.matches('main script, img, iframe, base, link, math, animate, [style]:not(.tip), [src], [http-equiv=refresh]')
    || one.getAttributeNames().some((name) => name.startsWith('on'))).map((one) => one.outerHTML)"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    made = Browser(tmp_path_factory.mktemp("browser"))
    made.ask("Page.setBypassCSP", enabled=True)
    yield made
    made.close()


def structure(browser: Browser, page: Path) -> list[str]:
    """Load a page and use all that it offers; returns the names of its elements and of their attributes."""
    browser.open(page)
    browser.evaluate("""document.querySelectorAll('*').forEach((one) => {
        for (const name of ['mouseover', 'pointermove', 'focus', 'click', 'input'])
            one.dispatchEvent(new Event(name, {bubbles: false}));
        one.dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowRight'}));
    })""")
    browser.evaluate("new Promise((done) => setTimeout(done, 50))")  # a picture's error comes later
    assert browser.evaluate("window.ran") is None
    assert browser.requests() == [page.as_uri()]
    assert browser.evaluate(FOREIGN) == []
    return browser.evaluate(STRUCTURE)


def test_without_the_policy_markup_that_got_in_would_run(browser, tmp_path):
    page = tmp_path / "page.html"
    page.write_text(hostile_page(tmp_path, "a text").read_text().replace("a text", f"<img src=x onerror={RUN}>"))
    browser.open(page)
    browser.evaluate("new Promise((done) => setTimeout(done, 50))")
    assert browser.evaluate("window.ran") == 1


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_a_report_of_hostile_texts_has_the_elements_of_a_harmless_one(browser, tmp_path, text):
    name = text.replace("/", "|").replace("\0", "").encode(errors="ignore").decode()
    expected = structure(browser, hostile_page(tmp_path / "harmless", "a text", "a name"))
    assert structure(browser, hostile_page(tmp_path / "hostile", text, name)) == expected


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_a_page_of_hostile_rows_has_no_element_of_theirs(browser, tmp_path, text):
    name = text.replace("/", "|").replace("\0", "").encode(errors="ignore").decode()[:100]
    path, page = tmp_path / f"{name}.jsonl", tmp_path / "page.html"
    rows = [
        {"prompt": text, "chosen": text, "rejected": text, text: text},
        {"prompt": f"Why {text}?", "chosen": "", "rejected": f"x{text}", text: {text: [text]}},
        {"prompt": "Why?", "chosen": f"{text} As an AI language model, I cannot.", "rejected": f"No.{text}"},
        {text: text},
        {"messages": [{"role": text, "content": text}], "chosen": text, "rejected": f"{text}."},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = CliRunner().invoke(main, ["check", str(path), "--html", str(page)], catch_exceptions=False)
    assert done.exit_code == 3
    structure(browser, page)
    assert browser.evaluate("document.querySelectorAll('.row').length") >= 4
