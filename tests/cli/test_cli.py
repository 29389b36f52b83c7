"""The real command: exit codes, whole messages, nothing left behind by a refusal, and an answer at once."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import tomli_w
from click.testing import CliRunner

from qpref.cli import COMMANDS, main
from qpref.hooks.manager import installed_offers

QPREF = Path(sys.executable).with_name("qpref")
HEAVY = ("torch", "transformers", "peft", "bitsandbytes", "trl", "pydantic", "numpy")


def run(*arguments, **environment):
    """The installed command, in a process of its own."""
    return subprocess.run(
        [QPREF, *map(str, arguments)], capture_output=True, text=True, check=False, env=os.environ | environment
    )


def invoke(*arguments):
    """The same command in this process, which has torch loaded already."""
    return CliRunner().invoke(main, list(map(str, arguments)), catch_exceptions=False)


def files_under(folder):
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.fixture
def write_recipe(tmp_path, make_recipe):
    """`write_recipe({"loss.beta": 1})`: the path of a tiny recipe, alone in its folder with its data."""

    def write(changes=None):
        path = tmp_path / "tiny.toml"
        path.write_text(tomli_w.dumps(make_recipe(changes)))
        return path

    return write


# In a process of its own: what stands on standard error is all that a user sees.


def test_progress_bars_of_libraries_stay_out_of_a_file():
    bar = "from tqdm.auto import tqdm; list(tqdm(range(3)))"
    script = f"from qpref.cli import main; main(['losses'], standalone_mode=False); {bar}"
    environment = {name: value for name, value in os.environ.items() if name != "TQDM_DISABLE"}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment
    )  # fmt: skip
    assert done.stderr == ""


def test_a_broken_recipe_is_one_message_and_leaves_nothing(tmp_path, write_recipe):
    recipe = write_recipe({"train.learning_rate": "hot", "adapter.dora": True})
    before = files_under(tmp_path)
    done = run("train", recipe, "--output", tmp_path / "run")
    assert (done.returncode, done.stdout, done.stderr) == (
        2,
        "",
        f"error: {recipe}: 2 problems\n"
        "  [adapter] dora: DoRA rescales whole columns of the base, which folds into no delta on a 4-bit base\n"
        "  [train] learning_rate: expected a number, got 'hot'\n",
    )
    assert files_under(tmp_path) == before


def test_an_unknown_loss_is_one_message_and_leaves_nothing(tmp_path, write_recipe):
    recipe = write_recipe({"loss.name": "simpoo"})
    before = files_under(tmp_path)
    done = run("train", recipe, "--output", tmp_path / "run")
    assert (done.returncode, done.stdout, done.stderr) == (
        2,
        "",
        f"error: {recipe}: 1 problem\n  [loss] name: no loss 'simpoo' is installed; did you mean 'simpo'?\n",
    )
    assert files_under(tmp_path) == before


def test_a_row_that_is_no_pair_is_one_message_and_leaves_nothing(tmp_path, write_recipe):
    recipe = write_recipe()
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write('{"prompt": "Who?", "chosen": "Me."}\n{"prompt": "Who?", "chosen": "Me.", "rejec\n')
    before = files_under(tmp_path)
    done = run("train", recipe, "--output", tmp_path / "run")
    assert (done.returncode, done.stdout, done.stderr) == (
        3,
        "",
        f"error: {tmp_path}/train.jsonl:13: not a preference pair: no rejected; it has prompt, chosen; if a column has "
        'another name, map it: [data] columns = { rejected = "..." }\n'
        f"{tmp_path}/train.jsonl:14: not JSON: the row doesn't end on its line: it was cut off, or a line break or "
        "quote in a text isn't escaped (column 37); 2 of 18 rows are refused\n"
        "hint: fix or drop the rows (`qpref check` lists all of them), or allow a share of them with "
        "[data] skip_bad\n",
    )
    assert files_under(tmp_path) == before


# In this process.


def refusal(tmp_path, *arguments):
    """Exit code and standard error of a `train` that is refused; asserts that it leaves nothing and prints nothing."""
    before = files_under(tmp_path)
    done = invoke("train", *arguments)
    assert files_under(tmp_path) == before
    assert done.stdout == ""
    return done.exit_code, done.stderr


def test_a_missing_recipe_exits_2(tmp_path):
    path = tmp_path / "none.toml"
    assert refusal(tmp_path, path, "--output", tmp_path / "run") == (2, f"error: {path}: no such recipe\n")


def test_a_bad_override_exits_2(tmp_path, write_recipe):
    assert refusal(tmp_path, write_recipe(), "--set", "loss.beta", "--output", tmp_path / "run") == (
        2,
        "error: --set loss.beta: expected table.key=value\n",
    )


@pytest.mark.parametrize("key", ["train", "heldout"])
def test_a_missing_data_file_exits_3(tmp_path, write_recipe, key):
    recipe = write_recipe({f"data.{key}": "none.jsonl"})
    assert refusal(tmp_path, recipe, "--output", tmp_path / "run") == (
        3,
        f"error: {tmp_path}/none.jsonl: no such file\n",
    )


def test_data_that_are_a_folder_exit_3(tmp_path, write_recipe):
    (tmp_path / "folder.jsonl").mkdir()
    recipe = write_recipe({"data.train": "folder.jsonl"})
    assert refusal(tmp_path, recipe, "--output", tmp_path / "run") == (
        3,
        f"error: {tmp_path}/folder.jsonl: not a folder of Dataset.save_to_disk: it has no state.json\n",
    )


def test_an_empty_data_file_exits_3(tmp_path, write_recipe):
    recipe = write_recipe({"data.train": "empty.jsonl"})
    (tmp_path / "empty.jsonl").touch()
    assert refusal(tmp_path, recipe, "--output", tmp_path / "run") == (
        3,
        f"error: {tmp_path}/empty.jsonl: no pair is left of 0 rows\n",
    )


def make_folder(path, **files):
    path.mkdir()
    for name, text in files.items():
        (path / name.replace("__", ".")).write_text(text)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "{base}: no config.json, so no model folder"),
        ({"config__json": "{"}, "{base}/config.json: not JSON: "),
        ({"config__json": '{"model_type": "llama"}'}, "{base}/model.safetensors: no such file"),
        (
            {"config__json": '{"model_type": "llama", "auto_map": {}}'},
            "{base}/config.json: 'auto_map' names code of the model's own, which qpref doesn't run",
        ),
    ],
    ids=["empty", "no JSON", "no weights", "code"],
)
def test_an_unreadable_model_folder_exits_10(tmp_path, write_recipe, files, message):
    base = tmp_path / "base"
    make_folder(base, **files)
    code, stderr = refusal(tmp_path, write_recipe({"model.base": str(base)}), "--output", tmp_path / "run")
    assert (code, stderr.startswith("error: " + message.format(base=base)), stderr.count("\n")) == (10, True, 1)


def test_a_folder_that_holds_a_run_exits_2_and_stays(tmp_path, write_recipe):
    make_folder(tmp_path / "run", run__json="{}", metrics__jsonl="")
    assert refusal(tmp_path, write_recipe(), "--output", tmp_path / "run") == (
        2,
        f"error: {tmp_path}/run: holds a run\n"
        "hint: continue with --resume, replace it with --overwrite, or use --output\n",
    )


@pytest.mark.parametrize("option", [None, "--resume", "--overwrite"])
def test_a_folder_with_other_files_exits_2_and_stays(tmp_path, write_recipe, option):
    make_folder(tmp_path / "thesis", chapter__tex="All of it.")
    options = [option] if option else []
    assert refusal(tmp_path, write_recipe(), "--output", tmp_path / "thesis", *options) == (
        2,
        f"error: {tmp_path}/thesis: holds files and no run\nhint: name another folder with --output\n",
    )


def test_resume_and_overwrite_exclude_each_other(tmp_path, write_recipe):
    make_folder(tmp_path / "run", run__json="{}")
    assert refusal(tmp_path, write_recipe(), "--output", tmp_path / "run", "--resume", "--overwrite") == (
        2,
        "error: --resume and --overwrite exclude each other\n",
    )


def test_a_file_as_the_run_folder_exits_2_and_stays(tmp_path, write_recipe):
    (tmp_path / "run").write_text("mine")
    assert refusal(tmp_path, write_recipe(), "--output", tmp_path / "run") == (
        2,
        f"error: {tmp_path}/run: is a file; a run needs a folder\n",
    )


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["trian"], "No such command 'trian'. Did you mean 'train'?"),
        (["losses", "shwo"], "No such command 'shwo'. Did you mean 'show'?"),
        (["cache", "zzz"], "No such command 'zzz'. Commands: clear."),
        (["train"], "Missing argument 'RECIPE'."),
        (["train", "r.toml", "--zzz", "1"], "No such option '--zzz'."),
        (["plugins", "--jsn"], "No such option '--jsn'. Did you mean '--json'?"),
    ],
)
def test_a_wrong_command_line_exits_2(arguments, complaint):
    done = invoke(*arguments)
    assert (done.exit_code, done.stderr.splitlines()[-1]) == (2, f"Error: {complaint}")


# qpref plugins


@pytest.fixture
def acme(tmp_path):
    """Environment in which a foreign distribution alone offers plugins; its modules don't exist."""
    info = tmp_path / "site" / "acme_losses-2.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-losses\nVersion: 2.0\n")
    (info / "entry_points.txt").write_text(
        "[qpref]\nloss-warm = acme_warm\nread-warm-and-wet = acme_read\nlos-cold = acme_cold\n"
    )
    disabled = ",".join(offer.entry_point for offer in installed_offers())
    return {"PYTHONPATH": str(tmp_path / "site"), "QPREF_DISABLE": disabled}


