"""`qpref export`"""

from __future__ import annotations

from pathlib import Path

import click

from qpref.cli.options import base_option
from qpref.cli.output import echo
from qpref.errors import PolicyError, RecipeError

PATH = click.Path(path_type=Path)


@click.command("export")
@click.argument("model", type=PATH)
@click.argument("out", metavar="[OUT.gguf]", type=PATH, required=False)
@click.option("--gguf", is_flag=True, default=True, help="Export as GGUF, the only format.")
@click.option("--lora", is_flag=True, help="Export the adapter of MODEL, a run or an adapter, for llama.cpp's --lora.")
@click.option("--converter", type=PATH, help="convert_hf_to_gguf.py, or its folder.  [default: $LLAMA_CPP, or PATH]")
@click.option(
    "--type",
    "kind",
    type=click.Choice(["f16", "bf16", "f32", "q8_0"]),
    help="Type of the exported weights.  [default: MODEL's own; an adapter is f32]",
)
@click.option("--push", metavar="ORG/NAME", help="Hub repository to upload the adapter of a run to; reads $HF_TOKEN.")
@base_option
def command(
    model: Path,
    out: Path | None,
    gguf: bool,
    lora: bool,
    converter: Path | None,
    kind: str | None,
    push: str | None,
    base: str | None,
) -> None:
    """Export MODEL as one GGUF file for llama.cpp, or push a run's adapter to the hub.

    A merged model, as qpref merge writes it, is converted by llama.cpp's own converter, which has to be on this
    machine; OUT.Modelfile beside it is for Ollama. With --lora the adapter of a run is written, to be applied to a GGUF
    file of the base. With --push and without OUT, the adapter is uploaded in PEFT's format.
    """
    from qpref.cli import ends_cleanly

    if lora and (converter or kind):
        raise click.UsageError("--lora needs no converter, and is float32")
    if push is not None:
        if out is not None or lora:
            raise click.UsageError("--push uploads a run's adapter as it is: without OUT and --lora")
        _push(model, push)
        return
    if out is None:
        raise click.UsageError("name the file to write, OUT.gguf, or a hub repository with --push")
    with ends_cleanly():
        if lora:
            echo(f"gguf: {_export_lora(model, out, base)}")
        else:
            _export_merged(model, out, kind, converter)


def _export_merged(merged: Path, out: Path, kind: str | None, converter: Path | None) -> None:
    from qpref import fsio
    from qpref.merging.export import export_gguf
    from qpref.merging.modelfile import modelfile

    echo(f"gguf: {export_gguf(merged, out, kind, converter)}")
    beside = out.with_suffix(".Modelfile")
    if beside.exists():
        echo(f"{beside}: is there already, and stays as it is")
        return
    try:
        fsio.write_text(beside, modelfile(merged, out.name))
    except PolicyError as error:
        echo(f"warning: no {beside.name} for Ollama: {error.what}", err=True)
    else:
        echo(f"for Ollama: ollama create NAME -f {beside}")


def _export_lora(model: Path, out: Path, base: str | None) -> Path:
    from qpref.evaluation.subjects import identify
    from qpref.merging.gguf_lora import export_lora

    subject = identify(str(model), base=base)
    if subject.kind not in ("run", "adapter") or subject.adapter is None:
        raise RecipeError(
            f"{model}: a {subject.kind}, which has no adapter in PEFT's format", "name a run or an adapter"
        )
    return export_lora(subject.adapter, subject.base.config, out)


def _push(model: Path, name: str) -> None:
    from qpref.merging import hub
    from qpref.merging.adapter_to_push import adapter_to_push

    hub.refuse_push(name)
    echo(f"pushed: {hub.push(adapter_to_push(model), name, 'Trained by qpref')}")
