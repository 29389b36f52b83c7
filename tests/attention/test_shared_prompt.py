"""The proof that each prompt may be computed once: packed and shared equals every (prompt, response) row by itself.

The oracle is transformers and PEFT alone: a model loaded by itself, one row at a time under eager attention, all
logits, log_softmax, gather. All in float32.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, load_worn, make_example, make_tokenizer
from torch.nn.functional import logsigmoid

from qpref.attention.layout import Layout, laid_out
from qpref.attention.register import BLOCKS, SEGMENTS, CannotShareError, shared_prompt_attention
from qpref.attention.states import StateCache
from qpref.data.pack import pack, split_by_tokens
from qpref.policy.logprobs import completion_logprobs, pair_logprobs
from qpref.policy.policy import Policy
from qpref.records import Group, TokenizedExample
from qpref.training.invariants import check_layout

FAMILIES = ("llama", "qwen", "mistral", "gemma3", "granite")
WINDOW = 7  # of mistral's layers and of gemma3's first
RANK, ALPHA, BETA = 4, 8, 0.5
SPREAD = 0.2  # of weights; with narrow ones attention is nearly uniform, and a token too many or too few hardly shows
WIDE = TINY | {"initializer_range": SPREAD}
TOLERANCE = 1e-5
RECURRENT_TOLERANCE = 1e-4
"""A delta rule sums in chunks, which begin elsewhere after a fork: on one CPU log-probabilities are 1.8e-5 apart."""
PACKINGS = {  # tokens of a micro-batch, and the seed that shuffles the pairs
    "one stream": (10_000, None),
    "a pair each": (1, None),
    "40 tokens": (40, None),
    "40 tokens, shuffled": (40, 1),
    "60 tokens, shuffled": (60, 2),
}


# Prompts and responses shorter and longer than the window, responses of one token on either side and on both.
LENGTHS = ((1, 1, 6), (11, 1, 1), (5, 9, 2), (17, 4, 13), (3, 12, 1), (8, 2, 7))
EXAMPLES = [make_example(line, *lengths) for line, lengths in enumerate(LENGTHS, start=1)]
EXAMPLES.append(
    replace(make_example(7, 1, 3, 6), prompt=EXAMPLES[3].prompt)
)  # shares it where both are packed together


def load(base: Path, checkpointing: bool = False, targets: str | list[str] = "all-linear") -> Policy:
    return load_worn(
        {
            "model": {"base": str(base), "quantization": "none", "dtype": "float32"},
            "adapter": {"rank": RANK, "alpha": ALPHA, "targets": targets},
            "train": {"gradient_checkpointing": checkpointing},
        }
    )


def whole_row_model(base: Path, policy: Policy):
    """The same weights in a model that qpref never touched."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    trained = policy.trained_parameters()
    targets = sorted({name.partition(".lora_")[0].rpartition(".")[2] for name in trained})
    model = get_peft_model(plain, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets))
    copies = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert copies.keys() == trained.keys()
    for name, parameter in copies.items():
        parameter.data.copy_(trained[name])
    return model.eval()


def whole_row_logprobs(model, example: TokenizedExample) -> list[torch.Tensor]:
    """[tokens] of each response, from a row of its own."""
    rows = []
    for branch in example.branches:
        logits = model(input_ids=torch.tensor([[*example.prompt, *branch]]), use_cache=False).logits[0]
        predicting = logits[len(example.prompt) - 1 : -1]
        rows.append(predicting.log_softmax(-1).gather(1, torch.tensor(branch)[:, None]).squeeze(1))
    return rows


def dpo_like(chosen: torch.Tensor, rejected: torch.Tensor, reference: torch.Tensor | float) -> torch.Tensor:
    return -logsigmoid(BETA * (chosen - rejected - reference))


@dataclass
class Answer:
    """What the oracle says: each response's log-probabilities, the mean loss of all pairs, its gradients."""

    logprobs: dict[int, list[torch.Tensor]]
    loss: float
    gradients: dict[str, torch.Tensor]


