"""Points of a sweep: every combination of the values of `--over`, each a recipe with overrides and a run folder."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from qpref.errors import PluginError, QprefError, RecipeError
from qpref.recipe.plan import Plan
from qpref.recipe.resolve import make_plan

MAX_NAME = 150
"""Characters of a folder's name."""
ODD_IN_NAME = re.compile(r"[^\w.,+=-]+")
QUOTES = "\"'"


@dataclass(frozen=True, slots=True)
class Axis:
    """A key of the recipe and the values that it takes in turn, each as `--set` takes it."""

    key: str
    values: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One run of a sweep.

    Attributes:
        name: of its folder, made of the varied settings.
        overrides: the varied settings, as `qpref train --set` takes them.
        plan: None where the recipe has mistakes at this point.
        refusal: those mistakes; None where there is a plan.
    """

    name: str
    overrides: tuple[str, ...]
    plan: Plan | None = None
    refusal: QprefError | None = None


def parse_axes(texts: Iterable[str]) -> list[Axis]:
    """Parse `table.key=value,value,...`; a comma inside brackets or quotes is part of a value.

    Raises:
        RecipeError: one has no `=` or an empty value, or names a key or a value twice.
    """
    axes: list[Axis] = []
    for text in texts:
        key, equals, values = text.partition("=")
        axis = Axis(key.strip(), _split(values))
        if not (equals and axis.key and all(axis.values)):
            raise RecipeError(f"--over {text}: expected table.key=value,value", "such as --over loss.beta=0.05,0.1")
        if twice := [value for value in axis.values if axis.values.count(value) > 1]:
            raise RecipeError(f"--over {axis.key}: {twice[0]} is there twice")
        if axis.key in [other.key for other in axes]:
            raise RecipeError(f"--over {axis.key}: is there twice", "name all of its values in one --over")
        axes.append(axis)
    if not axes:
        raise RecipeError("nothing to sweep over", "name a key and its values, such as --over loss.beta=0.05,0.1,0.3")
    return axes


def make_points(recipe: Path, axes: Sequence[Axis], overrides: Sequence[str], output: Path) -> list[Point]:
    """Plan every combination of the axes' values, the first axis slowest.

    Args:
        overrides: `--set` of all points.
        output: folder of their run folders.

    Raises:
        RecipeError: no point has a plan, or two points are the same run.
    """
    points = []
    for values in itertools.product(*(axis.values for axis in axes)):
        varied = tuple(f"{axis.key}={value}" for axis, value in zip(axes, values, strict=True))
        name = _name(axes, values)
        try:
            plan = make_plan(recipe, [*overrides, *varied], output / name)
            points.append(Point(name=name, overrides=varied, plan=plan))
        except (RecipeError, PluginError) as refusal:
            points.append(Point(name=name, overrides=varied, refusal=refusal))
    _refuse_hopeless(points)
    _refuse_repeated(points)
    return points


def in_order_of_training(points: Iterable[Point]) -> list[Point]:
    """Sort the planned points: those of one base together, so that each base is loaded once, and deterministic ones
    first, since cuBLAS reads the size of its workspace at the process's first product."""
    planned = [point for point in points if point.plan is not None]
    plans = [point.plan for point in planned if point.plan is not None]
    models = [plan.recipe.model for plan in plans]
    ranks = [(not plan.recipe.train.deterministic, models.index(plan.recipe.model)) for plan in plans]
    return [planned[index] for index in sorted(range(len(planned)), key=ranks.__getitem__)]


def _refuse_hopeless(points: Sequence[Point]) -> None:
    refusals = [point.refusal for point in points if point.refusal is not None]
    if len(refusals) < len(points):
        return
    if len({str(refusal) for refusal in refusals}) == 1:
        raise refusals[0]
    described = "\n".join(f"{point.name}: {point.refusal}" for point in points)
    raise RecipeError(f"all {len(points)} points of the sweep are refused\n{described}")


def _refuse_repeated(points: Sequence[Point]) -> None:
    for one, other in itertools.combinations(points, 2):
        if one.plan is not None and other.plan is not None and one.plan.document == other.plan.document:
            raise RecipeError(f"--over: {one.name} and {other.name} are the same run", "leave one of the values out")


def _split(text: str) -> tuple[str, ...]:
    """Split at the commas outside of brackets and quotes."""
    parts, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in QUOTES:
            quote = character
        else:
            depth += (character in "[{") - (character in "]}")
        if character == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += character
    return tuple(part.strip() for part in parts)


def _name(axes: Sequence[Axis], values: Sequence[str]) -> str:
    """Name a point's folder: `beta=0.1,name=ipo`, with a hash where a value has other characters than a name can."""
    keys = [axis.key for axis in axes]
    last = [key.rpartition(".")[2] for key in keys]
    names = [own if last.count(own) == 1 else key for own, key in zip(last, keys, strict=True)]
    whole = ",".join(f"{name}={value}" for name, value in zip(names, values, strict=True))
    cleaned = ODD_IN_NAME.sub("-", whole)[:MAX_NAME]
    digest = hashlib.blake2b(whole.encode(errors="surrogateescape"), digest_size=4).hexdigest()
    return whole if cleaned == whole else f"{cleaned}-{digest}"
