"""Files of TRL, Axolotl and LLaMA-Factory as recipes: values, traps of meaning, and a word on every key."""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from qpref.cli import main
from qpref.convert.conversion import convert
from qpref.convert.write import recipe_text, remarks
from qpref.errors import RecipeError

FILES = Path(__file__).with_name("files")
NAMES = sorted(path.name for path in FILES.glob("*.y*ml"))


@pytest.fixture
def converted(tmp_path):
    """`converted(text_or_name, **options)`: the recipe of a file, as nested dicts, and all that is said about it."""

    def run(file, **options):
        path = FILES / file if "\n" not in file else tmp_path / "file.yaml"
        if path.parent == tmp_path:
            path.write_text(file)
        draft = convert(path, tmp_path, **options)
        return tomllib.loads(recipe_text(draft, "")), " ".join(line.strip() for line in remarks(draft, path.name))

    return run


@pytest.mark.parametrize("name", NAMES)
def test_the_recipe_of_each_example_passes_a_dry_run(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(main, ["convert", str(FILES / name), "--output", "my.toml"], catch_exceptions=False)
    assert (done.exit_code, done.stdout) == (0, "")
    assert done.stderr.startswith("recipe: my.toml\n")
    assert max(map(len, done.stderr.splitlines())) <= 80
    tried = CliRunner().invoke(main, ["train", "my.toml", "--dry-run"], catch_exceptions=False)
    assert (tried.exit_code, tried.stderr) == (0, "")


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("trl")])
def test_each_key_of_an_example_is_in_the_recipe_or_explained(tmp_path, name):
    draft = convert(FILES / name, tmp_path)
    said = recipe_text(draft, "") + " ".join(remarks(draft, name))
    given = yaml.safe_load((FILES / name).read_text())
    by_other_keys = {"stage", "pref_loss", "dataset_dir", "eval_strategy", "test_datasets"}
    silent = [key for key, value in given.items() if value not in (None, 0) and not re.search(rf"\b{key}\b", said)]
    assert set(silent) <= by_other_keys


def test_a_trl_file_is_read_by_trls_own_classes(converted):
    recipe, said = converted("trl-dpo.yaml")
    assert recipe == {
        "model": {"base": "Qwen/Qwen2.5-0.5B-Instruct", "revision": "main", "quantization": "nf4",
                  "double_quantization": True, "dtype": "bf16"},
        "adapter": {"rank": 32, "alpha": 16, "dropout": 0.05, "targets": "all-linear", "rslora": False},
        "data": {"train": "hf:trl-lib/ultrafeedback_binarized", "heldout": "hf:trl-lib/ultrafeedback_binarized:test",
                 "max_length": 1024, "max_prompt_length": 1023, "on_overflow": "truncate"},
        "loss": [{"name": "dpo", "weight": 0.8, "beta": 0.1}, {"name": "sft", "weight": 0.2}],
        "train": {"learning_rate": 5e-6, "epochs": 1, "warmup_ratio": 0.1, "batch_size": 16, "schedule": "cosine",
                  "optimizer": "paged_adamw_8bit", "weight_decay": 0.01, "max_grad_norm": 0.3, "seed": 42,
                  "log_every": 10, "eval_every": 100, "save_every": 200, "keep": 3, "best_by": "eval_rewards/margins",
                  "best_direction": "max"},
        "reference": {"fill": "before"},
    }  # fmt: skip
    assert "label_smoothing: TRL ignores it under loss_type sigmoid; here 0.1 would be conservative DPO" in said
    assert "adam_beta2: it is 0.999 always" in said
    assert "neftune_noise_alpha: no noise is added to embeddings" in said
    assert "sync_ref_model: a reference that moves with the policy can't be cached" in said


def test_trls_defaults_are_those_of_its_classes(converted):
    from dataclasses import fields

    from trl import DPOConfig

    recipe, _ = converted("model_name_or_path: org/m\ndataset_name: org/d\n")
    defaults = {field.name: field.default for field in fields(DPOConfig)}
    assert recipe["train"]["learning_rate"] == defaults["learning_rate"]
    assert recipe["train"]["epochs"] == defaults["num_train_epochs"]
    assert recipe["train"]["batch_size"] == defaults["per_device_train_batch_size"]
    assert recipe["loss"]["beta"] == defaults["beta"]
    assert recipe["data"]["max_length"] == defaults["max_length"]


def test_a_trl_file_sets_no_environment_and_opens_nothing_that_it_names(converted, tmp_path):
    trap = tmp_path / "ds.json"
    os.mkfifo(trap)
    text = f"model_name_or_path: org/m\ndataset_name: org/d\nenv: {{QPREF_TEST_TRAP: '1'}}\ndeepspeed: {trap}\n"
    _, said = converted(text)
    assert "QPREF_TEST_TRAP" not in os.environ
    assert "env: an environment is set outside of a recipe" in said


