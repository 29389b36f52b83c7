"""Plugins are found without being imported, loaded one by one, attributed, and refused where two offer one name."""

import ast
import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

import qpref
from qpref.errors import PluginError, RecipeError
from qpref.hooks.manager import CHECK, KINDS, LOSS, READER, SINK, Offer, PluginHost, installed_offers

CORE = Path(qpref.__file__).parent
PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"
OURS = sorted(offer for offer in installed_offers() if offer.distribution == "qpref")
MODULES = sorted({offer.module for offer in OURS})


VERSION = metadata.version("qpref")


def names_of(kind):
    return ", ".join(sorted({offer.name for offer in installed_offers() if offer.kind == kind.prefix}))


LOSS_MODULE = """
from qpref.hooks import Options, PairedLoss, hookimpl

@hookimpl
def qpref_losses():
    yield PairedLoss(name="{name}", summary="", options=Options, build=lambda options: None)
"""
CANARY = "raise AssertionError('a plugin was imported')"


@pytest.fixture
def install(tmp_path, monkeypatch):
    """`install("acme", "2.0", {"loss-warm": "acme_warm"}, acme_warm="source")`: a distribution as pip leaves it."""
    before = set(sys.modules)

    def put(distribution, version, entry_points, requires=(), **modules):
        site = tmp_path / f"{distribution}-site"
        info = site / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        extras = "Provides-Extra: fast\n" if "extra" in "".join(requires) else ""
        lines = extras + "".join(f"Requires-Dist: {line}\n" for line in requires)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n{lines}")
        table = "".join(f"{name} = {module}\n" for name, module in entry_points.items())
        (info / "entry_points.txt").write_text(f"[qpref]\n{table}")
        for module, source in modules.items():
            (site / f"{module}.py").write_text(source)
        monkeypatch.syspath_prepend(site)

    yield put
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def test_listing_imports_no_plugin(install):
    install("acme", "2.0", {"loss-warm": "acme_warm"}, acme_warm=CANARY)
    assert Offer("loss", "warm", "acme", "2.0", "acme_warm") in installed_offers()


def test_loading_one_plugin_imports_no_other(install):
    install(
        "acme", "2.0", {"loss-warm": "acme_warm", "loss-cold": "acme_cold"},
        acme_warm=LOSS_MODULE.format(name="warm"), acme_cold=CANARY,
    )  # fmt: skip
    assert PluginHost().load(LOSS, "warm").record.name == "warm"


def test_a_loaded_plugin_says_where_it_came_from(install):
    install("acme", "2.0", {"loss-warm": "acme_warm"}, acme_warm=LOSS_MODULE.format(name="warm"))
    assert str(PluginHost().load(LOSS, "warm").offer) == "acme 2.0 [loss-warm]"


def test_one_module_may_offer_several_names(install):
    hot = "    yield PairedLoss(name='hot', summary='', options=Options, build=print)\n"
    install("acme", "2.0", {"loss-warm": "acme", "loss-hot": "acme"}, acme=LOSS_MODULE.format(name="warm") + hot)
    host = PluginHost()
    assert [host.load(LOSS, name).record.name for name in ("hot", "warm")] == ["hot", "warm"]


@pytest.fixture
def clash(install):
    install("acme-warm", "2.0", {"loss-warm": "acme_warm"}, acme_warm=LOSS_MODULE.format(name="warm"))
    install("zeta", "0.3", {"loss-warm": "zeta_warm"}, zeta_warm=LOSS_MODULE.format(name="warm"))


def test_a_clash_names_both_culprits(clash):
    with pytest.raises(PluginError) as caught:
        PluginHost().load(LOSS, "warm")
    assert str(caught.value) == (
        "loss 'warm' is offered by both acme-warm 2.0 [loss-warm] and zeta 0.3 [loss-warm]\n"
        "hint: uninstall one of the two, or leave one out: QPREF_DISABLE=acme-warm:loss-warm"
    )


@pytest.mark.parametrize(("disabled", "left"), [("acme-warm:loss-warm", "zeta"), ("zeta:loss-warm", "acme-warm")])
def test_disabling_one_distribution_of_a_clash_leaves_the_other(clash, monkeypatch, disabled, left):
    monkeypatch.setenv("QPREF_DISABLE", disabled)
    assert PluginHost().load(LOSS, "warm").offer.distribution == left


