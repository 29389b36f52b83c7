"""Draw the runs of docs/beta.md and write its tables: `python docs/make_beta_page.py`.

The numbers are those of the newest `benchmarks/results/*-beta.json`, which `python -m benchmarks.beta FOLDER` measures.
Needs matplotlib (`pip install -e ".[docs]"`).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = max((ROOT / "benchmarks/results").glob("*-beta.json"))
PICTURE = ROOT / "docs/pictures/beta.svg"
PAGE = ROOT / "docs/beta.md"
QUOTING = ("README.md", "README.zh-CN.md", "docs/tutorial.md", "docs/tutorial.zh-CN.md")
"""Pages that have the numbers of `quoted`."""
LIGHT = {"ink": "#1f2328", "paper": "#ffffff", "0.02": "#c2410c", "0.1": "#1d4ed8", "0.5": "#15803d"}
DARK = {"ink": "#e6edf3", "paper": "#0d1117", "0.02": "#fb923c", "0.1": "#60a5fa", "0.5": "#4ade80"}
MARKERS = {"0.02": "o", "0.1": "s", "0.5": "^"}
CSS_WIDTH = 390
"""Pixels of the picture's width, that of a phone: nothing in it is scaled down there."""


@dataclass(frozen=True)
class Run:
    """A run of the results' file."""

    found: Mapping[str, Any]

    @property
    def beta(self) -> str:
        """Its beta, as the recipe has it; the quickstart's own where that isn't changed."""
        return str(self.found["settings"].get("loss.beta", "0.1"))

    @cached_property
    def curve(self) -> Sequence[Mapping[str, float]]:
        """Its held-out rows."""
        rows: Sequence[Mapping[str, float]] = self.found["curve"]
        return rows

    def nats(self, row: Mapping[str, float]) -> float:
        """Return a row's margin without beta: the change of log p(chosen) - log p(rejected), nats."""
        return row["rewards/margins"] / float(self.beta)

    def moved(self, row: Mapping[str, float], side: str) -> float:
        """Return the change of a side's log-probability since step 0, nats."""
        return row[f"logps/{side}"] - self.curve[0][f"logps/{side}"]

    @property
    def kl(self) -> str:
        """The KL from the reference at its end, nats of an answer, with its interval; empty if not measured."""
        measured = self.found["measured"]
        return "" if measured is None else with_interval(measured["kl"], ".1f")


def results() -> dict[str, Any]:
    """Read the newest results."""
    found: dict[str, Any] = json.loads(RESULTS.read_text())
    return found


def runs() -> list[Run]:
    """List the runs."""
    return [Run(found) for found in results()["runs"]]


def overlaid() -> list[Run]:
    """List the runs that the picture overlays: one for each beta, of the first seed."""
    first: dict[str, Run] = {}
    for run in runs():
        first.setdefault(run.beta, run)
    return list(first.values())