def test_plugins_lists_each_with_its_distribution(acme):
    done = run("plugins", **acme)
    lines = done.stdout.splitlines()
    assert (done.returncode, done.stderr, [line.split()[:5] for line in lines]) == (
        0,
        "",
        [
            ["KIND", "NAME", "DISTRIBUTION", "VERSION", "ENTRY"],
            ["?", "cold", "acme-losses", "2.0", "los-cold"],
            ["loss", "warm", "acme-losses", "2.0", "loss-warm"],
            ["reader", "warm-and-wet", "acme-losses", "2.0", "read-warm-and-wet"],
        ],
    )
    assert lines[0].endswith("  PROBLEM")
    assert "unknown kind 'los'; did you mean loss-cold?" in lines[1]
    assert "there is no module acme_warm; reinstall acme-losses" in lines[2]


def test_plugins_lists_the_same_as_json(acme):
    done = run("plugins", "--json", **acme)
    rows = [("los", "cold", "acme_cold"), ("loss", "warm", "acme_warm"), ("read", "warm-and-wet", "acme_read")]
    listed = json.loads(done.stdout)
    assert [plugin.pop("problem").partition(";")[0] for plugin in listed] == [
        "unknown kind 'los'", "there is no module acme_warm", "there is no module acme_read",
    ]  # fmt: skip
    assert listed == [
        {"kind": kind, "name": name, "distribution": "acme-losses", "version": "2.0", "module": module}
        for kind, name, module in rows
    ]


