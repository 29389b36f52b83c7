"""The data report as one HTML page that loads nothing. Texts of rows are untrusted: all of them are escaped."""

from __future__ import annotations

from pathlib import Path

from qpref import fsio
from qpref.data.audit import Audit

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width">
<title>qpref check: {{ report.label }}</title>
<style>
:root { color-scheme: light dark; --bar: #4a7ebb; --line: #8886; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.4em; } h2 { font-size: 1.1em; margin-top: 2em; }
table { border-collapse: collapse; width: 100%; }
td, th { text-align: left; vertical-align: top; padding: .3em .6em; border-bottom: 1px solid var(--line); }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
tr.error td:first-child { border-left: .3em solid #c0392b; }
tr.warning td:first-child { border-left: .3em solid #e0a030; }
.rows { font-size: .9em; overflow-wrap: anywhere; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(20em, 1fr)); gap: 2em; }
.charts table { width: auto; } .charts td { border: 0; padding: 0 .5em; font-size: .85em; }
.bar { background: var(--bar); height: .8em; min-width: 1px; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; border: 1px solid var(--line); padding: 1em; }
</style>
<h1>{{ report.label }}</h1>
<p>{{ report.read }} rows read, {{ report.kept }} kept, {{ report.refused }} refused
{%- if report.repeated %}, {{ report.repeated }} the same as an earlier row{% endif %}
{%- if report.dropped %}, {{ report.dropped }} dropped for their length{% endif %}
{%- if report.num_cut %}, {{ report.num_cut }} truncated{% endif %}.</p>
{% for reason in why_empty %}<p><strong>{{ reason }}</strong></p>
{% endfor %}
<h2>Findings</h2>
{% if kinds %}<table>
<tr><th>code<th>severity<th class="number">count<th>first rows
{% for severity, code, count, findings in kinds %}<tr class="{{ severity }}"><td>{{ code }}<td>{{ severity }}
<td class="number">{{ count }}
<td class="rows">{% for finding in findings %}{{ finding.source }}: {{ finding.message }}<br>{% endfor %}
{% endfor %}</table>{% else %}<p>No findings.</p>{% endif %}
<h2>Lengths</h2>
<div class="charts">
{% for name, bars in charts %}<section><h3>{{ name }}</h3><table>
{% for low, high, count, width in bars %}<tr><td class="number">{{ low }} to {{ high }}<td class="number">{{ count }}
<td><div class="bar" style="width: {{ width }}em"></div>
{% endfor %}</table></section>
{% endfor %}</div>
{% if first_row %}<h2>The first row as the model sees it</h2>
<p>Scored tokens are in ⟦ ⟧.</p>
<pre>{{ first_row }}</pre>{% endif %}
</html>
"""
NUM_ROWS = 10
WIDEST_EM = 12


def write_page(audit: Audit, path: Path) -> None:
    """Render the audit as a page and write it to `path`."""
    from jinja2 import Environment

    report = audit.checked.report
    kinds = []
    for (severity, code), count in sorted(report.counts.items()):
        found = [one for one in report.findings if (one.severity, one.code) == (severity, code)]
        kinds.append((severity, code, count, found[:NUM_ROWS]))
    charts = []
    for name, histogram in report.lengths.items():
        top = max(histogram.values())
        bars = [(low, high, count, round(WIDEST_EM * count / top, 2)) for low, high, count in histogram.bars()]
        charts.append((name, bars))
    template = Environment(autoescape=True).from_string(PAGE)
    page = template.render(
        report=report, why_empty=audit.why_empty, kinds=kinds, charts=charts, first_row=audit.first_row
    )
    fsio.write_text(path, page)
