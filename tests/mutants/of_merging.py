"""Mistakes in merged models."""

from __future__ import annotations

from .mutant import Mutant, mutant

WRITE = "qpref/merging/write.py"
SETTINGS = "qpref/merging/settings.py"
WEIGHTS = "tests/merge/test_merge_weights.py::"
GUARDS = "tests/merge/test_merge_guards.py::"

MUTANTS: tuple[Mutant, ...] = (
    mutant(
        "C33",
        "what was learned on 4-bit weights is added to the original ones",
        WRITE,
        "source = self.base.original(key) if self.original else self.base.as_trained(key)",
        "source = self.base.original(key)",
        WEIGHTS + "test_a_bf16_run_merges_onto_its_own_dequantized_weights",
        "tests/merge/test_merge_verdict.py::test_its_figures_are_those_of_the_loaded_folder_and_the_trained_policy",
    ),
    mutant(
        "C34",
        "an output head of its own is left out, as if it were tied",
        WRITE,
        "    for key in keys:\n        yield from",
        '    for key in (key for key in keys if key != "lm_head.weight"):\n        yield from',
        WEIGHTS + "test_merged_logits_equal_the_trained_policys",
    ),
    mutant(
        "C34",
        "a tied head is adapted, and the embeddings with it",
        "qpref/policy/adapter.py",
        "if is_target and head.weight is model.get_input_embeddings().weight:",
        "if is_target and head is model.get_input_embeddings():",
        "tests/policy/test_adapter.py::test_a_tied_head_cannot_be_asked_for",
    ),
    mutant(
        "C35",
        "a merged model's config still says that it is quantized",
        SETTINGS,
        'if key not in ("quantization_config", "_name_or_path")}',
        'if key != "_name_or_path"}',
        "tests/merge/test_merge_settings.py::test_a_text_config_inside_is_patched_too",
    ),
    mutant(
        "C36",
        "an adapter that has learned nothing is merged",
        "qpref/policy/delta.py",
        "if not any(bool(delta.up.any()) for delta in matrices.values()):",
        "if not matrices:",
        GUARDS + "test_a_merge_that_cannot_be_right_is_refused_before_the_first_byte",
    ),
    mutant(
        "C38",
        "an adapter with infinities is merged, since none of its values is NaN",
        "qpref/policy/delta.py",
        "if not bool(down.isfinite().all() & up.isfinite().all()):",
        "if bool(down.isnan().any() | up.isnan().any()):",
        GUARDS + "test_a_merge_that_cannot_be_right_is_refused_before_the_first_byte",
    ),
    mutant(
        "C39",
        "the chat template isn't exported",
        SETTINGS,
        '"tokenizer.json", "tokenizer.model", "*.jinja", "additional',
        '"tokenizer.json", "tokenizer.model", "additional',
        "tests/merge/test_merge_settings.py::test_tokenizer_template_and_generation_settings_are_the_bases_own_bytes",
    ),
    mutant(
        "C40",
        "the index names the tensors of the last file alone",
        WRITE,
        "weight_map |= dict.fromkeys(tensors, name)",
        "weight_map = dict.fromkeys(tensors, name)",
        WEIGHTS + "test_shards_and_index_agree_with_what_is_on_disk",
    ),
    mutant(
        "C40",
        "files that stood in the output folder stay among the merged ones",
        "qpref/merging/guards.py",
        "if out.exists() and (not out.is_dir() or any(out.iterdir())):",
        "if out.exists() and not out.is_dir():",
        GUARDS + "test_a_folder_that_is_not_empty_is_left_alone",
    ),
    mutant(
        "C51",
        "tensors without dimensions are read as if they had rows",
        "qpref/merging/rounding.py",
        "        weight = torch.atleast_1d(weight)\n",
        "",
        "tests/merge/test_merge_kept.py::test_tensors_without_dimensions_are_merged",
    ),
    mutant(
        "C51",
        "tensors that transformers doesn't read are rounded with the others",
        "qpref/merging/base.py",
        "kept=frozenset((unread | outside) - packed)",
        "kept=frozenset(outside - unread - packed)",
        "tests/merge/test_merge_kept.py::test_tensors_that_transformers_does_not_know_are_kept_to_the_byte",
    ),
)
