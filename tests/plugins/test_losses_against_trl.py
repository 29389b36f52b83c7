"""Every loss that TRL 1.16 has too against TRL's own trainer: the same tiny Llamas in float32, the same token ids.

TRL's number is its trainer's `compute_loss`. Ours is the plugin's loss on log-probabilities gathered here, sequence by
sequence and without padding, from the models' plain logits. Both the value and its gradient with respect to every
weight of the policy have to agree. What TRL does otherwise stands in tests of its own, at the end.
"""

from __future__ import annotations

import copy
import functools
import importlib
import math
import random
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import make_tokenizer, tiny_config
from torch import Tensor

from qpref.hooks.types import Loss
from qpref.records import LossOutput, PairedInputs, PairLogProbs, TokenLogProbs, UnpairedInputs

PACKAGES = ("dpo", "ipo", "orpo", "kto", "margin", "anchored", "aot", "free")
VALUE_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4
PairedRow = tuple[list[int], list[int], list[int]]
UnpairedRow = tuple[list[int], list[int], bool]


@functools.cache
def record(name: str) -> Loss:
    offers = (importlib.import_module(f"qpref_loss_{package}").qpref_losses() for package in PACKAGES)
    (found,) = (loss for losses in offers for loss in losses if loss.name == name)
    return found


def call(name: str, options: dict, inputs: PairedInputs | UnpairedInputs) -> LossOutput:
    loss = record(name)
    return loss.build(loss.options.model_validate(options))(inputs)


def token_ids(rng: random.Random, longest: int) -> list[int]:
    return [rng.randrange(256) for _ in range(rng.randint(1, longest))]


@functools.cache
def paired_rows() -> list[PairedRow]:
    """Prompts and responses of many lengths, among them 1."""
    rng = random.Random(0)
    rows = [(token_ids(rng, 6), token_ids(rng, 12), token_ids(rng, 12)) for _ in range(5)]
    return [*rows, ([7], [8, 9, 10], [11])]


@functools.cache
def unpaired_rows() -> list[UnpairedRow]:
    rows = paired_rows()
    return [
        (prompt, completion, label)
        for prompt, *pair in rows
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


def rotated(rows: list[UnpairedRow]) -> list[tuple[list[int], list[int]]]:
    """Each prompt with the completion of the example before it, as TRL pairs them."""
    return [(row[0], rows[place - 1][1]) for place, row in enumerate(rows)]


def unpaired_inputs(policy: Any, reference: Any, rows: list[UnpairedRow]) -> UnpairedInputs:
    matched = [(prompt, completion) for prompt, completion, _ in rows]
    with torch.no_grad():
        of_reference = scores(reference, matched)
        mismatched = [scores(model, rotated(rows)) for model in (policy, reference)]
    desirable = [label for *_, label in rows]
    return UnpairedInputs(
        policy=scores(policy, matched),
        reference=of_reference,
        mismatched_policy=mismatched[0],
        mismatched_reference=mismatched[1],
        desirable=torch.tensor(desirable),
        class_counts=(sum(desirable), len(desirable) - sum(desirable)),
    )


def make_trainer(kind: str, config: dict, folder: Any) -> Any:
    """TRL's trainer of a kind, on copies of the models; the data that it is made with are never used."""
    import datasets
    from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    trainer_class, config_class = {
        "dpo": (DPOTrainer, DPOConfig),
        "kto": (KTOTrainer, KTOConfig),
        "orpo": (ORPOTrainer, ORPOConfig),
        "cpo": (CPOTrainer, CPOConfig),
    }[kind]
    datasets.disable_progress_bars()
    dummy = {"prompt": "a", "chosen": "b", "rejected": "c"}
    if kind == "kto":
        dummy = {"prompt": "a", "completion": "b", "label": True}
    policy, reference = map(copy.deepcopy, models())
    settings = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "remove_unused_columns": False,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "max_length": 512,
    }
    return trainer_class(
        model=policy,
        args=config_class(**settings | config),
        train_dataset=datasets.Dataset.from_list([dummy] * 2),
        processing_class=make_tokenizer(),
        **({"ref_model": reference} if kind in ("dpo", "kto") else {}),
    )


