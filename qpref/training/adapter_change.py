"""Change that a run's learning rate allows a new LoRA adapter, by arithmetic, before a step is taken.

AdamW moves a weight by about the learning rate per step at most (Kingma and Ba 2015, "Adam: A method for stochastic
optimization", section 2.1). B starts at 0, so after a run its values are at most the sum L of the learning rates. A
row of A, uniform in +-1/sqrt(inputs) as PEFT makes it, has a product with an input of size 1 of 1/sqrt(3) in the root
mean square, and of 0.46 in the mean of its absolute value. So an adapted layer's output changes by at most about

    scale * rank * 0.46 * L

in units of its input, which are about those of its output. To first order a run's effect is proportional to that.
"""

from __future__ import annotations

import math

from qpref.recipe.sections import AdapterSection, Recipe, TrainSection
from qpref.training.optim import learning_rate

MEAN_PRODUCT = math.sqrt(1 / 3) * math.sqrt(2 / math.pi)
"""Mean absolute product of a row of A with an input whose values have the root mean square 1."""
LEAST_CHANGE = 2**-12
"""Change of a layer's output below which a run's effect is lost in the noise.

Growth of held-out margins by `qpref train recipes/quickstart.toml --set train.learning_rate=RATE` on an AMD EPYC:
17.2 nats at 2e-4, a change of 0.02; 0.3 nats (95 % interval 0.0 to 0.6) at 2.5e-6, one of 2.4e-4; 0.0 (-0.2 to 0.2) at
5e-7, one of 5e-5.
"""
USUAL_CHANGE = 0.01
"""Change of a layer's output that a suggested learning rate allows."""


def largest_change(adapter: AdapterSection, train: TrainSection, total_steps: int) -> float:
    """Return the largest change of an adapted layer's output, relative to it, that a new adapter can learn."""
    scale = adapter.alpha / (math.sqrt(adapter.rank) if adapter.rslora else adapter.rank)
    travel = math.fsum(learning_rate(train, step, total_steps) for step in range(total_steps))
    return scale * adapter.rank * MEAN_PRODUCT * travel


def better_rate(recipe: Recipe, total_steps: int) -> float | None:
    """Suggest a learning rate, with one digit, where the recipe's allows for no usual change of a new adapter.

    None where it does, and for an adapter that the run starts from, whose own size decides.
    """
    change = largest_change(recipe.adapter, recipe.train, total_steps)
    if recipe.adapter.start is not None or change >= USUAL_CHANGE:
        return None
    return float(f"{recipe.train.learning_rate * USUAL_CHANGE / change:.0e}")


def idle_rate_warning(recipe: Recipe, total_steps: int) -> str | None:
    """Say that the learning rate is too low for this run to change anything; None where it isn't."""
    change = largest_change(recipe.adapter, recipe.train, total_steps)
    rate = better_rate(recipe, total_steps)
    if rate is None or change >= LEAST_CHANGE:
        return None
    return (
        f"[train] learning_rate = {recipe.train.learning_rate:g} over {total_steps} steps can change the output of a "
        f"layer by about {change:.1g} of its size, and an effect below {LEAST_CHANGE:.1g} is lost in the noise. LoRA "
        f"needs a higher rate than full fine-tuning: to try, learning_rate = {rate:g}, or more steps"
    )
