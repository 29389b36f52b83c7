"""`qpref plan`: no weight, no GPU, no network; what it prints and what it exits with."""

import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import tomli_w
from click.testing import CliRunner
from conftest import write_jsonl

from qpref.cli import main

QPREF = Path(sys.executable).with_name("qpref")
RECIPES = Path(__file__).parents[2] / "recipes"


def plan(*arguments, code=0):
    done = CliRunner().invoke(main, ["plan", *map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == code, done.output
    return done


def facts(*arguments, code=0):
    return json.loads(plan(*arguments, "--json", code=code).stdout)


@pytest.fixture
def write_recipe(tmp_path, make_recipe):
    """`write_recipe({"train.epochs": 2})`: the path of a tiny recipe with its data."""

    def write(changes=None):
        path = tmp_path / "tiny.toml"
        path.write_text(tomli_w.dumps(make_recipe(changes)))
        return path

    return write


def test_a_7b_recipe_is_planned_without_data_network_or_gpu(tmp_path):
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = subprocess.run(
        [QPREF, "plan", RECIPES / "7b-24gb.toml", "--vram", "24GiB"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)},
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 60  # CPU seconds: no weight is made
    assert "each pair is taken to be 512 + 2 x 512 tokens, the longest allowed" in done.stdout
    assert "of 23.60 GiB: --vram 24GiB, less 0.40 of the CUDA context (assumed)" in done.stdout


CARD_PLAN = """\
base     known shape Qwen2.5-7B, by the base's name: 7.62 billion parameters, 28 layers
adapter  40.4 million parameters on 196 linear layers
data     {data}
steps    unknown; 24,544 tokens a step
work     {work:,.1f} TFLOP a step

predicted peak on a GPU, GiB
  weights         5.17   frozen base
  adapters        0.30   adapters and their gradients, float32
  optimizer       0.08   optimizer state of adamw_8bit
  activations  {activations:7.2f}   activations kept for the backward pass
  live         {live}
  head tile    {head_tile}
  reserve      {reserve:7.2f}   assumed: libraries, 3 % fragmentation, 2 % error of this prediction
  total        {total:7.2f}   of {limit}

tokens per micro-batch  {tokens}  (auto)
recomputed layers       {layers} of 28  (auto)
{notes}"""


def gib(size):
    return size / 2**30


def expected_plan(found, limit, notes=""):
    """What `qpref plan` prints of the 7B recipe, by the facts of `--json`; the larger of two temporaries counts."""
    memory = found["memory"]
    captions = {"live": "backward pass of one layer", "head_tile": "scoring responses"}
    counted = max(captions, key=memory.get)
    rows = {
        part: f"{gib(memory[part]):7.2f}   {caption}"
        if part == counted
        else f"{f'({gib(memory[part]):.2f})':>8}  {caption}; not at the same time"
        for part, caption in captions.items()
    }
    assert memory["total"] == sum(memory[part] for part in memory if part not in ("total", *captions)) + memory[counted]
    return CARD_PLAN.format(
        data=found["data"]["origin"],
        work=found["flops_per_step"] / 1e12,
        **{part: gib(memory[part]) for part in ("activations", "reserve", "total")},
        **rows,
        limit=limit,
        tokens=found["tokens_per_microbatch"],
        layers=found["recomputed_layers"],
        notes=notes,
    )


NO_DATA = ("--set", "data.train=nowhere.jsonl")


def test_a_card_is_planned_for_by_its_name():
    """12 GiB by nvidia-smi, of which the driver keeps 500 MiB and 0.25 %, and torch's context 0.4 GiB."""
    asked = (RECIPES / "7b-24gb.toml", *NO_DATA, "--card", "geforce rtx3060 12 gb")
    found, limit = facts(*asked), 12 * 2**30 - 530 * 2**20 - int(0.4 * 2**30)
    origin = "RTX 3060 12GB of 12.00 GiB, less 0.52 of the driver and 0.40 of the CUDA context (assumed)"
    assert found["limit"] == {"bytes": limit, "origin": origin}
    assert found["card"] == {
        "name": "RTX 3060 12GB",
        "capability": {"value": "8.6", "source": "developer.nvidia.com/cuda-gpus"},
        "total": {
            "bytes": 12 * 2**30,
            "source": "nvidia-smi, github.com/geerlingguy/raspberry-pi-pcie-devices/issues/790",
        },
        "ecc": {"bytes": 0, "source": "box less total"},
        "driver": {"bytes": 530 * 2**20, "source": "assumed"},
        "context": {"bytes": int(0.4 * 2**30), "source": "github.com/pytorch/pytorch/issues/107667"},
        "usable": {"bytes": limit, "source": "total less the rest"},
    }
    assert (found["notes"], found["fits"], found["device"]) == ([], True, "cuda")
    assert plan(*asked).stdout == expected_plan(found, f"11.08 GiB: {origin}")


def test_a_card_without_bf16_is_planned_with_the_reason_that_training_will_refuse_it():
    """And with attention segment by segment, which keeps more than flash attention."""
    asked = (RECIPES / "7b-24gb.toml", *NO_DATA, "--card", "Tesla T4")
    note = 'T4 has compute capability 7.5, so no bf16: training refuses [model] dtype = "bf16"; set it to "fp16" (planned alike)'  # noqa: E501
    found = facts(*asked)
    assert found["notes"] == [note]
    limit = "14.07 GiB: T4 16GB of 15.00 GiB, less 0.53 of the driver and 0.40 of the CUDA context (assumed)"
    assert plan(*asked).stdout == expected_plan(found, limit, f"\nnote: {note}\n")
    fixed = facts(*asked, "--set", "model.dtype=fp16")
    assert fixed["notes"] == []
    assert fixed["memory"] == found["memory"]


def test_a_card_without_flash_attention_keeps_more():
    """By the same micro-batches and recomputed layers."""
    fixed = ("--set", "train.tokens_per_microbatch=3068", "--set", "train.gradient_checkpointing=24")
    turing, ada = (facts(RECIPES / "7b-24gb.toml", *NO_DATA, *fixed, "--card", card)["memory"] for card in ("T4", "L4"))
    assert turing["activations"] > 1.1 * ada["activations"]
    assert turing["weights"] == ada["weights"]


def test_a_card_that_torch_has_no_kernels_for_names_the_wheel_that_does():
    wheel, dtype = facts(RECIPES / "7b-24gb.toml", *NO_DATA, "--card", "V100 32GB")["notes"]
    assert wheel == (
        "V100 has compute capability 7.0: torch 2.11 and later has kernels for it in its CUDA 12.6 wheels alone; "
        "install one of those"
    )
    assert 'set it to "fp16"' in dtype


def test_a_desktop_on_the_card_takes_its_share():
    alone, beside = (
        facts(RECIPES / "7b-24gb.toml", *NO_DATA, "--card", "RTX 4090", *more) for more in ((), ("--desktop",))
    )
    assert alone["limit"]["bytes"] - beside["limit"]["bytes"] == 2**30
    assert beside["card"]["desktop"] == {"bytes": 2**30, "source": "assumed"}
    assert ", 0.40 of the CUDA context and 1.00 of a desktop (assumed)" in beside["limit"]["origin"]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (("--card", "T4", "--vram", "8"), "Error: --card and --vram exclude each other: both name the memory.\n"),
        (("--desktop",), "Error: --desktop needs --card; --vram is free memory, without a desktop's share.\n"),
    ],
)  # fmt: skip
def test_options_that_contradict_each_other_are_refused(write_recipe, options, problem):
    assert plan(write_recipe(), *options, code=2).stderr.endswith(problem)