def dpo_batch(trainer: Any, rows: list[PairedRow]) -> dict:
    return trainer.data_collator(
        [{"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected} for prompt, chosen, rejected in rows]
    )


def kto_batch(trainer: Any, rows: list[UnpairedRow]) -> dict:
    return trainer.data_collator(
        [
            {"prompt_ids": prompt, "completion_ids": completion, "KL_completion_ids": other, "label": label}
            for (prompt, completion, label), (_, other) in zip(rows, rotated(rows), strict=True)
        ]
    )


def concatenated_batch(trainer: Any, rows: list[PairedRow]) -> dict:
    """As the CPO and ORPO trainers tokenize: prompt and response together, the prompt masked in the labels."""
    examples = []
    for prompt, *pair in rows:
        example: dict[str, list[int]] = {"prompt_input_ids": prompt, "prompt_attention_mask": [1] * len(prompt)}
        for side, response in zip(("chosen", "rejected"), pair, strict=True):
            example[f"{side}_input_ids"] = prompt + response
            example[f"{side}_attention_mask"] = [1] * len(prompt + response)
            example[f"{side}_labels"] = [-100] * len(prompt) + response
        examples.append(example)
    return trainer.data_collator(examples)


BATCH: dict[str, Callable] = {
    "dpo": dpo_batch,
    "kto": kto_batch,
    "orpo": concatenated_batch,
    "cpo": concatenated_batch,
}


def gradient(loss: Tensor, model: Any) -> Tensor:
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    return torch.cat([piece.flatten() for piece in torch.autograd.grad(loss, weights)])


def trl_loss(kind: str, config: dict, rows: list, folder: Any) -> tuple[float, Tensor]:
    trainer = make_trainer(kind, config, folder)
    loss = trainer.compute_loss(trainer.model, BATCH[kind](trainer, rows))
    return loss.item(), gradient(loss, trainer.model)


def our_loss(name: str, options: dict, rows: list) -> tuple[float, Tensor]:
    policy, reference = models()
    inputs = (unpaired_inputs if isinstance(rows[0][2], bool) else paired_inputs)(policy, reference, rows)
    loss = call(name, options, inputs).losses.mean()
    return loss.item(), gradient(loss, policy)


def assert_same(ours: tuple[float, Tensor], trl: tuple[float, Tensor]) -> None:
    assert math.isfinite(trl[0])
    assert trl[1].norm() > 1e-4
    assert ours[0] == pytest.approx(trl[0], rel=VALUE_TOLERANCE, abs=VALUE_TOLERANCE)
    assert (ours[1] - trl[1]).norm() <= GRADIENT_TOLERANCE * trl[1].norm()


def ids(cases: list[tuple[str, dict, dict]]) -> list[str]:
    return [f"{name}-{'-'.join(map(str, options.values()))}".rstrip("-") for name, options, _ in cases]


DPO_CASES: list[tuple[str, dict, dict]] = [
    ("dpo", {"beta": 0.3}, {"loss_type": ["sigmoid"], "beta": 0.3}),
    ("dpo", {"divergence": "forward_kl"}, {"f_divergence_type": "forward_kl"}),
    ("dpo", {"divergence": "js"}, {"f_divergence_type": "js_divergence"}),
    (
        "dpo",
        {"divergence": "alpha", "alpha": 0.3},
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3},
    ),
    ("dpo", {"ld_alpha": 0.4}, {"ld_alpha": 0.4}),
    ("dpo", {"wpo": True}, {"use_weighting": True}),
    ("ipo", {"beta": 0.3}, {"loss_type": ["ipo"], "beta": 0.3}),
    ("hinge", {"beta": 0.3}, {"loss_type": ["hinge"], "beta": 0.3}),
    ("robust", {"label_smoothing": 0.2}, {"loss_type": ["robust"], "label_smoothing": 0.2}),
    ("exo_pair", {"label_smoothing": 0.01}, {"loss_type": ["exo_pair"], "label_smoothing": 0.01}),
    ("discopop", {"beta": 0.05}, {"loss_type": ["discopop"], "beta": 0.05}),
    ("discopop", {"beta": 0.1, "tau": 0.2}, {"loss_type": ["discopop"], "discopop_tau": 0.2}),
    ("sigmoid_norm", {"beta": 5.0}, {"loss_type": ["sigmoid_norm"], "beta": 5.0}),
    ("nca_pair", {"beta": 0.3}, {"loss_type": ["nca_pair"], "beta": 0.3}),
    ("sppo_hard", {"beta": 0.3}, {"loss_type": ["sppo_hard"], "beta": 0.3}),
    ("bco_pair", {"beta": 0.3}, {"loss_type": ["bco_pair"], "beta": 0.3}),
    ("apo_zero", {"beta": 0.3}, {"loss_type": ["apo_zero"], "beta": 0.3}),
    ("apo_down", {"beta": 0.3}, {"loss_type": ["apo_down"], "beta": 0.3}),
    ("aot", {"beta": 0.3}, {"loss_type": ["aot"], "beta": 0.3}),
    ("aot", {"label_smoothing": 0.2}, {"loss_type": ["aot"], "label_smoothing": 0.2}),
    ("aot_unpaired", {"beta": 0.3}, {"loss_type": ["aot_unpaired"], "beta": 0.3}),
    ("aot_unpaired", {"label_smoothing": 0.2}, {"loss_type": ["aot_unpaired"], "label_smoothing": 0.2}),
]


@pytest.mark.parametrize(("name", "options", "config"), DPO_CASES, ids=ids(DPO_CASES))
def test_paired_loss_is_trls(name, options, config, tmp_path):
    rows = paired_rows()
    assert_same(our_loss(name, options, rows), trl_loss("dpo", config, rows, tmp_path))


# TRL averages these over the tokens of the whole batch, ours are per example: they agree at batch 1.
TOKEN_MEAN_CASES: list[tuple[str, dict, dict]] = [
    ("orpo", {"beta": 0.1}, {"beta": 0.1}),
    ("orpo", {"beta": 1.0}, {"beta": 1.0}),
    ("cpo", {"beta": 0.3, "alpha": 0.5}, {"beta": 0.3, "cpo_alpha": 0.5}),
    ("cpo", {"label_smoothing": 0.2}, {"label_smoothing": 0.2}),
    ("sft", {}, {"loss_type": ["sft"]}),
    ("rpo", {"beta": 0.3, "alpha": 0.5}, {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5], "beta": 0.3}),
    ("simpo", {"beta": 2.0, "gamma": 0.5, "alpha": 1.0}, {"loss_type": "simpo", "beta": 2.0}),
]


