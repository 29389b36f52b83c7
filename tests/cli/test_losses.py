"""`qpref losses`: the list, a single loss, the contract check and the comparison with TRL."""

import json
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import tomli_w
from click.testing import CliRunner

from qpref.cli import main
from qpref.hooks.manager import installed_offers
from qpref.testing import RULES
from qpref.testing.trl_trainers import INSTALL

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"

SOUND = '''
from typing import Literal

from torch.nn.functional import logsigmoid

from qpref.hooks import Field, Options, PairedLoss, UnpairedLoss, hookimpl, reward_metrics, unpaired_reward_metrics
from qpref.records import LossOutput


class WarmOptions(Options):
    """Options of the loss `warm`."""

    beta: float = Field(default=0.1, gt=0, description="The scale of the rewards.")
    side: Literal["left", "right"] = Field(default="left", description="Of no effect.")
    floor: float | None = Field(default=None, description="Of no effect either.")


def build(options):
    def warm(inputs):
        policy, reference = inputs.policy, inputs.reference
        chosen = options.beta * (policy.chosen.total - reference.chosen.total)
        rejected = options.beta * (policy.rejected.total - reference.rejected.total)
        return LossOutput(losses=LOSSES, metrics=reward_metrics(chosen, rejected))
    return warm


def build_lone(options):
    def lone(inputs):
        rewards = options.beta * inputs.policy.mean
        losses = (-rewards).where(inputs.desirable, rewards)
        return LossOutput(losses=losses, metrics=unpaired_reward_metrics(rewards, inputs.desirable))
    return lone


@hookimpl
def qpref_losses():
    yield PairedLoss(
        name="warm", summary="a warm loss", formula="-log sigmoid(beta h)", paper="Acme 2026, eq. 1",
        options=WarmOptions, build=build, starts_at=lambda options: 0.6931471805599453,
        log_ratios_only=True, variants=({"beta": 0.5},),
    )
    yield UnpairedLoss(
        name="lone", summary="a lone loss", options=WarmOptions, build=build_lone,
        needs=lambda options: frozenset(),
    )
'''
LOSSES = "-logsigmoid(chosen - rejected - inputs.margin)"
CAST = "-logsigmoid(chosen - rejected - inputs.margin).float().double()"


