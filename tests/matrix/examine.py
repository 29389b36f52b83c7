"""One row of the matrix: an architecture's tiny model is trained, scored, merged and reloaded."""

from __future__ import annotations

import contextlib
import json
import math
import re
import tomllib
import traceback
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from click.testing import CliRunner
from conftest import make_tokenizer, preference_rows, write_jsonl
from matrix import oracle
from tiny_models import TinyModel

from qpref.attention.errors import CannotShareError
from qpref.cli import main
from qpref.records import Source, TokenizedExample

NATS = 2e-3
"""Tolerance of a response's log-probability, a sum over some 30 tokens."""
REFUSALS = (2, 3, 10)
"""Exit codes of a recipe, data or a model that are refused before training."""
LONGEST_REFUSAL = 400
"""Characters of a sentence or two with their hint."""
NO = "-"


@dataclass(slots=True)
class Row:
    """Outcome of an architecture; "yes" is right, NO wasn't reached, and anything else is what is wrong.

    Attributes:
        trains: "yes" where training starts at ln 2 and the held-out log-probabilities are the oracle's.
        shared: "yes" where each prompt is computed once, else "no".
        experts: "none", "4-bit" or "16-bit"; "4-bit, LoRA" with adapters on them.
        adapter: "yes" where plain PEFT loads it onto the class in config.json, with the trained log-probabilities.
        merge: "yes" where the merged folder gives them in plain transformers and holds every tensor of the base; "no"
            where training says at its start that the adapter can't be merged.
        bf16: mean error of a token's log-probability in bf16, in nats, by qpref and by plain transformers.
        refusal: the words of a refusal before training.
    """

    name: str
    trains: str = NO
    shared: str = NO
    experts: str = NO
    adapter: str = NO
    merge: str = NO
    bf16: tuple[float, float] | None = None
    refusal: str = ""

    @property
    def fault(self) -> str:
        """Describe what is wrong; empty for a row that is right, and for one that is refused as it should be."""
        if self.refusal:
            return ""
        columns = {name: getattr(self, name) for name in ("trains", "adapter", "merge")}
        right = {("trains", "yes"), ("adapter", "yes"), ("merge", "yes"), ("merge", "no")}
        return "; ".join(f"{name}: {value}" for name, value in columns.items() if (name, value) not in right)


@dataclass(frozen=True, slots=True)
class Place:
    """Folders and data of one row."""

    folder: Path
    heldout: Sequence[oracle.Pair]
    tokenizer: Any

    @property
    def base(self) -> Path:
        return self.folder / "base"

    @property
    def recipe(self) -> Path:
        return self.folder / "recipe.toml"

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def out(self) -> Path:
        return self.folder / "out"

    def totals(self, model: Any) -> tuple[float, float]:
        return oracle.totals(oracle.logprobs(model, self.tokenizer, self.heldout), self.tokenizer, self.heldout)


def examine(name: str, model: TinyModel, folder: Path) -> Row:
    """Make the model, run `qpref train` and `qpref merge` on it, and compare with plain transformers."""
    row = Row(name)
    place = Place(folder, preference_rows(3, start=100), make_tokenizer())
    write_base(model, place.base)
    adapts_experts = has_fused_experts(place.base)
    write_recipe(place, adapts_experts)
    code, output = qpref("train", place.recipe, "--output", place.run)
    output = output.replace(f"{place.base}: ", "").replace(f"{place.folder}/", "")
    if code:
        _read_refusal(row, code, output, place)
        return row
    steps, heldout = _logged(place.run)
    row.shared = "yes" if re.search(r"each prompt computed once", output) else "no"
    named, auto = oracle.model_classes(place.base)
    rounded = _compare_before(row, place, auto, steps[0]["loss"], heldout[0])
    if row.trains == "yes" and row.experts == "16-bit" and not re.search(r"expert[^.]{0,90}(16|32)[- ]?bit", output):
        row.trains = "the log doesn't say that its experts aren't in 4 bits"
    row.experts += ", LoRA" if adapts_experts else ""
    _compare_adapter(row, place, named, rounded, heldout[-1])
    _compare_merge(row, place, dict.fromkeys((named, auto)), heldout[-1])
    if "qpref merge can't merge this adapter" in output and row.merge.startswith("(11) error: "):
        row.merge = "no"
    row.bf16 = _bf16_errors(row, place, auto, rounded)
    return row