@pytest.mark.parametrize("row", paired_rows(), ids=lambda row: "-".join(str(len(part)) for part in row))
@pytest.mark.parametrize(("name", "options", "config"), TOKEN_MEAN_CASES, ids=ids(TOKEN_MEAN_CASES))
def test_loss_with_a_token_mean_is_trls_at_batch_1(name, options, config, row, tmp_path):
    kind = {"orpo": "orpo", "cpo": "cpo", "simpo": "cpo"}.get(name, "dpo")
    assert_same(our_loss(name, options, [row]), trl_loss(kind, config, [row], tmp_path))


CPO_CASES: list[tuple[str, dict, dict]] = [
    ("cpo", {"alpha": 0.0}, {"cpo_alpha": 0.0}),
    ("simpo", {"beta": 2.0, "gamma": 1.0}, {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0, "simpo_gamma": 1.0}),
    ("simpo", {"label_smoothing": 0.2}, {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0, "label_smoothing": 0.2}),
    ("alphapo", {"beta": 2.5, "gamma": 0.1, "alpha": 0.25}, {"beta": 2.5, "simpo_gamma": 0.1, "alpha": 0.25}),
    ("alphapo", {"beta": 2.5, "gamma": 0.1, "alpha": -0.25}, {"beta": 2.5, "simpo_gamma": 0.1, "alpha": -0.25}),
]


@pytest.mark.parametrize(("name", "options", "config"), CPO_CASES, ids=ids(CPO_CASES))
def test_loss_without_a_reference_is_trls(name, options, config, tmp_path):
    rows, config = paired_rows(), config | ({"loss_type": "alphapo"} if name == "alphapo" else {})
    assert_same(our_loss(name, options, rows), trl_loss("cpo", config, rows, tmp_path))


WEIGHTS = {"desirable_weight": 1.5, "undesirable_weight": 0.5}
KTO_CASES: list[tuple[str, dict, dict]] = [
    ("kto", {"beta": 0.1}, {"beta": 0.1}),
    ("kto", {"beta": 0.5}, {"beta": 0.5}),
    ("kto", WEIGHTS, WEIGHTS),
    ("apo_zero_unpaired", {"beta": 0.3}, {"loss_type": "apo_zero_unpaired", "beta": 0.3}),
]


@pytest.mark.parametrize("labels", ["both", "desirable", "undesirable"])
@pytest.mark.parametrize(("name", "options", "config"), KTO_CASES, ids=ids(KTO_CASES))
def test_unpaired_loss_is_trls(name, options, config, labels, tmp_path):
    rows = [row for row in unpaired_rows() if labels == "both" or row[2] == (labels == "desirable")]
    assert_same(our_loss(name, options, rows), trl_loss("kto", config, rows, tmp_path))


# What TRL does otherwise.


def dpo_loss_types(config: dict) -> list[str]:
    loss_type = config.get("loss_type", [])
    return loss_type if isinstance(loss_type, list) else []


def apart(ours: tuple[float, Tensor], trl: tuple[float, Tensor]) -> float:
    return abs(ours[0] - trl[0]) / abs(trl[0])


def test_every_loss_type_of_trls_dpo_trainer_is_compared():
    import inspect

    from trl import DPOTrainer

    known = set(re.findall(r'loss_type == "(\w+)"', inspect.getsource(DPOTrainer._compute_loss)))
    assert known == {kind for *_, config in DPO_CASES + TOKEN_MEAN_CASES for kind in dpo_loss_types(config)}