def ask_whole_rows(base: Path, policy: Policy) -> Answer:
    model = whole_row_model(base, policy)
    rows = {example.source.line: whole_row_logprobs(model, example) for example in EXAMPLES}
    losses = [dpo_like(*(row.sum() for row in rows[example.source.line]), example.margin) for example in EXAMPLES]
    loss = torch.stack(losses).sum() / len(EXAMPLES)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    return Answer({line: [row.detach() for row in pair] for line, pair in rows.items()}, loss.item(), gradients)


def save_tiny(config, folder: Path) -> Path:
    """A random model of any config."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).float().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def granite_config():
    """Granite: attention, residuals and logits have factors of their own."""
    from transformers import GraniteConfig

    factors = {
        "attention_multiplier": 0.1,
        "residual_multiplier": 0.5,
        "logits_scaling": 2.0,
        "embedding_multiplier": 3.0,
    }
    return GraniteConfig(**{key: value for key, value in WIDE.items() if key != "head_dim"}, **factors)


@pytest.fixture(scope="module")
def answers(make_base, tmp_path_factory) -> dict[str, tuple[Path, Answer]]:
    """For each family its folder, and the oracle's answer for a policy as `load` makes it."""
    bases = {family: make_base(family, initializer_range=SPREAD) for family in FAMILIES[:-1]}
    bases["granite"] = save_tiny(granite_config(), tmp_path_factory.mktemp("granite"))
    return {family: (base, ask_whole_rows(base, load(base))) for family, base in bases.items()}


def train_on(policy: Policy, budget: int, seed: int | None) -> tuple[float, dict[str, torch.Tensor]]:
    """The mean loss over all pairs and its gradients, accumulated over the micro-batches of one packing."""
    order = list(EXAMPLES)
    if seed is not None:
        random.Random(seed).shuffle(order)
    policy.model.zero_grad(set_to_none=True)
    total = 0.0
    for members in split_by_tokens(order, budget, policy.shares_prompts):
        batch = pack(members, policy.device)
        scores = pair_logprobs(completion_logprobs(policy, batch))
        loss = dpo_like(scores.chosen.total, scores.rejected.total, batch.margin).sum() / len(EXAMPLES)
        loss.backward()
        total += loss.item()
    return total, {name: parameter.grad for name, parameter in policy.trained_parameters().items()}


