"""Loading a causal language model with transformers, complete or not at all."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qpref.errors import DeviceMemoryError, PolicyError
from qpref.policy.architecture import model_class
from qpref.policy.foreign_files import read_by_library
from qpref.policy.model_config import read_model_config
from qpref.policy.out_of_memory import out_of_memory_as, says_out_of_memory

log = logging.getLogger("qpref")


def load_pretrained(folder: Path, gguf_file: str | None = None, **options: Any) -> Any:
    """Load a model with transformers and check that its files hold every weight; transformers fills gaps at random.

    Args:
        folder: the model's folder.
        gguf_file: name of the GGUF file in it to read instead of safetensors.
        options: for transformers' `from_pretrained`.

    Raises:
        PolicyError: transformers can't load it, or a weight is missing.
        DeviceMemoryError: the device is too small for it.
    """
    from transformers import AutoModelForCausalLM

    kind = AutoModelForCausalLM if gguf_file else model_class(options.get("config") or read_config(folder), folder)
    path = folder / gguf_file if gguf_file else folder
    out_of_memory = (
        f"{path}: the device ran out of memory while the model was loaded",
        "free its memory, raise [model] memory where it is set, or take a smaller base",
    )
    problem = "can't read this GGUF file" if gguf_file else "can't load this model"
    try:
        with (
            _loading_report() as report,
            read_by_library(path, f"transformers {problem}"),
            out_of_memory_as(*out_of_memory),
        ):
            model, found = kind.from_pretrained(
                folder, gguf_file=gguf_file, output_loading_info=True, trust_remote_code=False, **options
            )
    except PolicyError as error:
        if any(map(says_out_of_memory, report)):
            raise DeviceMemoryError(*out_of_memory) from error
        raise
    if missing := sorted(found["missing_keys"]):
        raise PolicyError(f"{path}: it lacks {len(missing)} of its model's weights, the first is {missing[0]}")
    if unread := sorted(found["unexpected_keys"]):
        log.warning(
            "%d tensors of the base's files are unknown to transformers, the first is %s; they aren't trained, and a "
            "merged model keeps them as they are",
            len(unread),
            unread[0],
        )
    return model


def read_config(folder: Path) -> Any:
    """Read a model's config with transformers.

    Raises:
        PolicyError: transformers doesn't know it, or can't read it.
    """
    from transformers import AutoConfig

    read_model_config(folder)
    with read_by_library(folder, "transformers can't load this model"):
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)


@contextmanager
def _loading_report() -> Iterator[list[str]]:
    """Collect what transformers logs while it loads a model, off the console.

    It catches the errors of single weights, out-of-memory among them; the error that it raises at the end refers to a
    logged report (transformers 5.17, `log_conversion_errors`). Drop this when that error says it. Others may have
    switched its logger off before, as `logging.config.dictConfig` does with all that exist.
    """
    lines: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    logger = logging.getLogger("transformers.modeling_utils")
    collector, level, propagate = Collector(), logger.level, logger.propagate
    disabled, all_disabled = logger.disabled, logging.root.manager.disable
    logger.addHandler(collector)
    logger.setLevel(logging.WARNING)
    logger.propagate = logger.disabled = False
    logging.disable(logging.NOTSET)
    try:
        yield lines
    finally:
        logger.removeHandler(collector)
        logger.setLevel(level)
        logger.propagate, logger.disabled = propagate, disabled
        logging.disable(all_disabled)
