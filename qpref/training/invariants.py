"""First-batch checks of every run. Each of these faults has occurred silently in some trainer."""

from __future__ import annotations

import logging
import math
from array import array
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qpref.data.pack import num_fed_tokens, pack
from qpref.data.tokenize import PairTokenizer
from qpref.errors import DataError, DeviceMemoryError, PolicyError
from qpref.policy.architecture import causal_model, layers_after_decoder
from qpref.policy.forward_errors import naming_the_layer
from qpref.policy.logprobs import completion_logprobs, select_sequences
from qpref.policy.out_of_memory import fits
from qpref.policy.policy import Policy
from qpref.policy.reference import as_start, frozen
from qpref.records import ListInputs, PackedBatch, TokenizedExample, TokenLogProbs
from qpref.training.inputs import Inputs, Mismatched
from qpref.training.loss_caller import LossCaller
from qpref.training.objective import Objective
from qpref.training.sharing_check import LAYOUT_TOLERANCE, excess, own_rows, sharing_fault

log = logging.getLogger("qpref")

LOGITS_TOLERANCE = 0.1
"""Nats by which log-probabilities may differ in 16-bit dtypes, as a mean over tokens, between our head and the model's
own logits, which it rounds to 16 bits (0.03 measured)."""
START_TOLERANCE = 1e-4
SHORTER = "lower [data] max_length, or take a smaller base; `qpref plan` says what needs how much"
CHECKED_PROMPT, CHECKED_RESPONSE = 16, 8
"""Tokens of the first pair that are compared with the model's own logits, and whose gradients are checked."""


def check_first_row(tokenizer: PairTokenizer, example: TokenizedExample) -> None:
    """S4: log the first row as the model sees it, and refuse a broken template.

    Raises:
        DataError: BOS occurs twice, or a response doesn't end in a stop token.
    """
    log.info("first row, scored spans in ⟦ ⟧:\n%s", tokenizer.render_first(example))
    bos = tokenizer.tokenizer.bos_token_id
    first, second = [*example.prompt, -1, -1][:2]
    if bos is not None and first == second == bos:
        raise DataError(f"{example.source}: the prompt starts with BOS twice", "fix the chat template")
    for branch, cut in zip(example.branches, example.truncated, strict=True):
        if not cut and branch[-1] not in tokenizer.stop_tokens:
            raise DataError(f"{example.source}: a response doesn't end in a stop token", "fix the chat template")


def check_layout(policy: Policy, example: TokenizedExample) -> None:
    """Compare packed log-probabilities with the model's own logits on one pair, and choose an attention path.

    The first sharing path without a fault is used; without one, prompts are computed once for each response.

    Raises:
        PolicyError: even whole rows differ: the model changes its logits in a way that qpref doesn't support.
        DeviceMemoryError: not even a few tokens fit.
    """
    _with_fitting(policy, [example], lambda examples: _choose_path(policy, examples[0]))


def _choose_path(policy: Policy, example: TokenizedExample) -> None:
    batch, short = (pack([each], policy.device) for each in (example, shortened(example)))
    with frozen(policy):
        policy.use_attention(policy.own_attention)
        rows = own_rows(policy, batch, short)
        own = completion_logprobs(policy, short).values
        if not bool(own.isfinite().all()):
            raise PolicyError(
                "the base's log-probabilities aren't finite: its weights hold NaN or infinity, or overflow",
                'take another copy of the base, or set [model] dtype to "bf16" or "float32"',
            )
        _refuse_reading_ahead(policy, short, own)
        if reason := excess(own, _plain_logprobs(policy, short.examples[0]), policy, LOGITS_TOLERANCE):
            raise PolicyError(
                f"log-probabilities differ from the model's own logits: {reason}", _unknown_head(policy.plain_model)
            )
        for path in policy.sharing_paths:
            reason = sharing_fault(policy, path, batch, short, rows)
            if reason is None:
                log.info("attention: %s, each prompt computed once", path)
                return
            if path == policy.sharing_paths[-1]:
                log.warning("prompts are computed once for each response, not once a pair: %s", reason)
            else:
                log.warning("attention %s is not used: %s", path, reason)
        policy.use_attention(policy.own_attention)


def _unknown_head(model: Any) -> str:
    """Say what the model does to its hidden states or logits that isn't known."""
    if between := layers_after_decoder(model):
        return f"this architecture has layers between its decoder and its head ({', '.join(between)}); train another"
    return "this architecture changes its logits in a way that qpref doesn't know; please report it"


def _refuse_reading_ahead(policy: Policy, batch: PackedBatch, own: Tensor) -> None:
    """Refuse a model whose log-probabilities depend on later tokens, as an encoder's do.

    Args:
        own: the batch's log-probabilities; those before each response's last two tokens are compared with the ones
            beside another second-to-last token.
    """
    examples = [replace(each, branches=tuple(map(_with_another_end, each.branches))) for each in batch.examples]
    changed = completion_logprobs(policy, pack(examples, policy.device)).values
    before, after = (torch.cat([part[:-2] for part in values.split(list(batch.lengths))]) for values in (own, changed))
    if before.numel() and excess(before, after, policy, LOGITS_TOLERANCE):
        kind = policy.plain_model.config.model_type
        raise PolicyError(
            f"this {kind} model sees later tokens when it predicts one: it is an encoder, or isn't set up to decode",
            "train a causal language model; some of these kinds are one with is_decoder = true in config.json",
        )