def worst_gradient(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """The largest error of any entry, as a share of its tensor's largest entry."""
    assert found.keys() == wanted.keys()
    return max(((found[name] - value).abs().max() / value.abs().max()).item() for name, value in wanted.items())


def worst_logprob(policy: Policy, wanted: dict[int, list[torch.Tensor]]) -> float:
    values = completion_logprobs(policy, pack(EXAMPLES, policy.device)).values
    return (values - torch.cat([row for example in EXAMPLES for row in wanted[example.source.line]])).abs().max().item()


@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_are_those_of_whole_rows(family, answers):
    base, wanted = answers[family]
    policy = load(base)
    assert policy.shares_prompts
    assert worst_logprob(policy, wanted.logprobs) <= TOLERANCE


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_whole_rows_for_any_packing(family, checkpointing, packing, answers):
    base, wanted = answers[family]
    policy = load(base, checkpointing)
    assert policy.shares_prompts
    _, gradients = train_on(policy, *PACKINGS[packing])
    assert worst_gradient(gradients, wanted.gradients) <= TOLERANCE


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_is_that_of_whole_rows_for_any_packing(family, packing, answers):
    base, wanted = answers[family]
    loss, _ = train_on(load(base), *PACKINGS[packing])
    assert loss == pytest.approx(wanted.loss, rel=TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
def test_fallback_rows_have_the_logprobs_of_whole_rows(family, answers):
    base, wanted = answers[family]
    policy = load(base)
    policy.share_prompts(False)
    assert worst_logprob(policy, wanted.logprobs) <= TOLERANCE


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_fallback_rows_have_the_gradients_of_whole_rows(family, checkpointing, answers):
    base, wanted = answers[family]
    policy = load(base, checkpointing)
    policy.share_prompts(False)
    _, gradients = train_on(policy, 40, 3)
    assert worst_gradient(gradients, wanted.gradients) <= TOLERANCE


@pytest.mark.parametrize("budget", [1, 10_000])
def test_an_adapter_on_the_head_learns_what_it_would_on_whole_rows(budget, answers):
    base, _ = answers["llama"]
    policy = load(base, targets=["v_proj", "lm_head"])
    wanted = ask_whole_rows(base, policy)
    assert worst_logprob(policy, wanted.logprobs) <= TOLERANCE
    _, gradients = train_on(policy, budget, None)
    assert "base_model.model.lm_head.lora_A.default.weight" in gradients
    assert worst_gradient(gradients, wanted.gradients) <= TOLERANCE


def test_sharing_again_after_a_fallback_gives_the_same_bits(answers):
    policy = load(answers["mistral"][0])
    batch = pack(EXAMPLES, policy.device)
    before = completion_logprobs(policy, batch).values
    policy.share_prompts(False)
    completion_logprobs(policy, batch)
    policy.share_prompts(True)
    assert torch.equal(completion_logprobs(policy, batch).values, before)


@pytest.mark.parametrize(("checkpointing", "forwards"), [(False, 1), (True, 2)], ids=["kept", "checkpointed"])
def test_checkpointing_computes_a_layer_again_for_the_backward_pass(checkpointing, forwards, answers):
    policy = load(answers["llama"][0], checkpointing)
    calls = []
    policy.decoder.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    completion_logprobs(policy, pack(EXAMPLES, policy.device)).values.sum().backward()
    assert len(calls) == forwards


@pytest.mark.parametrize("family", FAMILIES)
def test_a_response_depends_on_no_other_response_and_no_other_prompt(family, answers):
    policy = load(answers[family][0])
    batch = pack(EXAMPLES, policy.device)
    embedded = []
    policy.decoder.embed_tokens.register_forward_hook(lambda *call: embedded.append(call[-1].requires_grad_()))
    scores = completion_logprobs(policy, batch)
    (grad,) = torch.autograd.grad(scores.values.split(scores.lengths)[7].sum(), embedded)  # the fourth pair's rejected
    felt = grad[0].abs().amax(-1) > 0
    group = batch.groups[3]
    own = torch.zeros_like(felt)
    own[group.start : group.start + group.prompt] = True
    start = group.start + group.prompt + group.branches[0]
    own[start : start + group.branches[1]] = True
    assert felt[own].any()
    assert not felt[~own].any()


def test_mistral_sees_as_far_back_as_two_windows_and_no_further(answers):
    policy = load(answers["mistral"][0])
    example = make_example(99, 40, 2, 3)
    batch = pack([example], policy.device)
    embedded = []
    policy.decoder.embed_tokens.register_forward_hook(lambda *call: embedded.append(call[-1].requires_grad_()))
    values = completion_logprobs(policy, batch).values
    (grad,) = torch.autograd.grad(values[0], embedded)  # predicted at position 39, by two layers of 7 positions each
    assert grad[0].abs().amax(-1).nonzero().squeeze(1).tolist() == list(range(39 - 2 * (WINDOW - 1), 40))


def plain_config(kind: str):
    """Attention without a fused kernel, of which that shows: capped scores, and logits; or sinks."""
    from transformers import Gemma2Config, GptOssConfig

    layers = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
    if kind == "gemma2":
        caps = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}
        return Gemma2Config(**WIDE, **caps, **layers, query_pre_attn_scalar=16)
    return GptOssConfig(**WIDE, **layers, num_local_experts=4, num_experts_per_tok=2)


PLAIN = ("gemma2", "gpt_oss")


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> dict[str, Path]:
    return {kind: save_tiny(plain_config(kind), tmp_path_factory.mktemp(kind)) for kind in PLAIN}


def recurrent_config(kind: str):
    from transformers import BambaConfig, Lfm2Config, Qwen3_5TextConfig, RecurrentGemmaConfig

    if kind == "qwen3_5_text":
        keys = {"linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16}
        layers = {"layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 4}
        return Qwen3_5TextConfig(**WIDE, **keys, **layers)
    if kind == "lfm2":
        return Lfm2Config(**WIDE, layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False)
    if kind == "bamba":
        wide = {key: value for key, value in WIDE.items() if key != "head_dim"}
        return BambaConfig(**wide, attn_layer_indices=[1], mamba_n_heads=4, mamba_d_head=32, mamba_d_state=16)
    changes = {"num_hidden_layers": 3, "num_key_value_heads": 1, "lru_width": 64, "attention_window_size": WINDOW}
    return RecurrentGemmaConfig(**WIDE | changes)


FORKED = ("lfm2", "bamba", "qwen3_5_text")
RECURRENT = (*FORKED, "recurrent_gemma")


@pytest.fixture(scope="module")
def recurrent(tmp_path_factory) -> dict[str, Path]:
    """Models with a state that runs along the whole stream: of a convolution, a state space, a linear recurrence."""
    return {kind: save_tiny(recurrent_config(kind), tmp_path_factory.mktemp(kind)) for kind in RECURRENT}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("kind", PLAIN)
def test_attention_without_a_kernel_shares_prompts_with_the_right_gradients(kind, checkpointing, plain):
    policy = load(plain[kind], checkpointing, ["q_proj", "k_proj", "v_proj", "o_proj"])
    check_layout(policy, EXAMPLES[3])
    assert policy.attention == SEGMENTS
    wanted = ask_whole_rows(plain[kind], policy)
    assert worst_logprob(policy, wanted.logprobs) <= TOLERANCE
    _, gradients = train_on(policy, 40, 1)
    assert worst_gradient(gradients, wanted.gradients) <= TOLERANCE


@pytest.mark.parametrize("kind", PLAIN)
def test_attention_without_a_kernel_is_the_same_on_every_path(kind, plain):
    policy = load(plain[kind])
    batch = pack(EXAMPLES, policy.device)
    wanted = completion_logprobs(policy, batch).values
    policy.use_attention(BLOCKS)
    assert (completion_logprobs(policy, batch).values - wanted).abs().max() <= TOLERANCE


def test_a_recurrent_layer_that_takes_no_state_falls_back_with_a_warning(recurrent, caplog):
    policy = load(recurrent["recurrent_gemma"])
    assert not policy.shares_prompts
    assert "once for each response, not once a pair: it has layers of the kind" in caplog.text


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("kind", RECURRENT)
def test_recurrent_layers_have_the_right_gradients(kind, checkpointing, recurrent):
    policy = load(recurrent[kind], checkpointing)
    check_layout(policy, EXAMPLES[3])
    assert policy.shares_prompts == (kind in FORKED)
    wanted = ask_whole_rows(recurrent[kind], policy)
    assert worst_logprob(policy, wanted.logprobs) <= RECURRENT_TOLERANCE
    _, gradients = train_on(policy, 40, 1)
    assert worst_gradient(gradients, wanted.gradients) <= RECURRENT_TOLERANCE


def test_the_first_batch_finds_a_recurrent_layer_that_the_config_hides(recurrent, caplog):
    policy = load(recurrent["recurrent_gemma"])
    policy.sharing_paths = (SEGMENTS,)  # as if its config had said nothing
    check_layout(policy, EXAMPLES[3])
    assert not policy.shares_prompts
    assert "sharing a prompt changes log-probabilities" in caplog.text


def test_the_first_batch_finds_a_response_that_sees_the_other_however_little_it_changes(recurrent, caplog, monkeypatch):
    monkeypatch.setattr("qpref.training.sharing_check.FLOAT32_TOLERANCE", 100.0)
    policy = load(recurrent["recurrent_gemma"])
    policy.sharing_paths = (SEGMENTS,)  # as if its config had said nothing
    check_layout(policy, EXAMPLES[3])
    assert not policy.shares_prompts
    assert "one response sees the other" in caplog.text


def test_the_first_batch_finds_a_state_without_its_gradient(recurrent, caplog, monkeypatch):
    monkeypatch.setattr(
        StateCache, "get_recurrent_state", lambda cache, *_, **__: cut(cache.states.get(("recurrent", 0)))
    )
    policy = load(recurrent["bamba"])
    check_layout(policy, EXAMPLES[3])
    assert not policy.shares_prompts
    assert "sharing a prompt changes gradients by" in caplog.text


def cut(state: torch.Tensor | None) -> torch.Tensor | None:
    """A state with the right values whose gradient ends there, but for a share that the graph shows."""
    return None if state is None else state.detach() + 0 * state


def test_a_path_that_fails_leaves_whole_rows(recurrent, caplog, monkeypatch):
    def fail(*_):
        raise RuntimeError("no kernel for this state\nand more")

    monkeypatch.setattr(Layout, "fork", fail)
    policy = load(recurrent["lfm2"])
    check_layout(policy, EXAMPLES[3])
    assert not policy.shares_prompts
    assert caplog.messages[-1].endswith("not once a pair: RuntimeError: no kernel for this state")


def test_a_mixture_of_experts_shares_prompts(tmp_path, caplog):
    """Its experts compute other tokens beside a response's own, which moves scores by rounding; that is no leak."""
    from transformers import MixtralConfig

    policy = load(save_tiny(MixtralConfig(**WIDE, num_local_experts=4, num_experts_per_tok=2), tmp_path))
    check_layout(policy, EXAMPLES[3])
    assert policy.shares_prompts
    _, gradients = train_on(policy, 40, 1)
    assert worst_gradient(gradients, ask_whole_rows(tmp_path, policy).gradients) <= TOLERANCE


def test_the_first_batch_leaves_sharing_on_where_it_is_exact(answers, caplog):
    policy = load(answers["gemma3"][0])
    check_layout(policy, EXAMPLES[3])
    assert policy.shares_prompts
    assert not [record for record in caplog.records if record.name == "qpref" and record.levelname != "INFO"]


def attend(keywords: dict[str, object], **config: object) -> None:
    """The attention function as a layer of some unknown model might call it."""
    module = SimpleNamespace(config=SimpleNamespace(**config), layer_idx=0)
    states = torch.randn(1, 2, 3, 4)
    groups = (Group(start=0, prompt=2, branches=(1, 0)),)
    with laid_out(Layout(groups)):
        shared_prompt_attention(module, states, states, states, None, **keywords)


@pytest.mark.parametrize(
    ("keywords", "reason"),
    [
        ({"position_bias": torch.zeros(2)}, "uses position_bias"),
        ({"is_causal": False}, "not causal"),
    ],
)
def test_what_attention_does_not_know_it_refuses(keywords, reason):
    with pytest.raises(CannotShareError, match=reason):
        attend(keywords)


def test_a_window_that_is_in_the_mask_alone_is_refused():
    with pytest.raises(CannotShareError, match="in the mask alone"):
        attend({}, layer_types=["sliding_attention"])


def test_keywords_that_change_nothing_are_let_through():
    attend({"position_ids": torch.arange(3), "use_cache": False, "softcap": None}, layer_types=["full_attention"])


def test_a_cpu_attends_in_float32_under_autocast():
    """Its bf16 kernel keeps compiled code for each length it meets, and the last bits of its sums depend on it."""
    states = torch.randn(3, 1, 2, 90, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    module = SimpleNamespace(config=SimpleNamespace(), layer_idx=0)
    with laid_out(Layout((Group(start=0, prompt=40, branches=(30, 20)),))):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found, _ = shared_prompt_attention(module, *states, None)
        wanted, _ = shared_prompt_attention(module, *states.float(), None)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, wanted.bfloat16())


def test_weight_and_margin_follow_their_pair_through_a_packing():
    examples = [replace(example, weight=float(example.source.line)) for example in EXAMPLES]
    batch = pack(examples[::-1], torch.device("cpu"))
    assert batch.weight.tolist() == [float(example.source.line) for example in EXAMPLES[::-1]]
    assert batch.margin.tolist() == pytest.approx([example.margin for example in examples[::-1]])