def with_interval(estimate: Mapping[str, float], form: str = "+.1f") -> str:
    """Format an estimate with its interval."""
    value, low, high = (format(round(estimate[name], 1) + 0.0, form) for name in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def betas_table() -> str:
    """Tabulate what the runs have become at their end."""
    rows = []
    for run in overlaid():
        last, verdict = run.curve[-1], run.found["verdict"]
        rows.append(
            [
                run.beta,
                f"{last['rewards/margins']:.2f}",
                with_interval(verdict["margin"]),
                with_interval(verdict["chosen"]),
                f"{run.moved(last, 'rejected'):+.1f}",
                f"{last['rewards/accuracies']:.2f}",
                f"{verdict['accuracy']['before']:.2f} to {verdict['accuracy']['after']:.2f}",
                *([run.kl] if run.kl else []),
            ]
        )
    head = ["beta", "reward margin", "margin (nats)", "chosen (nats)", "rejected (nats)"]
    head += ["accuracy by reward margin", "accuracy by log-probability"]
    head += ["KL (nats)"] if overlaid()[0].kl else []
    return _table(head, rows)


def course_table() -> str:
    """Tabulate the reward margin, its nats and the gradient that it leaves at each held-out evaluation."""
    rows = []
    for at, first in enumerate(overlaid()[0].curve):
        cells = [f"{first['step']}"]
        for run in overlaid():
            margin = run.curve[at]["rewards/margins"] + 0.0
            share = 2 / (1 + math.exp(margin))
            cells.append(f"{margin:.1f} = {run.nats(run.curve[at]) + 0.0:.0f} nats, {share:.1%}")
        rows.append(cells)
    return _table(("step", *(f"beta {run.beta}" for run in overlaid())), rows)


def seeds_table() -> str:
    """Tabulate margin and KL of every seed, where there are several."""
    by_beta: dict[str, list[Run]] = {}
    for run in runs():
        by_beta.setdefault(run.beta, []).append(run)
    seeds = [run.found["settings"]["train.seed"] for run in next(iter(by_beta.values()))]
    if len(seeds) == 1:
        return "One seed. How much another one changes was not measured.\n"
    rows = []
    for beta, members in by_beta.items():
        nats = [f"{run.found['verdict']['margin']['value']:.1f}" for run in members]
        rows.append([beta, " / ".join(nats), " / ".join(run.kl for run in members)])
    named = ", ".join(seeds)
    return _table(("beta", f"margin (nats), seeds {named}", f"KL (nats), seeds {named}"), rows)


def rates_table() -> str:
    """Tabulate two runs of docs/metrics.md that differ in the learning rate alone, with a beta of 0.1."""
    rows = []
    for name, rate in (("flat", "5e-7"), ("healthy", "2e-4")):
        lines = map(json.loads, (ROOT / f"docs/pictures/runs/{name}.jsonl").read_text().splitlines())
        run = Run({"settings": {}, "curve": [row for row in lines if row["split"] == "eval"]})
        first, last = run.curve[0], run.curve[-1]
        nats = [f"{round(run.nats(row), 1) + 0.0:.1f}" for row in (first, last)]
        rows.append([rate, f"{last['step']}", f"{first['loss']:.2f} to {last['loss']:.2f}", " to ".join(nats)])
    return _table(("learning rate", "steps", "held-out loss", "margin (nats)"), rows)


def answers() -> str:
    """Lay out the greedy answers of base and runs to the first held-out prompts, one under the other."""
    rows = (ROOT / "recipes/quickstart/heldout.jsonl").read_text().splitlines()
    parts = []
    for index, base in enumerate(results()["base_answers"]):
        of_runs = [[f"beta {run.beta}", _cell(run.found["measured"]["answers"][index])] for run in overlaid()]
        parts.append(
            f"**{json.loads(rows[index])['prompt']}**\n\n{_table(('', ''), [['base', _cell(base)], *of_runs])}"
        )
    return "\n".join(parts)


def provenance() -> str:
    """Name commands, date and machine of all numbers of the page."""
    found = results()
    machine = found["machine"]
    commands = f"    {found['command']}\n    {found['sweep']}"
    return (
        f"Measured {found['date']} on {machine['threads']} shared cores of an {machine['cpu']}, torch "
        f"{machine['versions']['torch']}, by the first command, which runs the second:\n\n{commands}\n"
    )


def quoted() -> list[str]:
    """Write the numbers that README and tutorial quote, by beta: margin in nats, and reward margin."""
    return [
        " / ".join(f"{run.found['verdict']['margin']['value']:.0f}" for run in overlaid()),
        " / ".join(f"{run.curve[-1]['rewards/margins']:.1f}" for run in overlaid()),
    ]


BLOCKS: Mapping[str, Callable[[], str]] = {
    "provenance": provenance,
    "betas": betas_table,
    "course": course_table,
    "seeds": seeds_table,
    "rates": rates_table,
    "answers": answers,
}


def page(text: str) -> str:
    """Render the page with its blocks as the results have them."""
    for name, write in BLOCKS.items():
        begin, end = f"<!-- {name}: python docs/make_beta_page.py -->\n", f"<!-- end of {name} -->"
        if begin in text:
            before, _, rest = text.partition(begin)
            text = f"{before}{begin}\n{write()}\n{end}{rest.partition(end)[2]}"
    return text


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return (
        "".join(f"| {' | '.join(cells)} |\n" for cells in lines).replace("| --- |", "|---|").replace(" --- |", "---|")
    )


def _cell(answer: str) -> str:
    """Fit an answer into a cell: one line, without marks of a table, and as it stands."""
    return " ".join(answer.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*").split()) or "(empty)"


def draw() -> None:
    """Draw margins and log-probabilities of the overlaid runs, in colours for light and dark pages."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot

    style = {"svg.hashsalt": "qpref", "svg.fonttype": "none", "font.size": 8, "font.family": "sans-serif"}
    inks = dict.fromkeys(
        ("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor"), LIGHT["ink"]
    )
    with mpl.rc_context(style | inks):
        figure, axes = pyplot.subplots(
            2, 2, figsize=(CSS_WIDTH / 96, 4.4), layout="constrained", facecolor=LIGHT["paper"]
        )
        panels = (
            ("reward margin (beta x nats)", lambda run, row: row["rewards/margins"]),
            ("margin (nats)", lambda run, row: run.nats(row)),
            ("change of chosen (nats)", lambda run, row: run.moved(row, "chosen")),
            ("change of rejected (nats)", lambda run, row: run.moved(row, "rejected")),
        )
        for axis, (title, value) in zip(axes.flat, panels, strict=True):
            for run in overlaid():
                points = [(row["step"], value(run, row)) for row in run.curve]
                axis.plot(*zip(*points, strict=True), color=LIGHT[run.beta], marker=MARKERS[run.beta], markersize=3.5,
                          linewidth=1.4, label=f"beta {run.beta}")  # fmt: skip
            axis.set_title(title, fontsize=8)
        for axis in axes.flat:
            axis.set_facecolor("none")
            axis.spines[["top", "right"]].set_visible(False)
            axis.set_xlabel("step")
        axes.flat[3].legend(frameon=False, loc="lower left")
        figure.savefig(PICTURE, metadata={"Date": None, "Description": checksum()})
        pyplot.close(figure)
    PICTURE.write_text(_with_dark_colours(PICTURE.read_text()))


def _with_dark_colours(svg: str) -> str:
    """Give the picture a second set of colours for dark pages."""
    rules = "".join(
        f'[style*="fill: {light}"]{{fill:{DARK[name]}!important}}'
        f'[style*="stroke: {light}"]{{stroke:{DARK[name]}!important}}'
        for name, light in LIGHT.items()
    )
    plain = f"text{{fill:{LIGHT['ink']}}}"
    dark = f"@media (prefers-color-scheme: dark){{{rules}text{{fill:{DARK['ink']}!important}}}}"
    head, _, rest = svg.partition("<defs>")
    return f"{head}<style>{plain}{dark}</style>\n <defs>{rest}"


def checksum() -> str:
    """Hash the results, which the picture names: one of other results is seen."""
    return hashlib.sha256(RESULTS.read_bytes()).hexdigest()


if __name__ == "__main__":
    draw()
    PAGE.write_text(page(PAGE.read_text()))
    for name in QUOTING:
        missing = [figures for figures in quoted() if figures not in (ROOT / name).read_text()]
        if missing:
            print(f"{name} should quote {' and '.join(missing)}")
