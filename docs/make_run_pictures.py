"""Draw healthy and sick runs for docs/metrics.md and the tutorial: `python docs/make_run_pictures.py [FOLDER]`.

With a FOLDER, trains the quickstart's model there under each run's changes and keeps the metrics in docs/pictures/runs;
without one, draws those again. Needs matplotlib (`pip install -e ".[docs]"`).
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PICTURES = ROOT / "docs/pictures"
METRICS = PICTURES / "runs"
RECIPE = "recipes/quickstart.toml"
PAGES = ("docs/metrics.md", "docs/tutorial.md", "docs/tutorial.zh-CN.md")
COIN_FLIPS, NUM_FLIPPED_ROWS = "coin-flips.jsonl", 32
KEPT = ("step", "split", "loss", "rewards/margins", "rewards/accuracies", "logps/accuracies", "logps/chosen",
        "logps/rejected")  # fmt: skip
PANELS = (
    ("loss", ("loss",)),
    ("reward margin", ("rewards/margins",)),
    ("accuracy by reward margin", ("rewards/accuracies",)),
    ("log-probability (nats)", ("logps/chosen", "logps/rejected")),
)
COLOURS = {"logps/rejected": "#c2410c"}
BLUE = "#1d4ed8"


@dataclass(frozen=True, slots=True)
class Shown:
    """A run to show: its changes of the quickstart's recipe, and how its row in the table begins."""

    changes: tuple[str, ...]
    title: str


SICK_AND_HEALTHY = {
    "healthy": Shown(("train.epochs=2",), "healthy"),
    "flat": Shown(("train.epochs=2", "train.learning_rate=5e-7"), "learning rate too low"),
    "displaced": Shown(("train.epochs=2", "train.learning_rate=1e-3", "loss.beta=0.01"), "moves too far"),
    "memorized": Shown(
        ("train.epochs=8", "train.learning_rate=1e-3", "data.train={folder}/" + COIN_FLIPS), "labels are noise"
    ),
}
BETAS = {f"beta-{beta}": Shown((f"loss.beta={beta}",), str(beta)) for beta in (0.03, 0.1, 0.3)}


def train(folder: Path) -> None:
    """Train each run that isn't in the folder, and keep its metrics."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_coin_flips(folder / COIN_FLIPS)
    METRICS.mkdir(exist_ok=True)
    for name, run in (SICK_AND_HEALTHY | BETAS).items():
        changes = [*run.changes, *(["train.eval_every=4"] if name in SICK_AND_HEALTHY else [])]
        settings = [part for change in changes for part in ("--set", change.format(folder=folder))]
        if not (folder / name / "result.json").exists():
            command = ["qpref", "train", RECIPE, "--output", str(folder / name), *settings, "--overwrite"]
            subprocess.run(command, check=True, cwd=ROOT)
        lines = (folder / name / "metrics.jsonl").read_text().splitlines()
        kept = (_kept(json.loads(line)) for line in lines)
        (METRICS / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))


def _write_coin_flips(path: Path) -> None:
    """Write some of the quickstart's training pairs, the labels of every second one swapped."""
    lines = (ROOT / "recipes/quickstart/train.jsonl").read_text().splitlines()[:NUM_FLIPPED_ROWS]
    with path.open("w") as file:
        for number, row in enumerate(map(json.loads, lines)):
            swapped = {"chosen": row["rejected"], "rejected": row["chosen"]} if number % 2 else {}
            print(json.dumps(row | swapped), file=file)


def _kept(row: dict[str, object]) -> dict[str, object]:
    """Keep the values that the pictures and tables show, under their names without `eval_`, rounded."""
    values = {name.removeprefix("eval_"): value for name, value in row.items()}
    return {name: round(value, 4) if isinstance(value := values[name], float) else value
            for name in KEPT if name in values}  # fmt: skip


def rows_of(name: str, split: str) -> list[dict[str, float]]:
    """Read the kept rows of a run's split, in the order of their steps."""
    rows = (json.loads(line) for line in (METRICS / f"{name}.jsonl").read_text().splitlines())
    return [row for row in rows if row["split"] == split]


