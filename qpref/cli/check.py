"""`qpref check`"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qpref.cli import completion
from qpref.cli.options import json_option, set_option, source_options
from qpref.cli.output import echo, make_console

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.table import Table

    from qpref.data.audit import Audit
    from qpref.data.data_report import DataReport
    from qpref.errors import QprefError
    from qpref.records import Finding

NUM_LOCATIONS = 3
BAR_WIDTH = 40


@click.command("check")
@click.argument("what", metavar="RECIPE_OR_DATA", shell_complete=completion.files)
@set_option
@click.option("--model", "base", metavar="BASE", help="Base whose tokenizer checks a bare data file, too.")
@source_options
@json_option
@click.option(
    "--html",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Also write the findings, with the texts of the rows, as an HTML page.",
)
@click.option(
    "--fix",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Write the kept rows with their own columns to FILE (of several sources to NAME.1.jsonl and so on), and the "
    "refused rows with their reasons to NAME.refused.jsonl beside it.",
)
def command(
    what: str,
    overrides: tuple[str, ...],
    base: str | None,
    as_json: bool,
    html: Path | None,
    fix: Path | None,
    **source_keys: Any,
) -> None:
    """Check the preference data of a recipe (a .toml file), or one data source: a file, `hf:org/name`, ...

    Loads no weights. Exits with 3 if a row is refused or no row is left; warnings alone exit with 0.
    """
    from qpref.data.clean import refuse_early
    from qpref.errors import DataError, RecipeError

    if fix is not None:
        refuse_early(fix)
    if html is not None and html.suffix not in (".html", ".htm"):
        raise RecipeError(f"{html}: a page's name ends in .html")
    try:
        audit = _audit(what, overrides, base, {key: value for key, value in source_keys.items() if value})
    except DataError as error:
        if as_json:
            echo(json.dumps(_unreadable(what, error), indent=2, ensure_ascii=False))
        raise
    report = audit.checked.report
    if fix is not None:
        _fix(audit, fix, to_stderr=as_json)
    if html is not None:
        from qpref.report.check_page import write_check_page

        write_check_page(audit, html, what if ":" in what else Path(what).name)
        echo(f"written: {html}", err=as_json)
    if as_json:
        echo(json.dumps(audit.summary().as_json(), indent=2, ensure_ascii=False))
    else:
        _print(audit)
    if report.refused or audit.why_empty:
        raise click.exceptions.Exit(DataError.exit_code)


def _fix(audit: Audit, path: Path, to_stderr: bool) -> None:
    """Write the kept and the refused rows, and print which file stands in for which source."""
    from qpref.data.clean import write_clean

    fixed, refused = write_clean(audit.checked, path)
    heldout = audit.checked.heldout
    for file in fixed:
        held_out = heldout is not None and heldout.share is not None and file.split == "heldout"
        use = ", with [data] heldout in place of heldout_share" if held_out else ""
        echo(f"written: {file.path}, in place of {file.location}{use}", err=to_stderr)
    echo(f"written: {refused}, the refused rows with the reasons", err=to_stderr)


def _unreadable(what: str, error: QprefError) -> dict[str, object]:
    """JSON output for data that cannot be read to the end."""
    finding = {"code": "unreadable", "severity": "error", "path": what, "line": 0, "message": error.what}
    return {"read": 0, "kept": 0, "refused": 0, "dropped": 0, "findings": [finding]}


def _audit(what: str, overrides: tuple[str, ...], base: str | None, source_keys: Mapping[str, Any]) -> Audit:
    """Check a recipe's data, or one source.

    Args:
        source_keys: keys of `[data]` for a source without a recipe.
    """
    from qpref.api.checking import audit_recipe, audit_source
    from qpref.cli import quiet_transformers
    from qpref.errors import RecipeError
    from qpref.recipe.resolve import make_plan

    if Path(what).suffix == ".toml":
        if base is not None:
            raise RecipeError("--model is for a bare source of data; a recipe names its own: --set model.base=...")
        if source_keys:
            key = next(iter(source_keys))
            raise RecipeError(f"--{key} is for a bare source of data; a recipe has its own: --set data.{key}=...")
        plan = make_plan(Path(what), overrides)
        quiet_transformers()
        return audit_recipe(plan)
    if overrides:
        raise RecipeError("--set changes a recipe, and this is a source of data")
    if base is not None:
        quiet_transformers()
    return audit_source(what, base, source_keys)


def _print(audit: Audit) -> None:
    console = make_console(soft_wrap=True)
    report = audit.checked.report
    console.print(f"{report.label}: {report.read} rows read, {report.kept} kept, {report.refused} refused"
                  + (f", {report.repeated} the same as an earlier row" if report.repeated else "")
                  + (f", {report.dropped} left out for their length" if report.dropped else "")
                  + (f", {report.num_cut} cut to length" if report.num_cut else "")
                  + (_several(report) if report.num_several else ""))  # fmt: skip
    if report.counts:
        console.print(_findings(report))
    for finding in report.findings:
        if not finding.source.line:
            console.print(f"{finding.code}: {finding.source}: {finding.message}")
    for path, verdicts in itertools.groupby(report.verdicts, key=lambda one: one.source.path):
        console.print(f"\n{path}: who won, in the first rows")
        for one in verdicts:
            console.print(f"  {one.source.line}: {one.verdict}: {one.winner} won\n    chosen:   {one.chosen}\n"
                          f"    rejected: {one.rejected}")  # fmt: skip
    for name, histogram in report.lengths.items():
        console.print(f"\n{name}")
        top = max(histogram.values())
        for low, high, count in histogram.bars():
            bar = "█" * round(BAR_WIDTH * count / top)
            console.print(f"  {low:>8} .. {high:<8} {count:>8}  {bar}")
    if audit.first_row is not None:
        console.print(f"\nthe first row as the model sees it, scored text in ⟦ ⟧:\n{audit.first_row}")
    for reason in audit.why_empty:
        console.print(f"\n{reason}")


def _several(report: DataReport) -> str:
    rows = "1 row has" if report.num_several == 1 else f"{report.num_several} rows have"
    return f"; {rows} more than two responses, which make {report.num_pairs} pairs"


def _findings(report: DataReport) -> Table:
    from rich.table import Table

    table = Table(title="findings", title_justify="left")
    for column in ("finding", "severity", "count", "first lines", "first message"):
        table.add_column(column, overflow="fold", justify="right" if column == "count" else "left")
    for (severity, code), count in sorted(report.counts.items(), key=lambda item: (item[0][0], -item[1])):
        first = [one for one in report.findings if (one.severity, one.code) == (severity, code)][:NUM_LOCATIONS]
        if first[0].source.line:
            table.add_row(code, severity, str(count), _locations(report, first), first[0].message)
        else:
            table.add_row(code, severity, str(count), "all", "see below")
    return table


def _locations(report: DataReport, findings: Sequence[Finding]) -> str:
    """List the findings' lines, with file names where there are several files."""
    if len(report.paths) == 1:
        return ", ".join(str(one.source.line) for one in findings)
    return "\n".join(f"{Path(one.source.path).name}:{one.source.line}" for one in findings)
