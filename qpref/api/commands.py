"""Checks, plans, evaluation, generation and merging from Python: the records whose JSON the commands print"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from qpref.api.calls import call
from qpref.api.models import Turns, as_prompt
from qpref.api.recipes import Overrides, RecipeLike, is_recipe, listed, source_of
from qpref.api.rows import Rows, as_location, source_override

if TYPE_CHECKING:
    from qpref.data.audit import DataCheck
    from qpref.evaluation.comparison import Comparison
    from qpref.evaluation.gate_report import GateReport
    from qpref.evaluation.generate import Answers
    from qpref.memory.forecast import Prediction
    from qpref.merging.request import MergeResult

Location = str | PathLike[str]


def check(
    what: RecipeLike | Rows,
    *,
    overrides: Overrides = (),
    rows: Rows | None = None,
    heldout: Rows | None = None,
    base: Location | None = None,
    reader: str | None = None,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
) -> DataCheck:
    """Check the preference data of a recipe, or one source of data; the same as `qpref check`.

    Args:
        what: a recipe (a path that ends in .toml, the text of one, nested dicts or a `Recipe`), a source as in
            `[data] train`, or rows, each like one of a JSON Lines file. Messages give row N as line N of a temporary
            file.
        overrides: of a recipe, as for `train`.
        rows: training data in place of the recipe's, as for `train`.
        heldout: held-out data, likewise.
        base: base whose tokenizer checks a bare source, too.
        reader: key of `[data]` for a bare source, as `format` and `columns`.
        format: its row format.
        columns: its column names, qpref's name first.

    Returns:
        The counts and findings; `passed` is False where the command exits with 3. `as_json()` is what it prints.

    Raises:
        QprefError: the recipe has mistakes, or a source cannot be read.
    """
    from qpref.errors import RecipeError

    with call():
        from qpref.api.checking import audit_recipe, audit_source
        from qpref.recipe.resolve import make_plan

        given = {"reader": reader, "format": format, "columns": columns}
        options = {name: value for name, value in given.items() if value}
        stored = {split: one for split, one in (("train", rows), ("heldout", heldout)) if one is not None}
        if not is_recipe(what):
            if overrides or stored:
                raise RecipeError("overrides=, rows= and heldout= change a recipe, and this is a source of data")
            with as_location(what) as location:  # type: ignore[arg-type]
                return audit_source(location, _text(base), options).summary()
        if base is not None or options:
            raise RecipeError("base=, reader=, format= and columns= are for a bare source; a recipe has its own")
        with ExitStack() as files:
            locations = {split: files.enter_context(as_location(one, split)) for split, one in stored.items()}
            changes = [source_override(split, Path(path)) for split, path in locations.items()]
            return audit_recipe(make_plan(source_of(what), [*listed(overrides), *changes])).summary()


def plan(
    recipe: RecipeLike,
    *,
    overrides: Overrides = (),
    vram: str | None = None,
    card: str | None = None,
    desktop: bool = False,
    shape: str | None = None,
    tflops: float | None = None,
) -> Prediction:
    """Predict the memory, work and steps of a recipe on one device; the same as `qpref plan`, whose options these are.

    Loads no weights and needs no GPU.

    Returns:
        The prediction; `fits` is False where the command exits with 5. `as_json()` is what it prints with `--json`.

    Raises:
        QprefError: the recipe has mistakes, or its base's shape isn't known.
    """
    from qpref.errors import RecipeError

    with call():
        from qpref.memory.forecast import Forecast, Prediction, Target
        from qpref.recipe.resolve import make_plan

        if vram is not None and card is not None:
            raise RecipeError("card= and vram= exclude each other: both name the memory")
        if desktop and card is None:
            raise RecipeError("desktop=True needs card=; vram= is free memory, without a desktop's share")
        source = source_of(recipe)
        planned = make_plan(source, listed(overrides))
        target = Target.chosen(planned.recipe, vram=vram, card=card, desktop=desktop)
        forecast = Forecast.of(planned, target, shape)
        named = str(source) if isinstance(source, Path) else None
        return Prediction.of({"recipe": named} | forecast.facts(tflops))


def evaluate(
    models: Location | Sequence[Location],
    *,
    data: Location | Rows | None = None,
    beta: float | None = None,
    samples: int = 2000,
    seed: int = 0,
    max_pairs: int | None = None,
    max_length: int | None = None,
    float32: bool = False,
    without_overlap: bool = False,
    base: Location | None = None,
    quantization: Literal["nf4", "none"] = "none",
) -> Comparison:
    """Compare the preferences of models on held-out pairs; the same as `qpref eval`, whose options these are.

    Args:
        models: a run, a checkpoint, an adapter, a merged model or a base; or several, compared with the first.
        data: pairs, as in `[data] train`, or rows, each like one of a JSON Lines file; the first run's held-out pairs
            by default.

    Returns:
        The comparison; `as_json()` is what `qpref eval --json` prints.

    Raises:
        QprefError: a model or the data cannot be read, no pair is left, or memory ran out.
    """
    names = [models] if isinstance(models, str | PathLike) else models
    with call():
        from qpref.evaluation.evaluate import Request
        from qpref.evaluation.evaluate import evaluate as evaluate_request

        with nullcontext() if data is None else as_location(data) as location:
            return evaluate_request(
                Request(
                    models=[fspath(name) for name in names],
                    data=location,
                    beta=beta,
                    samples=samples,
                    seed=seed,
                    max_pairs=max_pairs,
                    max_length=max_length,
                    all_float32=float32,
                    base=_text(base),
                    quantization=quantization,
                    without_overlap=without_overlap,
                )
            )


def gate(
    models: Location | Sequence[Location],
    *,
    items: Location | None = None,
    samples: int = 2000,
    seed: int = 0,
    float32: bool = False,
    base: Location | None = None,
    quantization: Literal["nf4", "none"] = "none",
) -> GateReport:
    """Compare what models and their bases know on a regression set; the same as `qpref eval --gate`.

    Args:
        models: a run, a checkpoint or an adapter; or several models, of which a plain one is compared with the first.
        items: pairs of a right and a wrong answer; the built-in set by default.

    Returns:
        The report; `forgets` says whether a loss is significant, `as_json()` is what `qpref eval --gate --json` prints.

    Raises:
        QprefError: a model or the items cannot be read, a plain model is alone, or memory ran out.
    """
    names = [models] if isinstance(models, str | PathLike) else models
    with call():
        from qpref.evaluation.gate import GateRequest
        from qpref.evaluation.gate import gate as run_gate

        return run_gate(
            GateRequest(
                models=[fspath(name) for name in names],
                items=_text(items),
                samples=samples,
                seed=seed,
                all_float32=float32,
                base=_text(base),
                quantization=quantization,
            )
        )


def generate(
    model: Location,
    prompts: Iterable[Turns] = (),
    *,
    data: Location | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 8,
    base: Location | None = None,
    quantization: Literal["nf4", "none"] = "none",
) -> list[Answers]:
    """Generate the answers of a model and of its base to the same prompts; the same as `qpref generate`.

    Args:
        model: a run, a checkpoint, an adapter, or a plain model, which answers alone.
        prompts: texts, each one user turn, or lists of messages. Without any, and without data, the first 8 held-out
            prompts of the run.
        data: data with prompts, such as pairs, or a .txt file with one prompt per line; after `prompts`.

    Returns:
        The answers in the prompts' order; `as_json()` of each is what `qpref generate --json` prints.

    Raises:
        QprefError: the model or a prompt cannot be read, or memory ran out.
    """
    with call():
        from qpref.evaluation.generate import Sampling, asked_prompts
        from qpref.evaluation.generate import generate as generate_answers
        from qpref.evaluation.subjects import identify

        subject = identify(fspath(model), base=_text(base), quantization=quantization)
        given = [as_prompt(prompt, number) for number, prompt in enumerate(prompts, start=1)]
        settings = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed,
                            batch_size=batch_size)  # fmt: skip
        return generate_answers(subject, asked_prompts(subject, given, _text(data)), settings)


def merge(
    run: Location,
    out: Location,
    *,
    onto: Literal["trained", "original"] = "trained",
    dtype: Literal["auto", "bf16", "fp16", "float32"] = "auto",
    quantize: Literal["nf4"] | None = None,
    max_margin_error: str = "2%",
    pairs: int = 64,
) -> MergeResult:
    """Merge base and adapter of a run into a plain model folder; the same as `qpref merge`, whose options these are.

    Returns:
        The written folder and its verdict. `result.verdict.passed` is False where the margins differ by more than
        `max_margin_error`: the command exits with 11 then. `as_json()` is what `qpref merge --json` prints.

    Raises:
        QprefError: the run isn't finished, its parts don't belong together, or `out` isn't empty.
    """
    with call():
        from qpref.merging.merge import merge_run
        from qpref.merging.request import MergeRequest, Tolerance

        tolerance = Tolerance.parse(max_margin_error)
        return merge_run(
            MergeRequest(
                run=Path(run),
                out=Path(out),
                onto=onto,
                quantize=quantize,
                dtype=dtype,
                tolerance=tolerance,
                pairs=pairs,
            )
        )


def _text(location: Location | None) -> str | None:
    return None if location is None else fspath(location)