@pytest.mark.parametrize(
    ("keys", "trainer", "loss"),
    [
        ("loss_type: kto", None, {"name": "kto", "beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0}),
        ("desirable_weight: 1.5", None,
         {"name": "kto", "beta": 0.1, "desirable_weight": 1.5, "undesirable_weight": 1.0}),
        ("loss_type: ipo\nbeta: 0.2", None, {"name": "ipo", "beta": 0.2}),
        ("loss_type: hinge", None, {"name": "hinge", "beta": 0.1}),
        ("beta: 0.2", "orpo", {"name": "orpo", "beta": 0.2}),
        ("f_divergence_type: js_divergence", None, {"name": "dpo", "beta": 0.1, "divergence": "js"}),
        ("f_divergence_type: alpha_divergence\nf_alpha_divergence_coef: 0.3", None,
         {"name": "dpo", "beta": 0.1, "divergence": "alpha", "alpha": 0.3}),
        ("use_weighting: true\nld_alpha: 0.4", None, {"name": "dpo", "beta": 0.1, "wpo": True, "ld_alpha": 0.4}),
        ("loss_type: simpo\nbeta: 2.0", None,
         {"name": "simpo", "beta": 2.0, "gamma": 0.5, "alpha": 1.0, "label_smoothing": 0.0}),
    ],
)  # fmt: skip
def test_trls_losses_are_the_installed_ones_that_equal_them(converted, keys, trainer, loss):
    recipe, _ = converted(f"model_name_or_path: org/m\ndataset_name: org/d\n{keys}\n", trainer=trainer, tool="trl")
    assert recipe["loss"] == loss


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("sigmoid", "dpo"),
        *((name, name) for name in ("hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot",
                                    "aot_unpaired", "discopop", "apo_zero", "apo_down", "sft", "sigmoid_norm")),
        ("aot_pair", "aot_unpaired"),  # an older name of the same arithmetic
    ],
)  # fmt: skip
def test_each_loss_type_of_trls_dpo_trainer_has_its_loss(converted, theirs, ours):
    text = f"model_name_or_path: org/m\ndataset_name: org/d\nloss_type: {theirs}\nlabel_smoothing: 0.1\n"
    recipe, _ = converted(text, trainer="dpo", tool="trl")
    assert recipe["loss"]["name"] == ours


def test_simpo_with_trls_defaults_is_said_to_be_something_else(converted):
    _, said = converted("model_name_or_path: org/m\ndataset_name: org/d\nloss_type: simpo\n")
    assert "beta = 0.1 (default of TRL): SimPO's rewards are means over tokens" in said
    assert "alpha = 1 (default of TRL): an NLL beside SimPO (CPO-SimPO)" in said


def test_a_mixture_of_trls_datasets_is_several_sources(converted):
    recipe, _ = converted(
        "model_name_or_path: org/m\ndatasets:\n- {path: org/a, name: hard}\n- {path: org/b, split: train_prefs}\n"
        "test_split_size: 0.02\neval_strategy: epoch\n"
    )
    assert recipe["data"]["train"] == [{"path": "hf:org/a/hard"}, {"path": "hf:org/b:train_prefs"}]
    assert recipe["data"]["heldout_share"] == 0.02
    assert recipe["train"]["eval_every"] == "epoch"


def test_an_axolotl_file_with_three_datasets(converted):
    recipe, said = converted("axolotl-dpo.yml")
    assert recipe["data"] == {
        "heldout_share": 0.05, "max_length": 4096, "max_prompt_length": 4095, "on_overflow": "drop",
        "train": [
            {"path": "hf:Intel/orca_dpo_pairs", "columns": {"prompt": "question"}},
            {"path": "hf:argilla/ultrafeedback-binarized-preferences"},
            {"path": os.path.relpath(Path.cwd() / "data/mine.jsonl", recipe_folder(converted)),
             "columns": {"prompt": "question", "chosen": "good", "rejected": "bad"}},
        ],
    }  # fmt: skip
    assert recipe["loss"] == [{"name": "dpo", "beta": 0.2, "label_smoothing": 0.1}, {"name": "sft", "weight": 0.5}]
    assert recipe["adapter"] == {"rank": 32, "alpha": 16, "dropout": 0.05, "targets": "all-linear"}
    assert recipe["train"]["batch_size"] == 8
    assert recipe["train"]["patience"] == 3
    assert "warmup_ratio" not in recipe["train"]
    for sentence in (
        "for warmup_steps 10, set 10 / the steps that `qpref plan` prints",
        'eval_every = "epoch": for evals_per_epoch 4, give it a number of steps',
        "chat_template llama3: rows are rendered with the tokenizer's own chat template",
        "prompt_format: texts are taken as they are",
        "lora_modules_to_save: layers that are trained in full stay changed",
        "no key of axolotl-dpo.yml that is known, left out: flux_capacitor",
    ):
        assert sentence in said


def recipe_folder(converted):
    return converted.__closure__[0].cell_contents