def test_a_card_for_a_recipe_on_the_cpu_is_refused(write_recipe):
    done = plan(write_recipe({"model.device": "cpu"}), "--card", "T4", code=2)
    assert (
        done.stderr == 'error: --card: the recipe has [model] device = "cpu"\nhint: plan with --set model.device=auto\n'
    )


def test_data_are_counted_by_the_bases_own_tokenizer(write_recipe):
    """12 pairs in batches of 4 for 2 epochs; the byte-level tokenizer makes every byte a token."""
    found = facts(write_recipe({"train.epochs": 2}))
    assert found["shape"]["layers"] == 2
    assert (found["data"]["examples"], found["steps"]) == (12, 6)
    assert found["data"]["origin"].endswith("train.jsonl: 12 examples, by the base's tokenizer")
    assert found["tokens_per_step"] == pytest.approx(found["tokens_per_epoch"] / 3, abs=1)
    assert found["device"] == "cpu"
    assert found["fits"]
    assert found["tokens_per_microbatch"] == 400
    assert found["limit"]["origin"] == "half of the memory that is free now"


def test_the_token_count_is_that_of_training(write_recipe, tmp_path):
    recipe = write_recipe({"train.eval_every": 1})
    counted = facts(recipe)["tokens_per_epoch"]
    assert CliRunner().invoke(main, ["train", str(recipe), "--output", str(tmp_path / "run")]).exit_code == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["tokens"] == counted


def test_tokens_are_estimated_where_the_tokenizer_isnt_here(write_recipe):
    found = facts(write_recipe({"model.base": "Qwen/Qwen2.5-0.5B"}))
    assert found["data"]["origin"].endswith("train.jsonl: 12 examples; tokens estimated, 4 characters each")
    assert found["steps"] == 3


