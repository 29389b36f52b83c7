"""A recipe is taken whole or refused with every mistake in it; relative paths and options end where they belong."""

import sys
from pathlib import Path
from typing import get_args

import pytest
import tomli_w

from qpref import __version__
from qpref.errors import PluginError, RecipeError
from qpref.hooks.manager import installed_offers
from qpref.recipe.data_section import RowFormat
from qpref.recipe.document import with_overrides
from qpref.recipe.resolve import DEFAULT_VALIDATORS, make_plan
from qpref.recipe.sections import TrainSection
from qpref.rows.formats import ROW_FORMATS

MINIMAL = {"model": {"base": "someone/model"}, "data": {"train": "pairs.jsonl"}, "loss": {"name": "dpo"}}


def names_of(kind):
    return ", ".join(sorted({offer.name for offer in installed_offers() if offer.kind == kind}))


SUFFIXES = ", ".join(f".{name}" for name in names_of("read").split(", "))


def recipe_with(**tables):
    """The minimal recipe with keys of some tables changed; a table that is no dict replaces the whole."""
    merged = {name: dict(table) for name, table in MINIMAL.items()}
    for name, table in tables.items():
        merged[name] = merged.get(name, {}) | table if isinstance(table, dict) else table
    return merged


def problems(recipe, overrides=()):
    """What a recipe is refused with, less the headline."""
    with pytest.raises(RecipeError) as caught:
        make_plan(recipe, overrides)
    return [line.strip() for line in caught.value.what.splitlines()[1:]]


def write(path, text):
    path.write_text(text)
    return path


NO_URLS = """
from qpref.hooks import Options, Validator, hookimpl

class UrlOptions(Options):
    allowed: int = 0

@hookimpl
def qpref_validators():
    yield Validator(name="no-urls", summary="", options=UrlOptions, start=lambda options: None)
"""
CHAT_JSONL = """
from qpref.hooks import Reader, hookimpl

@hookimpl
def qpref_readers():
    yield Reader(name="chat.jsonl", summary="", read=iter)
"""


