"""Every loss that TRL has too against TRL's own trainer: the same tiny Llamas in float32, the same token ids.

TRL's number is its trainer's `compute_loss`. Ours is the plugin's loss on log-probabilities gathered here, sequence by
sequence and without padding, from the models' plain logits. Both the value and its gradient with respect to every
weight of the policy have to agree. Which configurations of TRL's compute which loss is in the losses' records
(`trl_cases`), how to call TRL in `qpref.testing.trl_trainers`. Deliberate differences have tests of their own, at the
end.
"""

from __future__ import annotations

import copy
import functools
import math
import random
from typing import Any

import pytest
import torch
from conftest import tiny_config
from torch import Tensor

from qpref.hooks import TrlCase
from qpref.hooks.manager import LOSS, PluginHost, installed_offers
from qpref.hooks.types import Loss
from qpref.records import LossOutput, PairedInputs, PairLogProbs, TokenLogProbs, UnpairedInputs
from qpref.testing.trl_trainers import PairedRow, UnpairedRow, batch_of, loss_types, trl_loss
from qpref.testing.trl_trainers import make_trainer as make_trl_trainer

VALUE_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4
HOST = PluginHost()
OURS = [offer.name for offer in installed_offers() if (offer.kind, offer.distribution) == (LOSS.prefix, "qpref")]


def record(name: str) -> Loss:
    return HOST.load(LOSS, name).record


def call(name: str, options: dict, inputs: PairedInputs | UnpairedInputs) -> LossOutput:
    loss = record(name)
    return loss.build(loss.options.model_validate(options))(inputs)


def token_ids(rng: random.Random, longest: int) -> list[int]:
    return [rng.randrange(256) for _ in range(rng.randint(1, longest))]


@functools.cache
def paired_rows() -> list[PairedRow]:
    """Prompts and responses of many lengths, among them 1."""
    rng = random.Random(0)
    rows = [PairedRow(token_ids(rng, 6), token_ids(rng, 12), token_ids(rng, 12)) for _ in range(5)]
    return [*rows, PairedRow([7], [8, 9, 10], [11])]


@functools.cache
def unpaired_rows() -> list[UnpairedRow]:
    """Both responses of each pair; `rotated` fills in the mismatched ones."""
    return [
        UnpairedRow(prompt, completion, [], label)
        for prompt, *pair in paired_rows()
        for completion, label in zip(pair, (True, False), strict=True)
    ]


@functools.cache
def models() -> tuple[Any, Any]:
    """A policy, and a reference near it. Nothing changes them.

    The seed makes kl positive on all unpaired rows and negative on the undesirable ones, and the pairs' order under the
    policy another one than under the reference.
    """
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    policy = AutoModelForCausalLM.from_config(tiny_config("llama", initializer_range=0.15))
    reference = copy.deepcopy(policy)
    torch.manual_seed(9)
    with torch.no_grad():
        for weight in reference.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.03)
    return policy.float(), reference.float()


def scores(model: Any, sequences: list[tuple[list[int], list[int]]]) -> TokenLogProbs:
    """Log-probabilities of what follows each context; nothing for an empty continuation."""
    values, squares = [], []
    for context, continuation in sequences:
        rows = model(torch.tensor([context + continuation])).logits[0, len(context) - 1 : -1].log_softmax(-1)
        values.append(rows.gather(1, torch.tensor(continuation, dtype=torch.long)[:, None])[:, 0])
        squares.append((2 * rows.detach()).logsumexp(-1))
    lengths = tuple(map(len, values))
    return TokenLogProbs(values=torch.cat(values), lengths=lengths, log_sum_squares=torch.cat(squares))


def pair_scores(model: Any, rows: list[PairedRow]) -> PairLogProbs:
    return PairLogProbs(
        chosen=scores(model, [(prompt, chosen) for prompt, chosen, _ in rows]),
        rejected=scores(model, [(prompt, rejected) for prompt, _, rejected in rows]),
        prompt=scores(model, [(prompt[:1], prompt[1:]) for prompt, *_ in rows]),
    )


