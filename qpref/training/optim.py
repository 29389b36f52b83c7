"""The optimizer, its learning rate, and its state as plain tensors."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from qpref.errors import RecipeError
from qpref.recipe.sections import TrainSection


def learning_rate(train: TrainSection, step: int, total: int) -> float:
    """Compute the learning rate of optimizer step `step` (from 0) of `total`.

    It rises over the first `warmup_ratio` of the steps, the first of which already moves, then stays (constant), or
    falls to 0 along a line (linear) or half a cosine (cosine).
    """
    warmup = math.ceil(train.warmup_ratio * total)
    if step < warmup:
        return train.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    if train.schedule == "constant":
        return train.learning_rate
    if train.schedule == "linear":
        return train.learning_rate * (1 - done)
    return train.learning_rate * (1 + math.cos(math.pi * done)) / 2


def make_optimizer(train: TrainSection, parameters: Iterable[Parameter], device: torch.device) -> Any:
    """Make AdamW with betas 0.9 and 0.999 and epsilon 1e-8 (Loshchilov and Hutter 2019), torch's or bitsandbytes'.

    Raises:
        RecipeError: a paged optimizer without a GPU, whose memory it would page.
    """
    settings: dict[str, Any] = {
        "lr": train.learning_rate,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "weight_decay": train.weight_decay,
    }
    parameters = list(parameters)
    assert all(parameter.dtype == torch.float32 for parameter in parameters)  # 16-bit ones don't move at these rates
    if train.optimizer == "adamw":
        return torch.optim.AdamW(parameters, **settings, fused=True)
    if train.optimizer.startswith("paged") and device.type == "cpu":
        raise RecipeError(f"[train] optimizer: {train.optimizer} pages a GPU's memory, and this run is on the CPU")
    from bitsandbytes import optim

    kinds = {
        "adamw_8bit": optim.AdamW8bit,
        "paged_adamw": optim.PagedAdamW,
        "paged_adamw_8bit": optim.PagedAdamW8bit,
    }
    return kinds[train.optimizer](parameters, **settings)


def set_learning_rate(optimizer: Any, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def optimizer_tensors(optimizer: Any) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Copy the optimizer's state as tensors and plain numbers, named `<parameter's index>.<state's name>`."""
    _wait_for_device(optimizer)
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, float] = {}
    for index, state in optimizer.state_dict()["state"].items():
        for name, value in _flat(state):
            if isinstance(value, Tensor):
                tensors[f"{index}.{name}"] = value.detach().clone()  # bitsandbytes shares its maps between parameters
            else:
                numbers[f"{index}.{name}"] = value
    return tensors, numbers


def _flat(state: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Flatten a parameter's state: bitsandbytes nests its moments, to hide them from FSDP, and loads them unnested."""
    for name, value in state.items():
        if isinstance(value, dict):
            yield from value.items()
        else:
            yield name, value


def restore_optimizer(optimizer: Any, tensors: dict[str, Tensor], numbers: dict[str, float]) -> None:
    """Restore the state that `optimizer_tensors` copied."""
    state: dict[int, dict[str, Any]] = {}
    for key, value in [*tensors.items(), *numbers.items()]:
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    saved = {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
    if isinstance(optimizer, torch.optim.AdamW) or not optimizer.is_paged:
        optimizer.load_state_dict(saved)
        return
    optimizer.load_state_dict(saved, move_to_device=False)
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if isinstance(value, Tensor):
                values[name] = _placed(optimizer, parameter, name, value)


def _placed(optimizer: Any, parameter: Parameter, name: str, value: Tensor) -> Tensor:
    """Copy a restored tensor to where the paged optimizer would have made it.

    bitsandbytes 0.50 loads all state as plain device tensors, which never leave the GPU again and may not fit it.
    """
    if name not in ("state1", "state2"):
        return value.to(parameter.device)
    buffer: Tensor = optimizer.get_state_buffer(parameter, dtype=value.dtype)
    _wait_for_device(optimizer)  # which fills the buffer
    return buffer.copy_(value)


def _wait_for_device(optimizer: Any) -> None:
    """Wait for what the GPU has been given: the host reads and writes managed memory without a copy that would wait."""
    devices = {parameter.device for group in optimizer.param_groups for parameter in group["params"]}
    for device in devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)


def seed_step(seed: int, step: int) -> None:
    """Seed every generator for one optimizer step.

    qpref draws nothing from them there. What libraries or kernels draw depends on nothing before the step, so no
    generator's state has to be saved.
    """
    import numpy

    number = random.Random(f"{seed}/{step}").getrandbits(32)
    random.seed(number)
    numpy.random.seed(number)
    torch.manual_seed(number)