@pytest.fixture
def offer_by_acme(tmp_path, monkeypatch):
    """`offer_by_acme("check-no-urls", source)`: acme 2.0, installed, with one plugin."""

    def put(entry_point, source):
        info = tmp_path / "site" / "acme-2.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme\nVersion: 2.0\n")
        (info / "entry_points.txt").write_text(f"[qpref]\n{entry_point} = acme_plugin\n")
        (tmp_path / "site" / "acme_plugin.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path / "site")

    yield put
    sys.modules.pop("acme_plugin", None)


def test_every_mistake_is_reported_at_once(tmp_path):
    file = write(
        tmp_path / "wrong.toml",
        """
        [model]
        bsae = "someone/model"
        dtype = "int8"
        [adapter]
        rank = 0
        [data]
        train = "pairs.zip"
        heldout = 3
        [checks]
        identical = "wran"
        [checks.urls]
        [loss]
        name = "dpo"
        betaa = 0.1
        [train]
        learning_rate = "hot"
        [[sinks]]
        name = "consol"
        [[sinks]]
        nmae = "console"
        [trian]
        """,
    )
    with pytest.raises(RecipeError) as caught:
        make_plan(file)
    assert str(caught.value) == "\n".join(
        [
            f"{file}: 13 problems",
            "  [adapter] rank: expected greater than or equal to 1, got 0",
            "  [checks] identical: expected 'error', 'warn' or 'off', got 'wran'",
            f"  [checks.urls] name: no validator 'urls' is installed; installed: {names_of('check')}",
            "  [data] heldout: expected a string, got 3",
            f"  [data] train: no reader for 'pairs.zip'; installed: {SUFFIXES}",
            f"  [loss] betaa: unknown option of loss 'dpo' (qpref {__version__} [loss-dpo]); did you mean 'beta'?",
            "  [model] base: missing",
            "  [model] bsae: unknown key; did you mean 'base'?",
            "  [model] dtype: expected 'bf16', 'fp16' or 'float32', got 'int8'",
            "  [sinks.0] name: no metric sink 'consol' is installed; did you mean 'console'?",
            "  [sinks.1] name: missing",
            "  [train] learning_rate: expected a number, got 'hot'",
            "  [trian] unknown key; did you mean 'train'?",
        ]
    )


def test_one_mistake_is_one_problem():
    with pytest.raises(RecipeError) as caught:
        make_plan(recipe_with(train={"epochs": 0}))
    assert str(caught.value) == "recipe: 1 problem\n  [train] epochs: expected greater than or equal to 1, got 0"


@pytest.mark.parametrize(
    ("tables", "problem"),
    [
        ({"train": {"epcohs": 2}}, "[train] epcohs: unknown key; did you mean 'epochs'?"),
        ({"adapter": {"ranks": 2}}, "[adapter] ranks: unknown key; did you mean 'rank'?"),
        ({"sink": {"a": 1}}, "[sink] unknown key; did you mean 'sinks'?"),
        ({"loss": {"name": "simpoo"}}, "[loss] name: no loss 'simpoo' is installed; did you mean 'simpo'?"),
        ({"data": {"reader": "jsonll"}}, "[data] reader: no reader 'jsonll' is installed; did you mean 'jsonl'?"),
    ],
)
def test_a_misspelt_name_gets_the_nearest(tables, problem):
    assert problems(recipe_with(**tables)) == [problem]


def test_a_word_like_no_key_gets_all_of_them():
    assert problems(recipe_with(zzzzz={})) == [
        "[zzzzz] unknown key",
        "tables: model, adapter, data, checks, loss, plugins, reference, train,",
        "distributed, rounds, sinks",
    ]


def test_the_keys_of_a_table_are_listed_once_and_wrapped():
    with pytest.raises(RecipeError) as caught:
        make_plan(recipe_with(train={"zzzzz": 1, "qqqqq": 2}))
    first, second, *listed = caught.value.what.splitlines()[1:]
    assert [first, second] == ["  [train] qqqqq: unknown key", "  [train] zzzzz: unknown key"]
    assert listed[0].startswith("  keys of [train]: learning_rate, epochs, ")
    words = " ".join(line.strip() for line in listed).removeprefix("keys of [train]: ").split(", ")
    assert words == list(TrainSection.model_fields)
    assert max(map(len, listed)) <= 80
    assert len(listed) > 2


@pytest.mark.parametrize("table", MINIMAL)
def test_a_table_that_every_recipe_has_is_missed_by_name(table):
    recipe = recipe_with()
    del recipe[table]
    assert problems(recipe) == [f"[{table}] missing; every recipe has it"]


@pytest.mark.parametrize(
    ("tables", "problem"),
    [
        ({"loss": {"beta": 0}}, "[loss] beta: expected greater than 0, got 0"),
        ({"loss": {"beta": "x"}}, "[loss] beta: expected a number, got 'x'"),
        ({"loss": {"beta": True}}, "[loss] beta: expected a number, got True"),
        (
            {"sinks": {"console": {}}},
            "[sinks] expected a list of tables, [[sinks]] with a name in each, got {'console': {}}",
        ),
        ({"checks": {"max_similarity": 2}}, "[checks] max_similarity: expected less than or equal to 1, got 2"),
        (
            {"checks": {"identicl": "off"}},
            f"[checks] identicl: unknown option of validator 'pairs' (qpref {__version__} [check-pairs]); "
            "did you mean 'identical'?",
        ),
        (
            {"sinks": [{"name": "console"}, {"name": "tensorboard", "fodler": "x"}]},
            f"[sinks.1] fodler: unknown option of metric sink 'tensorboard' (qpref {__version__} [sink-tensorboard]); "
            "did you mean 'folder'?",
        ),
    ],
)
def test_a_plugins_own_model_judges_its_options(tables, problem):
    assert problems(recipe_with(**tables)) == [problem]


def test_a_plugins_parsed_options_are_in_the_plan():
    assert make_plan(recipe_with(loss={"beta": 0.5})).losses[0].options.first.beta == 0.5


def test_a_clash_of_plugins_is_no_mistake_of_the_recipe(offer_by_acme):
    offer_by_acme("loss-dpo", "")
    with pytest.raises(PluginError, match=r"offered by both acme 2.0 \[loss-dpo\] and qpref .* \[loss-dpo\]"):
        make_plan(MINIMAL)


# What would move the reference.


@pytest.mark.parametrize(
    ("adapter", "problem"),
    [
        ({"dora": True}, "dora: DoRA rescales whole columns of the base, which folds into no delta on a 4-bit base"),
        (
            {"use_dora": True},
            "use_dora: DoRA rescales whole columns of the base, which folds into no delta on a 4-bit base",
        ),
        (
            {"experts": True, "dropout": 0.1},
            "experts: PEFT's adapters on experts have no dropout; set dropout = 0",
        ),
        (
            {"modules_to_save": ["lm_head"]},
            "modules_to_save: layers trained in full stay changed with the adapters off, so the reference would move",
        ),
        (
            {"init": "olora"},
            "init: olora changes the base or starts away from it, so the base with adapters off is no reference",
        ),
        (
            {"init": "PiSSA_niter_16"},
            "init: PiSSA_niter_16 changes the base or starts away from it, so the base with adapters off is no "
            "reference",
        ),
        ({"bias": "all"}, "bias: trained biases stay on when the adapters are off, so the reference would move"),
        (
            {"bias": "lora_only"},
            "bias: trained biases stay on when the adapters are off, so the reference would move",
        ),
    ],
)
def test_what_would_move_the_reference_is_refused_with_the_reason(adapter, problem):
    assert problems(recipe_with(adapter=adapter)) == [f"[adapter] {problem}"]


@pytest.mark.parametrize("adapter", [{"bias": "none"}, {"init": "gaussian"}, {"rslora": True}])
def test_what_leaves_the_reference_alone_is_taken(adapter):
    assert make_plan(recipe_with(adapter=adapter)).document["adapter"].items() >= adapter.items()


@pytest.mark.parametrize("prompt", [1024, 2000])
def test_prompts_that_leave_no_room_for_a_response_are_refused(prompt):
    assert problems(recipe_with(data={"max_length": 1024, "max_prompt_length": prompt})) == [
        f"[data] max_prompt_length ({prompt}) has to be below max_length (1024), or nothing is left for a response"
    ]


def test_prompts_may_leave_one_token_for_a_response():
    assert make_plan(recipe_with(data={"max_length": 1024, "max_prompt_length": 1023}))


@pytest.mark.parametrize("key", ["save_every", "eval_every"])
@pytest.mark.parametrize("value", ["epoch", 1, 500])
def test_every_takes_steps_or_epoch(key, value):
    assert getattr(make_plan(recipe_with(train={key: value})).recipe.train, key) == value


@pytest.mark.parametrize("key", ["save_every", "eval_every"])
@pytest.mark.parametrize("value", ["epochs", 0, -1, 2.5, True, []])
def test_every_takes_nothing_else(key, value):
    assert problems(recipe_with(train={key: value})) == [
        f'[train] {key}: expected a number of steps from 1 on, or "epoch", got {value!r}'
    ]


# Files.


def test_a_missing_recipe_is_named(tmp_path):
    with pytest.raises(RecipeError) as caught:
        make_plan(tmp_path / "none.toml")
    assert str(caught.value) == f"{tmp_path}/none.toml: no such recipe"


def test_a_folder_is_no_recipe(tmp_path):
    with pytest.raises(RecipeError) as caught:
        make_plan(tmp_path)
    assert str(caught.value) == f"{tmp_path}: cannot be read: it is a folder, not a regular file"


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"[model\n", "not TOML: Expected ']' at the end of a table declaration (at line 1, column 7)"),
        (b"[loss]\nbeta = 1\nbeta = 2\n", "not TOML: Cannot overwrite a value (at line 3, column 9)"),
        (b'name = "\xff"\n', "not UTF-8"),
        (b"a\x00 = 1\n", "not TOML: Expected '=' after a key in a key/value pair (at line 1, column 2)"),
    ],
)
def test_a_file_that_is_no_toml_is_refused_with_the_place(tmp_path, content, complaint):
    (tmp_path / "r.toml").write_bytes(content)
    with pytest.raises(RecipeError) as caught:
        make_plan(tmp_path / "r.toml")
    assert str(caught.value) == f"{tmp_path}/r.toml: {complaint}"


