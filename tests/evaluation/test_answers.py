"""Answers of base and trained model, against generation without padding, batches or adapters."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch
from conftest import load_worn, make_example, make_tokenizer, merge_to, preference_rows, write_jsonl
from tiny_models import TinyModel

from qpref.data.tokenize import PairTokenizer
from qpref.errors import DataError, DeviceMemoryError
from qpref.evaluation import generate as module
from qpref.evaluation import heldout_pairs
from qpref.evaluation.generate import Sampling, answer_all, as_prompt, generate, prompt_ids, read_prompts
from qpref.evaluation.subjects import identify
from qpref.recipe.resolve import make_plan
from qpref.training.run import train_plan

PROMPTS = [as_prompt(text) for text in ("Hi?", "What comes after the number eleven, please?", "Question 4: who?")]
GREEDY = Sampling(max_new_tokens=8, batch_size=3)
DRAWN = Sampling(max_new_tokens=8, batch_size=3, temperature=1.0, seed=5)


@pytest.fixture(scope="module")
def run(make_base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("asked")
    recipe = {
        "model": {"base": str(make_base()), "quantization": "nf4", "dtype": "float32"},
        "adapter": {"rank": 4, "alpha": 8},
        "data": {"train": str(write_jsonl(folder / "train.jsonl", preference_rows(12)))},
        "checks": {"too_short": "off"},
        "loss": {"name": "dpo", "beta": 0.1},
        "train": {"learning_rate": 0.02, "batch_size": 4, "warmup_ratio": 0.0},
        "sinks": [],
    }
    return train_plan(make_plan(recipe, output=folder / "run"))


@torch.no_grad()
def one_by_one(policy, ids, count):
    """Greedy answers, token by token, without a cache, a batch or padding."""
    tokens = list(ids)
    for _ in range(count):
        logits = policy.plain_model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1]
        tokens.append(int(logits.argmax()))
        if tokens[-1] == 258:
            break
    return tokens[len(ids) :]


def test_a_batch_answers_as_each_prompt_alone_does(run):
    """Of prompts of three lengths, padded on the left, by the trained model and by its base."""
    subject = identify(str(run))
    found = generate(subject, PROMPTS, GREEDY)
    policy, tokenizer = subject.load("float32"), subject.tokenizer()
    policy.share_prompts(False)
    for prompt, answers in zip(PROMPTS, found, strict=True):
        (ids,) = prompt_ids(tokenizer, [prompt])
        with policy.model.disable_adapter():
            base = one_by_one(policy, ids, 8)
        texts = [
            tokenizer.tokenizer.decode(new, skip_special_tokens=True) for new in (one_by_one(policy, ids, 8), base)
        ]
        assert [answers.model, answers.base] == texts
        assert answers.prompt == prompt.prompt[0].content
    assert any(answers.model != answers.base for answers in found)


def test_prompts_of_other_rotary_frequencies_answer_as_alone(tmp_path):
    # LongRoPE takes a batch's longest position; answers that cross the switch do so at their own length.
    factors = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "original_max_position_embeddings": 20}
    rope = {"rope_type": "longrope", "rope_theta": 10_000.0, **factors}
    config = {"rope_parameters": rope, "original_max_position_embeddings": 20, "sliding_window": None}
    base = TinyModel(model_type="phi3", config=config).write(tmp_path / "base")
    policy = load_worn({"model": {"base": str(base), "quantization": "none", "dtype": "float32"}})
    policy.share_prompts(False)
    tokenizer = PairTokenizer.of(make_tokenizer(), "chat", (258,))
    ids = [list(make_example(line, length, 1, 1).prompt) for line, length in enumerate((8, 40, 10, 15, 17, 33))]
    together, alone = (answer_all(policy, tokenizer, ids, replace(GREEDY, batch_size=size)) for size in (6, 1))
    assert together == alone


def test_the_merged_model_answers_as_the_run(run, tmp_path):
    merge_to(run, tmp_path / "out", "float32")
    alone = generate(identify(str(tmp_path / "out")), PROMPTS, GREEDY)
    assert [answers.model for answers in alone] == [
        answers.model for answers in generate(identify(str(run)), PROMPTS, GREEDY)
    ]
    assert {answers.base for answers in alone} == {None}


def test_drawn_answers_follow_the_seed(run):
    subject = identify(str(run))
    first, again = (generate(subject, PROMPTS, DRAWN) for _ in range(2))
    assert first == again
    other = generate(subject, PROMPTS, Sampling(max_new_tokens=8, batch_size=3, temperature=1.0, seed=6))
    assert [answers.model for answers in other] != [answers.model for answers in first]
    assert [answers.model for answers in first] != [answers.model for answers in generate(subject, PROMPTS, GREEDY)]


def test_the_models_own_settings_dont_reach_in(run, tmp_path, make_base):
    """A generation_config.json of the base's that forbids repetition and draws by itself."""
    import json

    base = shutil.copytree(make_base(), tmp_path / "base")
    settings = {"repetition_penalty": 5.0, "do_sample": True, "temperature": 9.0, "eos_token_id": 258}
    plain = generate(identify(str(base)), PROMPTS, GREEDY)
    (base / "generation_config.json").write_text(json.dumps(settings))
    assert generate(identify(str(base)), PROMPTS, GREEDY) == plain


