"""Parquet files, saved datasets and the hub's give plain Python values, row by row, and name what is damaged."""

import json
import re
import subprocess
import sys
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from qpref.errors import DataError, UnreachableDataError
from qpref.hooks.manager import READER, PluginHost
from qpref.records import Finding
from qpref_plugins.read_arrow.cells import MAX_ROW_BYTES, rows_of_table

TURNS = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because.", "name": "ü"}]


def found(name, source):
    """(line, values) of each row and (line, message) of each finding."""
    items = PluginHost().load(READER, name).record.read(source)
    return [(item.source.line, item.message if isinstance(item, Finding) else item.values) for item in items]


@pytest.fixture
def write(tmp_path):
    """`write(rows)`: a Parquet file of these rows."""

    def write(rows, **options):
        path = tmp_path / "pairs.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, **options)
        return path

    return write


def test_rows_are_numbered_from_1_over_all_batches_and_row_groups(write):
    rows = [{"a": number, "b": f"text {number}"} for number in range(1000)]
    assert found("parquet", write(rows, row_group_size=300)) == list(enumerate(rows, start=1))


def test_nested_values_are_lists_and_dicts(write):
    assert found("parquet", write([{"chosen": TURNS, "tags": [["x"], []]}])) == [
        (1, {"chosen": [{"content": "Why?", "role": "user"}, TURNS[1]], "tags": [["x"], []]})
    ]


def test_null_fields_of_structs_are_left_out_and_null_columns_stay(write):
    rows = [{"a": None, "tools": [{"x": {"p": 1}}, {"x": {"q": None}}]}, {"a": 1, "tools": None}]
    assert found("parquet", write(rows)) == [(1, {"a": None, "tools": [{"x": {"p": 1}}, {"x": {}}]}), (2, rows[1])]


def test_a_file_without_rows_is_no_rows(tmp_path):
    path = tmp_path / "pairs.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"a": pyarrow.array([], pyarrow.string())}), path)
    assert found("parquet", path) == []


def test_an_over_long_row_is_a_finding_and_the_next_one_is_read(write):
    rows = [{"a": "x"}, {"a": "x" * (MAX_ROW_BYTES + 1)}, {"a": "y"}] + [{"a": "z" * 10**6}] * 20
    result = found("parquet", write(rows))
    assert result[:3] == [(1, {"a": "x"}), (2, "the row is longer than 4 MiB"), (3, {"a": "y"})]
    assert [line for line, _ in result] == list(range(1, 24))


def test_one_long_value_in_many_rows_is_refused_in_each(tmp_path):
    path = tmp_path / "pairs.parquet"
    column = pyarrow.DictionaryArray.from_arrays([0] * 100, ["x" * (MAX_ROW_BYTES + 1)])
    pyarrow.parquet.write_table(pyarrow.table({"a": column}), path)
    assert found("parquet", path) == [(line, "the row is longer than 4 MiB") for line in range(1, 101)]


def test_a_dictionary_of_many_texts_is_read(tmp_path):
    path = tmp_path / "pairs.parquet"
    texts = [f"{number:09}" * 1000 for number in range(600)]  # 5.4 MB in all
    pyarrow.parquet.write_table(pyarrow.table({"a": pyarrow.array(texts).dictionary_encode()}), path)
    assert [values["a"] for _, values in found("parquet", path)] == texts


def test_values_of_the_type_json_are_parsed(tmp_path):
    path = tmp_path / "pairs.parquet"
    column = pyarrow.array(['{"x": [1, null]}', None, "{"], pyarrow.json_())
    pyarrow.parquet.write_table(pyarrow.table({"a": column}), path)
    first, second, (line, message) = found("parquet", path)
    assert (first, second, line) == ((1, {"a": {"x": [1, None]}}), (2, {"a": None}), 3)
    assert message.startswith("column a: invalid JSON: ")


