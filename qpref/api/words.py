"""Messages in Python's words: options of the command line that they name, as the arguments that they are here.

The core says `--resume`, since the command line prints its messages. This is the one place that rewrites them, so that
an error that a script gets says `resume=True`. Options of other programs (pip's, docker's) stay as they are.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from qpref.errors import QprefError

log = logging.getLogger("qpref")

FLAGS = ("resume", "overwrite", "desktop", "float32", "without-overlap")
"""Options without a value: given, they are true."""
OPTIONS = {
    **{name: name for name in ("output", "base", "quantization", "data", "beta", "samples", "seed", "reader", "format",
                               "columns", "onto", "dtype", "quantize", "pairs", "vram", "card", "shape", "tflops")},
    **{name: name.replace("-", "_") for name in ("max-pairs", "max-length", "max-new-tokens", "max-margin-error",
                                                 "top-p", "batch-size")},
    "temperature": "temperature",
    "set": "overrides",
    "prompt": "prompts",
    "prompts": "data",
    "model": "base",
}  # fmt: skip
"""Options with a value, and the arguments that they are in Python."""
FUNCTIONS = {"train": "train", "eval": "evaluate", "check": "check", "plan": "plan", "generate": "generate"}
VALUE = r"'[^']+'|[\w.%/-]*[\w%]"
"""A value after an option: a word in the next sentence is none, and neither is a dash."""
TAKES_VALUE = "onto|dtype|quantize|quantization|vram|card|shape|max-margin-error"
RULES: tuple[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]], ...] = (
    (re.compile(r"qpref train --resume with the run's recipe"), "qpref.train(recipe, resume=True)"),
    (re.compile(r"qpref train --resume"), "qpref.train(recipe, resume=True)"),
    (re.compile(r"another --output"), "another output"),
    (re.compile(r"; --gpus starts more"), "; torchrun starts more"),
    (re.compile(r"--prompt or --prompts"), "prompts= or data="),
    (re.compile(rf"`?\bqpref ({'|'.join(FUNCTIONS)})\b(?! [^`]*--)`?"), lambda found: f"qpref.{FUNCTIONS[found[1]]}"),
    (re.compile(r"(?<![\w-])--set (\S+?)(?=[:,;]?(?:\s|$))"), r'overrides=["\1"]'),
    (re.compile(rf"(?<![\w-])--({TAKES_VALUE}) ({VALUE})(?=[:,;.]?(?: or |$|,|;|:| in | and | if |\.$))"),
     lambda found: f'{OPTIONS[found[1]].replace("-", "_")}="{found[2].strip(chr(39))}"'),
    (re.compile(rf"(?<![\w-])--({'|'.join(FLAGS)})(?![\w-])"), lambda found: f"{found[1].replace('-', '_')}=True"),
    (re.compile(rf"(?<![\w-])--({'|'.join(sorted(OPTIONS, key=len, reverse=True))})(?![\w-])"),
     lambda found: f"{OPTIONS[found[1]]}="),
)  # fmt: skip
"""Patterns in the order in which they are replaced: whole phrases, commands, then options."""


def in_python(text: str) -> str:
    """Rewrite the commands and options that a message names."""
    for pattern, words in RULES:
        text = pattern.sub(words, text)
    return text


class _Rewriting(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = in_python(record.getMessage()), ()
        return True


@contextmanager
def python_words() -> Iterator[None]:
    """Rewrite the errors that are raised inside, and what is logged."""
    rewriting = _Rewriting()
    log.addFilter(rewriting)
    try:
        yield
    except QprefError as error:
        error.what = in_python(error.what)
        error.hint = None if error.hint is None else in_python(error.hint)
        error.args = (error.what,)
        raise
    finally:
        log.removeFilter(rewriting)
