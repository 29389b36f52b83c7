"""Errors from inside a model's forward pass, each as one sentence that names the layer."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from qpref.attention.determinism import needs_nondeterminism
from qpref.distributed.waiting import is_of_connection
from qpref.errors import PolicyError, QprefError
from qpref.policy.out_of_memory import is_out_of_memory

KINDS = (RuntimeError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, AssertionError, ImportError)


@contextmanager
def naming_the_layer(model: Any) -> Iterator[None]:
    """Raise what a layer of the model raises as a PolicyError.

    Errors from elsewhere pass, and so do out-of-memory errors and those of a connection to another process.

    Raises:
        PolicyError: a layer failed.
    """
    try:
        yield
    except KINDS as error:
        if _passes(error):
            raise
        if (layer := _failing_layer(error, model)) is None:
            raise
        name, kind = layer
        reason = str(error).strip().partition("\n")[0]
        raise PolicyError(
            f"the forward pass of this {model.config.model_type} model fails in {name or 'the model'} ({kind}): "
            f"{type(error).__name__}: {reason}",
            _remedy(model.get_submodule(name)),
        ) from error


@contextmanager
def naming_the_model(model: Any, work: str) -> Iterator[None]:
    """Raise what a model's own code raises as a PolicyError, which names the layer where it came through one.

    Args:
        work: what can't be done with the model, a participle such as "sampled".

    Raises:
        PolicyError: the model failed.
    """
    try:
        with naming_the_layer(model):
            yield
    except KINDS as error:
        if _passes(error):
            raise
        reason = str(error).strip().partition("\n")[0]
        raise PolicyError(
            f"this {model.config.model_type} model can't be {work}: {type(error).__name__}: {reason}",
            "where plain transformers' generate can, please report it",
        ) from error


def _passes(error: Exception) -> bool:
    """Return whether an error isn't the model's: one of qpref, of memory, of determinism, or of a connection to another
    process, from all of which a shared base's layer is gathered."""
    return (
        isinstance(error, QprefError)
        or is_out_of_memory(error)
        or needs_nondeterminism(error)
        or is_of_connection(error)
    )


def _remedy(layer: Any) -> str:
    """Say what to try: some layers read a linear layer's weight themselves, which 4 bits don't allow."""
    from bitsandbytes.nn import Linear4bit

    if any(isinstance(part, Linear4bit) for part in layer.modules()):
        return (
            'set [model] quantization = "none" if the model fits so: this layer may read weights itself, which 4-bit '
            "ones don't allow; where plain transformers can run it in 4 bits, please report it"
        )
    return "transformers or PEFT can't run this model as it is loaded; where plain transformers can, please report it"


def _failing_layer(error: BaseException, model: Any) -> tuple[str, str] | None:
    """Return name and class of the innermost module of the model that the error came through."""
    names = {id(module): (name, type(module).__name__) for name, module in model.named_modules()}
    found = None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        found = names.get(id(frame.f_locals.get("self")), found)
    return found
