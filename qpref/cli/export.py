"""`qpref export`"""

from __future__ import annotations

from pathlib import Path

import click

from qpref.cli.output import echo

PATH = click.Path(path_type=Path)


@click.command("export")
@click.argument("merged", type=PATH)
@click.argument("out", metavar="OUT.gguf", type=PATH)
@click.option("--gguf", is_flag=True, default=True, help="Export as GGUF, the only format.")
@click.option("--converter", type=PATH, help="convert_hf_to_gguf.py, or its folder.  [default: $LLAMA_CPP, or PATH]")
@click.option(
    "--type",
    "kind",
    type=click.Choice(["f16", "bf16", "f32", "q8_0"]),
    help="Type of the exported weights.  [default: MERGED's own]",
)
def command(merged: Path, out: Path, gguf: bool, converter: Path | None, kind: str | None) -> None:
    """Export MERGED, a model that qpref merge wrote, as one GGUF file for llama.cpp.

    Needs llama.cpp's own converter on this machine.
    """
    from qpref.cli import ends_cleanly
    from qpref.merge.export import export_gguf

    with ends_cleanly():
        written = export_gguf(merged, out, kind, converter)
    echo(f"gguf: {written}")