def write_base(model: TinyModel, folder: Path) -> None:
    """Write the model with weights that bf16 holds, as those of published models are, stored as float32."""
    from safetensors.torch import save_file

    model.write(folder)
    values = {key: value.bfloat16().float() if value.is_floating_point() else value
              for key, value in oracle.tensors(folder).items()}  # fmt: skip
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    save_file(values, folder / "model.safetensors", metadata={"format": "pt"})


def has_fused_experts(base: Path) -> bool:
    """Tell whether adapters go on experts too: where qpref says that they can."""
    from qpref.errors import PolicyError
    from qpref.policy.architecture import empty_model
    from qpref.policy.experts_lora import adaptable_experts
    from qpref.policy.pretrained import read_config

    try:
        return bool(adaptable_experts(empty_model(read_config(base), base)))
    except (PolicyError, AttributeError):  # it has none, or isn't a decoder of text, which training says
        return False


def write_recipe(place: Place, adapts_experts: bool) -> None:
    """Write the data and the recipe of two steps."""
    train = write_jsonl(place.folder / "train.jsonl", preference_rows(8))
    heldout = write_jsonl(place.folder / "heldout.jsonl", list(place.heldout))
    place.recipe.write_text(f"""
sinks = []
model = {{ base = "{place.base}", quantization = "nf4", dtype = "float32" }}
adapter = {{ rank = 4, alpha = 8, experts = {str(adapts_experts).lower()} }}
data = {{ train = "{train}", heldout = "{heldout}", max_length = 256, max_prompt_length = 128 }}
checks = {{ too_short = "off" }}
loss = {{ name = "dpo", beta = 0.1 }}

[train]
learning_rate = 5e-3
schedule = "constant"
warmup_ratio = 0.0
max_steps = 2
batch_size = 4
tokens_per_microbatch = 600
gradient_checkpointing = false
""")


def qpref(*words: object) -> tuple[int, str]:
    """Run a command in this process: its exit code and all that it prints, a traceback included."""
    done = CliRunner().invoke(main, [str(word) for word in words])
    output = done.output
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        output += "Traceback (most recent call last)\n" + "".join(traceback.format_exception_only(done.exception))
    return done.exit_code, output


def _read_refusal(row: Row, code: int, output: str, place: Place) -> None:
    words = ending(output)
    if "Traceback" in output or code not in REFUSALS:
        row.trains = f"crash ({code}): {words}"
    elif len(words) > LONGEST_REFUSAL:
        row.trains = f"refused in {len(words)} characters: {words[:LONGEST_REFUSAL]}"
    elif fault := _hint_fault(output, place):
        row.trains = f"refused, but {fault}"
    else:
        row.refusal = words.removeprefix("error: ")


def _hint_fault(output: str, place: Place) -> str:
    """Describe why a run with the targets that a refusal proposes doesn't train; empty where it does."""
    found = re.findall(r"targets\s*=\s*(\[[^\]]*\])", " ".join(output.split()))
    if not found:
        return ""
    change = f"adapter.targets={found[-1]}"
    code, output = qpref("train", place.recipe, "--output", place.folder / "hinted", "--set", change)
    return f"with its hint's targets: {ending(output)}" if code else ""


def ending(output: str) -> str:
    """What a failed command ends with, on one line: its error, or a traceback's last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    if "Traceback" in output:
        errors = (line for line in reversed(lines) if re.match(r"[\w.]*(Error|Exception|Interrupt)\b", line))
        return next(errors, lines[-1])
    found = re.search(r"error: .*", " ".join(lines))
    return found.group(0) if found else lines[-1]


def _logged(run: Path) -> tuple[list[dict[str, float]], list[tuple[float, float]]]:
    """The training rows, and the held-out rows' log-probabilities."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    held = [(row["eval_logps/chosen"], row["eval_logps/rejected"]) for row in rows if "eval_logps/chosen" in row]
    return [row for row in rows if "loss" in row], held


def apart(one: Sequence[float], other: Sequence[float]) -> float:
    """The largest difference, infinite where a value isn't finite."""
    gap = max(abs(a - b) for a, b in zip(one, other, strict=True))
    return gap if math.isfinite(gap) else math.inf


def _compare_before(row: Row, place: Place, kind: Any, first: float, heldout: tuple[float, float]) -> bool:
    """Compare the start with the oracle; return whether fused experts are rounded through NF4."""
    model = oracle.load(kind, place.base, nf4=True)
    gap, rounded = apart(place.totals(model), heldout), False
    fused = bool(oracle.fused_experts(model))
    if fused and gap > NATS:
        oracle.round_experts(model)
        gap, rounded = apart(place.totals(model), heldout), True
    row.experts = "none"
    if fused or oracle.has_expert_layers(model):
        row.experts = "16-bit" if fused and not rounded else "4-bit"
    row.trains = "yes"
    if abs(first - math.log(2)) > 1e-5:
        row.trains = f"first loss {first:.4f}, not ln 2"
    elif gap > NATS:
        row.trains = f"{gap:.3f} nats from transformers' own log-probabilities"
    return rounded


