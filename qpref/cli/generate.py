"""`qpref generate`"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import click

from qpref.cli.options import base_option, json_option, quantization_option, sampling_options
from qpref.cli.output import echo, make_console

if TYPE_CHECKING:
    from qpref.evaluation.generate import Answers

COLUMNS_WITHOUT_TERMINAL = 160


@click.command("generate")
@click.argument("model")
@click.option("--prompt", "texts", multiple=True, metavar="TEXT", help="A prompt; repeatable.")
@click.option(
    "--prompts",
    "data",
    metavar="DATA",
    help="Data with prompts, such as pairs: a file, ...; or a .txt file with one prompt per line.  [default, without "
    "--prompt: the first 8 held-out prompts of the run]",
)
@sampling_options(max_new_tokens=128, temperature=0.0)
@click.option("--batch-size", type=click.IntRange(min=1), default=8, show_default=True, help="Prompts per batch.")
@json_option
@base_option
@quantization_option
def command(
    model: str,
    texts: tuple[str, ...],
    data: str | None,
    as_json: bool,
    base: str | None,
    quantization: Literal["nf4", "none"],
    **sampling: Any,
) -> None:
    """Print answers of the base and of the trained MODEL to the same prompts, side by side.

    MODEL is a run, a checkpoint or an adapter; its base answers with the adapter off. A plain model answers alone.
    Without --prompt and --prompts, the first 8 held-out prompts of the run are used.
    """
    from qpref.cli import quiet_transformers
    from qpref.evaluation.generate import Sampling, as_prompt, asked_prompts, generate
    from qpref.evaluation.subjects import identify, refuse_nothing, run_folder
    from qpref.records import Source

    refuse_nothing(model)
    if not texts and data is None and run_folder(model) is None:
        raise click.UsageError(
            f"{model}: not a run, so it has no held-out prompts; name prompts with --prompt or --prompts"
        )
    quiet_transformers()
    subject = identify(model, base=base, quantization=quantization)
    given = [as_prompt(text, Source(path="--prompt", line=number)) for number, text in enumerate(texts, start=1)]
    answers = generate(subject, asked_prompts(subject, given, data), Sampling(**sampling))
    if as_json:
        echo(json.dumps([answer.as_json() for answer in answers], indent=2, ensure_ascii=False))
    else:
        _print(answers, model)


def _print(answers: Sequence[Answers], name: str) -> None:
    from rich.table import Table

    console = make_console()
    if not console.is_terminal:
        console.width = COLUMNS_WITHOUT_TERMINAL
    for answer in answers:
        table = Table(title=answer.prompt, title_justify="left", expand=True)
        cells = []
        if answer.base is not None:
            table.add_column("base", ratio=1)
            cells.append(_shown(answer.base, answer.ended[1]))
        table.add_column(name, ratio=1)
        cells.append(_shown(answer.model, answer.ended[0]))
        table.add_row(*cells)
        console.print(table)


def _shown(answer: str, ended: bool | None) -> str:
    return answer if ended else f"{answer} [...]"
