"""docs/models.md from the rows of the matrix."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from matrix.examine import Row

HEAD = """# Models

Architectures that were trained as tiny random models, each compared with plain transformers. Written by
`python docs/make_models.py`; `pytest -m matrix` repeats it and compares the outcome with this page.

For each architecture: an NF4 base in float32, two steps of DPO by `qpref train`, `qpref merge`, and the same numbers
computed without qpref: bitsandbytes' 4-bit layers in transformers' own model, one unpadded row for each response.

- **trains**: the first loss is ln 2, and the held-out log-probabilities before training are transformers' own, to
  {nats} nats a response.
- **prompt once**: each prompt is computed once a pair, not once for each response.
- **experts**: their frozen weights in memory, `4-bit` or `16-bit` (in the base's dtype), and `LoRA` where they were
  adapted too (`[adapter] experts = true`); `none`: it has no experts.
- **adapter elsewhere**: plain PEFT loads `adapter/` onto the class that the base's config.json names, and gives the
  trained log-probabilities.
- **merge exact**: the merged folder gives them too, by plain `from_pretrained`, and no tensor of the base is missing;
  `no`: training says at its start that this adapter can't be merged.
- **bf16**: mean error of a token's log-probability in bf16 against float32, in nats: qpref's, and
  (plain transformers').

A tiny random model shows that an architecture is computed right, not that it learns well. Text alone is trained: of a
multimodal model, its text part.

{machine}

"""
HEADER = "| architecture | trains | prompt once | experts | adapter elsewhere | merge exact | bf16 |"


def page(rows: Sequence[Row]) -> str:
    """Format the page: the rows that train, those that are refused, and those with a fault."""
    from matrix.examine import NATS

    trained = [row for row in rows if not row.refusal and not row.fault]
    refused = [row for row in rows if row.refusal]
    faulty = [row for row in rows if row.fault]
    parts = [HEAD.format(nats=NATS, machine=_machine(rows))]
    parts.append(f"## Trained ({len(trained)})\n\n{HEADER}\n|---|---|---|---|---|---|---|\n")
    parts += [f"{line(row)} {_bf16(row)} |\n" for row in trained]
    parts.append(f"\n## Refused before training ({len(refused)})\n\n| architecture | message |\n|---|---|\n")
    parts += [f"{line(row)}\n" for row in refused]
    if faulty:
        parts.append(f"\n## Not right ({len(faulty)})\n\n| architecture | fault |\n|---|---|\n")
        parts += [f"{line(row)}\n" for row in faulty]
    return "".join(parts)


def line(row: Row) -> str:
    """Format what doesn't differ between machines of a row's line."""
    if row.refusal or row.fault:
        return f"| {row.name} | {_text(row.refusal or row.fault)} |"
    return f"| {row.name} | {row.trains} | {row.shared} | {row.experts} | {row.adapter} | {row.merge} |"


def names(text: str) -> list[str]:
    """Read the architectures of a page."""
    return sorted(set(re.findall(r"^\| ([\w.-]+) \|", text, re.MULTILINE)) - {"architecture"})


def _bf16(row: Row) -> str:
    if row.bf16 is None:
        return "fails in plain transformers"
    ours, theirs = row.bf16
    return f"{ours:.3f} ({theirs:.3f})"


def _text(words: str) -> str:
    return words.replace("|", "\\|").replace("*", "\\*").replace(" hint: ", "<br>hint: ")


def _machine(rows: Sequence[Row]) -> str:
    models = re.findall(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    machine = f"{os.cpu_count()} cores of {models[0] if models else 'a CPU'}"
    packages = ", ".join(f"{name} {version(name)}" for name in ("transformers", "peft", "bitsandbytes", "torch"))
    return f"{len(rows)} architectures, {datetime.now(UTC).date()}, {machine}, {packages}."
