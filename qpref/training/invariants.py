"""What every run checks on its first batch. Each of these has gone wrong in some trainer without a word."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qpref.attention.register import COMPARED, SEGMENTS, CannotShareError, register_comparison
from qpref.data.pack import pack
from qpref.data.tokenize import PairTokenizer
from qpref.errors import DataError, PolicyError
from qpref.policy.logprobs import completion_logprobs, select_sequences
from qpref.policy.policy import Policy
from qpref.policy.reference import as_reference, frozen
from qpref.records import PackedBatch, TokenizedExample
from qpref.training.inputs import Mismatched
from qpref.training.objective import Objective

log = logging.getLogger("qpref")

FLOAT32_TOLERANCE = 1e-3
"""Nats by which a token's log-probability may differ between two ways to compute it in float32."""
LAYOUT_TOLERANCE = 0.1
"""The same in 16-bit types, as a mean over tokens, between two batch layouts (0.04 measured on SmolLM2-135M)."""
LOGITS_TOLERANCE = 0.1
"""The same between our head and the model's own logits, which it rounds to 16 bits (0.03 measured)."""
KERNEL_TOLERANCE = 0.05
"""Relative difference of a layer's attention and its gradients between two kernels in 16-bit types (0.008 measured on
SmolLM2-135M). Through all layers rounding adds up: there gradients are 6 to 8 % off those in float32 by any path."""
START_TOLERANCE = 1e-4


def check_first_row(tokenizer: PairTokenizer, example: TokenizedExample) -> None:
    """S4: show the first row as the model meets it, and refuse what no template should make.

    Raises:
        DataError: BOS stands twice, or a response doesn't end in one stop token.
    """
    log.info("first row, scored spans in ⟦ ⟧:\n%s", tokenizer.render_first(example))
    bos = tokenizer.tokenizer.bos_token_id
    first, second = [*example.prompt, -1, -1][:2]
    if bos is not None and first == second == bos:
        raise DataError(f"{example.source}: the prompt starts with BOS twice", "mend the chat template")
    for branch, cut in zip(example.branches, example.truncated, strict=True):
        if not cut and branch[-1] not in tokenizer.stop_tokens:
            raise DataError(f"{example.source}: a response doesn't end in a stop token", "mend the chat template")


def check_layout(policy: Policy, example: TokenizedExample) -> None:
    """Compare the packed computation with the model's own logits on one pair, and fall back where sharing is wrong.

    Raises:
        PolicyError: even whole rows differ: the model does something to its logits that qpref doesn't know.
    """
    batch = pack([example], policy.device)
    with frozen(policy):
        policy.use_attention(policy.own_attention)
        rows = completion_logprobs(policy, batch).values
        if reason := _difference(rows, _plain_logprobs(policy, example), policy, LOGITS_TOLERANCE):
            raise PolicyError(
                f"log-probabilities differ from the model's own logits: {reason}",
                "this architecture changes its logits in a way that qpref doesn't know; please report it",
            )
        for path in policy.sharing_paths:
            reason = _sharing_fault(policy, path, batch, rows)
            if reason is None:
                log.info("attention: %s, each prompt computed once", path)
                return
            if path == policy.sharing_paths[-1]:
                log.warning("prompts are computed once for each response, not once a pair: %s", reason)
            else:
                log.warning("attention %s is not used: %s", path, reason)
        policy.use_attention(policy.own_attention)


def _sharing_fault(policy: Policy, path: str, batch: PackedBatch, rows: Tensor) -> str | None:
    """What is wrong with a sharing path, which is then in use; None where its values and its gradients are right."""
    try:
        policy.use_attention(path)
        values = completion_logprobs(policy, batch).values
        if reason := _difference(values, rows, policy, LAYOUT_TOLERANCE):
            return f"sharing a prompt changes log-probabilities: {reason}"
        slope = _grad_of_second(policy, batch)
        group = batch.groups[0]
        first = group.start + group.prompt
        if bool(slope[first : first + group.branches[0]].any()):
            return "one response sees the other"
        return None if path == SEGMENTS else _kernel_fault(policy, batch)
    except CannotShareError as error:
        return str(error)
    except (RuntimeError, ImportError, ValueError, TypeError) as error:
        if isinstance(error, torch.OutOfMemoryError) or path == SEGMENTS:
            raise
        reason, _, _ = str(error).strip().partition("\n")
        return f"{type(error).__name__}: {reason}"


def _kernel_fault(policy: Policy, batch: PackedBatch) -> str | None:
    """What is wrong with a kernel, by the plain path in each layer."""
    path = policy.attention
    apart = register_comparison(path)
    policy.use_attention(COMPARED)
    completion_logprobs(policy, batch)
    policy.use_attention(path)
    worst = max(apart, key=lambda each: (math.isnan(each), each))
    return None if worst <= KERNEL_TOLERANCE else f"a layer's result or gradients are off by {worst:.1%}"