def _compare_adapter(row: Row, place: Place, kind: Any, rounded: bool, heldout: tuple[float, float]) -> None:
    from peft import PeftModel

    model = oracle.load(kind, place.base, nf4=True)
    if rounded:
        oracle.round_experts(model)
    runs = oracle.runs_on_text(model)
    adapted = PeftModel.from_pretrained(model, place.run / "adapter").eval()
    learned = sum(value.abs().sum().item() for key, value in adapted.named_parameters() if "lora_B" in key)
    gap = apart(place.totals(adapted), heldout) if runs else 0.0
    row.adapter = "yes" if learned > 0 and gap <= NATS else f"sum of |B| {learned:.2g}, {gap:.3f} nats apart"


def _compare_merge(row: Row, place: Place, kinds: Any, heldout: tuple[float, float]) -> None:
    code, output = qpref("merge", place.run, place.out, "--dtype", "float32")
    if code:
        row.merge = f"({code}) {ending(output).replace(f'{place.base}: ', '').replace(f'{place.folder}/', '')}"
        return
    for kind in kinds:
        model = oracle.load(kind, place.out, nf4=False)
        gap = apart(place.totals(model), heldout) if oracle.runs_on_text(model) else 0.0
        if gap > NATS:
            row.merge = f"{gap:.3f} nats apart as {kind.__name__}"
            return
    row.merge = _tensor_fault(oracle.tensors(place.base), oracle.tensors(place.out)) or "yes"


def _tensor_fault(base: dict[str, torch.Tensor], merged: dict[str, torch.Tensor]) -> str:
    """Describe a tensor that was lost, or changed though neither NF4 nor an adapter changes it."""
    if lost := sorted(base.keys() - merged.keys()):
        return f"{len(lost)} tensors lost, the first is {lost[0]}"
    kept = [key for key, value in base.items() if value.dim() < 2 or re.search(r"vision|visual|embed_tokens", key)]
    changed = [key for key in kept if not torch.equal(base[key], merged[key])]
    return f"{len(changed)} tensors changed, the first is {changed[0]}" if changed else ""


def _bf16_errors(row: Row, place: Place, kind: Any, rounded: bool) -> tuple[float, float] | None:
    """Mean absolute errors of a token's log-probability in bf16: qpref's, and plain transformers'; None where that
    fails in bf16."""
    models = [oracle.load(kind, place.base, nf4=True, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
    if rounded:
        for model in models:
            oracle.round_experts(model)
    try:
        exact, plain = (oracle.logprobs(model, place.tokenizer, place.heldout) for model in models)
    except RuntimeError:
        return None
    ours = _policy_logprobs(place, shared=row.shared == "yes")
    return (ours - exact).abs().mean().item(), (plain - exact).abs().mean().item()


def _policy_logprobs(place: Place, shared: bool) -> torch.Tensor:
    """[S] log-probabilities by qpref in bf16, as at a run's start."""
    from qpref.data.pack import pack
    from qpref.policy.load import load_policy
    from qpref.policy.logprobs import completion_logprobs
    from qpref.policy.source import resolve_base
    from qpref.recipe.sections import Recipe

    document = tomllib.loads(place.recipe.read_text())
    document["model"]["dtype"] = "bf16"
    recipe = Recipe.model_validate(document)
    policy = load_policy(recipe, resolve_base(recipe.model))
    policy.model.eval()
    batch = pack([_example(place, pair) for pair in place.heldout], policy.device)
    for attention in (*(policy.sharing_paths if shared else ()), policy.own_attention):
        policy.use_attention(attention)
        with torch.no_grad(), contextlib.suppress(CannotShareError):
            return completion_logprobs(policy, batch).values
    raise AssertionError("the model's own attention computes any batch")


def _example(place: Place, pair: oracle.Pair) -> TokenizedExample:
    sides = [oracle.token_ids(place.tokenizer, pair, side) for side in ("chosen", "rejected")]
    return TokenizedExample(
        prompt=array("i", sides[0][0]),
        branches=tuple(array("i", response) for _, response in sides),
        truncated=(False, False),
        weight=1.0,
        margin=0.0,
        source=Source(path="made", line=1),
    )