def test_axolotls_older_names_and_tables_are_known(converted):
    base = "base_model: org/m\nadapter: qlora\nload_in_4bit: true\ndatasets: [{path: org/d}]\nlearning_rate: 1e-5\n"
    assert converted(f"{base}rl: dpo\ndpo_beta: 0.3\n")[0]["loss"]["beta"] == 0.3
    assert converted(f"{base}rl: dpo\ntrl: {{beta: 0.4}}\n")[0]["loss"]["beta"] == 0.4
    assert converted(f"{base}rl: orpo\norpo_alpha: 0.25\n")[0]["loss"] == {"name": "orpo", "beta": 0.25}
    assert converted(f"{base}rl: dpo\nbatch_size: 64\nmicro_batch_size: 2\n")[0]["train"]["batch_size"] == 64


def test_a_llama_factory_file_finds_its_data_through_dataset_info(converted, monkeypatch):
    monkeypatch.chdir(FILES)
    recipe, said = converted("llamafactory-dpo.yaml")
    folder = os.path.relpath(FILES / "lf_data", recipe_folder(converted))
    assert recipe["data"]["train"] == [
        {"path": f"{folder}/dpo_en_demo.json"},
        {"path": "hf:org/pairs/hard", "columns": {"prompt": "question", "chosen": "better", "rejected": "worse"}},
    ]
    assert recipe["loss"] == [{"name": "dpo", "beta": 0.1}, {"name": "sft", "weight": 0.2}]
    assert recipe["adapter"]["alpha"] == 16  # twice the rank, unless the file says otherwise
    for sentence in ("max_samples: all rows of a source are used", "use_dora: DoRA rescales whole columns",
                     "template llama3: rows are rendered with the tokenizer's own chat template"):  # fmt: skip
        assert sentence in said


def test_llama_factorys_defaults_differ_from_trls(converted):
    recipe, said = converted("llamafactory-orpo.yaml")
    assert recipe["loss"] == {"name": "orpo", "beta": 0.1, "nll": "response"}
    assert recipe["model"]["dtype"] == "fp16"
    assert (recipe["adapter"]["rank"], recipe["data"]["max_length"]) == (8, 2048)
    assert (recipe["train"]["epochs"], recipe["train"]["batch_size"]) == (3, 8)
    assert "2.5 epochs' worth of the steps" in said


def test_a_mixture_with_bco_has_weights_that_sum_to_one(converted):
    recipe, _ = converted(
        "model_name_or_path: org/m\nstage: dpo\ndataset: a.jsonl\npref_bco_weight: 0.25\nquantization_bit: 4\n"
    )
    assert [(loss["name"], loss["weight"]) for loss in recipe["loss"]] == [("dpo", 0.8), ("bco_pair", 0.2)]


def test_gpus_are_a_factor_of_the_batch_size(converted):
    recipe, said = converted("axolotl-kto.yml", num_gpus=4)
    assert recipe["train"]["batch_size"] == 8
    assert "--gpus" not in said


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("rl: grpo\nbase_model: org/m\n", "rl: grpo: qpref trains DPO and its relatives"),
        ("base_model: org/m\n", "rl: missing: qpref trains DPO and its relatives"),
        ("stage: sft\nmodel_name_or_path: org/m\n", "stage: sft, pref_loss: sigmoid: qpref trains DPO"),
        ("stage: dpo\nfinetuning_type: full\n", "finetuning_type: full: qpref trains LoRA adapters"),
        ("base_model: org/m\nrl: dpo\nadapter: llama-adapter\n", "adapter: llama-adapter: qpref trains LoRA"),
        ("model_name_or_path: org/m\nloss_type: nca\n", "no installed loss equals loss_type nca (DPOTrainer)"),
        ("model_name_or_path: org/m\nlearning_rate: hot\n", "TRL refuses it: argument --learning_rate"),
    ],
)
def test_what_qpref_does_not_train_is_said_in_one_sentence(converted, text, problem):
    with pytest.raises(RecipeError) as caught:
        converted(text)
    assert problem in caught.value.what
    assert "\n" not in caught.value.what


def test_all_values_of_a_wrong_type_are_reported_at_once(converted):
    text = "base_model: org/m\nrl: dpo\ndatasets: [{path: org/d}]\nlearning_rate: hot\nlora_r: 1.5\nseed: [1]\n"
    with pytest.raises(RecipeError) as caught:
        converted(text)
    assert caught.value.what.splitlines()[1:] == [
        "  learning_rate: expected a number, got 'hot'",
        "  lora_r: expected a whole number, got 1.5",
        "  seed: expected a whole number, got [1]",
    ]


def test_a_recipe_is_not_replaced_unasked(tmp_path):
    there = tmp_path / "my.toml"
    there.write_text("mine")
    arguments = ["convert", str(FILES / "axolotl-kto.yml"), "--output", str(there)]
    done = CliRunner().invoke(main, arguments)
    assert (done.exit_code, there.read_text()) == (2, "mine")
    assert CliRunner().invoke(main, [*arguments, "--overwrite"]).exit_code == 0
    assert there.read_text() != "mine"


def test_a_file_without_a_model_says_what_the_recipe_lacks(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("rl: dpo\ndatasets: [{path: org/d}]\n")
    done = CliRunner().invoke(main, ["convert", str(path)])
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [f"error: {path}: it lacks what a recipe needs", "  [model] base: missing"]
