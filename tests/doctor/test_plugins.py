"""Plugins are judged by their metadata: a broken or doubled one is named, and none is imported."""

from __future__ import annotations

import sys

from qpref.doctor.plugins import plugin_findings
from qpref.hooks.manager import Offer, installed_offers


def problems(*offers):
    return [(finding.message, finding.fix) for finding in plugin_findings(offers) if finding.status == "problem"]


def test_the_built_in_plugins_are_fine():
    assert problems(*installed_offers()) == []


def test_a_module_that_is_gone_is_named():
    gone = Offer("loss", "warm", "acme", "2.0", "acme_warm.loss")
    inner = Offer("loss", "cold", "acme", "2.0", "json.cold")
    assert problems(gone, inner) == [
        ("acme 2.0 [loss-warm]: there is no module acme_warm.loss",
         "reinstall acme, or leave it out: QPREF_DISABLE=loss-warm"),
        ("acme 2.0 [loss-cold]: there is no module json.cold",
         "reinstall acme, or leave it out: QPREF_DISABLE=loss-cold"),
    ]  # fmt: skip


def test_a_name_that_two_distributions_offer_and_an_unknown_kind_are_named():
    ours, theirs = Offer("loss", "dpo", "qpref", "0.1", "json"), Offer("loss", "dpo", "acme", "2.0", "json")
    odd = Offer("los", "dpo", "acme", "2.0", "json")
    (kind, _), (clash, fix) = problems(ours, theirs, odd)
    assert kind == "acme 2.0 [los-dpo]: unknown kind 'los'; did you mean loss-dpo?"
    assert clash == "qpref 0.1 [loss-dpo] and acme 2.0 [loss-dpo] have one name"
    assert fix == "uninstall acme, or leave it out: QPREF_DISABLE=acme:loss-dpo"


def test_a_function_as_entry_point_is_named():
    ((message, _),) = problems(Offer("loss", "warm", "acme", "2.0", "json:loads"))
    assert message.startswith("acme 2.0 [loss-warm]: its entry point names loads within json")


def test_no_plugin_is_imported(tmp_path, monkeypatch):
    (tmp_path / "acme_trap").mkdir()
    (tmp_path / "acme_trap" / "__init__.py").write_text("raise SystemExit('imported')")
    (tmp_path / "acme_trap" / "loss.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert problems(Offer("loss", "trap", "acme", "2.0", "acme_trap.loss")) == []
    assert "acme_trap" not in sys.modules