def test_what_is_missing_is_assumed_at_its_longest(write_recipe):
    found = facts(write_recipe({"data.train": "nowhere.jsonl"}))
    assert "nowhere.jsonl: no such file; each pair is taken to be 128 + 2 x 128 tokens" in found["data"]["origin"]
    assert (found["steps"], found["tokens_per_epoch"], found["flops"]) == (None, None, None)
    assert found["tokens_per_step"] == 4 * (128 + 2 * 127)


def test_a_large_file_is_sampled_and_its_longest_rows_are_found(write_recipe, tmp_path, monkeypatch):
    """Row 7 is the longest and not among every third row."""
    monkeypatch.setattr("qpref.memory.planned_data.MOST_TOKENIZED", 4)
    monkeypatch.setattr("qpref.memory.planned_data.LONGEST_TOKENIZED", 1)
    recipe = write_recipe({"data.max_length": 500, "train.tokens_per_microbatch": "auto", "train.batch_size": 1})
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    rows[7]["chosen"] = "It is eight. " * 20
    write_jsonl(tmp_path / "train.jsonl", rows)
    found = facts(recipe)
    assert "12 examples (by 4 of them), by the base's tokenizer" in found["data"]["origin"]
    assert found["tokens_per_microbatch"] > 260 > found["tokens_per_step"]


def test_mismatched_completions_count(write_recipe):
    """Each pair is two completions; under kto another's stands after each prompt, too."""
    alone, with_partners = (
        facts(write_recipe({"loss.name": name, "train.batch_size": 8})) for name in ("apo_zero_unpaired", "kto")
    )
    assert (alone["data"]["examples"], alone["steps"]) == (24, 3)
    assert alone["tokens_per_step"] < with_partners["tokens_per_step"] < 2 * alone["tokens_per_step"]


def test_a_missing_held_out_file_is_no_matter(write_recipe):
    assert facts(write_recipe({"data.heldout": "nowhere.jsonl"}))["steps"] == 3


def test_work_is_that_of_the_steps_and_one_reference_pass(write_recipe):
    """The reference is scored once for each pair, so the second epoch adds training alone."""
    one, two, none = (
        facts(write_recipe(changes))["flops"]
        for changes in ({"train.epochs": 1}, {"train.epochs": 2}, {"loss.name": "simpo", "loss.beta": 2.0})
    )
    assert none < one < two < 2 * one
    assert two - one == pytest.approx(none)


def test_hours_are_predicted_only_at_a_given_speed(write_recipe):
    recipe = write_recipe()
    assert "hours" not in facts(recipe)
    found = facts(recipe, "--tflops", "2")
    assert found["hours"]["hours"] == pytest.approx(found["flops"] / 2e12 / 3600)
    assert "hours at 2 TFLOP/s" in plan(recipe, "--tflops", "2").stdout
    assert plan(recipe, "--tflops", "0", code=2)


@pytest.mark.parametrize("size", ["24GiB", "24 GiB", "24"])
def test_vram_is_read_with_or_without_a_unit(write_recipe, size):
    found = facts(write_recipe({"model.memory": "2GiB"}), "--vram", size)
    origin = f"--vram {size}, less 0.40 of the CUDA context (assumed)"
    assert found["limit"] == {"bytes": 24 * 2**30 - int(0.4 * 2**30), "origin": origin}
    assert (found["device"], found["card"]) == ("cuda", None)


def test_vram_of_a_recipe_on_the_cpu_is_the_limit_itself(write_recipe):
    found = facts(write_recipe({"model.device": "cpu"}), "--vram", "8")
    assert found["limit"] == {"bytes": 8 * 2**30, "origin": "--vram"}


def test_the_recipes_memory_is_the_limit_without_vram(write_recipe):
    found = facts(write_recipe({"model.memory": "2GB"}))
    assert found["limit"] == {"bytes": 2 * 10**9, "origin": "[model] memory"}


def test_a_shape_can_be_named(write_recipe, make_base):
    recipe = write_recipe()
    assert facts(recipe, "--shape", "smollm2-135m")["shape"]["parameters"] == 134_515_008
    assert facts(recipe, "--shape", make_base(num_hidden_layers=3))["shape"]["layers"] == 3


def test_auto_is_chosen_and_printed(write_recipe):
    recipe = write_recipe({"train.tokens_per_microbatch": "auto", "train.gradient_checkpointing": "auto"})
    done = plan(recipe, "--shape", "Qwen2.5-7B", "--vram", "10GiB", "--set", "model.quantization=nf4",
                "--set", "model.dtype=bf16", "--set", "train.batch_size=12").stdout  # fmt: skip
    assert re.search(r"tokens per micro-batch  \d+  \(auto\)", done)
    assert re.search(r"recomputed layers       \d+ of 28  \(auto\)", done)
    assert "(the recipe's)" in plan(write_recipe()).stdout


