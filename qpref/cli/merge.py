"""`qpref merge`"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qpref.cli.options import json_option
from qpref.cli.output import echo

if TYPE_CHECKING:
    from qpref.merging.request import MergeResult, Verdict

NUM_FLIPS = 5


@click.command("merge")
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--onto",
    type=click.Choice(["trained", "original"]),
    default="trained",
    show_default=True,
    help="Weights to add the adapter to: the dequantized ones of training, or the base's original 16-bit ones.",
)
@click.option(
    "--dtype",
    type=click.Choice(["auto", "bf16", "fp16", "float32"]),
    default="auto",
    show_default=True,
    help="Dtype of the stored weights; auto takes the first that passes the verdict.",
)
@click.option(
    "--quantize", type=click.Choice(["nf4"]), help="Requantize the merged weights; loses much of the learned change."
)
@click.option(
    "--max-margin-error",
    default="2%",
    show_default=True,
    metavar="SHARE|NATS",
    help="Largest mean margin error to pass: a share of the learned change (at least 0.05 nats), or nats.",
)
@click.option(
    "--pairs",
    type=click.IntRange(64),
    default=64,
    show_default=True,
    help="Number of held-out pairs to replay; all if there are fewer.",
)
@click.option("--push", metavar="ORG/NAME", help="Hub repository to upload to if the verdict passes; reads $HF_TOKEN.")
@json_option
def command(run: Path, out: Path, max_margin_error: str, push: str | None, as_json: bool, **asked: Any) -> None:
    """Merge base and adapter of RUN into OUT, a plain safetensors model that any engine loads.

    OUT is read back and compared with the trained policy. If their margins differ by more than --max-margin-error, the
    exit code is 11; OUT is kept.
    """
    from qpref.cli import ends_cleanly, quiet_transformers
    from qpref.errors import MergeError
    from qpref.merging import hub
    from qpref.merging.merge import merge_run
    from qpref.merging.request import MergeRequest, Tolerance

    request = MergeRequest(run=run, out=out, tolerance=Tolerance.parse(max_margin_error), **asked)
    if push is not None:
        hub.refuse_push(push)
    quiet_transformers()
    with ends_cleanly():
        result = merge_run(request)
    if as_json:
        echo(json.dumps(result.as_json(), indent=2))
    else:
        for line in _report(result, request.quantize or result.dtype):
            echo(line)
    verdict = result.verdict
    if not verdict.passed:
        unsent = "; nothing was pushed" if push else ""
        raise MergeError(
            f"{out}: the mean margin error is {verdict.margin_error:.3g} nats, "
            f"and at most {verdict.allowed:.3g} passes{unsent}",
            _way_out(request.onto, request.quantize, request.dtype),
        )
    if push is not None:
        echo(f"pushed: {hub.push(result.path, push, 'Merged by qpref')}", err=as_json)


def _way_out(onto: str, quantize: str | None, dtype: str) -> str:
    ways = [("leave out --onto original", onto == "original"), ("leave out --quantize", quantize is not None),
            ("leave out --dtype", dtype != "auto")]  # fmt: skip
    return ", ".join([way for way, applies in ways if applies] or ["raise --max-margin-error"])


def _report(result: MergeResult, stored: str) -> Iterator[str]:
    for name, kept in result.kept.items():
        mark = "  <- stored" if name == stored else ""
        yield f"{name:8} keeps {kept:6.1%} of the learned change in the weights{mark}"
    yield from result.notes
    for name, verdict in result.tried.items():
        yield f"{name} tried and rejected: margin error {_error(verdict)}"
    yield from _verdict(result.verdict)
    if result.onto_trained is not None:
        yield f"onto the trained weights, in the same type: margin error {_error(result.onto_trained)}"
    yield f"merged model: {result.path}"


def _verdict(verdict: Verdict) -> Iterator[str]:
    yield f"verdict on {verdict.pairs} {verdict.origin}, merged model beside trained policy, both in float32"
    yield f"  margin, learned change        {verdict.learned:9.3f} nats on average"
    yield f"  margin error                  {_error(verdict)}; at most {verdict.allowed:.3f} passes"
    yield f"  largest                       {verdict.largest_margin_error:9.3f} nats, {verdict.worst}"
    yield f"  log-probability of a response {verdict.logprob_error:9.3f} nats off on average"
    yield f"  KL per token                  {verdict.kl:9.2g} nats, {verdict.largest_kl:.2g} at most"
    yield f"  preference flips              {len(verdict.flips):9}"
    for flip in verdict.flips[:NUM_FLIPS]:
        yield f"    {flip.location}: margin {flip.trained:z.3f} trained, {flip.merged:z.3f} merged"
    if len(verdict.flips) > NUM_FLIPS:
        yield f"    and {len(verdict.flips) - NUM_FLIPS} more, in merge.json"


def _error(verdict: Verdict) -> str:
    share = "" if verdict.share is None else f" ({verdict.share:.2%} of the learned change)"
    return f"{verdict.margin_error:9.3f} nats on average{share}"