def test_an_empty_recipe_misses_all_tables(tmp_path):
    assert problems(write(tmp_path / "r.toml", "")) == [
        f"[{table}] missing; every recipe has it" for table in ("data", "loss", "model")
    ]


def test_relative_paths_start_at_the_recipes_folder(tmp_path, monkeypatch):
    folder = tmp_path / "recipes"
    folder.mkdir()
    recipe = recipe_with(data={"train": "in/train.jsonl", "heldout": "../heldout.json"}, adapter={"start": "sft"})
    file = write(folder / "r.toml", tomli_w.dumps(recipe))
    monkeypatch.chdir("/")
    plan = make_plan(file)
    assert (plan.recipe.data.train, plan.recipe.data.heldout, plan.recipe.adapter.start) == (
        f"{folder}/in/train.jsonl",
        f"{tmp_path}/heldout.json",
        f"{folder}/sft",
    )


def test_relative_paths_of_a_dict_start_at_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert make_plan(MINIMAL).recipe.data.train == f"{tmp_path}/pairs.jsonl"


@pytest.mark.parametrize("key", ["base", "tokenizer"])
@pytest.mark.parametrize(
    ("value", "resolved"),
    [
        ("someone/model", "someone/model"),
        ("here/model", "{folder}/here/model"),
        ("./none", "{folder}/none"),
        ("../none", "{parent}/none"),
        ("/none", "/none"),
        ("~/none", "{home}/none"),
        ("none/model.gguf", "{folder}/none/model.gguf"),
        ("pypi:llm==1.0/model.gguf", "pypi:llm==1.0/model.gguf"),
    ],
)
def test_a_base_is_a_path_where_it_looks_like_one_or_exists(tmp_path, monkeypatch, key, value, resolved):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    folder = tmp_path / "recipes"
    (folder / "here" / "model").mkdir(parents=True)
    file = write(folder / "r.toml", tomli_w.dumps(recipe_with(model={key: value})))
    expected = resolved.format(folder=folder, parent=tmp_path, home=tmp_path / "home")
    assert getattr(make_plan(file).recipe.model, key) == expected