def _with_another_end(branch: array[int]) -> array[int]:
    """Change the last token that the model is fed."""
    return branch if len(branch) < 3 else branch[:-2] + array("i", [int(branch[-2] == 0)]) + branch[-1:]


def check_company(policy: Policy, examples: Sequence[TokenizedExample]) -> None:
    """Compare log-probabilities of the first and the shortest example beside the longest with those of each response
    alone; where they differ, each response becomes a pass of its own.

    Raises:
        PolicyError: they differ even so, because earlier passes change later ones.
        DeviceMemoryError: not even a few tokens fit.
    """
    by_length = sorted(examples, key=lambda example: num_fed_tokens(example, shared=False))
    longest = by_length[-1]
    others = {id(each): each for each in (examples[0], by_length[0]) if each is not longest}
    if others:
        _with_fitting(policy, [*others.values(), longest], lambda members: _check_company(policy, members))


def _check_company(policy: Policy, members: Sequence[TokenizedExample]) -> None:
    """Compare all members but the last, or a single one, beside the last and alone."""
    path, batch = policy.attention, pack(members, policy.device)
    with frozen(policy):
        beside = completion_logprobs(policy, batch).values
        policy.use_attention(policy.own_attention)
        policy.isolates_rows = True
        alone = torch.cat(
            [completion_logprobs(policy, pack([each], policy.device)).values for each in members[:-1] or members]
        )
        reason = excess(beside[: len(alone)], alone, policy, LAYOUT_TOLERANCE)
        if reason is None:
            policy.isolates_rows = False
            policy.use_attention(path)
            return
        log.warning(
            "log-probabilities of a response depend on what is computed beside it (%s): each response is a pass of its "
            "own, under the model's own attention", reason,
        )  # fmt: skip
        completion_logprobs(policy, pack(members[-1:], policy.device))
        after = completion_logprobs(policy, pack(members[:1], policy.device)).values
        if reason := excess(after, alone[: len(after)], policy, LAYOUT_TOLERANCE):
            raise PolicyError(
                f"log-probabilities of a response depend on the passes before it: {reason}",
                "this architecture keeps a state between passes that qpref doesn't know; please report it",
            )


def _with_fitting(
    policy: Policy, examples: Sequence[TokenizedExample], check: Callable[[Sequence[TokenizedExample]], None]
) -> None:
    """Run a check on the examples; on fewer, then on shorter ones where memory runs out.

    Raises:
        DeviceMemoryError: not even a few tokens fit; or all do, but not in each of the processes that share a base.
    """
    while not _passes(policy, partial(check, examples)):
        policy.refuse_repeating("in the checks before training", SHORTER)
        smaller = _fewer_or_shorter(examples)
        if smaller is None:
            raise DeviceMemoryError(
                "the device ran out of memory in the checks before training, on a few tokens",
                "take a smaller base; `qpref plan` says what needs how much",
            )
        examples = smaller
        tokens = sum(num_fed_tokens(example, policy.shares_prompts) for example in examples)
        log.warning("out of memory: a check before training is repeated on %d tokens", tokens)


def _passes(policy: Policy, check: Callable[[], None]) -> bool:
    with naming_the_layer(policy.plain_model):
        return fits(check)