def test_trl_ignores_label_smoothing_under_its_dpo_and_ours_does_not(tmp_path):
    rows = paired_rows()
    trl = trl_loss("dpo", {"loss_type": ["sigmoid"], "label_smoothing": 0.2}, rows, tmp_path)
    assert_same(our_loss("dpo", {}, rows), trl)
    assert apart(our_loss("dpo", {"label_smoothing": 0.2}, rows), trl) > 0.01


def test_trl_has_no_reward_shift_under_bco(tmp_path):
    rows = paired_rows()
    trl = trl_loss("dpo", {"loss_type": ["bco_pair"]}, rows, tmp_path)
    assert apart(our_loss("bco_pair", {"baseline": "step"}, rows), trl) > 1e-4


def test_trl_averages_over_the_tokens_of_the_batch_and_ours_over_examples(tmp_path):
    rows = paired_rows()
    trl = trl_loss("dpo", {"loss_type": ["sft"]}, rows, tmp_path)
    chosen = pair_scores(models()[0], rows).chosen
    assert trl[0] == pytest.approx(-chosen.total.sum().item() / sum(chosen.lengths), rel=1e-5)
    assert our_loss("sft", {}, rows)[0] == pytest.approx(-chosen.mean.mean().item(), rel=1e-5)
    assert apart(our_loss("sft", {}, rows), trl) > 1e-4


def test_trl_takes_kl_from_each_micro_batch_and_ours_from_the_step(tmp_path):
    # kl is 0.3 on the desirable half, clamped to 0 on the other one, and 0.1 on both together.
    rows = sorted(unpaired_rows(), key=lambda row: row[2])
    halves = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    by_halves = [trl_loss("kto", {"beta": 0.5}, half, tmp_path)[0] for half in halves]
    ours = our_loss("kto", {"beta": 0.5}, rows)
    assert_same(ours, trl_loss("kto", {"beta": 0.5}, rows, tmp_path))
    assert ours[0] != pytest.approx(sum(by_halves) / 2, rel=1e-3)


def test_kl_of_the_rows_is_above_0_and_clamped_on_the_undesirable_ones():
    def kl(rows: list[UnpairedRow]) -> float:
        return call("kto", {}, unpaired_inputs(*models(), rows)).metrics["kl"][0].item()

    assert kl(unpaired_rows()) > 0.1
    assert kl([row for row in unpaired_rows() if row[2]]) > 0.1
    assert kl([row for row in unpaired_rows() if not row[2]]) == 0


def test_trl_weighs_classes_alike_by_default_and_ours_balances_them(tmp_path):
    # 6 desirable, 2 undesirable: ours takes the undesirable ones three times.
    rows = [row for row in unpaired_rows() if row[2]] + [row for row in unpaired_rows() if not row[2]][:2]
    assert_same(our_loss("kto", {}, rows), trl_loss("kto", {"undesirable_weight": 3.0}, rows, tmp_path))
    assert apart(our_loss("kto", {}, rows), trl_loss("kto", {}, rows, tmp_path)) > 0.1


def test_what_trl_logs_as_log_odds_ratio_is_its_log_sigmoid(tmp_path):
    rows = paired_rows()[:1]
    trainer = make_trainer("orpo", {}, tmp_path)
    _, logged = trainer.get_batch_loss_metrics(trainer.model, concatenated_batch(trainer, rows))
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


def test_trls_orpo_has_no_gradient_where_a_response_is_certain_and_ours_has(tmp_path):
    trainer = make_trainer("orpo", {}, tmp_path)
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
def test_trl_overflows_where_the_chosen_response_has_become_improbable_and_ours_does_not(
    name, options, config, tmp_path
):
    # Hundreds of nats below a reference that is certain of it.
    rng = random.Random(1)
    rows = [([1], [rng.randrange(256) for _ in range(40)], [2])]
    trainer = make_trainer("dpo", config, tmp_path)
    trainer.precompute_ref_logps = True
    batch = dpo_batch(trainer, rows) | {"ref_chosen_logps": torch.zeros(1), "ref_rejected_logps": torch.zeros(1)}
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


def test_trls_alphapo_overflows_where_a_response_is_improbable_and_ours_does_not(tmp_path):
    trainer = make_trainer("cpo", {"loss_type": "alphapo", "alpha": 1.0}, tmp_path)
    chosen, rejected = flat(-200.0, -1.0)
    trainer.cpo_loss(chosen, rejected)[0].sum().backward()
    assert not chosen.grad.isfinite().all()
    chosen, rejected = flat(-200.0, -1.0)
    call("alphapo", {"alpha": 1.0}, one_token_inputs(chosen, rejected)).losses.sum().backward()
    assert chosen.grad.isfinite().all()