def test_the_run_folder_is_named_like_the_recipe(tmp_path):
    assert str(make_plan(write(tmp_path / "7b-24gb.toml", tomli_w.dumps(MINIMAL))).output) == "runs/7b-24gb"


# Readers.


@pytest.mark.parametrize(
    ("data", "reader"),
    [
        ({"train": "a.jsonl"}, "jsonl"),
        ({"train": "a.json"}, "json"),
        ({"train": "A.JSONL"}, "jsonl"),
        ({"train": "a.json.jsonl"}, "jsonl"),
        ({"train": "a.jsonl", "reader": "json"}, "json"),
        ({"train": "a.txt", "reader": "jsonl"}, "jsonl"),
    ],
)
def test_the_reader_is_the_one_named_or_that_of_the_suffix(data, reader):
    assert [source.reader.record.name for source in make_plan(recipe_with(data=data)).sources] == [reader]


@pytest.mark.parametrize("name", ["org/name-1.5", "org/name/config@main:test", "org/name:train"])
def test_a_path_that_is_none_and_may_be_a_hub_dataset_is_told_its_name(name):
    told = f"no such path; a dataset of the hub is 'hf:{name}'"
    assert problems(recipe_with(data={"train": name, "heldout": f"{name}2"})) == [
        f"[data] heldout: no such path; a dataset of the hub is 'hf:{name}2'",
        f"[data] train: {told}",
    ]
    assert problems(recipe_with(data={"train": [{"path": name}]})) == [f"[data.train.0] path: {told}"]