def paired_inputs(policy: Any, reference: Any, rows: list[PairedRow]) -> PairedInputs:
    with torch.no_grad():
        of_reference = pair_scores(reference, rows)
    return PairedInputs(policy=pair_scores(policy, rows), reference=of_reference, margin=torch.zeros(len(rows)))


def rotated(rows: list[UnpairedRow]) -> list[UnpairedRow]:
    """Each row with the completion of the row before it as the mismatched one, as TRL pairs them."""
    return [row._replace(mismatched=rows[index - 1].completion) for index, row in enumerate(rows)]


def unpaired_inputs(policy: Any, reference: Any, rows: list[UnpairedRow]) -> UnpairedInputs:
    matched = [(row.prompt, row.completion) for row in rows]
    other = [(row.prompt, row.mismatched) for row in rotated(rows)]
    with torch.no_grad():
        of_reference = scores(reference, matched)
        mismatched = [scores(model, other) for model in (policy, reference)]
    desirable = [row.desirable for row in rows]
    return UnpairedInputs(
        policy=scores(policy, matched),
        reference=of_reference,
        mismatched_policy=mismatched[0],
        mismatched_reference=mismatched[1],
        desirable=torch.tensor(desirable),
        class_counts=(sum(desirable), len(desirable) - sum(desirable)),
    )


def gradient(loss: Tensor, model: Any) -> Tensor:
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    return torch.cat([piece.flatten() for piece in torch.autograd.grad(loss, weights)])


def make_trainer(kind: str, config: dict) -> Any:
    """TRL's trainer of a kind, on copies of the models."""
    return make_trl_trainer(f"{kind.upper()}Trainer", config, *map(copy.deepcopy, models()))


def theirs(kind: str, config: dict, rows: list) -> tuple[float, Tensor]:
    trainer = make_trainer(kind, config)
    loss = trl_loss(trainer, trainer.model, rotated(rows) if isinstance(rows[0], UnpairedRow) else rows)
    return loss.item(), gradient(loss, trainer.model)


def our_loss(name: str, options: dict, rows: list) -> tuple[float, Tensor]:
    policy, reference = models()
    inputs = (unpaired_inputs if isinstance(rows[0], UnpairedRow) else paired_inputs)(policy, reference, rows)
    loss = call(name, options, inputs).losses.mean()
    return loss.item(), gradient(loss, policy)


def assert_same(ours: tuple[float, Tensor], trl: tuple[float, Tensor]) -> None:
    assert math.isfinite(trl[0])
    assert trl[1].norm() > 1e-4
    assert ours[0] == pytest.approx(trl[0], rel=VALUE_TOLERANCE, abs=VALUE_TOLERANCE)
    assert (ours[1] - trl[1]).norm() <= GRADIENT_TOLERANCE * trl[1].norm()


def agreeing(alone: bool) -> list[Any]:
    """The cases of all losses that have to agree: on single examples alone, or on batches."""
    return [
        pytest.param(name, case, id=f"{name}-{'-'.join(map(str, case.options.values()))}".rstrip("-"))
        for name in OURS
        for case in record(name).trl_cases
        if not case.reason and (case.num_examples == 1) == alone
    ]


def assert_case(name: str, case: TrlCase, rows: list) -> None:
    trl = theirs(case.trainer.removesuffix("Trainer"), dict(case.config), rows)
    assert_same(our_loss(name, dict(case.options), rows), trl)


@pytest.mark.parametrize(("name", "case"), agreeing(alone=False))
def test_loss_is_trls(name, case):
    assert_case(name, case, unpaired_rows() if case.trainer == "KTOTrainer" else paired_rows())


@pytest.mark.parametrize("label", [True, False], ids=["desirable", "undesirable"])
@pytest.mark.parametrize("name", ["kto", "apo_zero_unpaired"])
def test_unpaired_loss_is_trls_on_a_single_class(name, label):
    for case in record(name).trl_cases:
        if not case.reason:
            assert_case(name, case, [row for row in unpaired_rows() if row.desirable == label])