def test_a_built_in_wins_no_clash(install):
    built_in = next(offer for offer in OURS if offer.kind == LOSS.prefix)
    install("acme", "2.0", {built_in.entry_point: "acme_loss"}, acme_loss=LOSS_MODULE.format(name=built_in.name))
    with pytest.raises(PluginError, match=re.escape(f"acme 2.0 [{built_in.entry_point}] and {built_in}")):
        PluginHost().load(LOSS, built_in.name)


@pytest.mark.parametrize("stranger", ["acme", "zeta"])
def test_a_clash_with_a_built_in_is_settled_by_leaving_the_third_party_out(install, monkeypatch, stranger):
    built_in = next(offer for offer in OURS if offer.kind == LOSS.prefix)
    install(stranger, "2.0", {built_in.entry_point: "their_loss"}, their_loss=LOSS_MODULE.format(name=built_in.name))
    with pytest.raises(PluginError) as caught:
        PluginHost().load(LOSS, built_in.name)
    disabled = f"{stranger}:{built_in.entry_point}"
    assert caught.value.hint == f"uninstall {stranger}, or leave it out: QPREF_DISABLE={disabled}"
    monkeypatch.setenv("QPREF_DISABLE", disabled)
    assert PluginHost().load(LOSS, built_in.name).offer == built_in


def test_three_of_one_name_are_all_named(clash, install):
    install("beta", "1.0", {"loss-warm": "beta_warm"})
    with pytest.raises(PluginError, match=r"offered by acme-warm 2.0 \[.*\], beta 1.0 \[.*\], zeta 0.3 \["):
        PluginHost().load(LOSS, "warm")


def test_a_clash_of_what_is_not_asked_for_harms_nobody(clash, install):
    install("calm", "1.0", {"loss-cold": "calm_cold"}, calm_cold=LOSS_MODULE.format(name="cold"))
    assert PluginHost().load(LOSS, "cold").record.name == "cold"


def test_one_name_in_two_kinds_is_no_clash(install):
    install("acme", "2.0", {"loss-warm": "acme_warm"}, acme_warm=LOSS_MODULE.format(name="warm"))
    install("zeta", "0.3", {"sink-warm": "zeta_warm"})
    assert PluginHost().find(LOSS, "warm").distribution == "acme"


def test_a_disabled_name_is_left_out_of_every_distribution(clash, monkeypatch):
    monkeypatch.setenv("QPREF_DISABLE", "something-else, loss-warm")
    assert [offer for offer in installed_offers() if offer.name == "warm"] == []