@pytest.mark.parametrize("path", ["name", "../org/name", "a/b/c/d", "org/pairs.zip", "/org/name"])
def test_a_path_that_is_no_hub_name_is_not_taken_for_one(path):
    (problem,) = problems(recipe_with(data={"train": path}))
    assert "hf:" not in problem


def test_a_folder_is_read_as_a_saved_dataset(tmp_path):
    (tmp_path / "saved").mkdir()
    plan = make_plan(recipe_with(data={"train": str(tmp_path / "saved")}))
    assert [source.reader.record.name for source in plan.sources] == ["datasets"]


def test_a_location_may_name_its_reader():
    (source,) = make_plan(recipe_with(data={"train": "hf:org/name:test"})).sources
    assert (source.reader.record.name, source.location) == ("hf", "hf:org/name:test")


def test_several_sources_have_settings_of_their_own_or_the_datas(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train = [{"path": "a.jsonl", "weight": 0.5, "format": "hh"}, {"path": "b.csv", "columns": {"prompt": "p"}}]
    data = {"train": train, "heldout": "c.json", "columns": {"chosen": "good"}, "format": "pair"}
    plan = make_plan(recipe_with(data=data))
    assert [
        (source.location, source.split, source.reader.record.name, source.weight, source.format, source.columns)
        for source in plan.sources
    ] == [
        (f"{tmp_path}/c.json", "heldout", "json", 1.0, "pair", {"chosen": "good"}),
        (f"{tmp_path}/a.jsonl", "train", "jsonl", 0.5, "hh", {"chosen": "good"}),
        (f"{tmp_path}/b.csv", "train", "csv", 1.0, "pair", {"prompt": "p"}),
    ]


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        ({"train": []}, "[data] train: "),
        ({"train": [{"path": "a.zip"}]}, "[data.train.0] path: no reader for 'a.zip'"),
        ({"train": [{"path": "a.jsonl", "weight": 0}]}, "[data.train.0] weight: expected greater than 0, got 0"),
        ({"train": [{"path": "a.jsonl", "wait": 1}]}, "[data.train.0] wait: unknown key; did you mean 'weight'?"),
        ({"train": [{"path": "a.jsonl"}, {"path": "./a.jsonl"}]}, "[data.train.1] path: "),
        ({"train": "a.jsonl", "heldout": "a.jsonl"}, "[data] train: "),
        ({"train": "a.jsonl", "heldout": [{"path": "b.jsonl", "weight": 2.0}]}, "[data] heldout: a weight says how"),
        ({"train": [{"path": "a.jsonl", "weight": 1e12}]}, "[data.train.0] weight: expected less than or equal to 100"),
        ({"train": "a.jsonl", "shape": "pair"}, "[data] shape: unknown key; did you mean 'format'?"),
        ({"train": [{"path": "a.jsonl", "shape": "hh"}]}, "[data.train.0] shape: unknown key; did you mean 'format'?"),
        ({"train": "a.jsonl", "format": "pears"}, "[data] format: expected 'auto', 'pair', "),
        ({"train": "a.jsonl", "heldout": "b.jsonl", "heldout_share": 0.1}, "[data] heldout names the held-out data"),
        ({"train": "a.jsonl", "heldout_share": 0.9}, "[data] heldout_share: expected less than or equal to 0.5"),
    ],
)
def test_mistakes_in_the_sources_are_named(data, problem):
    (found,) = problems(recipe_with(data=data))
    assert found.startswith(problem)


def test_the_recipe_knows_the_row_formats_that_there_are():
    assert set(get_args(RowFormat)) == {"auto", *ROW_FORMATS}


def test_of_two_readers_that_fit_the_longer_suffix_wins(offer_by_acme):
    offer_by_acme("read-chat.jsonl", CHAT_JSONL)
    plan = make_plan(recipe_with(data={"train": "a.chat.jsonl", "heldout": "b.jsonl"}))
    assert tuple(source.reader.record.name for source in reversed(plan.sources)) == ("chat.jsonl", "jsonl")


