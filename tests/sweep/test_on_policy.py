"""On-policy rounds: the reward rises, the KL budget and noise end them, and a kill at any stage changes no byte."""

from __future__ import annotations

import json
import shutil
from contextlib import contextmanager

import pytest
import tomli_w
import torch
from click.testing import CliRunner
from conftest import make_tokenizer, outcome
from safetensors.torch import load_file, save_file

from qpref.cli import main
from qpref.sampling import batches, measure
from qpref.sampling.measure import Measured
from qpref.sampling.reward import Scorer
from qpref.sweep import on_policy
from qpref.training.loop import Trainer

REWARD = """
from qpref.hooks import Options, Reward, hookimpl

@hookimpl
def qpref_rewards():
    yield Reward(name="small", summary="Share of small letters.", options=Options,
                 build=lambda options: lambda given: [share(one.text) for one in given])

def share(text):
    return sum("a" <= character <= "z" for character in text) / 6
"""


def writing_ascii(base, folder):
    """A copy of a tiny base that writes ASCII: one hidden number is the same everywhere, and rules other tokens out,
    and another one decides how probable small letters are, so that a few steps can teach them."""
    copy = shutil.copytree(base, folder / "base")
    tensors, tokenizer = load_file(copy / "model.safetensors"), make_tokenizer()
    tensors["model.embed_tokens.weight"][:, 0] = 0.05
    for name, weight in tensors.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight[0] = 0.0
    texts = [tokenizer.decode([token]) for token in range(len(tensors["lm_head.weight"]))]
    ruled_out = [not (text.isascii() and text.isprintable() and text) for text in texts]
    tensors["lm_head.weight"][:, 0] = torch.tensor(ruled_out) * -10.0
    tensors["lm_head.weight"][:, 1] = torch.tensor([text.islower() for text in texts]) * 1.0
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    return copy


@pytest.fixture(scope="module")
def recipe(make_base, tmp_path_factory):
    """A recipe of on-policy rounds of a few steps: each raises the share of small letters."""
    folder = tmp_path_factory.mktemp("on-policy")
    (folder / "small.py").write_text(REWARD)
    (folder / "prompts.txt").write_text("".join(f"Say {number}\n" for number in range(12)))
    (folder / "heldout.txt").write_text("".join(f"Tell {number}\n" for number in range(12)))
    document = {
        "model": {"base": str(writing_ascii(make_base(), folder)), "quantization": "none", "dtype": "float32"},
        "adapter": {"targets": ["q_proj", "v_proj", "up_proj", "gate_proj"]},
        "data": {"max_length": 64, "max_prompt_length": 48},
        "plugins": {"files": ["small.py"]},
        "loss": {"name": "dpo"},
        "train": {"learning_rate": 0.004, "batch_size": 4, "max_steps": 2, "save_every": 1, "warmup_ratio": 0.0},
        "rounds": {
            "prompts": "prompts.txt",
            "heldout": "heldout.txt",
            "reward": "small",
            "max_new_tokens": 6,
            "batch_size": 24,
        },
    }
    path = folder / "recipe.toml"
    path.write_text(tomli_w.dumps(document))
    return path


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QPREF_CACHE", str(tmp_path / "cache"))


def rounds(recipe, output, *arguments, count=2, code=0):
    command = ["rounds", str(recipe), "--rounds", str(count), "--output", str(output), "--json", *arguments]
    done = CliRunner().invoke(main, command, catch_exceptions=False)
    assert done.exit_code == code, done.output
    return json.loads(done.stdout) if code == 0 else done


@contextmanager
def dying_at(monkeypatch, owner, name, call):
    """End the process at the call of that number, of a function."""
    function, calls = getattr(owner, name), []

    def killed(*arguments, **options):
        calls.append(1)
        if len(calls) == call:
            raise SystemExit(137)
        return function(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, killed)
        yield


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory):
    """Two rounds that were never interrupted, and what the command printed."""
    folder = tmp_path_factory.mktemp("whole") / "rounds"
    return folder, rounds(recipe, folder)