def _fewer_or_shorter(examples: Sequence[TokenizedExample]) -> Sequence[TokenizedExample] | None:
    """Halve the examples, then the length of the last one; None where it is as short as a check needs."""
    if len(examples) > 1:
        return examples[: len(examples) // 2]
    example, shortest = examples[0], shortened(examples[0])
    if example == shortest:
        return None
    prompt = max(CHECKED_PROMPT, len(example.prompt) // 2)
    response = max(CHECKED_RESPONSE, *(len(branch) // 2 for branch in example.branches))
    return [_cut(example, prompt, response)]


def shortened(example: TokenizedExample) -> TokenizedExample:
    """Cut an example to lengths at which a pass with gradients takes less memory than training.

    The checks run in eval mode, in which no layer recomputes its activations.
    """
    return _cut(example, CHECKED_PROMPT, CHECKED_RESPONSE)


def _cut(example: TokenizedExample, prompt: int, response: int) -> TokenizedExample:
    """Keep so many tokens at most: the end of the prompt, the start of each response; all of them are scored."""
    branches = tuple(branch[:response] for branch in example.branches)
    return replace(example, prompt=example.prompt[-prompt:], branches=branches, masks=())


def _plain_logprobs(policy: Policy, example: TokenizedExample) -> Tensor:
    """Compute [S] log-probabilities from the model's own logits, one row for each branch, under its own attention."""
    model = causal_model(policy.plain_model)
    pieces = []
    for branch in example.branches:
        ids = torch.tensor([[*example.prompt, *branch]], device=policy.device)
        with policy.autocast():
            logits = model(input_ids=ids, use_cache=False, logits_to_keep=len(branch) + 1).logits[0]
        logits = logits[-len(branch) - 1 : -1]  # some models ignore logits_to_keep
        pieces.append(logits.float().log_softmax(-1).gather(1, ids[0, -len(branch) :, None]).squeeze(1))
    return torch.cat(pieces)


def check_start(policy: Policy, objective: Objective, batch: PackedBatch) -> None:
    """S1: check that the policy is what it starts from before the first step, and that each loss starts where its paper
    says if that is its reference.

    Both are computed in one layout, so only a real difference shows; the policy in training mode, with a graph and
    recomputed layers as in a step, but without LoRA's dropout, which the reference doesn't have.

    Raises:
        PolicyError: they differ, because the model is random or the reference is not what the policy starts from; or a
            loss starts elsewhere.
        DeviceMemoryError: not even a few tokens fit.
    """

    def check(examples: Sequence[TokenizedExample]) -> None:
        _check_start(policy, objective, batch if examples is batch.examples else pack(examples, policy.device))

    _with_fitting(policy, batch.examples, check)


def _check_start(policy: Policy, objective: Objective, batch: PackedBatch) -> None:
    with frozen(policy):
        scores = _scores_as_in_training(policy, objective, batch)
        with as_start(policy):
            reference = completion_logprobs(policy, batch)
        difference = _largest_difference(scores, reference)
        if not difference <= START_TOLERANCE:
            again = _largest_difference(_scores_as_in_training(policy, objective, batch), scores)
            raise _unlike_reference(difference, again)
        _refuse_repacked_weights(policy)
        inputs = _start_inputs(objective, batch, scores, reference)
        for caller in objective.callers:
            _check_starting_loss(caller, inputs)


def _scores_as_in_training(policy: Policy, objective: Objective, batch: PackedBatch) -> TokenLogProbs:
    policy.train_without_dropout()
    with torch.enable_grad():
        scores = objective.score(policy, batch)
    policy.model.eval()
    return replace(scores, values=scores.values.detach())


def _largest_difference(scores: TokenLogProbs, other: TokenLogProbs) -> float:
    """Return the largest difference of the tokens that both have, nats."""
    count = min(len(scores.values), len(other.values))
    return float((scores.values[:count] - other.values[:count]).abs().max())


def _unlike_reference(difference: float, again: float) -> PolicyError:
    """Say why policy and reference differ.

    Args:
        again: the policy's difference from itself in a second pass.
    """
    if again > START_TOLERANCE:
        return PolicyError(
            f"two passes of the model over the same batch differ by {again:.4f} nats on a token: it draws random "
            "numbers in eval mode too",
            "train another model, or report this one",
        )
    return PolicyError(
        f"before training, policy and reference differ by {difference:.4f} nats on a token",
        "an adapter that is not fresh has to be named in [adapter] start",
    )


def _start_inputs(objective: Objective, batch: PackedBatch, scores: TokenLogProbs, reference: TokenLogProbs) -> Inputs:
    """Lay out the inputs without margins and with balanced classes, on which a loss starts at its constant."""
    balanced = replace(objective, class_counts=(1, 1))
    level = replace(batch, margin=torch.zeros_like(batch.margin))
    mismatched = None
    if objective.needs_mismatched:
        own, partners = slice(0, None, 2), slice(1, None, 2)
        mismatched = Mismatched(select_sequences(scores, partners), select_sequences(reference, partners))
        scores, reference = select_sequences(scores, own), select_sequences(reference, own)
    return balanced.inputs(level, scores, reference, mismatched)


def _check_starting_loss(caller: LossCaller, inputs: Inputs) -> None:
    expected = caller.starts_at()
    if expected is None:
        return
    losses = caller(inputs).losses.tolist()
    sizes = inputs.sizes if isinstance(inputs, ListInputs) else (2,) * len(losses)
    for value in (value for value, size in zip(losses, sizes, strict=True) if size == 2):  # a longer list's is another
        if not math.isclose(value, expected, rel_tol=START_TOLERANCE, abs_tol=START_TOLERANCE):
            offer = caller.choice.plugin.offer
            raise PolicyError(f"before training, an example's loss is {value:.6f}; {offer} says {expected:.6f}")


def _refuse_repacked_weights(policy: Policy) -> None:
    for name, module in policy.model.named_modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            raise PolicyError(f"bitsandbytes has repacked the weights of {name}, which then have no gradient")


def first_batch(examples: Sequence[TokenizedExample], policy: Policy) -> PackedBatch:
    """Pack the batch that the checks run on: the two shortest prompts of the first step, so that they cost little."""
    return pack(sorted(examples, key=lambda example: len(example.prompt))[:2], policy.device)