def _grad_of_second(policy: Policy, batch: PackedBatch) -> Tensor:
    """[T, width] float32: how the second response's score depends on each token's embedding. Exactly 0 at the first
    response's tokens says that it doesn't see them; the scores themselves may move by rounding, where a mixture's
    experts compute other tokens beside them."""
    embedded: list[Tensor] = []

    def catch(*call: Any) -> None:
        embedded.append(call[-1].requires_grad_())

    hook = policy.decoder.get_input_embeddings().register_forward_hook(catch)
    try:
        with torch.enable_grad():
            values = completion_logprobs(policy, batch).values
            (slope,) = torch.autograd.grad(values[batch.lengths[0] :].sum(), embedded[0])
    finally:
        hook.remove()
    return slope[0].float()


def _difference(values: Tensor, expected: Tensor, policy: Policy, low_precision_tolerance: float) -> str | None:
    apart = (values - expected).abs()
    if policy.dtype == torch.float32:
        worst = apart.max().item()
        return None if worst <= FLOAT32_TOLERANCE else f"a token's is {worst:.4f} nats off"
    mean = apart.mean().item()
    return None if mean <= low_precision_tolerance else f"they are {mean:.3f} nats a token off on average"


def _plain_logprobs(policy: Policy, example: TokenizedExample) -> Tensor:
    """[S] from the model's own forward pass and logits, one row for each branch; the model's own attention is on."""
    model = policy.plain_model
    pieces = []
    for branch in example.branches:
        ids = torch.tensor([[*example.prompt, *branch]], device=policy.device)
        with policy.autocast():
            logits = model(input_ids=ids, use_cache=False, logits_to_keep=len(branch) + 1).logits[0, :-1]
        pieces.append(logits.float().log_softmax(-1).gather(1, ids[0, -len(branch) :, None]).squeeze(1))
    return torch.cat(pieces)


def check_start(policy: Policy, objective: Objective, batch: PackedBatch) -> None:
    """S1: before the first step policy and reference are the same, and the loss stands where its paper says.

    Both are computed in one layout, so only a real difference shows.

    Raises:
        PolicyError: they differ, so the reference is not what the policy starts from.
    """
    with frozen(policy):
        scores = objective.score(policy, batch)
        with as_reference(policy):
            reference = completion_logprobs(policy, batch)
        apart = (scores.values[: len(reference.values)] - reference.values).abs().max().item()
        if not apart <= START_TOLERANCE:
            raise PolicyError(
                f"before training, policy and reference differ by {apart:.4f} nats on a token",
                "an adapter that is not fresh has to be named in [adapter] start",
            )
        _refuse_repacked_weights(policy)
        balanced = replace(objective, class_counts=(1, 1))
        level = replace(batch, margin=torch.zeros_like(batch.margin))
        mismatched = None
        if objective.needs_mismatched:
            own, partners = slice(0, None, 2), slice(1, None, 2)
            mismatched = Mismatched(select_sequences(scores, partners), select_sequences(reference, partners))
            scores, reference = select_sequences(scores, own), select_sequences(reference, own)
        inputs = balanced.inputs(level, scores, reference, mismatched)
        for caller in objective.callers:
            wanted = caller.starts_at()
            if wanted is None:
                continue
            for value in caller(inputs).losses.tolist():
                if not math.isclose(value, wanted, rel_tol=START_TOLERANCE, abs_tol=START_TOLERANCE):
                    offer = caller.choice.plugin.offer
                    raise PolicyError(f"before training, an example's loss is {value:.6f}; {offer} says {wanted:.6f}")


def _refuse_repacked_weights(policy: Policy) -> None:
    from bitsandbytes.nn import Linear4bit

    for name, module in policy.model.named_modules():
        if isinstance(module, Linear4bit) and getattr(module.weight.quant_state, "packing_format_for_cpu", False):
            raise PolicyError(f"bitsandbytes has repacked the weights of {name}, which then have no gradient")


def check_gradients(policy: Policy) -> None:
    """S2: after the first backward pass every B matrix has a gradient (A's is 0 while B is).

    Raises:
        PolicyError: some have none: those layers would stay untrained without a word.
    """
    names, norms = [], []
    for name, parameter in policy.trained_parameters().items():
        if "lora_B" in name:
            names.append(name)
            norms.append(
                torch.zeros((), device=policy.device) if parameter.grad is None else parameter.grad.abs().amax()
            )
    dead = [name for name, norm in zip(names, torch.stack(norms).tolist(), strict=True) if norm == 0]
    if dead:
        raise PolicyError(
            f"{len(dead)} of {len(names)} adapted layers get no gradient, the first is {dead[0]}",
            "take them out of [adapter] targets, or report the model",
        )


def first_batch(examples: Sequence[TokenizedExample], policy: Policy) -> PackedBatch:
    """The batch that the checks run on: the shortest few of the first step's examples, so that they cost little."""
    return pack(sorted(examples, key=lambda example: len(example.prompt))[:2], policy.device)
