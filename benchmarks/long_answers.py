"""Cost of `qpref check` and of tokenizing on long answers, by part.

    python -m benchmarks.long_answers            3,000 rows, 29 MB; a minute on one core
    python -m benchmarks.long_answers --rows 200 --output out/

The rows resemble answers of chat models: paragraphs, numbered lists, headings, code and now and then a character that
isn't ASCII; a prompt of 800 characters and two answers of 4,400 on average, in words drawn by Zipf's law. They are made
from a seed. The tokenizer is a byte-level BPE of 16,000 tokens trained on the first of them, with a ChatML template.

Each part is run alone in this process; its figure is the least CPU time of five passes. Reading, records and counts are
parts of those below them. On a busy machine CPU seconds are longer: compare with the line of `json.loads`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import platform
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

NUM_ROWS, NUM_WORDS, TRAINED_ROWS, VOCABULARY = 3_000, 8_000, 400, 16_000
NUM_PASSES = 5
PROMPT_CHARACTERS, ANSWER_CHARACTERS, SPREAD = 400, 4_000, 0.5
ACCENTED = ("naïve", "café", "—", "“so”", "it\u2019s", "5 µm", "→", "Zürich")
RESULTS = Path(__file__).parent / "results"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHECKS = ("pairs", "duplicates", "leakage", "bias", "text")


class Writer:
    """A writer of made-up answers in Markdown."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        letters = "etaoinshrdlucmfwypvbgkjqxz"
        sizes = [round(1.5 + 3 * math.log10(rank + 1)) + self.random.randrange(NUM_PASSES) for rank in range(NUM_WORDS)]
        weights = [1 / (place + 2) for place in range(len(letters))]
        self.words = ["".join(self.random.choices(letters, weights, k=size)) for size in sizes]
        self.frequency = list(itertools.accumulate(1 / (rank + 3) for rank in range(NUM_WORDS)))

    def sentence(self) -> str:
        words = self.random.choices(self.words, cum_weights=self.frequency, k=self.random.randint(6, 24))
        if self.random.random() < 0.02:
            words.append(self.random.choice(ACCENTED))
        if len(words) > 14:
            words[7] += ","
        return " ".join(words).capitalize() + self.random.choice("....?!")

    def block(self) -> str:
        """Write a paragraph, a list, a heading or a piece of code."""
        kind = self.random.random()
        if kind < 0.6:
            return " ".join(self.sentence() for _ in range(self.random.randint(2, 6)))
        if kind < 0.8:
            return "\n".join(f"{number}. {self.sentence()}" for number in range(1, self.random.randint(4, 8)))
        if kind < 0.9:
            return f"## {self.sentence()[:-1]}"
        lines = (f"    {one} = {two}({self.random.randrange(100)})" for one, two in self.pairs(4))
        return "\n".join(["```python", f"def {self.name()}():", *lines, "```"])

    def pairs(self, count: int) -> list[tuple[str, str]]:
        return [(self.name(), self.name()) for _ in range(count)]

    def name(self) -> str:
        return self.random.choice(self.words)

    def text(self, characters: int) -> str:
        """Write about so many characters, in a log-normal distribution with this mean."""
        wanted = characters * math.exp(self.random.gauss(-SPREAD * SPREAD / 2, SPREAD))
        blocks, size = list[str](), 0
        while size < wanted:
            blocks.append(self.block())
            size += len(blocks[-1]) + 2
        return "\n\n".join(blocks)


def write_rows(path: Path, num_rows: int) -> None:
    """Write the pairs of the benchmark as JSON Lines."""
    writer = Writer(seed=0)
    sizes = {"prompt": PROMPT_CHARACTERS, "chosen": ANSWER_CHARACTERS, "rejected": ANSWER_CHARACTERS}
    with path.open("w") as file:
        for _ in range(num_rows):
            file.write(json.dumps({side: writer.text(size) for side, size in sizes.items()}, ensure_ascii=False) + "\n")


def make_tokenizer(texts: Sequence[str]) -> Any:
    """Train a byte-level BPE with ChatML's tokens and template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|im_end|>", "<|im_start|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=special[0], additional_special_tokens=special[1:]
    )
    fast.chat_template = CHATML
    return fast


def parts_of(path: Path) -> Iterator[tuple[str, Callable[[], int]]]:
    """Yield the name of each part, and a function that runs it and returns its number of rows."""
    from qpref.data.check import check_data
    from qpref.data.example_rows import texts_of
    from qpref.data.source import DataSource
    from qpref.data.tokenize import PairTokenizer
    from qpref.recipe.resolve import make_data_plan
    from qpref.records import Finding

    plan = make_data_plan(str(path), None)
    (choice,) = plan.sources

    def count(rows: Iterator[object]) -> int:
        return sum(not isinstance(row, Finding) for row in rows)

    def checked(names: Sequence[str]) -> int:
        validators = [one for one in plan.validators if one.plugin.record.name in names]
        return check_data(plan.sources, validators, pairs_only=False).report.kept

    lines = path.read_bytes().splitlines()
    yield "`json.loads` alone, for comparison", lambda: count(map(json.loads, lines))
    yield "reading", lambda: count(DataSource(choice).raw())
    yield "reading, records", lambda: count(DataSource(choice).rows())
    yield "reading, records, counts", lambda: checked(())
    for name in CHECKS:
        yield f"reading, records, counts, check `{name}`", partial(checked, (name,))
    yield "`qpref check`: all of these", partial(checked, CHECKS)
    records = [record for row in DataSource(choice).rows() if not isinstance(row, Finding) for record in row]
    base = make_tokenizer([text for record in records[:TRAINED_ROWS] for text in texts_of(record)])
    tokenizer = PairTokenizer.of(base, "chat", (base.eos_token_id,))
    yield "tokenizing alone", lambda: count(tokenizer.tokenize(records))


def measure(num_rows: int) -> dict[str, Any]:
    """Make the rows and measure each part, the best of some passes."""
    with tempfile.TemporaryDirectory(prefix="qpref-benchmark-") as scratch:
        path = Path(scratch) / "long.jsonl"
        write_rows(path, num_rows)
        found = []
        for name, run in parts_of(path):
            times = []
            for _ in range(NUM_PASSES):
                started = time.process_time()
                rows = run()
                times.append(time.process_time() - started)
            assert rows == num_rows, f"{name}: {num_rows - rows} rows are refused"
            found.append({"part": name, "rows": rows, "cpu_seconds": min(times)})
            print(f"{rows / min(times):>9,.0f} rows/s  {name}", flush=True)
        return {"rows": num_rows, "bytes": path.stat().st_size, "parts": found}


def table(result: dict[str, Any]) -> str:
    """Write the result as a Markdown page."""
    lines = [
        f"# Long answers, {result['date'][:10]}",
        "",
        f"{result['command']}: {result['rows']:,} rows, {result['bytes'] / 1e6:.1f} MB. {result['machine']}.",
        "",
        "| part | microseconds a row | rows a CPU second |",
        "|---|---|---|",
    ]
    for part in result["parts"]:
        each = part["cpu_seconds"] / part["rows"]
        lines.append(f"| {part['part']} | {each * 1e6:.0f} | {1 / each:,.0f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=NUM_ROWS)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the table")
    options = parser.parse_args()
    result = {
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "command": f"`python -m benchmarks.long_answers --rows {options.rows}`",
        "machine": f"{platform.machine()}, Python {platform.python_version()}",
    } | measure(options.rows)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / f"{result['date'][:10]}-long-answers.md").write_text(table(result))


if __name__ == "__main__":
    main()