def test_a_clash_with_a_built_in_is_marked_on_both_lines_with_the_third_party_to_leave_out(tmp_path):
    info = tmp_path / "acme_losses-2.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-losses\nVersion: 2.0\n")
    (info / "entry_points.txt").write_text("[qpref]\nloss-dpo = json\n")
    listed = json.loads(run("plugins", "--json", PYTHONPATH=str(tmp_path)).stdout)
    marked = {plugin["distribution"]: plugin["problem"] for plugin in listed if plugin["problem"]}
    assert set(marked) == {"acme-losses", "qpref"}
    for problem in marked.values():
        assert problem.startswith("clashes with ")
        assert problem.endswith("uninstall acme-losses, or leave it out: QPREF_DISABLE=acme-losses:loss-dpo")


def test_plugins_lists_every_built_in():
    listed = [line.split() for line in invoke("plugins").stdout.splitlines()[1:]]
    assert [(row[-1], row[-3]) for row in listed] == [
        (offer.entry_point, offer.distribution) for offer in installed_offers()
    ]


# --dry-run


def test_a_dry_run_needs_neither_data_nor_model_and_makes_nothing(tmp_path):
    recipe = tmp_path / "dry.toml"
    recipe.write_text(
        '[model]\nbase = "nobody/nothing"\n[data]\ntrain = "none.jsonl"\n[loss]\nname = "ipo"\nbeta = 0.25\n'
    )
    before = files_under(tmp_path)
    done = subprocess.run(
        [sys.executable, "-X", "importtime", QPREF, "train", recipe, "--dry-run", "--set", "train.epochs=7"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0
    assert files_under(tmp_path) == before
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "qpref.recipe.resolve" in imported
    unwanted = ("transformers", "peft", "bitsandbytes", "trl", "qpref.data", "qpref.policy", "qpref.training.run")
    assert imported.isdisjoint(unwanted)


CHECKS = ("bias", "duplicates", "leakage", "pairs", "text")


def test_a_dry_run_prints_the_resolved_recipe_and_its_plugins(tmp_path, write_recipe):
    import tomllib

    done = invoke("train", write_recipe(), "--dry-run", "--output", tmp_path / "run", "--set", "train.epochs=7")
    document = tomllib.loads(done.stdout)
    assert (document["train"]["epochs"], document["train"]["seed"], document["checks"]["identical"]) == (7, 0, "error")
    comments = [line for line in done.stdout.splitlines() if line.startswith("#")]
    offers = {offer.entry_point: f"# {offer}" for offer in installed_offers()}
    assert comments == [
        f"# run folder: {tmp_path}/run",
        *(offers[name] for name in (*(f"check-{name}" for name in CHECKS), "loss-dpo", "read-jsonl")),
    ]


def test_a_dry_run_refuses_what_a_run_would(tmp_path, write_recipe):
    recipe = write_recipe({"loss.betaa": 1})
    assert refusal(tmp_path, recipe, "--dry-run")[0] == 2


# At once.


@pytest.mark.parametrize("arguments", [["--help"], ["plugins"], ["plugins", "--json"], ["--version"]])
def test_help_and_plugins_import_nothing_heavy(arguments):
    code = f"""
import sys
from qpref.cli import main
main({arguments!r}, standalone_mode=False)
print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "[]\n"


def test_every_command_of_the_help_exists():
    assert {name: invoke(name, "--help").exit_code for name in COMMANDS} == dict.fromkeys(COMMANDS, 0)


BARE = """import click
@click.group()
def main(): pass
main()
"""


def test_help_and_plugins_answer_within_five_starts_of_a_bare_click_program(tmp_path):
    bare = tmp_path / "bare.py"
    bare.write_text(BARE)
    commands = {"bare": [bare, "--help"], "help": [QPREF, "--help"], "plugins": [QPREF, "plugins"]}
    seconds = {name: [] for name in commands}
    for _ in range(6):
        for name, command in commands.items():
            start = cpu_seconds_of_children()
            subprocess.run([sys.executable, *command], stdout=subprocess.DEVNULL, check=True)
            seconds[name].append(cpu_seconds_of_children() - start)
    limit = 5 * min(seconds["bare"])
    assert {name: min(taken) for name, taken in seconds.items() if min(taken) > limit} == {}


def cpu_seconds_of_children() -> float:
    """CPU time, which waiting beside other programs doesn't add to."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, "expandable_segments:True"),
        ({"PYTORCH_ALLOC_CONF": "backend:native"}, "backend:native"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, None),
    ],
)
def test_gpu_memory_is_in_expandable_segments_unless_the_user_says_otherwise(given, wanted):
    """Said before torch is imported, which is when its allocator reads it."""
    code = (
        "import os, sys\n"
        "from qpref.cli import main\n"
        "main(['plugins'], standalone_mode=False)\n"
        "assert 'torch' not in sys.modules\n"
        "print(os.environ.get('PYTORCH_ALLOC_CONF'))\n"
    )
    environment = {name: value for name, value in os.environ.items() if "ALLOC_CONF" not in name} | given
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.splitlines()[-1] == str(wanted)


@pytest.mark.parametrize(("given", "wanted"), [({}, "passive"), ({"OMP_WAIT_POLICY": "active"}, "active")])
def test_threads_sleep_while_they_wait_unless_the_user_says_otherwise(given, wanted):
    """Said before torch is imported, which is when OpenMP reads it."""
    code = (
        "import os, sys\n"
        "from qpref.cli import main\n"
        "main(['plugins'], standalone_mode=False)\n"
        "assert 'torch' not in sys.modules\n"
        "print(os.environ['OMP_WAIT_POLICY'])\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"} | given
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.splitlines()[-1] == wanted