# TRL averages these over the tokens of the whole batch, ours are per example: they agree at batch 1.
@pytest.mark.parametrize("row", paired_rows(), ids=lambda row: "-".join(str(len(part)) for part in row))
@pytest.mark.parametrize(("name", "case"), agreeing(alone=True))
def test_loss_with_a_token_mean_is_trls_at_batch_1(name, case, row):
    assert_case(name, case, [row])


# What TRL does otherwise.


def apart(ours: tuple[float, Tensor], trl: tuple[float, Tensor]) -> float:
    return abs(ours[0] - trl[0]) / abs(trl[0])


def test_every_loss_type_of_trls_dpo_trainer_is_compared():
    compared = {
        loss_type
        for name in OURS
        for case in record(name).trl_cases
        if case.trainer == "DPOTrainer"
        for loss_type in case.config.get("loss_type", [])
    }
    assert compared == loss_types("DPOTrainer")


@pytest.mark.parametrize("name", OURS)
def test_every_loss_has_a_case_that_agrees_for_each_that_differs(name):
    cases = record(name).trl_cases
    assert not cases or any(not case.reason for case in cases)
    for case in cases:
        if case.reason and case.same_as is not None:
            record(name).options.model_validate(case.same_as)


def test_trl_ignores_label_smoothing_under_its_dpo_and_ours_does_not():
    rows = paired_rows()
    trl = theirs("dpo", {"loss_type": ["sigmoid"], "label_smoothing": 0.2}, rows)
    assert_same(our_loss("dpo", {}, rows), trl)
    assert apart(our_loss("dpo", {"label_smoothing": 0.2}, rows), trl) > 0.01


def test_trl_has_no_reward_shift_under_bco():
    rows = paired_rows()
    trl = theirs("dpo", {"loss_type": ["bco_pair"]}, rows)
    assert apart(our_loss("bco_pair", {"baseline": "step"}, rows), trl) > 1e-4


def test_trl_averages_over_the_tokens_of_the_batch_and_ours_over_examples():
    rows = paired_rows()
    trl = theirs("dpo", {"loss_type": ["sft"]}, rows)
    chosen = pair_scores(models()[0], rows).chosen
    assert trl[0] == pytest.approx(-chosen.total.sum().item() / sum(chosen.lengths), rel=1e-5)
    assert our_loss("sft", {}, rows)[0] == pytest.approx(-chosen.mean.mean().item(), rel=1e-5)
    assert apart(our_loss("sft", {}, rows), trl) > 1e-4


def test_trl_takes_kl_from_each_micro_batch_and_ours_from_the_step():
    # kl is 0.3 on the desirable half, clamped to 0 on the other one, and 0.1 on both together.
    rows = sorted(unpaired_rows(), key=lambda row: row.desirable)
    halves = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    by_halves = [theirs("kto", {"beta": 0.5}, half)[0] for half in halves]
    ours = our_loss("kto", {"beta": 0.5}, rows)
    assert_same(ours, theirs("kto", {"beta": 0.5}, rows))
    assert ours[0] != pytest.approx(sum(by_halves) / 2, rel=1e-3)


def test_kl_of_the_rows_is_above_0_and_clamped_on_the_undesirable_ones():
    def kl(rows: list[UnpairedRow]) -> float:
        return call("kto", {}, unpaired_inputs(*models(), rows)).metrics["kl"][0].item()

    assert kl(unpaired_rows()) > 0.1
    assert kl([row for row in unpaired_rows() if row.desirable]) > 0.1
    assert kl([row for row in unpaired_rows() if not row.desirable]) == 0


def test_trl_weighs_classes_alike_by_default_and_ours_balances_them():
    # 6 desirable, 2 undesirable: ours takes the undesirable ones three times.
    rows = [row for row in unpaired_rows() if row.desirable] + [row for row in unpaired_rows() if not row.desirable][:2]
    assert_same(our_loss("kto", {}, rows), theirs("kto", {"undesirable_weight": 3.0}, rows))
    assert apart(our_loss("kto", {}, rows), theirs("kto", {}, rows)) > 0.1


