"""The page in a real browser: nothing on its console, nothing loaded, the right numbers, and what the pointer finds.

Needs a Chromium (Debian: apt-get install chromium), so it stays out of the default run.
"""

from __future__ import annotations

import json
import math
import random
import time

import pytest
from browser import Browser
from run_folders import make_run, train_rows

from qpref.report.text import number_text
from qpref.report.write import Extras, write_report

pytestmark = pytest.mark.soak

HOSTILE = "</script><script>alert(1)</script>'\"><img src=x onerror=alert(2)><svg onload=alert(3)>"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    made = Browser(tmp_path_factory.mktemp("browser"))
    yield made
    made.close()


def heldout_rows(*losses) -> list[dict[str, object]]:
    return [
        {"step": step, "split": "eval", "eval_loss": loss, "eval_rewards/margins": 1.0 - loss}
        for step, loss in zip((0, 3), losses, strict=True)
    ]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Two runs with every section filled, from sources of which many are hostile."""
    folder = tmp_path_factory.mktemp("page")
    memory = {"weights": 2**30, "adapters": 2**20, "optimizer": 2**20, "activations": 2**29, "live": 5, "head_tile": 9,
              "reserve": 2**29, "total": 2**31}  # fmt: skip
    runs = [
        make_run(
            folder / name,
            [*heldout_rows(0.6931, losses[-1] - 0.01), *train_rows(losses)],
            recipe=f"[loss]\nname = '''{name} {HOSTILE}'''\n",
            facts={"base": HOSTILE, "forecast": {"memory": memory, "flops_per_step": 1e12}, "steps": 3},
            result={"peak_bytes": {"resident": 2**30}},
            data={
                "read": 9,
                "findings": [{"code": "x", "message": HOSTILE}],
                "lengths": {HOSTILE: [{"from": 0, "to": 1, "count": 2}]},
            },
        )
        for name, losses in (("first", [0.7, None, 0.3]), ("second", [0.6, 0.5, 0.4]))
    ]
    files = {
        "merged": {"verdict": {"passed": True, "origin": HOSTILE}, "dtype": "bf16"},
        "evaluations": {"models": [{"model": HOSTILE, "metrics": {HOSTILE: {"value": 1, "low": 0, "high": 2}}}]},
        "samples": [{"prompt": HOSTILE, "model": HOSTILE, "base": HOSTILE}],
    }
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    extras = Extras(**{name: [folder / f"{name}.json"] for name in files})
    return write_report(runs, folder / "page.html", extras)


@pytest.fixture
def shown(browser, page):
    browser.ask("Emulation.setDeviceMetricsOverride", width=1280, height=900, deviceScaleFactor=1, mobile=False)
    browser.ask("Emulation.setEmulatedMedia", features=[])
    browser.open(page)
    return browser


def test_the_console_stays_empty_and_nothing_is_loaded(shown, page):
    assert shown.complaints() == []
    assert shown.requests() == [page.as_uri()]


def test_the_pages_own_style_and_script_are_at_work(shown):
    assert shown.evaluate("getComputedStyle(document.querySelector('.sample')).borderTopLeftRadius") == "10px"
    assert shown.evaluate("document.querySelectorAll('.tip[hidden]').length") > 0


def test_the_heldout_table_shows_the_numbers_of_the_rows(shown):
    text = shown.evaluate("document.querySelector('#held-out table').innerText")
    lines = [line.split("\t") for line in text.strip().splitlines()]
    assert [cell.strip() for cell in lines[0]][-4:] == [
        "first, step 0", "first, step 3", "second, step 0", "second, step 3",
    ]  # fmt: skip
    assert [cell.strip() for cell in lines[1]] == ["loss", "0.6931", "0.29", "0.6931", "0.39"]


def test_curves_stand_where_their_ticks_say(shown):
    """Read back from what the browser laid out, not from what we wrote."""
    found = shown.evaluate("""(() => {
        const svg = document.querySelector('#curves svg[data-points]');
        const middle = (element) => { const box = element.getBoundingClientRect(); return box.top + box.height / 2; };
        const ticks = [...svg.querySelectorAll('.linear .tick.y')].filter((tick) => tick.textContent !== 'step')
            .map((tick) => [Number(tick.textContent), middle(tick)]);
        const dots = [...svg.querySelectorAll('.linear g.c1 circle:not(.held)')].map(middle);
        return {ticks, dots};
    })()""")
    (low, bottom), (high, top) = found["ticks"][0], found["ticks"][-1]
    values = [low + (high - low) * (bottom - dot) / (bottom - top) for dot in found["dots"]]
    assert values == pytest.approx([0.6, 0.5, 0.4], abs=0.01)


def move_to(browser, step: int) -> None:
    box = browser.evaluate("""(() => {
        const svg = document.querySelector('#curves svg[data-points]');
        svg.scrollIntoView({block: 'center', behavior: 'instant'});
        const ticks = [...svg.querySelectorAll('.tick.x')];
        const box = (tick) => { const own = tick.getBoundingClientRect(); return own.left + own.width / 2; };
        return {ticks: ticks.map((tick) => [Number(tick.textContent), box(tick)]),
                y: svg.getBoundingClientRect().top + svg.getBoundingClientRect().height / 2};
    })()""")
    place = dict(map(tuple, box["ticks"]))[step]
    browser.ask("Input.dispatchMouseEvent", type="mouseMoved", x=place, y=box["y"])


def test_the_pointer_reads_the_values_of_the_step_under_it(shown):
    move_to(shown, 3)
    tip = shown.evaluate("document.querySelector('#curves .tip').innerText").splitlines()
    joined = " ".join(tip)
    assert "step 3" in joined
    assert "first, training 0.3" in joined
    assert "second, held-out 0.39" in joined
    move_to(shown, 2)  # where the first run has no value, the nearest is named with its own step
    joined = " ".join(shown.evaluate("document.querySelector('#curves .tip').innerText").splitlines())
    assert "second, training 0.5" in joined
    assert "first, training, step" in joined


def test_the_values_stay_inside_the_chart_at_both_ends(shown):
    for step in (0, 3):
        move_to(shown, step)
        inside = shown.evaluate("""(() => {
            const tip = document.querySelector('#curves .tip').getBoundingClientRect();
            const svg = document.querySelector('#curves svg[data-points]').getBoundingClientRect();
            return tip.width > 0 && tip.left >= svg.left - 1 && tip.right <= svg.right + 1;
        })()""")
        assert inside, step


def test_arrow_keys_read_the_values_too(shown):
    shown.evaluate("document.querySelector('#curves svg[data-points]').focus()")
    for _ in range(2):
        for kind in ("keyDown", "keyUp"):
            shown.ask("Input.dispatchKeyEvent", type=kind, key="ArrowRight", code="ArrowRight")
    assert "step\n1" in shown.evaluate("document.querySelector('#curves .tip').innerText")


def test_a_script_that_got_into_the_page_would_not_run(shown):
    shown.evaluate("""(() => {
        const script = document.createElement('script');
        script.textContent = 'window.ran = true';
        document.body.append(script);
        const picture = document.createElement('img');
        picture.src = 'http://127.0.0.1:9/x.png';
        document.body.append(picture);
    })()""")
    assert shown.evaluate("window.ran") is None
    assert shown.evaluate("fetch('http://127.0.0.1:9/').then(() => 'loaded', () => 'refused')") == "refused"
    blocked = [entry["entry"]["text"] for entry in shown.said("Log.entryAdded")]
    assert len(blocked) >= 3
    assert all("Content Security Policy" in text for text in blocked[:3])


def test_dark_and_light_follow_the_reader(shown):
    def background() -> str:
        return shown.evaluate("getComputedStyle(document.body).backgroundColor")

    light = background()
    shown.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    assert (light, background()) == ("rgb(247, 247, 245)", "rgb(20, 23, 27)")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable_on_its_background(shown, scheme):
    """WCAG 2.1's contrast of body and secondary text, at least 4.5 to 1, and of curves, at least 3 to 1."""
    shown.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    colours = shown.evaluate("""(() => {
        const own = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
        return Object.fromEntries(['page', 'card', 'shade', 'ink', 'soft', 'warn', 'warn-page', 'good', 'good-page',
            ...[0, 1, 2, 3, 4, 5, 6, 7].map((n) => 'c' + n)].map((name) => [name, own('--' + name)]));
    })()""")
    for paper in ("page", "card", "shade"):
        assert contrast(colours["ink"], colours[paper]) >= 7
        assert contrast(colours["soft"], colours[paper]) >= 4.5
    for kind in ("warn", "good"):
        assert contrast(colours[kind], colours[f"{kind}-page"]) >= 4.5
    assert min(contrast(colours[f"c{place}"], colours["card"]) for place in range(8)) >= 3


