"""The conformance checks give a loss the columns that its record names, and refuse records that name none."""

from __future__ import annotations

import pytest
from torch.nn.functional import logsigmoid

from qpref.hooks import Options, PairedLoss, reward_metrics
from qpref.records import LossOutput
from qpref.testing import assert_conforms

SCORES = ("score_chosen", "score_rejected")


def build_offset(options):
    def offset(inputs):
        policy, reference = inputs.policy, inputs.reference
        chosen = 0.1 * (policy.chosen.total - reference.chosen.total)
        rejected = 0.1 * (policy.rejected.total - reference.rejected.total)
        lead = inputs.columns["score_chosen"] - inputs.columns["score_rejected"]
        assert lead.dtype == chosen.dtype
        assert lead.shape == chosen.shape
        return LossOutput(
            losses=-logsigmoid(chosen - rejected - lead - inputs.margin), metrics=reward_metrics(chosen, rejected)
        )

    return offset


OFFSET = PairedLoss(name="offset", summary="of scores", options=Options, build=build_offset, columns=SCORES)


def with_record(**changes):
    fields = {name: getattr(OFFSET, name) for name in ("name", "summary", "options", "build", "columns")}
    return PairedLoss(**fields | changes)


@pytest.mark.parametrize("columns", [SCORES, list(SCORES), lambda options: SCORES], ids=["tuple", "list", "function"])
def test_a_loss_of_columns_is_checked_with_them(columns):
    assert_conforms(with_record(columns=columns))


def test_a_loss_that_reads_a_column_which_its_record_lacks_breaks_a_rule():
    with pytest.raises(AssertionError, match="the loss raised KeyError: 'score_rejected'"):
        assert_conforms(with_record(columns=SCORES[:1]))


@pytest.mark.parametrize("columns", ["score", lambda options: "score", (1,), ("",)])
def test_columns_are_names(columns):
    with pytest.raises(AssertionError, match=r"its columns are .*, not a tuple of names"):
        assert_conforms(with_record(columns=columns), "record")


def test_a_loss_may_not_write_into_its_columns():
    def build(options):
        function = build_offset(options)

        def writing(inputs):
            output = function(inputs)
            inputs.columns["score_chosen"].add_(1)
            return output

        return writing

    with pytest.raises(AssertionError, match="changes its inputs in place"):
        assert_conforms(with_record(build=build), "no state")
