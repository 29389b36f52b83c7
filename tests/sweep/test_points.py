"""Points of a sweep: how `--over` is read, named and planned."""

from __future__ import annotations

import pytest
import tomli_w

from qpref.errors import RecipeError
from qpref.sweep.points import Axis, in_order_of_training, make_points, parse_axes


@pytest.fixture
def recipe(make_recipe, tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(tomli_w.dumps(make_recipe()))
    return path


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("loss.beta=0.05,0.1", ("0.05", "0.1")),
        ("loss.name = dpo , ipo", ("dpo", "ipo")),
        ("loss.beta=0.1,{ start = 0.1, end = 0.5 }", ("0.1", "{ start = 0.1, end = 0.5 }")),
        ('adapter.targets=["q_proj"],["q_proj","v_proj"]', ('["q_proj"]', '["q_proj","v_proj"]')),
        ("data.train=\"a,b.jsonl\",'c.jsonl'", ('"a,b.jsonl"', "'c.jsonl'")),
    ],
)
def test_commas_outside_of_brackets_and_quotes_separate_values(text, values):
    (axis,) = parse_axes([text])
    assert axis.values == values


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "nothing to sweep over"),
        (["loss.beta"], "--over loss.beta: expected table.key=value,value"),
        (["loss.beta="], "expected table.key=value,value"),
        (["loss.beta=0.1,,0.2"], "expected table.key=value,value"),
        (["loss.beta=0.1,0.1"], "--over loss.beta: 0.1 is there twice"),
        (["loss.beta=0.1", "loss.beta=0.2"], "--over loss.beta: is there twice"),
    ],
)
def test_a_malformed_axis_is_refused(texts, message):
    with pytest.raises(RecipeError) as refusal:
        parse_axes(texts)
    assert message in refusal.value.what


def test_every_combination_is_a_point_with_a_folder_of_its_own(recipe, tmp_path):
    axes = parse_axes(["loss.beta=0.05,0.1", "loss.name=dpo,ipo"])
    points = make_points(recipe, axes, ["train.seed=3"], tmp_path / "sweep")
    assert [point.name for point in points] == [
        "beta=0.05,name=dpo", "beta=0.05,name=ipo", "beta=0.1,name=dpo", "beta=0.1,name=ipo"
    ]  # fmt: skip
    assert [(point.plan.document["loss"]["beta"], point.plan.document["loss"]["name"]) for point in points] == [
        (0.05, "dpo"), (0.05, "ipo"), (0.1, "dpo"), (0.1, "ipo")
    ]  # fmt: skip
    assert {point.plan.recipe.train.seed for point in points} == {3}
    assert [point.plan.output for point in points] == [tmp_path / "sweep" / point.name for point in points]


def test_keys_with_the_same_last_part_are_named_whole(recipe, tmp_path):
    axes = parse_axes(["loss.name=ipo", "sinks.0.name=console"])
    (point,) = make_points(recipe, axes, ['sinks=[{name="tensorboard"}]'], tmp_path)
    assert point.name == "loss.name=ipo,sinks.0.name=console"


def test_values_that_no_folder_can_have_get_a_hash(recipe, tmp_path):
    folders = (tmp_path / "a" / "b", tmp_path / "a-b")
    for folder in folders:
        folder.mkdir(parents=True)
    points = make_points(recipe, [Axis("model.tokenizer", tuple(map(str, folders)))], [], tmp_path)
    assert len({point.name for point in points}) == 2
    assert all("/" not in point.name and point.plan.output.parent == tmp_path for point in points)


def test_a_point_with_a_mistake_is_refused_alone(recipe, tmp_path):
    points = make_points(recipe, parse_axes(["loss.beta=0.1,hot"]), [], tmp_path)
    assert [point.plan is None for point in points] == [False, True]
    assert "[loss] beta: expected a number, got 'hot'" in str(points[1].refusal)


def test_a_mistake_of_all_points_is_one_error(recipe, tmp_path):
    with pytest.raises(RecipeError) as refusal:
        make_points(recipe, parse_axes(["loss.beta=0.1,0.2"]), ["train.batch_sise=4"], tmp_path)
    assert str(refusal.value).count("batch_sise") == 1


def test_different_mistakes_of_all_points_are_all_named(recipe, tmp_path):
    with pytest.raises(RecipeError) as refusal:
        make_points(recipe, parse_axes(["loss.beta=hot,cold"]), [], tmp_path)
    assert "'hot'" in str(refusal.value)
    assert "'cold'" in str(refusal.value)


def test_two_spellings_of_one_value_are_refused(recipe, tmp_path):
    with pytest.raises(RecipeError, match=r"beta=0\.1 and beta=0\.10 are the same run"):
        make_points(recipe, parse_axes(["loss.beta=0.1,0.10"]), [], tmp_path)


def test_points_of_one_base_are_trained_together_and_deterministic_ones_first(recipe, tmp_path):
    axes = parse_axes(["loss.beta=0.1,0.2", "model.dtype=float32,bf16", "train.deterministic=false,true"])
    points = in_order_of_training(make_points(recipe, axes, [], tmp_path))
    order = [(point.plan.recipe.train.deterministic, point.plan.recipe.model.dtype) for point in points]
    assert order == [(True, "float32")] * 2 + [(True, "bf16")] * 2 + [(False, "float32")] * 2 + [(False, "bf16")] * 2