DATE, TIME, DAY, MOMENT = date(2024, 1, 5), time(10, 30), datetime(2024, 1, 5), datetime(2024, 1, 5, 10, 30)
NO_SUCH_YEAR = pyarrow.array([300_000_000_000], pyarrow.timestamp("s"))
JSON_VALUES = {
    "bytes that are text": (pyarrow.array([b"gr\xc3\xbcn"]), "grün"),
    "bytes that are none": (pyarrow.array([b"\xff"]), b"\xff"),
    "large text": (pyarrow.array(["x"], pyarrow.large_string()), "x"),
    "a view of a text": (pyarrow.array(["x"], pyarrow.string_view()), "x"),
    "a category": (pyarrow.array(["x"]).dictionary_encode(), "x"),
    "a category of days": (pyarrow.array([DATE]).dictionary_encode(), "2024-01-05"),
    "runs": (pyarrow.RunEndEncodedArray.from_arrays([1], pyarrow.array([DATE])), "2024-01-05"),
    "a day": (pyarrow.array([DATE]), "2024-01-05"),
    "a time": (pyarrow.array([TIME]), "10:30:00"),
    "a moment": (pyarrow.array([MOMENT]), "2024-01-05T10:30:00"),
    "a moment with a zone": (pyarrow.array([MOMENT], pyarrow.timestamp("us", "UTC")), "2024-01-05T10:30:00+00:00"),
    "nanoseconds": (
        pyarrow.array([1_704_450_600_123_456_789], pyarrow.timestamp("ns")),
        "2024-01-05T10:30:00.123456789",
    ),
    "a day that Arrow's JSON reader takes for a moment": (pyarrow.array([DAY], pyarrow.timestamp("s")), "2024-01-05"),
    "such a moment": (pyarrow.array([MOMENT], pyarrow.timestamp("s")), "2024-01-05T10:30:00"),
    "such a day in Parquet": (pyarrow.array([DAY], pyarrow.timestamp("ms")), "2024-01-05"),
    "midnight in a zone": (pyarrow.array([DAY], pyarrow.timestamp("ms", "UTC")), "2024-01-05T00:00:00+00:00"),
    "a year beyond Python's": (NO_SUCH_YEAR, "11476-08-15 05:20:00"),
    "one within an object": (pyarrow.StructArray.from_arrays([NO_SUCH_YEAR], ["a"]), {"a": "11476-08-15 05:20:00"}),
    "a duration": (pyarrow.array([timedelta(minutes=1, milliseconds=500)]), 60.5),
    "a decimal": (pyarrow.array([Decimal("12.50")]), 12.5),
    "an integral decimal": (pyarrow.array([Decimal("12.00")]), 12),
    "an integer of one byte": (pyarrow.array([1], pyarrow.int8()), 1),
    "half a float": (pyarrow.array([0.5], pyarrow.float16()), 0.5),
    "a map": (pyarrow.array([[("a", DATE), ("b", None)]], pyarrow.map_("string", "date32")), {"a": "2024-01-05"}),
    "a map of numbers": (pyarrow.array([[(1, "x")]], pyarrow.map_("int64", "string")), {"1": "x"}),
    "a list of maps": (
        pyarrow.array(
            [
                [[("a", 1)]],
            ],
            pyarrow.list_(pyarrow.map_("string", "int64")),
        ),
        [{"a": 1}],
    ),
    "a view of a list": (pyarrow.array([[b"x", None]], pyarrow.list_view(pyarrow.binary())), ["x", None]),
    "a list of a fixed size": (pyarrow.array([[DATE]], pyarrow.list_(pyarrow.date32(), 1)), ["2024-01-05"]),
    "an identifier": (pyarrow.array([bytes(16)], pyarrow.uuid()), "00000000-0000-0000-0000-000000000000"),
    "a null": (pyarrow.nulls(1), None),
}


@pytest.mark.parametrize(("column", "value"), JSON_VALUES.values(), ids=JSON_VALUES)
def test_a_value_is_what_json_has_for_it(column, value):
    (row,) = rows_of_table(pyarrow.table({"a": column}), "x", 1)
    assert repr(row.values["a"]) == repr(value)
    (row,) = rows_of_table(pyarrow.table({"a": pyarrow.nulls(1, column.type)}), "x", 1)
    assert row.values["a"] is None


def test_a_map_with_a_key_twice_refuses_its_row_alone():
    column = pyarrow.array([[("a", 1), ("a", 2)], [("a", 3)]], pyarrow.map_("string", "int64"))
    refused, kept = rows_of_table(pyarrow.table({"a": column}), "x", 1)
    assert (refused.message, str(refused.source)) == ("column a: a map has a key twice", "x:1")
    assert (kept.values, str(kept.source)) == ({"a": {"a": 3}}, "x:2")


def test_a_text_that_is_not_utf8_refuses_its_row_alone():
    offsets = pyarrow.array([0, 1, 3], pyarrow.int32()).buffers()[1]
    column = pyarrow.Array.from_buffers(pyarrow.string(), 2, [None, offsets, pyarrow.py_buffer(b"xy\xff")])
    kept, refused = rows_of_table(pyarrow.table({"a": column}), "x", 1)
    assert (kept.values, refused.message, refused.source.line) == ({"a": "x"}, "a text is not UTF-8 (byte 2)", 2)