def contrast(one: str, other: str) -> float:
    def luminance(colour: str) -> float:
        parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def test_a_phone_scrolls_tables_and_not_the_page(shown):
    shown.ask("Emulation.setDeviceMetricsOverride", width=360, height=740, deviceScaleFactor=2, mobile=True)
    assert shown.evaluate("document.documentElement.scrollWidth") <= 360


def test_the_switches_choose_smoothed_lines_and_the_log_axis(browser, tmp_path):
    browser.open(write_report([make_run(tmp_path / "run", train_rows([1 / step for step in range(1, 31)]))]))

    def shown() -> dict[str, bool]:
        return browser.evaluate("""Object.fromEntries(
            ['.linear', '.log', '.linear .smooth', '.log .smooth'].map((kind) =>
            [kind, document.querySelector('#curves svg ' + kind).getClientRects().length > 0]))""")

    linear = {".linear": True, ".log": False, ".linear .smooth": True, ".log .smooth": False}
    assert shown() == linear
    browser.evaluate("document.querySelector('#smoothing').click()")
    assert shown() == linear | {".linear .smooth": False}
    browser.evaluate("document.querySelector('#log-axis').click()")
    assert shown() == {".linear": False, ".log": True, ".linear .smooth": False, ".log .smooth": False}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_no_section_is_wider_than_the_window(shown, width, scheme):
    """Tables scroll in their own frame, and no text of the header, the tiles or the legends leaves its box."""
    shown.ask("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 500)
    shown.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    wide = """[...document.querySelectorAll('header *, section > *, .tile, .legend li, .verdicts *, .trained li')]
        .filter((one) => one.getBoundingClientRect().right > innerWidth + 1).map((one) => one.outerHTML.slice(0, 80))"""
    assert shown.evaluate(wide) == []
    assert shown.evaluate("document.documentElement.scrollWidth") <= width


def test_a_page_of_hundreds_of_thousands_of_rows_opens_at_once(browser, tmp_path):
    random.seed(0)
    losses = [0.2 + 0.5 * math.exp(-step / 40_000) + random.gauss(0, 0.05) for step in range(300_000)]
    path = write_report([make_run(tmp_path / "run", train_rows(losses))])
    assert path.stat().st_size < 500_000
    started = time.monotonic()
    browser.open(path)
    assert time.monotonic() - started < 5
    assert browser.complaints() == []
    last = browser.evaluate(
        "[...document.querySelector('figure tbody tr:last-child').cells].map((cell) => cell.textContent)"
    )
    assert last == ["300,000", number_text(losses[-1])]
