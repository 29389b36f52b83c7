"""`qpref generate`"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal

import click

if TYPE_CHECKING:
    from qpref.evaluation.generate import Answers

WIDE = 160


@click.command("generate")
@click.argument("model")
@click.option("--prompt", "texts", multiple=True, metavar="TEXT", help="A prompt; may be given several times.")
@click.option(
    "--prompts",
    "data",
    metavar="DATA",
    help="Rows with a prompt, such as pairs: a file, ...; or .txt with a prompt a line.",
)
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=128, show_default=True, help="Of each answer.")
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="0: the likeliest token always.",
)
@click.option(
    "--top-p",
    type=click.FloatRange(min=0, max=1, min_open=True),
    default=1.0,
    show_default=True,
    help="Draw from the likeliest tokens that have this much probability together.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the drawing.")
@click.option("--batch-size", type=click.IntRange(min=1), default=8, show_default=True, help="Prompts at once.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON array.")
@click.option("--base", metavar="FOLDER|ID", help="The base of an adapter, where it isn't the one that it names.")
@click.option(
    "--quantization",
    type=click.Choice(["nf4", "none"]),
    default="none",
    show_default=True,
    help="Of a base, or of an adapter's base, that no run explains.",
)
def command(
    model: str,
    texts: tuple[str, ...],
    data: str | None,
    as_json: bool,
    base: str | None,
    quantization: Literal["nf4", "none"],
    **sampling: Any,
) -> None:
    """Print what the base and the trained MODEL answer to the same prompts, side by side.

    MODEL is a run, a checkpoint or an adapter, whose base answers with the adapter off; a plain model answers alone.
    """
    from qpref.cli import quiet_transformers
    from qpref.evaluation.generate import Sampling, as_prompt, generate, read_prompts
    from qpref.evaluation.subjects import identify
    from qpref.records import Source

    if not texts and data is None:
        raise click.UsageError("name prompts with --prompt or --prompts")
    quiet_transformers()
    subject = identify(model, base=base, quantization=quantization)
    given = [as_prompt(text, Source(path="--prompt", line=number)) for number, text in enumerate(texts, start=1)]
    prompts = given + (read_prompts(data) if data else [])
    answers = generate(subject, prompts, Sampling(**sampling))
    if as_json:
        click.echo(json.dumps([asdict(answer) for answer in answers], indent=2, ensure_ascii=False))
    else:
        _print(answers, model)


def _print(answers: Sequence[Answers], name: str) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = WIDE
    for answer in answers:
        table = Table(title=Text(answer.prompt), title_justify="left", expand=True)
        cells = []
        if answer.base is not None:
            table.add_column("base", ratio=1)
            cells.append(Text(_shown(answer.base, answer.ended[1])))
        table.add_column(Text(name), ratio=1)
        cells.append(Text(_shown(answer.model, answer.ended[0])))
        table.add_row(*cells)
        console.print(table)


def _shown(answer: str, ended: bool | None) -> str:
    return answer if ended else f"{answer} [...]"
