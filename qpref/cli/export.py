"""`qpref export`"""

from __future__ import annotations

from pathlib import Path

import click

PATH = click.Path(path_type=Path)


@click.command("export")
@click.argument("merged", type=PATH)
@click.argument("out", metavar="OUT.gguf", type=PATH)
@click.option("--gguf", is_flag=True, default=True, help="The format: GGUF, which is the only one.")
@click.option("--converter", type=PATH, help="convert_hf_to_gguf.py or its folder.  [default: $LLAMA_CPP or the PATH]")
@click.option(
    "--type",
    "kind",
    type=click.Choice(["f16", "bf16", "f32", "q8_0"]),
    help="Type of the weights.  [default: the one that MERGED is stored in]",
)
def command(merged: Path, out: Path, gguf: bool, converter: Path | None, kind: str | None) -> None:
    """Write MERGED, a folder of qpref merge, as one GGUF file for llama.cpp and its kin.

    llama.cpp's own converter does it, which has to be on this machine.
    """
    from qpref.cli import ends_cleanly
    from qpref.merge.export import export_gguf

    with ends_cleanly():
        written = export_gguf(merged, out, kind, converter)
    click.echo(f"gguf: {written}")
