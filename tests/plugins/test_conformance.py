"""Every loss that qpref ships keeps the whole conformance list, and says where it comes from."""

import pytest

from qpref.hooks.manager import LOSS, PluginHost, installed_offers
from qpref.testing import RULES, assert_conforms

OURS = [offer.name for offer in installed_offers() if (offer.kind, offer.distribution) == (LOSS.prefix, "qpref")]


@pytest.fixture(scope="module")
def host():
    return PluginHost()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", OURS)
def test_loss_conforms(host, name, rule):
    assert_conforms(host.load(LOSS, name).record, rule)


@pytest.mark.parametrize("name", OURS)
def test_loss_names_its_formula_and_its_paper(host, name):
    record = host.load(LOSS, name).record
    assert record.formula.strip()
    assert "\n" not in record.formula
    assert record.paper.strip()