def test_each_file_has_the_reader_of_its_own_suffix():
    plan = make_plan(recipe_with(data={"train": "a.jsonl", "heldout": "b.json"}))
    assert tuple(source.reader.record.name for source in reversed(plan.sources)) == ("jsonl", "json")


@pytest.mark.parametrize("key", ["train", "heldout"])
@pytest.mark.parametrize("file", ["in/pairs.zip", "jsonl", "in/pairs.jsonl.zip"])
def test_an_unknown_suffix_is_refused_with_what_is_installed(key, file):
    assert problems(recipe_with(data={key: file})) == [
        f"[data] {key}: no reader for '{Path(file).name}'; installed: {SUFFIXES}"
    ]


# Checks and sinks.


def test_without_tables_pairs_are_checked_and_the_console_shows():
    plan = make_plan(MINIMAL)
    assert [choice.plugin.record.name for choice in plan.validators] == ["pairs", *DEFAULT_VALIDATORS]
    assert [choice.plugin.record.name for choice in plan.sinks] == ["console"]


def test_an_empty_list_of_sinks_is_none():
    assert make_plan(recipe_with(sinks=[])).sinks == ()


@pytest.fixture
def no_urls(offer_by_acme):
    """A foreign validator `no-urls` with the option `allowed`."""
    offer_by_acme("check-no-urls", NO_URLS)


def test_a_table_of_checks_adds_a_validator_with_its_options(no_urls):
    plan = make_plan(recipe_with(checks={"identical": "warn", "no-urls": {"allowed": 3}}))
    names = [choice.plugin.record.name for choice in plan.validators]
    assert names == ["pairs", *DEFAULT_VALIDATORS, "no-urls"]
    assert plan.validators[-1].options.model_dump() == {"allowed": 3}


def test_a_validators_key_like_no_other_gets_the_known_ones(no_urls):
    assert problems(recipe_with(checks={"no-urls": {"zzz": 3}})) == [
        "[checks.no-urls] zzz: unknown option of validator 'no-urls' (acme 2.0 [check-no-urls])",
        "keys of [checks.no-urls]: allowed",
    ]


def test_a_table_of_checks_leaves_the_pair_checks_their_own_options(no_urls):
    plan = make_plan(recipe_with(checks={"identical": "warn", "no-urls": {}}))
    assert plan.validators[0].options.identical == "warn"


def test_a_validators_option_is_refused_under_its_table(no_urls):
    assert problems(recipe_with(checks={"no-urls": {"alowed": 3}})) == [
        "[checks.no-urls] alowed: unknown option of validator 'no-urls' (acme 2.0 [check-no-urls]); "
        "did you mean 'allowed'?"
    ]


# --set


@pytest.mark.parametrize(
    ("override", "table", "key", "value"),
    [
        ("train.learning_rate=1e-6", "train", "learning_rate", 1e-6),
        ("train.epochs=3", "train", "epochs", 3),
        ("train.epochs = 3", "train", "epochs", 3),
        ("loss.name=ipo", "loss", "name", "ipo"),
        ('loss.name="ipo"', "loss", "name", "ipo"),
        ("adapter.rslora=true", "adapter", "rslora", True),
        ('adapter.targets=["q_proj", "v_proj"]', "adapter", "targets", ["q_proj", "v_proj"]),
        ("data.train=a=b.jsonl", "data", "train", "a=b.jsonl"),
        ("model.base=../m", "model", "base", "../m"),
        ("train.save_every=epoch", "train", "save_every", "epoch"),
        ("loss.beta=", "loss", "beta", ""),
    ],
)
def test_set_reads_a_value_as_toml_or_as_text(override, table, key, value):
    changed = with_overrides(MINIMAL, [override])[table][key]
    assert (type(changed), changed) == (type(value), value)


def test_set_reaches_into_an_array():
    recipe = recipe_with(sinks=[{"name": "console"}, {"name": "tensorboard"}])
    changed = with_overrides(recipe, ["sinks.1.folder=tb", "sinks.0.name=tensorboard"])
    assert changed["sinks"] == [{"name": "tensorboard"}, {"name": "tensorboard", "folder": "tb"}]