def test_the_reward_rises_and_the_report_says_so(whole):
    folder, found = whole
    first = found["rounds"][0]
    assert first["heldout"]["reward"]["low"] > found["start"]["heldout"]["reward"]["high"]
    assert first["refused"] is None
    assert first["heldout"]["kl_from_base"] == first["heldout"]["kl_from_start"]
    assert found["start"]["heldout"]["kl_from_base"]["value"] == 0.0
    second = found["rounds"][1]["heldout"]
    assert second["kl_from_base"]["value"] > first["heldout"]["kl_from_base"]["value"]
    assert second["kl_from_start"] != second["kl_from_base"]
    rows = (folder / "round-1.jsonl").read_text().splitlines()
    assert first["pairs"] == len(rows) > 0
    assert 'id="rounds"' in (folder / "report.html").read_text()


def test_killed_at_any_stage_and_resumed_it_is_the_same_to_the_bit(recipe, whole, tmp_path, monkeypatch):
    folder = tmp_path / "rounds"
    kills = [
        (batches, "sample", 4),  # two batches measure the base, and two are the first round's
        (Scorer, "__call__", 1),
        (Trainer, "step", 2),
        (measure, "sequence_kl", 1),
        (Trainer, "step", 2),  # of the second round
    ]
    for number, kill in enumerate(kills):
        with dying_at(monkeypatch, *kill):
            rounds(recipe, folder, *(["--resume"] if number else []), code=137)
    found = rounds(recipe, folder, "--resume")
    unkilled, _ = whole
    for name in ("rounds.json", "round-1.jsonl", "round-2.jsonl"):
        assert (folder / name).read_bytes() == (unkilled / name).read_bytes()
    for name in ("round-1", "round-2"):
        assert outcome(folder / name) == outcome(unkilled / name)
    assert found["result"] is not None


def test_a_spent_budget_leaves_the_round_before_and_other_settings_are_refused(recipe, whole, tmp_path):
    folder = shutil.copytree(whole[0], tmp_path / "rounds")
    spent = whole[1]["rounds"][0]["heldout"]["kl_from_base"]["value"]
    found = rounds(recipe, folder, "--resume", "--set", f"rounds.kl_budget={spent / 2}")
    assert (found["result"], len(found["rounds"])) == (None, 1)
    assert "over the budget" in found["ended"]
    refused = rounds(recipe, folder, "--resume", "--set", "rounds.k=3", code=4)
    assert "made with another [rounds]" in refused.stderr
    (folder / "round-1.jsonl").write_text("{}\n")
    assert "is not what was sampled" in rounds(recipe, folder, "--resume", code=4).stderr
    assert "holds a run" in rounds(recipe, folder, code=2).stderr


def test_a_round_is_accepted_for_a_rise_beyond_noise_within_the_budget():
    start = measured([[0.0, 1.0], [1.0, 0.0]] * 8, kl=0.0)
    better, same = measured([[1.0, 1.0]] * 16, kl=3.0), measured([[1.0, 0.0], [0.0, 1.0]] * 8, kl=3.0)
    assert on_policy.why_refused(better, better.gain(start), 3.5) is None
    assert on_policy.why_refused(better, better.gain(start), None) is None
    assert "3.00 nats, over the budget of 2.5" in on_policy.why_refused(better, better.gain(start), 2.5)
    assert "no longer rises" in on_policy.why_refused(same, same.gain(start), None)


def measured(rewards, kl):
    each = [[kl] * len(row) for row in rewards]
    return Measured(rewards=rewards, kl_base=each, kl_start=each, ended=1.0, tokens=1.0)


def test_a_held_out_prompt_that_is_trained_on_is_refused(recipe, tmp_path):
    done = rounds(recipe, tmp_path / "rounds", "--set", "rounds.heldout=prompts.txt", code=3)
    assert "is among the prompts of [rounds] too" in done.stderr
    assert not (tmp_path / "rounds").exists()
