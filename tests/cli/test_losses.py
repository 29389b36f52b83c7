"""`qpref losses`: what is listed, what is shown of one, and what a broken one is charged with."""

import json
import subprocess
import sys
from importlib import metadata

import pytest
from click.testing import CliRunner

from qpref.cli import main
from qpref.hooks.manager import installed_offers
from qpref.testing import RULES

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
        return LossOutput(losses=-rewards, metrics=unpaired_reward_metrics(rewards, inputs.desirable))
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
LOSSES = "-logsigmoid(chosen - rejected)"
CAST = "-logsigmoid(chosen - rejected).float().double()"


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
    assert "importing acme_cold raised ModuleNotFoundError: No module named 'acme_ice'" in lines[1]


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
    assert cold["error"].startswith("acme-losses 2.0 [loss-cold]: importing acme_cold raised ModuleNotFoundError")


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
        "  acme-losses 2.0 [loss-cold]: importing acme_cold raised ModuleNotFoundError: No module named 'acme_ice'",
        "  loss 'warm' (acme-losses 2.0 [loss-warm]) breaks: dtype, gradient, start",
        "hint: report it to the plugin's author; QPREF_DISABLE=loss-cold,loss-warm leaves it out",
    ]