@pytest.fixture
def install(tmp_path, monkeypatch):
    """`install("warm", "lone", acme_warm="source")`: a foreign distribution alone offers these losses."""
    monkeypatch.setenv("QPREF_DISABLE", ",".join(offer.entry_point for offer in installed_offers()))
    before = set(sys.modules)

    def put(entry_points, **modules):
        info = tmp_path / "acme_losses-2.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-losses\nVersion: 2.0\n")
        table = "".join(f"loss-{name} = {module}\n" for name, module in entry_points.items())
        (info / "entry_points.txt").write_text(f"[qpref]\n{table}")
        for module, source in modules.items():
            (tmp_path / f"{module}.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path)

    yield put
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture
def sound(install):
    install({"warm": "acme_warm", "lone": "acme_warm"}, acme_warm=SOUND.replace("LOSSES", LOSSES))


@pytest.fixture
def broken(install):
    """One loss that casts, one sound, and one that cannot be imported."""
    install(
        {"warm": "acme_warm", "lone": "acme_warm", "cold": "acme_cold"},
        acme_warm=SOUND.replace("LOSSES", CAST),
        acme_cold="import acme_ice",
    )


def invoke(*arguments):
    done = CliRunner().invoke(main, ["losses", *arguments], catch_exceptions=False)
    return done.exit_code, done.stdout.splitlines(), done.stderr.splitlines()


def test_its_help_imports_no_plugin_and_nothing_heavy():
    code = "import sys; from qpref.cli import main; main(['losses', '--help'], standalone_mode=False)\n"
    code += "print([name for name in sys.modules if name in ('torch', 'pydantic') or name.startswith('qpref_')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_each_loss_is_listed(sound):
    assert invoke() == (
        0,
        [
            "NAME  DATA      DISTRIBUTION     SUMMARY",
            "lone  unpaired  acme-losses 2.0  a lone loss",
            "warm  paired    acme-losses 2.0  a warm loss",
        ],
        [],
    )


def test_a_loss_that_cannot_be_imported_does_not_take_the_list_down(broken):
    code, lines, _ = invoke()
    assert code == 0
    assert [line.split()[:2] for line in lines[1:]] == [["cold", "?"], ["lone", "unpaired"], ["warm", "paired"]]
    assert "it needs the package acme_ice, which isn't installed" in lines[1]


def test_the_list_as_json(broken):
    code, lines, _ = invoke("--json")
    cold, lone, warm = json.loads("\n".join(lines))
    assert code == 0
    assert warm == {
        "name": "warm",
        "kind": "paired",
        "distribution": "acme-losses",
        "version": "2.0",
        "summary": "a warm loss",
        "error": None,
    }
    assert (lone["kind"], lone["error"]) == ("unpaired", None)
    assert (cold["kind"], cold["summary"]) == (None, None)
    assert cold["error"].startswith("acme-losses 2.0 [loss-cold]: it needs the package acme_ice")


def test_every_built_in_is_listed_with_its_version():
    code, lines, _ = invoke("--json")
    ours = {loss["name"] for loss in json.loads("\n".join(lines)) if loss["distribution"] == "qpref"}
    assert code == 0
    assert ours == {offer.name for offer in installed_offers() if (offer.kind, offer.distribution) == ("loss", "qpref")}
    versions = {loss["version"] for loss in json.loads("\n".join(lines)) if loss["distribution"] == "qpref"}
    assert versions == {metadata.version("qpref")}


def test_show_prints_what_a_loss_says_of_itself(sound):
    assert invoke("show", "warm") == (
        0,
        [
            "warm: a warm loss",
            "",
            "from       acme-losses 2.0 [loss-warm]",
            "data       paired",
            "formula    -log sigmoid(beta h)",
            "paper      Acme 2026, eq. 1",
            "needs      reference",
            "scope      example by example",
            "starts at  0.693147",
            "",
            "beta: number, default 0.1",
            "    The scale of the rewards.",
            "",
            'side: "left" or "right", default "left"',
            "    Of no effect.",
            "",
            "floor: number, default none",
            "    Of no effect either.",
        ],
        [],
    )


def test_show_prints_the_same_as_json(sound):
    code, lines, errors = invoke("show", "warm", "--json")
    facts = json.loads("\n".join(lines))
    assert (code, errors) == (0, [])
    (beta,) = [option for option in facts.pop("options") if option["name"] == "beta"]
    assert (beta["type"], beta["required"], beta["default"]) == ("number", False, 0.1)
    assert facts == {
        "name": "warm",
        "summary": "a warm loss",
        "from": "acme-losses 2.0 [loss-warm]",
        "data": "paired",
        "formula": "-log sigmoid(beta h)",
        "paper": "Acme 2026, eq. 1",
        "needs": "reference",
        "scope": "example by example",
        "starts_at": "0.693147",
    }


def test_show_leaves_out_what_a_loss_does_not_say(sound):
    code, lines, _ = invoke("show", "lone")
    assert code == 0
    assert lines[2:7] == [
        "from       acme-losses 2.0 [loss-lone]",
        "data       unpaired",
        "needs      nothing",
        "scope      example by example",
        "starts at  no constant",
    ]


def test_show_of_a_record_that_raises_is_one_message(install):
    source = SOUND.replace("LOSSES", LOSSES).replace("lambda options: 0.6931471805599453", "lambda options: 1 / 0")
    install({"warm": "acme_warm"}, acme_warm=source)
    assert invoke("show", "warm") == (
        6,
        [],
        [
            "error: acme-losses 2.0 [loss-warm]: its record raised ZeroDivisionError: division by zero",
            "hint: see qpref losses check warm",
        ],
    )


@pytest.mark.parametrize("subcommand", ["show", "check"])
def test_an_unknown_loss_exits_2_with_the_nearest_name(sound, subcommand):
    assert invoke(subcommand, "wram") == (2, [], ["error: no loss 'wram' is installed; did you mean 'warm'?"])


def test_one_unknown_loss_keeps_the_others_from_being_checked(sound):
    assert invoke("check", "warm", "wram")[:2] == (2, [])


def test_check_prints_one_line_for_each_sound_loss(sound):
    assert invoke("check") == (
        0,
        [
            "lone (acme-losses 2.0 [loss-lone]): ok, 1 set of options",
            "warm (acme-losses 2.0 [loss-warm]): ok, 2 sets of options",
        ],
        [],
    )


def test_check_of_a_named_loss_prints_each_rule(sound):
    code, lines, stderr = invoke("check", "lone")
    assert (code, stderr) == (0, [])
    rows = [line.strip().split("  ") for line in lines[1:]]
    assert [row[0] for row in rows] == list(RULES)
    said = {row[0]: [cell.strip() for cell in row[1:] if cell] for row in rows}
    assert said["gradient"] == ["ok"]
    assert said["start"] == ["skipped", "it doesn't declare where it starts"]


def test_check_names_loss_distribution_version_and_rule_and_exits_6(broken):
    code, lines, stderr = invoke("check", "warm")
    assert code == 6
    assert lines[0] == "warm (acme-losses 2.0 [loss-warm]): broken, 2 sets of options"
    (dtype,) = [line for line in lines if line.startswith("  dtype")]
    assert dtype.split(maxsplit=2)[1:] == ["BROKEN", "losses of torch.float32 inputs are torch.float64"]
    assert stderr == [
        "error: loss 'warm' (acme-losses 2.0 [loss-warm]) breaks: dtype, gradient, start",
        "hint: report it to the plugin's author; QPREF_DISABLE=loss-warm leaves it out",
    ]


def test_check_goes_on_after_a_broken_loss(broken):
    code, lines, stderr = invoke("check")
    assert code == 6
    assert [line for line in lines if not line.startswith(" ")] == [
        "cold: cannot be loaded",
        "lone (acme-losses 2.0 [loss-lone]): ok, 1 set of options",
        "warm (acme-losses 2.0 [loss-warm]): broken, 2 sets of options",
    ]
    assert stderr == [
        "error: 2 of 3 losses cannot be relied on",
        "  acme-losses 2.0 [loss-cold]: it needs the package acme_ice, which isn't installed",
        "  loss 'warm' (acme-losses 2.0 [loss-warm]) breaks: dtype, gradient, start",
        "hint: report it to the plugin's author; QPREF_DISABLE=loss-cold,loss-warm leaves it out",
    ]


def test_check_as_json_gives_each_rule(sound):
    code, lines, _ = invoke("check", "warm", "--json")
    (warm,) = json.loads("\n".join(lines))
    assert code == 0
    assert (warm["loss"], warm["from"], warm["error"]) == ("warm", "acme-losses 2.0 [loss-warm]", None)
    assert [result["rule"] for result in warm["results"]] == list(RULES) * 2
    assert {result["status"] for result in warm["results"]} <= {"passed", "skipped"}


SIGMOID = SOUND.replace('name="warm"', 'name="sigmoid"')
SQUARED = "logsigmoid(chosen - rejected).square()"


def shape_of(lines):
    """Lines with every measured difference as a number sign."""
    return [re.sub(r"\d\.\de[+-]\d\d", "#", line) for line in lines]


def test_a_third_party_loss_is_compared_with_the_trl_loss_type_of_its_name(install):
    install({"sigmoid": "acme_sigmoid"}, acme_sigmoid=SIGMOID.replace("LOSSES", LOSSES))
    code, lines, stderr = invoke("check", "sigmoid", "--against", "trl")
    assert (code, stderr) == (0, [])
    assert shape_of(lines) == [
        f"TRL {metadata.version('trl')}: largest relative differences over 20 random batches",
        "",
        "sigmoid (acme-losses 2.0 [loss-sigmoid]): agrees",
        "          loss     gradient  qpref         TRL",
        '  agrees  #  #   the defaults  DPOTrainer: beta = 0.1, loss_type = ["sigmoid"]',
    ]


def test_a_loss_that_differs_from_trl_exits_6_and_is_named(install):
    install({"sigmoid": "acme_sigmoid"}, acme_sigmoid=SIGMOID.replace("LOSSES", SQUARED))
    code, lines, stderr = invoke("check", "sigmoid", "--against", "trl")
    assert code == 6
    assert lines[2] == "sigmoid (acme-losses 2.0 [loss-sigmoid]): DIFFERS"
    assert stderr == [
        f"error: loss 'sigmoid' (acme-losses 2.0 [loss-sigmoid]) differs from TRL {metadata.version('trl')}, "
        "and nothing says why",
        "hint: an intended difference gets a reason in the record's trl_cases",
    ]


CASES = """variants=({"beta": 0.5},),
        trl_cases=(TrlCase(trainer="DPOTrainer", config={"loss_type": ["sigmoid"]}, reason="ours is squared",SAME_AS),),
"""


def reasoned(losses, same_as):
    source = SOUND.replace('variants=({"beta": 0.5},),', CASES.replace("SAME_AS", same_as)).replace("LOSSES", losses)
    return source.replace("PairedLoss, UnpairedLoss", "PairedLoss, TrlCase, UnpairedLoss")


def test_a_reason_makes_a_difference_intended(install):
    install({"warm": "acme_warm"}, acme_warm=reasoned(SQUARED, "same_as=None"))
    code, lines, stderr = invoke("check", "warm", "--against", "trl")
    assert (code, stderr) == (0, [])
    assert [lines[2], lines[-1]] == [
        "warm (acme-losses 2.0 [loss-warm]): differs as intended",
        "  [1] ours is squared",
    ]


def test_a_reason_holds_only_if_trl_computes_what_it_claims(install):
    install({"warm": "acme_warm"}, acme_warm=reasoned(SQUARED, 'same_as={"beta": 0.2}'))
    code, lines, _ = invoke("check", "warm", "--against", "trl")
    assert (code, lines[2]) == (6, "warm (acme-losses 2.0 [loss-warm]): DIFFERS")


def test_a_loss_that_trl_does_not_have_is_said_to_be_missing(sound):
    code, lines, _ = invoke("check", "warm", "--against", "trl")
    assert code == 0
    assert lines[-2] == "warm (acme-losses 2.0 [loss-warm]): TRL has no such loss"
    assert lines[-1].startswith("  nothing was compared; ")


def test_without_a_name_the_losses_that_trl_has_are_compared(install):
    install({"sigmoid": "acme_sigmoid", "lone": "acme_sigmoid"}, acme_sigmoid=SIGMOID.replace("LOSSES", LOSSES))
    code, lines, _ = invoke("check", "--against", "trl")
    assert code == 0
    assert [line for line in lines if "acme-losses" in line] == ["sigmoid (acme-losses 2.0 [loss-sigmoid]): agrees"]


def test_the_comparison_as_json(install):
    install({"sigmoid": "acme_sigmoid"}, acme_sigmoid=SIGMOID.replace("LOSSES", LOSSES))
    code, lines, _ = invoke("check", "sigmoid", "--against", "trl", "--json")
    document = json.loads("\n".join(lines))
    (sigmoid,) = document["losses"]
    (case,) = sigmoid["cases"]
    assert code == 0
    assert (document["trl"], document["batches"]) == (metadata.version("trl"), 20)
    assert (sigmoid["loss"], sigmoid["outcome"]) == ("sigmoid", "agrees")
    assert max(case["loss_difference"], case["gradient_difference"]) < 1e-9
    assert (case["trainer"], case["config"]) == ("DPOTrainer", {"beta": 0.1, "loss_type": ["sigmoid"]})


def test_without_trl_the_comparison_is_one_message_with_the_way_to_install_it(sound, monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    code, lines, stderr = invoke("check", "warm", "--against", "trl")
    assert (code, lines) == (2, [])
    assert stderr == [
        "error: comparing with TRL needs the package trl, and importing it failed: import of trl halted; "
        "None in sys.modules",
        'hint: pip install "trl>=1.0,<2"',
    ]


def test_another_trl_than_a_1x_is_one_message(sound, monkeypatch):
    found = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "0.20.0" if name == "trl" else found(name))
    assert invoke("check", "warm", "--against", "trl") == (
        2,
        [],
        [
            "error: TRL 0.20.0 is installed, and losses are compared with TRL 1.x",
            'hint: pip install "trl>=1.0,<2"',
        ],
    )


def test_the_install_line_is_the_range_of_pyproject():
    requirements = tomllib.loads(PYPROJECT.read_text())["project"]["dependencies"]
    (trl,) = [requirement for requirement in requirements if requirement.startswith("trl")]
    assert f'pip install "{trl}"' == INSTALL


WITHOUT_TRL = """
import sys
from importlib import metadata
sys.modules["trl"] = None
found = metadata.version
def version(name):
    if name == "trl":
        raise metadata.PackageNotFoundError(name)
    return found(name)
metadata.version = version
from qpref.cli import main
main(sys.argv[1:])
"""


def test_training_needs_no_trl_and_records_no_version_of_it(tmp_path, make_recipe):
    recipe, output = tmp_path / "tiny.toml", tmp_path / "run"
    recipe.write_text(tomli_w.dumps(make_recipe({"train.max_steps": 1})))
    command = [sys.executable, "-c", WITHOUT_TRL, "train", str(recipe), "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    versions = json.loads((output / "run.json").read_text())["versions"]
    assert versions["trl"] is None
    assert {"qpref", "torch", "transformers", "peft", "python"} <= versions.keys()