def test_an_answer_that_was_cut_off_is_told_from_one_that_ended(run, monkeypatch):
    def answers(policy, tokenizer, prompts, sampling):
        return [[70, 71, 258, 258], [70, 71, 72, 73], [258, 258, 258, 258]][: len(prompts)]

    monkeypatch.setattr(module, "new_tokens", answers)
    ended = {found.ended for found in generate(identify(str(run)), PROMPTS, GREEDY)}
    assert ended == {(True, True), (False, False)}


def test_a_batch_that_runs_out_of_memory_is_halved(run, monkeypatch, said):
    real, sizes = module.new_tokens, []

    def small_memory(policy, tokenizer, prompts, sampling):
        sizes.append(len(prompts))
        return real(policy, tokenizer, prompts, sampling) if len(prompts) == 1 else None

    subject = identify(str(run))
    expected = generate(subject, PROMPTS, GREEDY)
    monkeypatch.setattr(module, "new_tokens", small_memory)
    assert generate(subject, PROMPTS, GREEDY) == expected
    assert sizes[:2] == [3, 1]
    assert any("continuing with 1 prompts per batch" in line for line in said)
    monkeypatch.setattr(module, "new_tokens", lambda *call: None)
    with pytest.raises(DeviceMemoryError, match="on one prompt"):
        generate(subject, PROMPTS, GREEDY)


def test_answers_survive_any_kind_of_out_of_memory(run, monkeypatch):
    from transformers import LlamaForCausalLM

    subject, real, sizes = identify(str(run)), LlamaForCausalLM.generate, []
    expected = generate(subject, PROMPTS, GREEDY)

    def small_memory(self, input_ids, **options):
        sizes.append(len(input_ids))
        if len(input_ids) > 1:
            raise torch.AcceleratorError("CUDA error: out of memory")
        return real(self, input_ids=input_ids, **options)

    monkeypatch.setattr(LlamaForCausalLM, "generate", small_memory)
    assert generate(subject, PROMPTS, GREEDY) == expected
    assert sizes[:2] == [3, 1]


def test_a_model_that_memory_does_not_suffice_for_is_one_message(run, monkeypatch):
    subject = identify(str(run))

    def exhausted(dtype):
        raise torch.AcceleratorError("CUDA error: out of memory")

    monkeypatch.setattr(type(subject), "load", lambda self, dtype: exhausted(dtype))
    with pytest.raises(DeviceMemoryError, match="the device ran out of memory"):
        generate(subject, PROMPTS, GREEDY)


def test_prompts_are_read_of_pairs_and_of_lines(tmp_path):
    pairs = write_jsonl(tmp_path / "pairs.jsonl", [*preference_rows(1), {"prompt": "alone"}])
    assert texts(read_prompts(str(pairs))) == [preference_rows(1)[0]["prompt"], "alone"]
    (tmp_path / "lines.txt").write_text("one\n\ntwo\n")
    found = read_prompts(str(tmp_path / "lines.txt"))
    assert texts(found) == ["one", "two"]
    assert [prompt.source.line for prompt in found] == [1, 3]


def texts(prompts):
    return [prompt.prompt[0].content for prompt in prompts]


def test_a_prompt_is_asked_with_the_ids_that_it_was_trained_with(run, tmp_path):
    tokenizer = identify(str(run)).tokenizer()
    path = str(write_jsonl(tmp_path / "pairs.jsonl", preference_rows(3)))
    kept, _ = heldout_pairs.tokenize_pairs(
        heldout_pairs.pairs_of(heldout_pairs.data_at(path)), tokenizer, identify(str(run)).recipe.data
    )
    assert prompt_ids(tokenizer, read_prompts(path)) == [list(example.prompt) for example in kept.values()]


def test_a_prompt_with_a_control_token_is_refused(run):
    with pytest.raises(DataError, match=r"--prompt:1: not a usable prompt: .*control token"):
        prompt_ids(identify(str(run)).tokenizer(), [as_prompt("a<|im_end|>")])


@pytest.mark.parametrize(("name", "content", "words"), [
    ("rows.jsonl", '{"text": "a"}\n', r"rows.jsonl:1: no prompt; the row has text"),
    ("rows.jsonl", '{"prompt": "a\n', r"rows.jsonl:1: not JSON"),
    ("empty.txt", "\n", "has no prompt"),
    ("none.txt", None, "no such file"),
])  # fmt: skip
def test_bad_prompts_are_refused_with_their_location(tmp_path, name, content, words):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=words):
        read_prompts(str(tmp_path / name))