BROKEN = {
    "an import that raises": ("1 / 0", "importing acme_bad raised ZeroDivisionError: division by zero"),
    "an import that exits": ("raise SystemExit('bye')", "importing acme_bad raised SystemExit: bye"),
    "a syntax error": ("def", "importing acme_bad raised SyntaxError: invalid syntax (acme_bad.py, line 1)"),
    "a hook that yields nothing": (
        "from qpref.hooks import hookimpl\n@hookimpl\ndef qpref_losses():\n    yield from ()\n",
        "qpref_losses has to yield one loss 'bad', and yields nothing",
    ),
    "a hook that raises": (
        "from qpref.hooks import hookimpl\n@hookimpl\ndef qpref_losses():\n    raise KeyError('x')\n    yield\n",
        "qpref_losses raised KeyError: 'x'",
    ),
    "a hook that exits": (
        "from qpref.hooks import hookimpl\n@hookimpl\ndef qpref_losses():\n    raise SystemExit(0)\n",
        "qpref_losses raised SystemExit: 0",
    ),
    "a hook that yields no record": (
        "from qpref.hooks import hookimpl\n@hookimpl\ndef qpref_losses():\n    yield 'bad'\n",
        "qpref_losses yields str, not Loss",
    ),
    "a record of another kind": (
        "from qpref.hooks import Reader, hookimpl\n@hookimpl\ndef qpref_losses():\n"
        "    yield Reader(name='bad', summary='', read=iter)\n",
        "qpref_losses yields Reader, not Loss",
    ),
    "a hook that returns what is no iterable": (
        "from qpref.hooks import hookimpl\n@hookimpl\ndef qpref_losses():\n    return 3\n",
        "qpref_losses raised TypeError: 'int' object is not iterable",
    ),
    "a record of another name": (
        LOSS_MODULE.format(name="other"),
        "qpref_losses has to yield one loss 'bad', and yields 'other'",
    ),
    "two records of the name": (
        LOSS_MODULE.format(name="bad") + "    yield from [next(qpref_losses())]\n",
        "qpref_losses has to yield one loss 'bad', and yields 'bad', 'bad'",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_plugin_is_named_with_the_way_out(install, case):
    source, complaint = BROKEN[case]
    install("acme", "2.0", {"loss-bad": "acme_bad"}, acme_bad=source)
    with pytest.raises(PluginError) as caught:
        PluginHost().load(LOSS, "bad")
    assert str(caught.value) == (
        f"acme 2.0 [loss-bad]: {complaint}\nhint: fix it, or leave it out: QPREF_DISABLE=loss-bad"
    )


CODE = "from qpref.hooks import hookimpl\n"
MISTAKES = {
    "no hook": (
        "",
        "it has no qpref_losses",
        "write a function qpref_losses under @hookimpl, which yields the records",
    ),
    "no decorator": (
        LOSS_MODULE.format(name="bad").replace("@hookimpl\n", ""),
        "its qpref_losses lacks the decorator @hookimpl",
        "add it: from qpref.hooks import hookimpl",
    ),
    "no decorator, and misspelt": (
        "def qpref_loss():\n    yield\n",
        "it has no qpref_losses, but a qpref_loss",
        "rename it to qpref_losses, under @hookimpl",
    ),
    "another kind's hook": (
        f"{CODE}@hookimpl\ndef qpref_readers():\n    yield\n",
        "it implements qpref_readers, and not qpref_losses",
        "compare the kind in its entry point",
    ),
    "a misspelt hook": (
        f"{CODE}@hookimpl\ndef qpref_loses():\n    yield\n",
        "unknown hook 'qpref_loses'; did you mean 'qpref_losses'?",
        "rename it",
    ),
    "a hook like no other": (
        f"{CODE}@hookimpl\ndef offer():\n    yield\n",
        f"unknown hook 'offer'; the hooks are {', '.join(sorted(kind.hook for kind in KINDS.values()))}",
        "rename it",
    ),
    "a hook with a parameter": (
        f"{CODE}@hookimpl\ndef qpref_losses(config):\n    yield\n",
        "its hook 'qpref_losses' has parameters, and a hook takes none",
        "remove them",
    ),
    "a missing package": (
        "import no_such_module_anywhere",
        "it needs the package no_such_module_anywhere, which isn't installed",
        'pip install "no_such_module_anywhere"',
    ),
    "a missing module of its own": ("import acme_bad.core", "there is no module acme_bad.core", "reinstall acme"),
    "a name that qpref.hooks lacks": (
        "from qpref.hooks import hookimp",
        f"cannot import name 'hookimp' from 'qpref.hooks': qpref {VERSION} has no such name",
        "correct it, or install the qpref that acme is made for",
    ),
    "a module that qpref lacks": (
        "import qpref.hoooks",
        f"No module named 'qpref.hoooks': qpref {VERSION} has no such name",
        "correct it, or install the qpref that acme is made for",
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_of_its_author_has_its_sentence_and_its_fix(install, case):
    source, complaint, fix = MISTAKES[case]
    install("acme", "2.0", {"loss-bad": "acme_bad"}, acme_bad=source)
    with pytest.raises(PluginError) as caught:
        PluginHost().load(LOSS, "bad")
    assert str(caught.value) == (
        f"acme 2.0 [loss-bad]: {complaint}\nhint: {fix}; or leave it out: QPREF_DISABLE=loss-bad"
    )


@pytest.mark.parametrize(
    ("requires", "command"),
    [
        (["no-such.module_anywhere>=3,<4"], 'pip install "no-such.module_anywhere<4,>=3"'),
        (["no-such-package-here", "packaging"], 'pip install "no-such-package-here"'),
        (['no-such-module-anywhere; extra == "fast"'], 'pip install "acme[fast]"'),
    ],
    ids=["by its requirement", "by another name", "by an extra"],
)
def test_a_missing_package_is_installed_as_the_distribution_requires_it(install, requires, command):
    install("acme", "2.0", {"loss-bad": "acme_bad"}, requires, acme_bad="import no_such_module_anywhere.inner")
    with pytest.raises(PluginError, match="it needs the package no_such_module_anywhere") as caught:
        PluginHost().load(LOSS, "bad")
    assert caught.value.hint.startswith(f"{command}; or leave it out")


def test_a_function_as_entry_point_is_named_with_the_line_to_write(install):
    install("acme", "2.0", {"loss-warm": "acme_warm:qpref_losses"}, acme_warm=LOSS_MODULE.format(name="warm"))
    with pytest.raises(PluginError) as caught:
        PluginHost().load(LOSS, "warm")
    assert caught.value.what == (
        "acme 2.0 [loss-warm]: its entry point names qpref_losses within acme_warm, and has to name the module alone"
    )
    assert caught.value.hint.startswith('write loss-warm = "acme_warm" in pyproject.toml, and pip install again')


@pytest.mark.parametrize("requirement", ["qpref>=99", "qpref<0.0.1"])
def test_a_plugin_for_another_qpref_is_refused_before_it_is_imported(install, requirement):
    install("acme", "2.0", {"loss-warm": "acme_warm"}, [requirement], acme_warm=CANARY)
    with pytest.raises(PluginError) as caught:
        PluginHost().load(LOSS, "warm")
    assert caught.value.what == f"acme 2.0 [loss-warm]: it is made for {requirement}, and this is qpref {VERSION}"
    assert caught.value.hint.startswith(f"pip install --upgrade acme '{requirement}'")


@pytest.mark.parametrize("requires", [["qpref"], [f"qpref<={VERSION}"], ["qpref>=99; python_version < '3'"]])
def test_a_plugin_for_this_qpref_loads(install, requires):
    install("acme", "2.0", {"loss-warm": "acme_warm"}, requires, acme_warm=LOSS_MODULE.format(name="warm"))
    assert PluginHost().load(LOSS, "warm").record.name == "warm"


@pytest.mark.parametrize(("point", "advice"), [
    ("losses-warm", "did you mean loss-warm?"),
    ("metric-warm", "did you mean sink-warm?"),
    ("validator-warm", "did you mean check-warm?"),
    ("zzz-warm", f"known: {', '.join(KINDS)}"),
])  # fmt: skip
def test_an_unknown_kind_is_named_where_its_plugin_is_wanted(install, point, advice):
    install("acme", "2.0", {point: "acme_warm"}, acme_warm=CANARY)
    with pytest.raises(RecipeError, match=r"no loss 'warm' is installed; acme 2.0 \[") as caught:
        PluginHost().load(LOSS, "warm")
    kind = point.partition("-")[0]
    assert caught.value.what.endswith(f"acme 2.0 [{point}] has an unknown kind '{kind}'; {advice}")


CASES = BROKEN | MISTAKES
MISSPELT = LOSS_MODULE.format(name="bad") + "\n@hookimpl\ndef qpref_readerz():\n    yield\n"


@pytest.mark.parametrize("source", [MISSPELT, *(case[0] for case in CASES.values())], ids=["misspelt", *CASES])
def test_other_plugins_still_load_beside_a_broken_one(install, source):
    install("acme", "2.0", {"loss-bad": "acme_bad"}, acme_bad=source)
    install("calm", "1.0", {"loss-cold": "calm_cold"}, calm_cold=LOSS_MODULE.format(name="cold"))
    host = PluginHost()
    with pytest.raises(PluginError, match="acme"):
        host.load(LOSS, "bad")
    assert host.load(LOSS, "cold").record.name == "cold"


def test_a_refused_plugin_stays_refused_when_asked_again(install):
    install("acme", "2.0", {"loss-bad": "acme_bad"}, acme_bad=MISSPELT)
    host = PluginHost()
    for _ in range(2):
        with pytest.raises(PluginError, match="unknown hook 'qpref_readerz'"):
            host.load(LOSS, "bad")


OWN = "a plugin of your own needs the entry point {}, and pip install again"


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        (LOSS, "wram", "no loss 'wram' is installed; did you mean 'warm'?"),
        (SINK, "consle", "no metric sink 'consle' is installed; did you mean 'console'?"),
        (READER, "zzz", f"no reader 'zzz' is installed; installed: {names_of(READER)}\nhint: {OWN.format('read-zzz')}"),
        (
            CHECK,
            "zzz",
            f"no validator 'zzz' is installed; installed: {names_of(CHECK)}\nhint: {OWN.format('check-zzz')}",
        ),
    ],
)
def test_an_unknown_name_is_told_the_nearest_or_all(install, kind, name, message):
    install("acme", "2.0", {"loss-warm": "acme_warm"})
    with pytest.raises(RecipeError) as caught:
        PluginHost().load(kind, name)
    assert str(caught.value) == message


def test_an_unknown_name_without_any_plugin_says_none(monkeypatch):
    monkeypatch.setenv("QPREF_DISABLE", ",".join(offer.entry_point for offer in installed_offers()))
    with pytest.raises(RecipeError, match=r"^no loss 'warm' is installed; installed: none"):
        PluginHost().load(LOSS, "warm")


@pytest.mark.parametrize("blocked", OURS, ids=lambda offer: offer.entry_point)
def test_without_one_built_in_all_others_load(monkeypatch, blocked):
    monkeypatch.setenv("QPREF_DISABLE", f"qpref:{blocked.entry_point}")
    host, others = PluginHost(), [offer for offer in OURS if offer != blocked]
    assert [host.load(KINDS[offer.kind], offer.name).offer for offer in others] == others


@pytest.mark.parametrize("blocked", OURS, ids=lambda offer: offer.entry_point)
def test_a_disabled_built_in_is_refused_by_the_name_of_the_variable(monkeypatch, blocked):
    monkeypatch.setenv("QPREF_DISABLE", blocked.entry_point)
    with pytest.raises(RecipeError) as caught:
        PluginHost().load(KINDS[blocked.kind], blocked.name)
    assert str(caught.value) == (
        f"{KINDS[blocked.kind].noun} '{blocked.name}' of {blocked} is disabled by QPREF_DISABLE\n"
        f"hint: take {blocked.entry_point} out of this environment variable, or unset it"
    )


@pytest.mark.parametrize("broken", MODULES)
def test_beside_one_broken_built_in_all_others_load(monkeypatch, broken):
    monkeypatch.setitem(sys.modules, broken, None)
    host = PluginHost()
    outcomes = {}
    for offer in OURS:
        try:
            outcomes[offer] = host.load(KINDS[offer.kind], offer.name).offer
        except PluginError as error:
            outcomes[offer] = str(error).partition(":")[0]
    assert outcomes == {offer: str(offer) if offer.module == broken else offer for offer in OURS}


def test_the_installed_entry_points_are_those_of_pyproject():
    table = tomllib.loads(PYPROJECT.read_text())["project"]["entry-points"]["qpref"]
    points = metadata.distribution("qpref").entry_points.select(group="qpref")
    assert {point.name: point.value for point in points} == table, "run pip install -e . again"


LOSS_NAME = re.compile(r"(?<![a-z])(dpo|ipo|kto|orpo|simpo)(?![a-z])", re.IGNORECASE)


DATA_COLUMN = "kto_tag"
"""LLaMA-Factory's name for a label, in other people's data."""
OTHER_TOOLS = {CORE / "aliases", CORE / "convert", CORE / "first_recipe", CORE / "cli" / "convert.py"}
"""Where losses have TRL's names and other tools', by which those that are installed are found."""


def words_of(source):
    """Identifiers (camel case taken apart) and string constants, docstrings aside, each with its line."""
    tree = ast.parse(source)
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        for field in ("id", "attr", "name", "arg", "asname", "module"):
            identifier = getattr(node, field, None)
            if isinstance(identifier, str):
                yield getattr(node, "lineno", 0), re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", identifier)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.lineno, node.value


@pytest.mark.parametrize(
    "source",
    ["from x import DpoOptions", "dpo = 1", "x.kto_margin", "def f(ipo): ...", "a['simpo']", "f'{a} ORPO'", "h(dpo=1)"],
)
def test_the_search_for_loss_names_finds(source):
    assert any(LOSS_NAME.search(word) for _, word in words_of(source))


def test_the_core_knows_no_loss_by_name():
    found = [
        f"{path.relative_to(CORE)}:{line}: {word!r}"
        for path in sorted(CORE.rglob("*.py"))
        if OTHER_TOOLS.isdisjoint({path, *path.parents})
        for line, word in words_of(path.read_text())
        if LOSS_NAME.search(word) and word != DATA_COLUMN
    ]
    assert found == []
