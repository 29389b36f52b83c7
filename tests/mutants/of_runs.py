"""Mistakes in run folders, checkpoints, caches and resuming."""

from __future__ import annotations

from .mutant import Edit, Mutant, mutant

OPENING = "qpref/opening.py"
FOLDERS = "tests/training/test_run_folder.py::"
RECORDS = "tests/training/test_run_records.py::"
PUBLISH = "tests/test_publish.py::"
INTO_BOTH = """            parameter.copy_(tensors[name])
            for other, frozen in policy.model.named_parameters():
                if other == name.replace(".default.", ".reference.") != name:
                    frozen.copy_(tensors[name])
"""

MUTANTS: tuple[Mutant, ...] = (
    mutant(
        "C37",
        "a resumed run from an adapter has what it has learned as its reference",
        "qpref/training/snapshot.py",
        "            parameter.copy_(tensors[name])\n",
        INTO_BOTH,
        "tests/training/test_resume.py::test_run_from_an_adapter_resumes_to_the_bit",
    ),
    Mutant(
        "C58",
        "links in a run folder are followed",
        (
            Edit(OPENING, "if kind := kind_of(path, follow=follow, folder=folder):", "if kind := None:"),
            Edit(OPENING, "(0 if follow else os.O_NOFOLLOW)", "0"),
        ),
        ("tests/test_opening.py::test_nothing_but_a_file_is_opened",),
    ),
    mutant(
        "C58",
        "a run writes into the folder that has taken the place of its own",
        "qpref/training/folder.py",
        "        if self.is_replaced:\n            raise",
        "        if self.is_replaced and False:\n            raise",
        "tests/training/test_run_folder.py::"
        "test_a_run_whose_folder_is_replaced_while_it_trains_changes_nothing_there[swap_folder]",
    ),
    mutant(
        "C59",
        "whoever loses the race for a shared folder fails",
        "qpref/publish.py",
        "        if not (isinstance(cause, OSError) and cause.errno in (errno.ENOTEMPTY, errno.EEXIST)"
        " and final.is_dir()):\n            raise\n",
        "        raise cause or error\n",
        PUBLISH + "test_the_loser_of_a_race_for_a_shared_folder_keeps_the_winners",
    ),
    mutant(
        "C59",
        "staging folders are named by process id, which two containers have in common",
        "qpref/fsio.py",
        "{secrets.token_hex(8)}",
        "{os.getpid():016x}",
        "tests/test_fsio.py::test_a_staging_name_is_never_the_same",
    ),
    mutant(
        "C60",
        "a damaged final adapter goes unseen",
        "qpref/training/folder.py",
        "if written is None:\n            return f",
        "if written is not None:\n            return None\n        else:\n            return f",
        FOLDERS + "test_a_damaged_adapter_is_exported_again_from_the_last_checkpoint",
    ),
    mutant(
        "C60",
        "a damaged run.json is believed",
        "qpref/sealed.py",
        "    if not is_sealed(values):\n",
        "    if not values:\n",
        RECORDS + "test_an_edited_fact_is_refused_by_the_hash_of_run_json",
    ),
    mutant(
        "C60",
        "a damaged recipe or data report of a run is believed",
        "qpref/training/folder.py",
        'if hashlib.sha256(content).hexdigest() == facts["files"][path.name]:',
        'if content and facts["files"][path.name]:',
        RECORDS + "test_a_flipped_bit_is_refused_by_name_with_the_way_out",
    ),
    mutant(
        "C60",
        "changed rows of metrics.jsonl go unseen",
        "qpref/training/snapshot.py",
        'if hashlib.sha256(file.read(expected)).hexdigest() != saved.state["metrics_sha256"]:',
        "if len(file.read(expected)) != expected:",
        RECORDS + "test_changed_rows_are_named_by_the_resumption_which_goes_on",
    ),
    Mutant(
        "C60",
        "a merge believes the cached hash of a base that the disk has damaged since",
        (
            Edit(
                "qpref/merging/guards.py",
                "import BaseFolder, shard_files",
                "import BaseFolder, cached_sha256, shard_files",
            ),
            Edit("qpref/merging/guards.py", "!= fsio.sha256_file(shard)", "!= cached_sha256(shard)"),
        ),
        ("tests/merge/test_merge_guards.py::test_a_base_damaged_under_its_cached_hash_is_refused",),
    ),
    mutant(
        "C60",
        "a wrong row of the reference cache is trained on, if it isn't in the first batch",
        "qpref/training/reference_check.py",
        "if examples is not None:\n            failed |=",
        "if not examples:\n            failed |=",
        "tests/training/test_reference_sample.py::test_a_single_wrong_row_is_found_where_all_rows_are_sampled",
    ),
    mutant(
        "C60",
        "a damaged conversion of a base is trained on",
        "qpref/policy/convert.py",
        "if (damaged := _damaged_file(folder)) is None:",
        "if (damaged := None) is None:",
        "tests/policy/test_source.py::test_a_damaged_conversion_is_named_and_made_again",
    ),
    mutant(
        "C60",
        "a base whose generation settings have changed since training goes unseen",
        "qpref/training/base_settings.py",
        "if key in facts and _sha256(base / name) != facts[key]:",
        'if name == "config.json" and key in facts and _sha256(base / name) != facts[key]:',
        "tests/training/test_run_records.py::test_changed_settings_of_the_base_are_refused_by_name",
    ),
    mutant(
        "C60",
        "a base whose tokenizer has changed since training goes unseen",
        "qpref/evaluation/subjects.py",
        '    _refuse_other_tokenizer(recipe.model, base, facts, adapter if kind == "run" else None)\n',
        "",
        "tests/evaluation/test_subjects.py::test_a_tokenizer_changed_since_training_is_refused",
    ),
    mutant(
        "C58",
        "a report shows what a link in the run folder leads to",
        "qpref/report/read.py",
        "return opening.read_bytes(path).decode",
        "return opening.read_bytes(path, follow=True).decode",
        "tests/report/test_hostile.py::test_a_file_of_the_run_that_is_no_file_is_named_and_not_read",
    ),
)