def test_an_unknown_time_zone_refuses_its_rows_by_name():
    (refused,) = rows_of_table(pyarrow.table({"a": pyarrow.array([0], pyarrow.timestamp("us", "Nowhere/X"))}), "x", 1)
    assert refused.message.startswith("a value cannot be converted: Cannot locate or parse timezone 'Nowhere/X'")


def test_nan_in_a_column_of_the_type_json_is_refused():
    (refused,) = rows_of_table(pyarrow.table({"a": pyarrow.array(["[NaN]"], pyarrow.json_())}), "x", 1)
    assert refused.message == "column a: invalid JSON: NaN is not JSON"


def test_a_column_that_occurs_twice_is_refused(tmp_path):
    path = tmp_path / "pairs.parquet"
    columns = [pyarrow.array([1]), pyarrow.array([2]), pyarrow.array([3])]
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays(columns, names=["a", "b", "a"]), path)
    with pytest.raises(DataError, match=re.escape(f"{path}: duplicate column 'a'")):
        found("parquet", path)


def test_an_over_long_row_is_refused_in_a_small_file_too(write):
    rows = [{"a": "x" * (MAX_ROW_BYTES + 1)}, {"a": "y"}]
    assert found("parquet", write(rows)) == [(1, "the row is longer than 4 MiB"), (2, {"a": "y"})]


@pytest.mark.parametrize("content", [b"", b"PAR1", b"no Parquet at all", b"PAR1" + bytes(100) + b"PAR1"], ids=repr)
def test_a_file_that_is_no_parquet_stops_the_reading(tmp_path, content):
    path = tmp_path / "pairs.parquet"
    path.write_bytes(content)
    with pytest.raises(DataError, match=re.escape(f"{path}:1: not a Parquet file, or damaged: ")):
        found("parquet", path)


def test_a_damaged_page_stops_the_reading_at_its_row(write):
    rows = [{"a": f"{number:05}" * 50} for number in range(4000)]
    path = write(rows, row_group_size=1000, compression="zstd", use_dictionary=False)
    where = pyarrow.parquet.ParquetFile(path).metadata.row_group(2).column(0).data_page_offset
    content = bytearray(path.read_bytes())
    content[where + 60 : where + 600] = bytes(540)
    path.write_bytes(content)
    with pytest.raises(DataError) as error:
        found("parquet", path)
    line = re.match(rf"{path}:(\d+): not a Parquet file, or damaged: ", error.value.what)[1]
    assert 1900 < int(line) <= 2001


def test_a_cut_file_stops_the_reading(write):
    path = write([{"a": "x"}] * 100)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="not a Parquet file, or damaged"):
        found("parquet", path)


def test_a_missing_file_is_the_systems_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        found("parquet", tmp_path / "none.parquet")


def test_a_row_group_larger_than_memory_should_be_is_streamed(tmp_path):
    path = tmp_path / "pairs.parquet"
    schema = pyarrow.schema({"a": pyarrow.string()})
    texts = [f"{number:06}" * 1000 for number in range(1000)]
    with pyarrow.parquet.ParquetWriter(path, schema, compression="none", use_dictionary=False) as writer:
        writer.write_table(pyarrow.table({"a": texts * 40}))  # 240 MB in one row group
    program = r"""
import re, sys
from pathlib import Path
from qpref_plugins.read_arrow import read_parquet
import qpref_plugins.read_arrow.parquet
size = lambda: int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) // 1000
before = size()
print(sum(1 for _ in read_parquet(Path(sys.argv[1]))), size() - before)
"""
    result = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True, check=True)
    rows, growth = map(int, result.stdout.split())
    assert (rows, growth < 100) == (40_000, True)


# Folders of Dataset.save_to_disk.

ROWS = [{"prompt": f"Question {number}?", "chosen": TURNS, "rejected": "No."} for number in range(300)]
READ = [row | {"chosen": [{"content": "Why?", "role": "user"}, TURNS[1]]} for row in ROWS]


@pytest.fixture
def saved(tmp_path):
    from datasets import Dataset

    folder = tmp_path / "saved"
    Dataset.from_list(ROWS).save_to_disk(folder, num_shards=2)
    return folder


def test_a_saved_dataset_is_read_in_order(saved):
    assert found("datasets", saved) == list(enumerate(READ, start=1))


def test_a_saved_selection_is_read_in_its_order(tmp_path):
    from datasets import Dataset

    Dataset.from_list(ROWS).select([7, 3, 11]).save_to_disk(tmp_path / "saved")
    assert [values["prompt"] for _, values in found("datasets", tmp_path / "saved")] == [
        "Question 7?",
        "Question 3?",
        "Question 11?",
    ]


