"""The reward of a local reward model, against one conversation at a time."""

from __future__ import annotations

import pytest
import torch
from conftest import TINY, make_tokenizer

from qpref.errors import PluginError
from qpref.records import Message, SampledResponse
from qpref.sampling.reward import Scorer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("reward")
    LlamaForSequenceClassification(LlamaConfig(**TINY, num_labels=1)).save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


def test_each_score_is_that_of_the_conversation_alone(folder):
    from transformers import AutoModelForSequenceClassification

    prompt = (Message(role="system", content="Be kind."), Message(role="user", content="Hi?"))
    responses = [
        SampledResponse(prompt=prompt, text=text, ended=True) for text in ("Yes.", "A longer answer here", "b")
    ]
    found = Scorer("model", {"path": str(folder), "dtype": "float32", "batch_size": 2})(responses)
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder).eval(), make_tokenizer()
    for one, score in zip(responses, found, strict=True):
        turns = [{"role": each.role, "content": each.content} for each in prompt]
        text = tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": one.text}], tokenize=False)
        with torch.no_grad():
            alone = model(torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])).logits[0, 0]
        assert score == pytest.approx(alone.item(), abs=1e-5)
    assert len(set(found)) == 3


def test_a_classifier_of_two_labels_is_no_reward_model(folder, tmp_path):
    from transformers import LlamaConfig, LlamaForSequenceClassification

    LlamaForSequenceClassification(LlamaConfig(**TINY, num_labels=2)).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(PluginError, match="2 labels; a reward model has 1"):
        Scorer("model", {"path": str(tmp_path)})
