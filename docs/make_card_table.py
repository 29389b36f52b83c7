"""Print the README's table of cards and models, as `qpref plan` predicts it.

Run `HF_HUB_OFFLINE=1 python docs/make_card_table.py`. The recipe is recipes/7b-24gb.toml with other bases' shapes.
Offline its data are unreachable, so every pair has the greatest lengths that the recipe allows.
"""

from __future__ import annotations

from pathlib import Path

from qpref.memory.forecast import Forecast
from qpref.memory.parts import GIB
from qpref.recipe.resolve import make_plan

RECIPE = Path(__file__).parents[1] / "recipes/7b-24gb.toml"
SHAPES = ("Qwen3-0.6B", "Llama-3.2-1B", "Llama-3.2-3B", "Qwen3-4B", "Qwen2.5-7B", "Llama-3.1-8B", "Qwen3-14B")
CARDS = (8, 12, 16, 24)
FREE = 0.95
"""Share of a card's memory that is assumed free for training: the driver and a display take the rest."""


def table() -> str:
    """Format the table as Markdown."""
    plan = make_plan(RECIPE, ['train.gradient_checkpointing="auto"'])
    lines = ["| | " + " | ".join(f"{card} GB" for card in CARDS) + " |", "|---|" + "---|" * len(CARDS)]
    for shape in SHAPES:
        cells = [_cell(Forecast.of(plan, f"{FREE * card:.2f}GiB", shape)) for card in CARDS]
        lines.append(f"| {shape} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(forecast: Forecast) -> str:
    fit, layers = forecast.fit, forecast.demand.shape.num_layers
    if not fit.fits:
        return f"needs {fit.memory.total / GIB:.1f} GiB"
    return f"{fit.recomputed_layers} of {layers}" if fit.recomputed_layers else "none"


if __name__ == "__main__":
    print(table())
