"""Recipes and data of the hub, through huggingface_hub's and datasets' own clients, from a hub on the loopback."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from conftest import preference_rows, write_jsonl
from hub import LoopbackHub, Repository, dataset_files, loopback_hub
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from qpref.hooks.hub import hub_failure

QPREF = Path(sys.executable).with_name("qpref")
RECIPES = Path(__file__).parents[1] / "recipes"
DATA = "trl-lib/ultrafeedback_binarized"
NOBODY = "http://127.0.0.1:9"
"""Where nothing listens."""
NO_SERVER, OFFLINE = {"HF_ENDPOINT": NOBODY}, {"HF_HUB_OFFLINE": "1"}
TINY = ("model.base=tiny-org/tiny", "model.device=cpu", "train.max_steps=2", "adapter.rank=4")


def conversations(count: int, start: int = 0) -> list[dict[str, object]]:
    """Rows as the public set has them: whole conversations and scores; one pair says the same twice."""
    rows = []
    for row in preference_rows(count, start):
        user = {"content": row["prompt"], "role": "user"}
        sides = {side: [user, {"content": row[side], "role": "assistant"}] for side in ("chosen", "rejected")}
        rows.append({**sides, "score_chosen": 8.0, "score_rejected": 3.5})
    rows[-1]["rejected"] = rows[-1]["chosen"]
    return rows


@dataclass
class Machine:
    """A computer that knows one hub, with caches of its own."""

    hub: LoopbackHub
    home: Path

    def qpref(self, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
        self.hub.state.calls.clear()
        return subprocess.run(
            [QPREF, *map(str, arguments)], cwd=self.home, capture_output=True, text=True, check=False,
            env=self.hub.environment(self.home) | environment,
        )  # fmt: skip

    def train(self, *more: str, output: str = "run", **environment: str) -> subprocess.CompletedProcess[str]:
        settings = [word for change in TINY for word in ("--set", change)]
        return self.qpref("train", RECIPES / "7b-24gb.toml", *settings, *more, "--output", output, **environment)

    def downloads(self) -> list[str]:
        """The large files that were fetched, as often as they were."""
        return sorted(call.path.split("/")[-1] for call in self.hub.state.calls
                      if call.method == "GET" and call.path.startswith("/lfs/"))  # fmt: skip


@pytest.fixture(scope="module")
def hub(make_base) -> Iterator[LoopbackHub]:
    base = make_base(max_position_embeddings=2048)
    files = dataset_files({"train": conversations(32), "test": conversations(21, start=1000)})
    with loopback_hub() as hub:
        for name, how in (("tiny", {}), ("gated", {"gated": True}), ("broken", {"broken": True})):
            hub.state.put(Repository.of_folder("models", f"tiny-org/{name}", base, **how))
            hub.state.put(Repository("datasets", f"tiny-org/{name}", files, **how))
        hub.state.put(_quantized(Repository.of_folder("models", "tiny-org/fp8", base)))
        hub.state.put(Repository("datasets", DATA, files))
        yield hub


def _quantized(model: Repository) -> Repository:
    config = json.loads(model.files["config.json"]) | {"quantization_config": {"quant_method": "fp8"}}
    return replace(model, files=model.files | {"config.json": json.dumps(config).encode()})


@pytest.fixture
def machine(hub, tmp_path) -> Machine:
    """One that has fetched nothing."""
    return Machine(hub, tmp_path)


@dataclass
class Trained:
    """A machine on which the 7B recipe has been trained for two steps, how it went, and what was downloaded."""

    machine: Machine
    done: subprocess.CompletedProcess[str]
    downloads: list[str]


@pytest.fixture(scope="module")
def trained(hub, tmp_path_factory) -> Trained:
    machine = Machine(hub, tmp_path_factory.mktemp("machine"))
    done = machine.train()
    return Trained(machine, done, machine.downloads())


def plan_facts(machine: Machine, **environment: str) -> dict[str, object]:
    done = machine.qpref("plan", RECIPES / "7b-24gb.toml", "--vram", "24GiB", "--json", **environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_7b_recipe_trains_as_it_is(trained):
    assert trained.done.returncode == 0, trained.done.stderr
    rows = [json.loads(line) for line in (trained.machine.home / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "eval_loss" in row] == [0, 2]
    assert (trained.machine.home / "run/adapter/adapter_model.safetensors").is_file()


def test_identical_pairs_of_the_set_are_left_out_and_counted(trained):
    assert ": 2 of 53 rows are left out (first: " in trained.done.stderr


def test_each_large_file_is_downloaded_once(trained):
    assert trained.downloads == [
        "model.safetensors",
        "test-00000-of-00001.parquet",
        "train-00000-of-00001.parquet",
    ]


def test_a_later_run_needs_no_hub(trained):
    done = trained.machine.train("--overwrite", **NO_SERVER)
    assert done.returncode == 0, done.stderr
    assert trained.machine.hub.state.calls == []


def test_the_7b_recipe_is_planned_with_the_data_and_no_weights(trained):
    facts = plan_facts(trained.machine)
    assert facts["data"]["examples"] == 31
    assert facts["shape"]["origin"] == "known shape Qwen2.5-7B, by the base's name"
    assert [call for call in trained.machine.hub.state.calls if "Qwen" in call.path] == []


def test_the_7b_recipe_is_planned_without_a_hub(machine):
    data = plan_facts(machine, **NO_SERVER)["data"]
    assert data["examples"] is None
    assert data["origin"] == (
        f"hf:{DATA}: the hub at {NOBODY} can't be reached: [Errno 111] Connection refused; "
        "each pair is taken to be 512 + 2 x 512 tokens, the longest allowed"
    )


def test_a_wrong_name_is_no_reason_to_plan_without_data(machine):
    done = machine.qpref("plan", RECIPES / "7b-24gb.toml", "--set", "data.train=hf:tiny-org/none", "--vram", "24GiB")
    assert (done.returncode, done.stdout) == (3, "")


def test_a_copy_of_another_commit_is_not_read_for_the_one_named(trained):
    done = trained.machine.qpref("check", f"hf:{DATA}@v1", **OFFLINE)
    assert done.returncode == 3
    assert "revision 'v1' can't be looked up, and the copy on this machine has another commit" in done.stderr
    commit = trained.machine.hub.state.repositories["datasets", DATA].commit
    assert done.stderr.rstrip().endswith(f"or use that copy: hf:{DATA}@{commit}")
    assert trained.machine.qpref("check", f"hf:{DATA}@{commit}", **OFFLINE).stdout.startswith(
        f"hf:{DATA}@{commit}: 32 "
    )


TOKEN = "set HF_TOKEN to a token with access to it, or run `hf auth login`"
FAILURES = {
    "wrong name": ("none", {}, "the hub has no {kind} of this name, or it is private",
                   f"check the name; for a private one {TOKEN}"),
    "gated": ("gated", {}, "this {kind} is gated on the hub", f"accept its terms on its page there, and {TOKEN}"),
    "no server": ("tiny", NO_SERVER, f"the hub at {NOBODY} can't be reached: [Errno 111] Connection refused",
                  "check the network and HF_ENDPOINT"),
    "offline": ("tiny", OFFLINE, "HF_HUB_OFFLINE is set, and this {kind} isn't in the hub's cache on this machine",
                "run once with HF_HUB_OFFLINE=0 to download it"),
    "broken off": ("broken", {}, "the download was interrupted: peer closed connection without sending complete "
                   "message body (received ", "run it again; downloaded parts are kept"),
}  # fmt: skip


def last_lines(done: subprocess.CompletedProcess[str], code: int) -> tuple[str, str]:
    """The error and the hint, which end what is printed; the clients may have logged their retries before."""
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    error, hint = done.stderr.splitlines()[-2:]
    return error, hint


@pytest.mark.parametrize("failure", FAILURES)
def test_a_dataset_that_cannot_be_had_is_one_sentence(failure, machine):
    name, environment, what, hint = FAILURES[failure]
    error, way_out = last_lines(machine.qpref("check", f"hf:tiny-org/{name}", **environment), 3)
    assert error.startswith(f"error: hf:tiny-org/{name}: {what.format(kind='dataset')}")
    assert way_out == f"hint: {hint}"


@pytest.mark.parametrize("failure", FAILURES)
def test_a_model_that_cannot_be_had_is_one_sentence(failure, machine):
    name, environment, what, hint = FAILURES[failure]
    write_jsonl(machine.home / "pairs.jsonl", preference_rows(4))
    done = machine.qpref("check", "pairs.jsonl", "--model", f"tiny-org/{name}", **environment)
    error, way_out = last_lines(done, 10)
    assert error.startswith(f"error: tiny-org/{name}: {what.format(kind='model')}")
    assert way_out == f"hint: {hint}; or name a local folder"


def test_a_revision_of_a_dataset_that_does_not_exist_is_named(machine):
    error, _ = last_lines(machine.qpref("check", "hf:tiny-org/tiny@v9"), 3)
    assert error == "error: hf:tiny-org/tiny: the hub has no revision 'v9' of this dataset"


def test_a_revision_of_a_model_that_does_not_exist_is_named(trained):
    error, _ = last_lines(trained.machine.train("--set", "model.revision=v9", output="v9"), 10)
    assert error == "error: tiny-org/tiny: the hub has no revision 'v9' of this model"


def test_weights_that_cannot_be_trained_are_not_downloaded(trained):
    error, hint = last_lines(trained.machine.train("--set", "model.base=tiny-org/fp8", output="fp8"), 10)
    assert "quantized by fp8; only bitsandbytes' 4-bit bases can be trained" in error
    assert hint.startswith("hint: name the original model with 16-bit weights")
    assert "model.safetensors" not in trained.machine.downloads()


def failure_of(error: Exception) -> str:
    return hub_failure(error, "model", None).what


@pytest.mark.parametrize("message", ["", " \n", "\n\nBusy\nlater"])
@pytest.mark.parametrize("status", [404, 429, 500, 503])
def test_an_answer_without_words_is_one_sentence(status, message):
    transport = importlib.import_module(HfHubHTTPError.__bases__[0].__module__.partition(".")[0])
    answer = transport.Response(status, request=transport.Request("GET", "http://hub"))
    failure = hub_failure(HfHubHTTPError(message, response=answer), "model", None)
    assert failure.what == f"the hub answers {status}" + (": Busy" if message.strip() else "")
    assert failure.unreachable == (status >= 500)


def test_the_root_of_a_failure_is_named():
    outer, inner, handled = OSError("outer"), OSError("inner"), OSError("handled")
    outer.__cause__, inner.__context__ = inner, handled
    assert failure_of(outer) == "can't be fetched: inner"
    inner.__cause__ = outer
    assert failure_of(outer) == "can't be fetched: inner"


def test_a_failure_that_another_hides_is_found():
    """As with `raise ... from None` while it is handled."""
    hiding = OSError("not cached")
    hiding.__context__, hiding.__suppress_context__ = OfflineModeIsEnabled("offline"), True
    assert failure_of(hiding) == "HF_HUB_OFFLINE is set, and this model isn't in the hub's cache on this machine"


def test_an_endpoint_that_is_no_address_is_named(machine):
    error, hint = last_lines(machine.qpref("check", "hf:tiny-org/tiny", HF_ENDPOINT="hub.example"), 3)
    assert error.startswith("error: hf:tiny-org/tiny: the hub at hub.example can't be reached: ")
    assert hint == "hint: check the network and HF_ENDPOINT"


def test_a_token_opens_what_is_gated(machine):
    assert machine.qpref("check", "hf:tiny-org/gated:test", HF_TOKEN="hf_mine").stdout.startswith(
        "hf:tiny-org/gated:test: 21 rows read"
    )