def test_nothing_that_fits_exits_5_with_what_would_help():
    done = plan(RECIPES / "7b-24gb.toml", "--vram", "6GiB", code=5)
    assert "  weights " in done.stdout
    limit = "5.60 GiB (--vram 6GiB, less 0.40 of the CUDA context (assumed))"
    assert re.match(rf"error: needs \d+\.\d\d GiB, and the limit is {re.escape(limit)}\n", done.stderr)
    assert "hint: what would help, most first:\n  [" in done.stderr
    assert "billion parameters" in done.stderr
    found = facts(RECIPES / "7b-24gb.toml", "--vram", "6GiB", code=5)
    assert (found["fits"], bool(found["advice"])) == (False, True)


def test_adapters_on_experts_are_planned():
    """A and B of rank 4 for each of 128 experts of 48 layers: gate and up 2048 -> 1536, down 768 -> 2048."""
    options = ("--shape", "Qwen3-30B-A3B", "--vram", "80GiB", "--set", "adapter.experts=true", "--set",
               "adapter.rank=4", "--set", "adapter.dropout=0")  # fmt: skip
    size = 48 * 128 * 4 * (2048 + 1536 + 768 + 2048)
    assert facts(RECIPES / "7b-24gb.toml", *options)["expert_adapter_parameters"] == size == 157_286_400
    lines = plan(RECIPES / "7b-24gb.toml", *options).stdout.splitlines()
    assert "adapter  161 million parameters on 192 linear layers and on the experts of 48 layers" in lines
    assert "experts  29.0 billion parameters in 4 bits, with 157 million parameters of the adapter" in lines


def test_adapters_on_experts_that_a_model_lacks_are_refused_as_by_train():
    done = plan(RECIPES / "7b-24gb.toml", "--shape", "Qwen3-4B", "--vram", "80GiB", "--set", "adapter.experts=true",
                "--set", "adapter.dropout=0", code=10)  # fmt: skip
    assert done.stderr == (
        "error: [adapter] experts: this qwen3 model has no experts\nhint: leave [adapter] experts out\n"
    )


@pytest.mark.parametrize("size", ["lots", "24TB", "0"])
def test_a_bad_vram_is_refused(write_recipe, size):
    done = plan(write_recipe(), "--vram", size, code=2)
    assert done.stderr == f"error: --vram: expected a size such as 24GiB or 24GB, got '{size}'\n"


def test_an_unknown_shape_is_refused(write_recipe):
    done = plan(write_recipe(), "--shape", "Llama-9-9B", code=10)
    assert done.stderr.startswith(
        "error: --shape Llama-9-9B: neither a folder with config.json nor a known shape\nhint:"
    )


def test_a_base_of_unknown_size_names_the_way_out(write_recipe):
    done = plan(write_recipe({"model.base": "someone/strange"}), code=10)
    assert "someone/strange: no config.json: HF_HUB_OFFLINE is set" in done.stderr
    assert "--shape FOLDER" in done.stderr


def test_mistakes_of_the_recipe_are_reported_as_by_train(write_recipe, tmp_path):
    assert "[train] epochs" in plan(write_recipe({"train.epochs": 0}), code=2).stderr
    assert "no such recipe" in plan(tmp_path / "none.toml", code=2).stderr
    assert "batch_size is 64, and there are 12" in plan(write_recipe({"train.batch_size": 64}), code=2).stderr


def test_bad_rows_are_reported_as_by_train(write_recipe, tmp_path):
    recipe = write_recipe()
    (tmp_path / "train.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "b"}\n')
    assert "train.jsonl:1" in plan(recipe, code=3).stderr


def test_rows_that_are_all_too_long_are_an_error(write_recipe):
    recipe = write_recipe({"data.max_length": 4, "data.max_prompt_length": 2, "data.on_overflow": "drop"})
    assert "no example is left within [data] max_length" in plan(recipe, code=3).stderr


def test_a_gpu_that_isnt_there_asks_for_vram_or_another_device(write_recipe):
    if not __import__("torch").cuda.is_available():
        assert "device is cuda" in plan(write_recipe({"model.device": "cuda"}), code=10).stderr
    assert facts(write_recipe({"model.device": "cuda"}), "--vram", "8")["device"] == "cuda"


def test_planning_leaves_nothing_behind(write_recipe, tmp_path):
    recipe = write_recipe()
    before = sorted(tmp_path.rglob("*"))
    plan(recipe)
    assert sorted(tmp_path.rglob("*")) == before
    assert not Path("runs/tiny").exists()
