"""`qpref doctor`"""

from __future__ import annotations

import itertools
import json
import textwrap
from dataclasses import asdict

import click

from qpref.cli.options import json_option
from qpref.cli.output import echo


@click.command("doctor")
@json_option
@click.pass_context
def command(ctx: click.Context, as_json: bool) -> None:
    """Examine this machine: packages, GPU, memory, disk, cache, plugins and known traps, each with its fix.

    Exits with 1 if something keeps qpref from training, else with 0. Nothing is sent or fetched.
    """
    from qpref.cli import quiet_transformers
    from qpref.doctor.device import examine_device
    from qpref.doctor.host import examine_host
    from qpref.doctor.packages import examine_packages
    from qpref.doctor.plugins import examine_plugins

    findings = [*examine_packages()]
    if all(one.status != "problem" for one in findings):
        quiet_transformers()
    findings += [*examine_device(), *examine_host(), *examine_plugins()]
    problems = sum(one.status == "problem" for one in findings)
    if as_json:
        echo(json.dumps({"ok": not problems, "findings": [asdict(one) for one in findings]}, indent=2))
    else:
        for topic, group in itertools.groupby(findings, key=lambda one: one.topic):
            echo(topic)
            for one in group:
                _print(one.status, one.message)
                if one.fix:
                    _print("", f"fix: {one.fix}")
        count = f"{problems} problem{'s' if problems > 1 else ''}" if problems else "no problem"
        echo(f"\n{count} found")
    ctx.exit(1 if problems else 0)


def _print(status: str, text: str) -> None:
    word = {"problem": "PROBLEM"}.get(status, status)
    echo(textwrap.fill(text, 100, initial_indent=f"  {word:<8} ", subsequent_indent=" " * 11,
                       break_long_words=False, break_on_hyphens=False))  # fmt: skip