def test_what_trl_logs_as_log_odds_ratio_is_its_log_sigmoid():
    rows = paired_rows()[:1]
    trainer = make_trainer("orpo", {})
    _, logged = trainer.get_batch_loss_metrics(trainer.model, batch_of("ORPOTrainer", rows))
    metrics = call("orpo", {}, paired_inputs(*models(), rows)).metrics
    assert metrics["log_odds_ratio"].item() == pytest.approx(logged["log_odds_chosen"], rel=1e-4)
    assert metrics["log_odds_ratio"].sigmoid().log().item() == pytest.approx(logged["log_odds_ratio"], rel=1e-4)
    assert metrics["nll"].item() == pytest.approx(logged["nll_loss"], rel=1e-5)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"):
        assert metrics[name].item() == pytest.approx(logged[name], rel=1e-4)


def flat(*values: float) -> tuple[Tensor, ...]:
    return tuple(torch.tensor([value], requires_grad=True) for value in values)


def one_token_inputs(chosen: Tensor, rejected: Tensor) -> PairedInputs:
    """One pair of responses of one token each, after a prompt of one token."""

    def single(value: Tensor) -> TokenLogProbs:
        return TokenLogProbs(values=value, lengths=(1,))

    return PairedInputs(
        policy=PairLogProbs(
            chosen=single(chosen),
            rejected=single(rejected),
            prompt=TokenLogProbs(values=torch.zeros(0), lengths=(0,)),
        ),
        reference=None,
        margin=torch.zeros(1),
    )


def test_trls_orpo_has_no_gradient_where_a_response_is_certain_and_ours_has():
    trainer = make_trainer("orpo", {})
    chosen, rejected = flat(0.0, -1.0)
    trainer.odds_ratio_loss(chosen, rejected)[0].sum().backward()
    assert not chosen.grad.isfinite().all()
    chosen, rejected = flat(0.0, -1.0)
    call("orpo", {}, one_token_inputs(chosen, rejected)).losses.sum().backward()
    assert chosen.grad.isfinite().all()
    assert rejected.grad.isfinite().all()


@pytest.mark.parametrize(
    ("name", "options", "config"),
    [
        ("discopop", {"beta": 2.0}, {"loss_type": ["discopop"], "beta": 2.0}),
        ("dpo", {"divergence": "forward_kl"}, {"f_divergence_type": "forward_kl"}),
    ],
    ids=["discopop", "forward_kl"],
)
def test_trl_overflows_where_the_chosen_response_has_become_improbable_and_ours_does_not(name, options, config):
    # Hundreds of nats below a reference that is certain of it.
    rng = random.Random(1)
    rows = [PairedRow([1], [rng.randrange(256) for _ in range(40)], [2])]
    trainer = make_trainer("dpo", config)
    trainer.precompute_ref_logps = True
    batch = batch_of("DPOTrainer", rows) | {"ref_chosen_logps": torch.zeros(1), "ref_rejected_logps": torch.zeros(1)}
    loss = trainer.compute_loss(trainer.model, batch)
    assert not gradient(loss, trainer.model).isfinite().all()
    policy = models()[0]
    certain = pair_scores(policy, rows)
    reference = PairLogProbs(
        chosen=TokenLogProbs(values=torch.zeros(40), lengths=(40,)),
        rejected=TokenLogProbs(values=torch.zeros(1), lengths=(1,)),
    )
    ours = call(name, options, PairedInputs(policy=certain, reference=reference, margin=torch.zeros(1))).losses.sum()
    assert ours.isfinite()
    assert gradient(ours, policy).isfinite().all()


def test_trls_alphapo_overflows_where_a_response_is_improbable_and_ours_does_not():
    trainer = make_trainer("cpo", {"loss_type": "alphapo", "alpha": 1.0})
    chosen, rejected = flat(-200.0, -1.0)
    trainer.cpo_loss(chosen, rejected)[0].sum().backward()
    assert not chosen.grad.isfinite().all()
    chosen, rejected = flat(-200.0, -1.0)
    call("alphapo", {"alpha": 1.0}, one_token_inputs(chosen, rejected)).losses.sum().backward()
    assert chosen.grad.isfinite().all()
