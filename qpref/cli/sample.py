"""`qpref sample`"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from qpref.cli import completion
from qpref.cli.options import base_option, json_option, quantization_option, sampling_options
from qpref.cli.output import echo

if TYPE_CHECKING:
    from qpref.sampling.sample import Sampled


@click.command("sample")
@click.argument("model")
@click.option(
    "--prompts",
    required=True,
    metavar="DATA",
    help="Data with prompts, such as pairs; or a .txt file with one prompt per line.",
)
@click.option(
    "--k",
    "num_responses",
    type=click.IntRange(min=2, max=64),
    default=4,
    show_default=True,
    help="Responses to each prompt.",
)
@click.option(
    "--reward",
    required=True,
    metavar="NAME",
    shell_complete=completion.rewards,
    help="Reward that scores the responses: `qpref plugins`.",
)
@click.option(
    "--reward-option",
    "assignments",
    multiple=True,
    metavar="KEY=VALUE",
    help="Option of the reward, TOML or a plain text; repeatable.",
)
@click.option("--output", required=True, type=click.Path(dir_okay=False, path_type=Path), help="JSONL file to write.")
@click.option(
    "--form",
    type=click.Choice(["extremes", "pairs", "ranked"]),
    default="extremes",
    show_default=True,
    help="A pair of the best and the worst response, a pair of any two, or a list from best to worst.",
)
@click.option(
    "--min-gap",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="Least difference of the rewards of a pair, or of a list's ends; equal ones make no pair.",
)
@sampling_options(max_new_tokens=128, temperature=1.0)
@click.option(
    "--batch-size", type=click.IntRange(min=1), default=64, show_default=True, help="Responses drawn together."
)
@click.option("--overwrite", is_flag=True, help="Replace the output, and start over what was interrupted.")
@json_option
@base_option
@quantization_option
def command(
    model: str,
    prompts: str,
    reward: str,
    assignments: tuple[str, ...],
    output: Path,
    form: Literal["extremes", "pairs", "ranked"],
    min_gap: float,
    batch_size: int,
    overwrite: bool,
    as_json: bool,
    base: str | None,
    quantization: Literal["nf4", "none"],
    **draws: Any,
) -> None:  # fmt: skip
    """Sample responses of MODEL to each prompt, score them, and write them as preferences to train on.

    MODEL is a run, a checkpoint, an adapter or a plain model. Each prompt is computed once for all its responses. A
    response depends on its prompt, its number and the seed. Interrupted, the same command goes on after the last batch.
    """
    from dataclasses import asdict

    from qpref.cli import quiet_transformers
    from qpref.evaluation.generate import read_prompts
    from qpref.evaluation.subjects import identify
    from qpref.sampling.decode import Draws
    from qpref.sampling.reward import Scorer
    from qpref.sampling.sample import Request, sample_to

    if not draws["temperature"]:
        raise click.UsageError("--temperature 0 draws the same response each time; choose more than 0")
    score = Scorer(reward, _options(assignments))
    quiet_transformers()
    request = Request(
        subject=identify(model, base=base, quantization=quantization),
        prompts=read_prompts(prompts),
        draws=Draws(**draws),
        form=form,
        min_gap=min_gap,
        batch_size=batch_size,
        reward=score.settings,
    )
    sampled = sample_to(output, request, score, overwrite=overwrite)
    echo(json.dumps(asdict(sampled), indent=2) if as_json else _text(sampled, output))


def _options(assignments: tuple[str, ...]) -> dict[str, Any]:
    from qpref.recipe.document import toml_value

    options = {}
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not equals or not key:
            raise click.UsageError(f"--reward-option {assignment}: write KEY=VALUE")
        options[key] = toml_value(value)
    return options


def _text(sampled: Sampled, output: Path) -> str:
    empty = "" if sampled.rows else "\nno row: the rewards of no prompt's responses differ enough"
    return (
        f"{output}: {sampled.rows} rows of {sampled.prompts} prompts\n"
        f"reward: {sampled.reward:.3f} a response, {sampled.best:.3f} the best of each prompt; "
        f"{sampled.ended:.0%} of the responses ended by themselves{empty}"
    )