def test_a_saved_dict_of_splits_names_them_and_each_is_read(tmp_path):
    from datasets import Dataset, DatasetDict

    folder = tmp_path / "saved"
    DatasetDict({"train": Dataset.from_list(ROWS), "test": Dataset.from_list(ROWS[:2])}).save_to_disk(folder)
    with pytest.raises(DataError, match=re.escape(f"holds the splits test, train; name one: {folder / 'test'}")):
        found("datasets", folder)
    assert found("datasets", folder / "test") == list(enumerate(READ[:2], start=1))


def test_a_folder_of_something_else_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"not a folder of Dataset\.save_to_disk: it has no state\.json"):
        found("datasets", tmp_path)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: (folder / "state.json").write_text("{"),
        lambda folder: (folder / "state.json").write_text("{}"),
        lambda folder: (folder / "dataset_info.json").unlink(),
        lambda folder: next(folder.glob("*.arrow")).unlink(),
        lambda folder: next(folder.glob("*.arrow")).write_bytes(b"x" * 100),
    ],
    ids=["no JSON", "empty state", "no info", "a missing shard", "a damaged shard"],
)
def test_a_damaged_folder_is_named(saved, spoil):
    spoil(saved)
    with pytest.raises(DataError, match=re.escape(f"{saved}: cannot be read as a saved dataset: ")):
        found("datasets", saved)


# The hub.


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("org/name", ("org/name", None, None, None)),
        ("org/name:train", ("org/name", None, None, "train")),
        ("org/name@v1.0:train", ("org/name", None, "v1.0", "train")),
        ("org/name@refs/pr/3", ("org/name", None, "refs/pr/3", None)),
        ("org/na.me-2/config@main:test", ("org/na.me-2", "config", "main", "test")),
    ],
)
def test_a_hub_name_has_config_revision_and_split(name, parts):
    from qpref_plugins.read_arrow.datasets import HubName

    assert HubName.of(name) == HubName(*parts)


@pytest.mark.parametrize(
    "name", ["", "name", "org/", "org/name:", "org/name@", "/etc/passwd", "../x/y/z", "a/b/c/d", "a b/c"]
)
def test_a_name_that_is_none_is_refused(name):
    with pytest.raises(DataError, match="expected hf:org/name"):
        found("hf", Path(name) if name else "")


def test_a_folder_of_the_same_name_is_not_taken_for_the_hubs(tmp_path, monkeypatch):
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        DataError, match="hf:org/name: the current folder has a folder of that name; run qpref in another one"
    ):
        found("hf", Path("org/name"))


def test_a_hub_out_of_reach_is_named():
    with pytest.raises(UnreachableDataError, match="hf:org/name: HF_HUB_OFFLINE is set"):
        found("hf", Path("org/name:train"))


@pytest.fixture
def splits(tmp_path):
    """The splits of a dataset as the hub's client streams them, from files that lie here."""
    import datasets

    for split in ("train", "test"):
        lines = [json.dumps(row | {"split": split}) for row in ROWS]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    return datasets.load_dataset("json", data_dir=str(tmp_path), streaming=True)


def test_streamed_rows_are_numbered_from_1(splits):
    from qpref_plugins.read_arrow.datasets import HubName, _rows, _split

    rows = list(_rows(_split(splits, HubName.of("org/name:test")), "hf:org/name:test"))
    assert [(str(row.source), row.values) for row in rows] == [
        (f"hf:org/name:test:{number}", row | {"split": "test"}) for number, row in enumerate(ROWS, start=1)
    ]


def test_without_a_split_train_is_read_or_the_only_one(splits):
    from qpref_plugins.read_arrow.datasets import HubName, _split

    assert _split(splits, HubName.of("org/name")) is splits["train"]
    assert _split({"test": 1}, HubName.of("org/name")) == 1


def test_an_unknown_split_names_the_known_ones(splits):
    from qpref_plugins.read_arrow.datasets import HubName, _split

    with pytest.raises(DataError, match="hf:org/name: no split 'validation'; it has train, test"):
        _split(splits, HubName.of("org/name:validation"))
    with pytest.raises(DataError, match="hf:org/name: no split 'train'; it has a, b"):
        _split({"a": 1, "b": 2}, HubName.of("org/name"))


def test_the_package_is_imported_without_pyarrow_and_datasets():
    program = (
        "import qpref_plugins.read_arrow, sys; print([name for name in ('pyarrow', 'datasets') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"
