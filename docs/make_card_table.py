"""Print the README's table of cards and models, as `qpref plan --card` predicts it.

Run `python docs/make_card_table.py`. The recipe is recipes/7b-24gb.toml with other bases' shapes; every pair has the
greatest lengths that it allows, as where the data can't be reached.
"""

from __future__ import annotations

from pathlib import Path

from qpref.memory.cards import Card, find_card
from qpref.memory.demand import Demand
from qpref.memory.fit import fit_memory
from qpref.memory.parts import GIB
from qpref.memory.planned_data import planned_data
from qpref.memory.setup import Setup
from qpref.memory.shape import ModelShape, model_shape
from qpref.recipe.plan import Plan
from qpref.recipe.resolve import make_plan

RECIPE = Path(__file__).parents[1] / "recipes/7b-24gb.toml"
NO_DATA = ('data.train="nowhere.jsonl"',)
SHAPES = ("Qwen3-0.6B", "Llama-3.2-1B", "Llama-3.2-3B", "Qwen3-4B", "Qwen2.5-7B", "Llama-3.1-8B", "Qwen3-14B")
CARDS = ("RTX 4060", "RTX 3060 12GB", "T4", "RTX 4080", "L4", "RTX 4090")


def table() -> str:
    """Format the table as Markdown, the memory that torch can have on each card in its head."""
    cards = [find_card(name) for name in CARDS]
    plan = make_plan(RECIPE, [*NO_DATA, 'train.gradient_checkpointing="auto"'])
    heads = (f"{card.title.replace('GB', ' GB')}: {card.usable_bytes() / GIB:.1f} GiB" for card in cards)
    lines = ["| | " + " | ".join(heads) + " |", "|---|" + "---|" * len(cards)]
    for name in SHAPES:
        shape = model_shape(plan.recipe.model, plan.recipe.adapter, name)
        lines.append(f"| {name} | " + " | ".join(_cell(plan, shape, card) for card in cards) + " |")
    return "\n".join(lines)


def _cell(plan: Plan, shape: ModelShape, card: Card) -> str:
    workload = planned_data(plan).workload(plan.recipe.train.batch_size, shape.shares_prompts)
    demand = Demand.of(plan.recipe, shape, Setup.of(plan.recipe, "cuda", shape, card.capability), workload)
    fit = fit_memory(demand, card.usable_bytes())
    if not fit.fits:
        return f"needs {fit.memory.total / GIB:.1f} GiB"
    return f"{fit.recomputed_layers} of {shape.num_layers}" if fit.recomputed_layers else "none"


if __name__ == "__main__":
    print(table())