def draw(name: str) -> None:
    """Draw a run's four panels: training rows solid, held-out rows dashed with dots."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot

    style = {"svg.hashsalt": "qpref", "svg.fonttype": "none", "font.size": 9, "font.family": "sans-serif"}
    with mpl.rc_context(style):
        figure, axes = pyplot.subplots(1, 4, figsize=(11, 2.4), layout="constrained")
        for axis, (title, metrics) in zip(axes, PANELS, strict=True):
            for metric in metrics:
                colour, label = COLOURS.get(metric, BLUE), metric.rpartition("/")[2] if len(metrics) > 1 else None
                for split, mark in (("train", "-"), ("eval", "o--")):
                    rows = rows_of(name, split)
                    axis.plot([row["step"] for row in rows], [row[metric] for row in rows], mark, color=colour,
                              markersize=3, linewidth=1.2, label=label if split == "eval" else None)  # fmt: skip
            if len(metrics) > 1:
                axis.legend(frameon=False)
            axis.set_title(title, fontsize=9)
            axis.set_xlabel("step")
            axis.spines[["top", "right"]].set_visible(False)
        figure.savefig(PICTURES / f"run-{name}.svg", metadata={"Date": None, "Description": checksum(name)})
        pyplot.close(figure)


def checksum(name: str) -> str:
    """Hash a run's kept metrics; its picture holds the hash, so that a picture of other metrics is seen."""
    return hashlib.sha256((METRICS / f"{name}.jsonl").read_bytes()).hexdigest()


def runs_table() -> str:
    """Tabulate the held-out rows of the sick and healthy runs, from step 0 to the last."""
    head = "| run | loss | margin | accuracy by reward margin, at the end | chosen (nats) | rejected (nats) |"
    return _table(
        head,
        (
            [
                f"[{run.title}](#{run.title.replace(' ', '-')})",
                _from_to(name, "loss"),
                _from_to(name, "rewards/margins"),
                f"{rows_of(name, 'eval')[-1]['rewards/accuracies']:.2f}",
                _from_to(name, "logps/chosen"),
                _from_to(name, "logps/rejected"),
            ]
            for name, run in SICK_AND_HEALTHY.items()
        ),
    )


def betas_table() -> str:
    """Tabulate the last held-out rows of the runs that differ in beta."""
    rows = []
    for name, run in BETAS.items():
        first, last = (rows_of(name, "eval")[at] for at in (0, -1))
        moved = [f"{last[side] - first[side]:+.1f}" for side in ("logps/chosen", "logps/rejected")]
        nats = last["rewards/margins"] / float(run.title)
        rows.append(
            [run.title, f"{last['rewards/margins']:.2f}", f"{nats:.1f}", f"{last['logps/accuracies']:.2f}", *moved]
        )
    return _table(
        "| beta | margin | margin / beta (nats) | accuracy by log-probability | chosen (nats) | rejected (nats) |", rows
    )


def _from_to(name: str, metric: str) -> str:
    """Write a held-out metric's first and last value; a rounded 0 has no sign."""
    digits = 1 if metric.startswith("logps/") else 2
    first, last = (round(rows_of(name, "eval")[at][metric], digits) + 0.0 for at in (0, -1))
    return f"{first:.{digits}f} to {last:.{digits}f}"


def _table(head: str, rows: Iterable[list[str]]) -> str:
    """Lay out a table in Markdown."""
    lines = [head, "|" + "---|" * (head.count("|") - 1), *(f"| {' | '.join(cells)} |" for cells in rows)]
    return "\n".join(lines) + "\n"


def page(path: Path) -> str:
    """Render a page with the current tables."""
    text = path.read_text()
    for name, table in (("runs", runs_table), ("beta", betas_table)):
        begin, end = f"<!-- {name}: python docs/make_run_pictures.py -->\n", f"<!-- end of {name} -->"
        if begin in text:
            before, _, rest = text.partition(begin)
            text = f"{before}{begin}\n{table()}\n{end}{rest.partition(end)[2]}"
    return text


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        train(Path(argument).resolve())
    for shown in SICK_AND_HEALTHY:
        draw(shown)
    for written in PAGES:
        (ROOT / written).write_text(page(ROOT / written))
