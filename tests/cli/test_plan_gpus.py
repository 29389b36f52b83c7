"""`qpref plan --gpus`: what it prints, chooses and refuses."""

import json
import re

import pytest
from click.testing import CliRunner

from qpref.cli import main

SMALL = ("--shape", "Qwen2.5-0.5B")


def plan(*arguments, code=0):
    done = CliRunner().invoke(main, ["plan", *map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == code, done.output
    return done


def facts(*arguments, code=0):
    return json.loads(plan(*arguments, "--json", code=code).stdout)


def test_70b_on_two_cards_of_24_gb_gets_a_sharded_plan():
    done = plan("--shape", "Llama-3.1-70B", "--gpus", 2, "--vram", 24).stdout
    assert "GPUs     2; 23.60 GiB on each: --vram 24, less 0.40 of the CUDA context (assumed)" in done
    assert "no recipe: dpo at rank 8 with adamw_8bit; each pair is taken to be 256 + 2 x 256 tokens" in done
    replicated, sharded = map(float, re.search(r"total        of 23.60 GiB +([\d.]+) +([\d.]+)\n", done).groups())
    assert replicated > 36 > 23.6 > sharded
    assert f"plan     sharded base; a replicated one needs {replicated:.2f} GiB\n" in done


def test_text_and_json_say_the_same_of_both_modes():
    asked = (*SMALL, "--gpus", 3, "--card", "RTX 3090", "--link", "pcie3", "--set", "train.batch_size=16")
    lines = plan(*asked).stdout.splitlines()
    whole = facts(*asked)
    found = whole["several_gpus"]
    assert (whole["fits"], "memory" in whole, found["best"]) == (True, False, "replicated")  # memory: in each mode
    assert (
        "speed    28.4 TFLOP/s on each: assumed: 40% of 71, NVIDIA Ampere GA102 whitepaper; --tflops sets it" in lines
    )
    assert "dealing  the fullest GPU has 1.12 times the tokens of the mean one" in lines
    rows = {line[:66].strip(): line[66:].split() for line in lines if len(line) > 80}
    for column, name in enumerate(("replicated", "sharded")):
        mode = found[name]
        sent = sum(mode["sent_bytes_per_step"].values())
        assert rows["efficiency"][column] == f"{mode['efficiency']:.0%}"
        assert rows["each GPU sends a step, GiB"][column] == f"{sent / 2**30:.2f}"
        assert rows["total        of 23.05 GiB"][column] == f"{mode['memory']['total'] / 2**30:.2f}"
    assert found["sharded"]["sent_bytes_per_step"]["base"] > 0
    assert (found["gpus"], found["hosts"], found["link"]["name"]) == (3, 1, "pcie3")


def test_one_gpu_is_planned_as_without_the_option(tmp_path):
    asked = (*SMALL, "--vram", 8)
    assert plan(*asked, "--gpus", 1).stdout == plan(*asked).stdout


def test_hosts_are_planned_over_their_network():
    found = facts(*SMALL, "--gpus", 8, "--hosts", 2, "--vram", 80, "--link", "nvlink-h100", "--tflops", 300)
    several = found["several_gpus"]
    assert several["link"]["name"] == "ethernet-10g"
    assert several["speed"] == {"tflops": 300.0, "source": "--tflops"}
    assert several["tokens_of_a_rank"]["mean"] == pytest.approx(found["tokens_per_step"] / 16, abs=1)


def test_what_fits_in_neither_mode_exits_5_with_what_would_help():
    done = plan("--shape", "Qwen2.5-7B", "--gpus", 2, "--vram", 3, code=5)
    assert "plan     neither fits\n" in done.stdout
    assert done.stderr.startswith("error: needs ")
    assert "hint: what would help, most first:\n  " in done.stderr


def test_a_base_that_cannot_be_shared_is_planned_on_each_gpu_alone():
    asked = (*SMALL, "--gpus", 2, "--set", "model.quantization=none")
    assert (
        "plan     replicated base; it can't be sharded: only 4-bit bases are shared\n"
        in plan(*asked, "--vram", 8).stdout
    )
    found = facts(*asked, "--vram", 1, code=5)["several_gpus"]
    assert (found["best"], found["sharded"]["refusal"]) == (None, "only 4-bit bases are shared")


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ((), "Error: Name a RECIPE, or a base by --shape.\n"),
        ((*SMALL, "--vram", 8, "--link", "pcie4"), "Error: --link is between several GPUs: add --gpus or --hosts.\n"),
        (
            (*SMALL, "--gpus", 2, "--set", "model.device=cpu"),
            "error: --gpus: the plan is for the CPU\nhint: name the card or its memory: --card 'RTX 3090', --vram 24\n",
        ),
        ((*SMALL, "--gpus", 0), "Error: Invalid value for '--gpus': 0 is not in the range x>=1.\n"),
    ],
)
def test_options_that_leave_nothing_to_plan_are_refused(options, problem):
    assert plan(*options, code=2).stderr.endswith(problem)
