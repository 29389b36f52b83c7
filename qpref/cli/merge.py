"""`qpref merge`"""

from __future__ import annotations

from pathlib import Path

import click


@click.command("merge")
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--dtype",
    type=click.Choice(["auto", "bf16", "fp16", "float32"]),
    default="auto",
    show_default=True,
    help="Stored type; auto: the first that keeps 98 % of the learned change.",
)
def command(run: Path, out: Path, dtype: str) -> None:
    """Write the model that RUN trained to OUT: plain safetensors that any engine loads."""
    from qpref.cli import quiet_transformers
    from qpref.merge import merge_run

    quiet_transformers()
    result = merge_run(run, out, dtype)
    for name, kept in result.kept.items():
        mark = "  <- stored" if name == result.dtype else ""
        click.echo(f"{name:8} keeps {kept:6.1%} of the learned change{mark}")
    click.echo(f"merged model: {result.path}")
