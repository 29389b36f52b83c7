"""Mistakes in losses, their accumulation and their metrics."""

from __future__ import annotations

from .mutant import Edit, Mutant, mutant

PLUGINS = "plugins/qpref_plugins/"
STEP = "qpref/training/step.py"
MISMATCH = "qpref/data/mismatch.py"
OBJECTIVE = "tests/training/test_objective.py::"

MUTANTS: tuple[Mutant, ...] = (
    mutant(
        "C10",
        "each micro-batch's loss is divided by its own examples, not by the step's",
        STEP,
        "/ len(step.examples)",
        "/ len(output.losses)",
        "tests/training/test_gradients.py::test_gradient_is_the_mean_of_the_pairs_own_for_any_microbatch",
    ),
    mutant(
        "C11",
        "IPO sums log-ratios where it says that it takes means",
        PLUGINS + "loss_ipo/__init__.py",
        'return ratio / policy.count if options.normalize == "mean" else ratio',
        "return ratio",
        "tests/plugins/test_loss_ipo.py::test_ipo_mean_divides_each_response_by_its_own_length",
    ),
    mutant(
        "C13",
        "ORPO's log(1 - exp(x)) is differentiated where exp(x) rounds to 1",
        PLUGINS + "loss_orpo/__init__.py",
        "far = torch.log1p(-x.where(is_far, -1.0).exp())",
        "far = torch.log1p(-x.exp())",
        "tests/plugins/test_loss_orpo.py::test_log1mexp_has_a_finite_gradient_where_exp_rounds_to_1",
    ),
    mutant(
        "C13",
        "ORPO's odds of a certain response are infinite",
        PLUGINS + "loss_orpo/__init__.py",
        "x = x.clamp(max=CERTAIN)",
        "x = x.clone()",
        "tests/plugins/test_loss_orpo.py::test_orpo_is_finite_with_a_finite_gradient_at_extremes",
    ),
    mutant(
        "C14",
        "a forward pass outside the graph: metrics are plausible, gradients are 0",
        PLUGINS + "loss_orpo/__init__.py",
        "chosen, rejected = policy.chosen.mean, policy.rejected.mean",
        "chosen, rejected = policy.chosen.mean.detach(), policy.rejected.mean.detach()",
        "tests/plugins/test_loss_orpo.py::test_orpo_gradient_is_the_central_difference_on_1000_random_pairs",
    ),
    mutant(
        "C14",
        "layers without a gradient train on without a word",
        "qpref/training/gradient_check.py",
        "strict=True) if norm == 0]",
        "strict=True) if norm < 0]",
        "tests/training/test_invariants.py::test_run_stops_at_its_first_step_when_a_layer_gets_no_gradient",
    ),
    Mutant(
        "C15",
        "a completion is its own mismatched partner",
        (
            Edit(MISMATCH, "for step in range(1, len(shuffled))", "for step in range(len(shuffled))"),
            Edit(MISMATCH, "for example in ahead if example.prompt != own.prompt)", "for example in ahead)"),
            Edit(MISMATCH, "if example.branches[0] != own.branches[0]), near[0])", "if example), near[0])"),
        ),
        (OBJECTIVE + "test_partner_is_of_another_prompt_and_fixed_by_the_seed",),
    ),
    mutant(
        "C16",
        "KTO estimates the divergence from each micro-batch, not from the step",
        STEP,
        "elif scorer.objective.sees_steps_mismatched:",
        "elif not scorer.callers:",
        OBJECTIVE + "test_micro_batches_give_the_gradient_of_the_whole_step",
    ),
    mutant(
        "C16",
        "KTO's weights divide by a class without examples",
        PLUGINS + "loss_kto/__init__.py",
        "if not num_desirable or not num_undesirable:",
        "if not num_desirable and not num_undesirable:",
        "tests/plugins/test_loss_kto.py::test_given_weight_stays_where_a_class_has_no_example",
    ),
    mutant(
        "C17",
        "a row of metrics is of the last micro-batch alone",
        "qpref/training/metrics.py",
        "self.sums[name] = self.sums.get(name, 0.0) + total",
        "self.sums[name] = total",
        "tests/training/test_metrics.py::test_average_is_over_pairs_and_not_over_microbatches",
    ),
    mutant(
        "C18",
        "partners are found in one order and used in another",
        MISMATCH,
        "joined[index] = _joined(shuffled[position], _partner(shuffled, position), max_length)",
        "joined[index] = _joined(examples[index], _partner(shuffled, index), max_length)",
        OBJECTIVE + "test_partner_is_of_another_prompt_and_fixed_by_the_seed",
    ),
    mutant(
        "C19",
        "label smoothing is an option that does nothing",
        PLUGINS + "loss_dpo/__init__.py",
        "losses = -(1 - eps) * logsigmoid(z) - eps * logsigmoid(-z)",
        "losses = -logsigmoid(z)",
        "tests/plugins/test_loss_dpo.py::test_dpo_smoothing_takes_a_share_of_the_labels_as_swapped",
    ),
    mutant(
        "C19",
        "label smoothing may be 0.5 and more, where the loss prefers what was rejected",
        PLUGINS + "loss_dpo/__init__.py",
        "lt=0.5,",
        "lt=1,",
        "tests/plugins/test_loss_dpo.py::test_dpo_refuses_options_out_of_range",
    ),
    mutant(
        "C57",
        "DPO's sign is flipped, which any run trains on",
        PLUGINS + "loss_dpo/__init__.py",
        "z = chosen - rejected - inputs.margin",
        "z = rejected - chosen - inputs.margin",
        "tests/plugins/test_loss_dpo.py::test_dpo_is_its_equation_on_1000_random_pairs",
        "tests/plugins/test_conformance.py::test_loss_conforms",
    ),
    mutant(
        "C57",
        "the conformance checks pass a loss that makes rejected responses more probable",
        "qpref/testing/learning_rules.py",
        "if not pull < -LEAST_PULL * size:",
        "if not pull < 1e9 * size:",
        "tests/test_testing.py::test_a_loss_that_breaks_a_rule_is_caught_under_its_name",
    ),
)