def test_the_last_set_of_a_key_wins():
    assert with_overrides(MINIMAL, ["loss.beta=1", "loss.beta=2"])["loss"]["beta"] == 2


def test_set_leaves_the_given_recipe_alone():
    recipe = recipe_with(sinks=[{"name": "console"}])
    with_overrides(recipe, ["sinks.0.name=x", "loss.beta=1", "train.epochs=2"])
    assert recipe == recipe_with(sinks=[{"name": "console"}])


def test_a_set_value_is_checked_like_the_recipes():
    assert problems(MINIMAL, ["train.learning_rate=hot", "loss.betaa=1"]) == [
        f"[loss] betaa: unknown option of loss 'dpo' (qpref {__version__} [loss-dpo]); did you mean 'beta'?",
        "[train] learning_rate: expected a number, got 'hot'",
    ]


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("loss.beta", "expected table.key=value"),
        ("=1", "expected table.key=value"),
        ("loss.=1", "expected table.key=value"),
        ("loss..beta=1", "expected table.key=value"),
        ("loss.name.x=1", "'loss.name.x' is not a key of this recipe"),
        ("loss.name.x.y=1", "'loss.name.x.y' is not a key of this recipe"),
        ("sinks.1.name=console", "'sinks.1.name' is not a key of this recipe"),
        ("sinks.first.name=console", "'sinks.first.name' is not a key of this recipe"),
        ("sinks.name=console", "'sinks.name' is not a key of this recipe"),
    ],
)
def test_a_set_that_leads_nowhere_is_refused(override, complaint):
    with pytest.raises(RecipeError) as caught:
        make_plan(recipe_with(sinks=[{"name": "console"}]), [override])
    assert str(caught.value) == f"--set {override}: {complaint}"


# The plan's document and fingerprint.


def test_the_resolved_recipe_resolves_to_itself(tmp_path):
    recipe = recipe_with(data={"heldout": "h.json"}, checks={"identical": "off"}, sinks=[{"name": "tensorboard"}])
    document = make_plan(recipe).document
    assert make_plan(write(tmp_path / "recipe.lock.toml", tomli_w.dumps(document))).document == document


@pytest.mark.parametrize(
    "overrides",
    [
        ["sinks=[]"],
        ['sinks=[{name = "tensorboard", folder = "tb"}]'],
        ["model.base=/elsewhere/model"],
        ["model.tokenizer=/elsewhere/model"],
        ["data.train=/elsewhere/pairs.jsonl", "data.heldout=/elsewhere/heldout.jsonl"],
        ["checks.too_short=off"],
    ],
    ids=lambda overrides: overrides[0],
)
def test_the_fingerprint_is_blind_to_what_decides_nothing(overrides):
    assert make_plan(MINIMAL, overrides).fingerprint == make_plan(MINIMAL).fingerprint


def test_the_fingerprint_is_blind_to_the_recipes_folder(tmp_path):
    plans = []
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        plans.append(make_plan(write(tmp_path / name / f"{name}.toml", tomli_w.dumps(MINIMAL))))
    assert plans[0].fingerprint == plans[1].fingerprint


def test_a_default_written_out_leaves_the_fingerprint():
    assert make_plan(recipe_with(loss={"beta": 0.1})).fingerprint == make_plan(MINIMAL).fingerprint


@pytest.mark.parametrize(
    "override",
    [
        "loss.beta=0.2",
        "loss.name=ipo",
        "train.learning_rate=2e-6",
        "train.batch_size=8",
        "train.seed=1",
        "adapter.rank=8",
        "adapter.alpha=16",
        "data.max_length=2048",
        "data.template=none",
        "model.quantization=none",
        "model.dtype=fp16",
    ],
)
def test_the_fingerprint_sees_what_decides(override):
    assert make_plan(MINIMAL, [override]).fingerprint != make_plan(MINIMAL).fingerprint
