"""Tiny real models and data: everything here is made on the spot, nothing is fetched."""

from __future__ import annotations

import gc
import json
import logging
import os
import random
import shutil
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tally import pytest_runtest_logreport, pytest_terminal_summary, tally  # noqa: F401 - a fixture and two hooks

from qpref import fsio
from qpref.records import Source, TokenizedExample

if TYPE_CHECKING:
    from qpref.policy.policy import Policy

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

_LOGGER = logging.getLogger("qpref")
LOGGER_AS_IMPORTED = (tuple(_LOGGER.handlers), _LOGGER.level, _LOGGER.propagate)

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VOCABULARY = 320
TINY = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "eos_token_id": 258,
    "bos_token_id": 257,
    "pad_token_id": 258,
}


@pytest.hookimpl(wrapper=True)
def pytest_report_to_serializable() -> Iterator[None]:
    """A worker's report reaches the main process as UTF-8, whatever text made its test fail."""
    return _as_utf8((yield))


def _as_utf8(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode(errors="backslashreplace").decode()
    if isinstance(value, dict):
        return {_as_utf8(key): _as_utf8(one) for key, one in value.items()}
    return type(value)(_as_utf8(one) for one in value) if isinstance(value, list | tuple) else value


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Matrices this small lose more to a second thread than it computes; tests' child processes set the same."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["QPREF_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def _own_logger() -> Iterator[None]:
    """Give each test the logger that an import leaves; a command sets it up, in a fixture of a whole module too."""
    fsio._read_only.clear()  # each test is a process of its own
    _reset_logger()
    yield
    _reset_logger()


def _reset_logger() -> None:
    logger = logging.getLogger("qpref")
    handlers, level, logger.propagate = LOGGER_AS_IMPORTED
    logger.handlers = list(handlers)
    logger.setLevel(level)


def make_tokenizer(chat_template: str | None = CHAT_TEMPLATE):
    """A byte-level tokenizer: 256 bytes, three special tokens, no merges. Pad equals eos, as in many real ones."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({symbol: place for place, symbol in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def tiny_config(family: str, **changes):
    """A two-layer config of a family: llama, qwen (tied, with biases), mistral (window), gemma3 (mixed windows)."""
    from transformers import Gemma3TextConfig, LlamaConfig, MistralConfig, Qwen2Config

    values = TINY | changes
    if family == "llama":
        return LlamaConfig(**values, tie_word_embeddings=values.pop("tie", False))
    if family == "qwen":
        return Qwen2Config(**values, tie_word_embeddings=True)
    if family == "mistral":
        return MistralConfig(**values, sliding_window=7, tie_word_embeddings=False)
    assert family == "gemma3"
    layers = ["sliding_attention", "full_attention"]
    return Gemma3TextConfig(**values, sliding_window=7, layer_types=layers, query_pre_attn_scalar=16)


@pytest.fixture(scope="session")
def make_base(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`make_base(family="llama", dtype=torch.float32, **config)`: a folder with a tiny model and its tokenizer."""
    made: dict[str, Path] = {}

    def make(family: str = "llama", dtype: torch.dtype = torch.float32, **changes) -> Path:
        key = f"{family}-{dtype}-{json.dumps(changes, sort_keys=True)}"
        if key not in made:
            from transformers import AutoModelForCausalLM

            folder = tmp_path_factory.mktemp(f"base-{family}")
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(tiny_config(family, **changes))
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    torch.nn.init.normal_(parameter, std=0.1)
            model.to(dtype).save_pretrained(folder)
            make_tokenizer().save_pretrained(folder)
            made[key] = folder
        return made[key]

    return make


def preference_rows(count: int, start: int = 0) -> list[dict[str, object]]:
    """Learnable pairs: the chosen answer is calm, the rejected one shouts."""
    return [
        {
            "prompt": f"Question {number}: what comes after {number}?",
            "chosen": f"After {number} comes {number + 1}." + " It does." * (number % 3),
            "rejected": f"WHO KNOWS WHAT {number} IS!!" + " NOT ME!" * (number % 2),
        }
        for number in range(start, start + count)
    ]


def make_example(line: int, *lengths: int) -> TokenizedExample:
    """Random bytes as a prompt and its responses; `margin` may stand for what the reference says of the pair."""
    draw = random.Random(line)
    prompt, *branches = (array("i", (draw.randrange(256) for _ in range(length))) for length in lengths)
    return TokenizedExample(
        prompt=prompt,
        branches=tuple(branches),
        truncated=(False,) * len(branches),
        weight=1.0,
        margin=draw.uniform(-2, 2),
        source=Source(path="made", line=line),
    )


def load_worn(tables: dict[str, dict[str, Any]]) -> Policy:
    """The policy of a recipe, in training mode, as after many steps: every B is random. Nothing is checkpointed unless
    the recipe says so."""
    from qpref.policy.load import load_policy
    from qpref.policy.source import resolve_base
    from qpref.recipe.sections import Recipe

    values = {"data": {"train": "none"}, "loss": {"name": "none"}, "train": {"gradient_checkpointing": False}}
    recipe = Recipe.model_validate(values | tables)
    policy = load_policy(recipe, resolve_base(recipe.model))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in policy.trained_parameters().items():
        if "lora_B" in name:
            parameter.data.normal_(std=0.2, generator=generator)
    policy.model.train()
    return policy


def peak_bytes(work: Callable[[], object]) -> int:
    """The most memory that tensors made by `work` held at once, by every allocation that torch's profiler sees."""
    from torch.profiler import ProfilerActivity, profile

    gc.collect()  # what earlier tests left, freed during the work, would count against it
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    level = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        level += event.nbytes()
        peak = max(peak, level)
    return peak


def write_jsonl(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def make_recipe(tmp_path: Path, make_base: Callable[..., Path]) -> Callable[..., dict[str, dict[str, object]]]:
    """`make_recipe({"train.max_steps": 2})`: a recipe as a dict, on a tiny base and 12 + 4 pairs."""

    def make(changes: dict[str, object] | None = None) -> dict[str, dict[str, object]]:
        recipe: dict[str, dict[str, object]] = {
            "model": {"base": str(make_base()), "quantization": "none", "dtype": "float32"},
            "adapter": {"rank": 4, "alpha": 8},
            "data": {
                "train": str(write_jsonl(tmp_path / "train.jsonl", preference_rows(12))),
                "heldout": str(write_jsonl(tmp_path / "heldout.jsonl", preference_rows(4, start=100))),
                "max_length": 256,
                "max_prompt_length": 128,
            },
            "checks": {"too_short": "off"},
            "loss": {"name": "dpo", "beta": 0.1},
            "train": {
                "learning_rate": 1e-3,
                "batch_size": 4,
                "warmup_ratio": 0.0,
                "tokens_per_microbatch": 400,
                "gradient_checkpointing": False,
            },
            "sinks": [],
        }
        for path, value in (changes or {}).items():
            table, _, key = path.partition(".")
            recipe.setdefault(table, {})[key] = value
        return recipe

    return make


@pytest.fixture(scope="session")
def _trained(tmp_path_factory) -> dict[str, Path]:
    return {}


@pytest.fixture
def trained_run(make_recipe, make_base, tmp_path_factory, _trained) -> Callable[..., Path]:
    """`trained_run(base, **recipe changes)`: a finished run of three large steps, trained once a session.

    Nobody writes to it; `merge_cases.moved` makes a copy.
    """

    def run(base: Path | None = None, **changes) -> Path:
        from qpref.recipe.resolve import make_plan
        from qpref.training.run import train_plan

        changes = {"train.learning_rate": 0.02, "model.base": str(base or make_base())} | changes
        key = json.dumps(changes, sort_keys=True)
        if key not in _trained:
            folder = tmp_path_factory.mktemp("trained")
            recipe = make_recipe(changes)
            for name in ("train", "heldout"):
                if name in recipe["data"]:
                    data = Path(recipe["data"][name])
                    recipe["data"][name] = str(shutil.copy(data, folder / data.name))
            _trained[key] = train_plan(make_plan(recipe, output=folder / "run"))
        return _trained[key]

    return run


@pytest.fixture
def said() -> Iterator[list[str]]:
    """The warnings of qpref's log, and no other handler, whatever an earlier command has set."""
    lines: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    log = logging.getLogger("qpref")
    before, log.handlers = log.handlers, [Listener(logging.WARNING)]
    yield lines
    log.handlers = before


OF_ONE_RUN = ("seconds", "metrics_bytes", "metrics_sha256", "run")
"""Values of a checkpoint's state that have times in them."""


@dataclass(frozen=True)
class Outcome:
    """All that a run leaves behind, but for the time that it took."""

    adapter: bytes
    tensors: dict[str, bytes]
    state: dict[str, Any]
    rows: list[dict[str, Any]]


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl without their times."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name != "seconds"} for line in lines]


def outcome(folder: Path) -> Outcome:
    last = max((folder / "checkpoints").iterdir())
    state = json.loads((last / "state.json").read_text())
    return Outcome(
        adapter=(folder / "adapter" / "adapter_model.safetensors").read_bytes(),
        tensors={path.name: path.read_bytes() for path in sorted(last.glob("*.safetensors"))},
        state={name: value for name, value in state.items() if name not in OF_ONE_RUN},
        rows=rows_of(folder),
    )


def merge_to(run: Path, out: Path, dtype: str) -> Path:
    """The real `qpref merge`, whatever its verdict on a tiny model is."""
    from click.testing import CliRunner

    from qpref.cli.merge import command

    done = CliRunner().invoke(command, [str(run), str(out), "--dtype", dtype])
    assert out.is_dir(), done.output
    return out
