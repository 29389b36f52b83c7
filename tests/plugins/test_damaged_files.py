"""A file that isn't what its name says is read where that is unambiguous, else refused once, with the fix."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import json
import lzma
import pickle
import sqlite3
import tarfile
import zipfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from qpref.errors import DataError, RecipeError
from qpref.hooks.manager import READER, PluginHost
from qpref.hooks.signatures import signature_of
from qpref.recipe.resolve import make_data_plan
from qpref.records import Finding

HOST = PluginHost()
ROWS = [
    {"prompt": "Größe?", "chosen": 'say "b"', "rejected": "日本 c"},
    {"prompt": "d", "chosen": "e", "rejected": "😀"},
]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
ARRAY, PRETTY = json.dumps(ROWS), json.dumps(ROWS, indent=2, ensure_ascii=False)
OBJECTS = "\n".join(json.dumps(row, indent=2) for row in ROWS) + "\n"


def read(path: Path, reader: str) -> tuple[list[object], list[str]]:
    """Return the rows, each as its values or the message that refuses it, and the notes on the whole file."""
    items = list(HOST.load(READER, reader).record.read(path))
    notes = [item for item in items if not item.source.line]
    assert all(isinstance(note, Finding) and note.severity == "warning" for note in notes)
    rows = [item.message if isinstance(item, Finding) else dict(item.values) for item in items if item.source.line]
    return rows, [note.message for note in notes]


def written(folder: Path, content: bytes | str, reader: str = "jsonl") -> Path:
    path = folder / f"pairs.{reader}"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def refusal(path: Path, reader: str) -> str:
    with pytest.raises(DataError) as error:
        read(path, reader)
    assert error.value.what.startswith(f"{path}:")
    return error.value.what.removeprefix(f"{path}:")


# What is read.

ENCODINGS = {
    "UTF-8 with a mark": codecs.BOM_UTF8 + LINES.encode(),
    "UTF-16 with a mark": LINES.encode("utf-16"),
    "big-endian UTF-16 with a mark": codecs.BOM_UTF16_BE + LINES.encode("utf-16-be"),
    "UTF-32 with a mark": LINES.encode("utf-32"),
    "big-endian UTF-32 with a mark": codecs.BOM_UTF32_BE + LINES.encode("utf-32-be"),
    **{encoding: LINES.encode(encoding) for encoding in ("utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be")},
    "UTF-16 with CRLF": LINES.replace("\n", "\r\n").encode("utf-16"),
    "gzip": gzip.compress(LINES.encode()),
    "UTF-16 in gzip": gzip.compress(LINES.encode("utf-16")),
}


@pytest.mark.parametrize("case", ENCODINGS)
def test_an_encoding_that_is_known_by_its_bytes_is_read_under_any_suffix(tmp_path, case):
    for reader in ("jsonl", "json", "ndjson", "txt", "jsonl.gz"):
        assert read(written(tmp_path, ENCODINGS[case], reader), reader) == (ROWS, [])


LAYOUTS = {
    "lines": LINES,
    "an array on one line": ARRAY,
    "an array over several lines": PRETTY,
    "an array that starts on the second line": "\n  " + ARRAY,
    "objects over several lines": OBJECTS,
    "objects over several lines, a comma after each": OBJECTS.replace("}", "},"),
    "an object whose first line has a key": LINES.replace(', "chosen"', ',\n "chosen"'),
    "an array of objects, one a line": "[\n" + ",\n".join(LINES.splitlines()) + "\n]\n",
}


@pytest.mark.parametrize("reader", ["jsonl", "ndjson", "json", "txt", "json.gz", "ndjson.gz", "txt.gz"])
@pytest.mark.parametrize("case", LAYOUTS)
def test_the_layout_of_json_rows_is_known_by_the_files_start(tmp_path, case, reader):
    content = gzip.compress(LAYOUTS[case].encode()) if reader.endswith(".gz") else LAYOUTS[case]
    assert read(written(tmp_path, content, reader), reader) == (ROWS, [])


def test_an_object_over_several_lines_is_located_by_its_first_line(tmp_path):
    path = written(tmp_path, OBJECTS)
    assert [item.source.line for item in HOST.load(READER, "jsonl").record.read(path)] == [1, 6]


@pytest.mark.parametrize("bad", ['{"prompt": "a",', '{"prompt": "a"', '{"prompt":', '{"prompt": ["a",'])
def test_a_first_line_that_the_second_doesnt_continue_is_a_bad_line(tmp_path, bad):
    rows, _ = read(written(tmp_path, f"{bad}\n{LINES}"), "jsonl")
    assert "doesn't end on its line" in str(rows[0])
    assert rows[1:] == ROWS


def test_an_object_larger_than_the_files_start_is_read(tmp_path):
    rows = [{"prompt": "p", "chosen": ["x" * 80] * 5000, "rejected": "r"}] * 2
    path = written(tmp_path, "\n".join(json.dumps(row, indent=1) for row in rows))
    assert read(path, "jsonl") == (rows, [])


def test_commas_after_objects_are_read_and_reported_once(tmp_path):
    rows, notes = read(written(tmp_path, LINES.replace("}\n", "},\n") * 3), "jsonl")
    assert rows == ROWS * 3
    assert len(notes) == 1
    assert "comma" in notes[0]


TABLE = "prompt,chosen,rejected\na,b,c\n"
SEPARATED = {
    "semicolons": (TABLE.replace(",", ";"), "semicolons"),
    "tabs": (TABLE.replace(",", "\t"), "tabs"),
    "vertical bars": (TABLE.replace(",", "|"), "vertical bars"),
    "semicolons and quoted fields": ('"prompt";"chosen";"rejected"\n"a";"b";"c"\n', "semicolons"),
    "semicolons after a comma in quotes": ('"prompt";"chosen";"rejected";"a,b"\n', "semicolons"),
}


@pytest.mark.parametrize("case", SEPARATED)
def test_another_separator_is_read_and_reported(tmp_path, case):
    content, name = SEPARATED[case]
    rows, (note,) = read(written(tmp_path, codecs.BOM_UTF8 + content.encode(), "csv"), "csv")
    assert rows == [{"prompt": "a", "chosen": "b", "rejected": "c"}][: len(rows)]
    assert name in note


def test_commas_in_a_tsv_file_are_read_and_reported(tmp_path):
    rows, (note,) = read(written(tmp_path, TABLE, "tsv"), "tsv")
    assert rows == [{"prompt": "a", "chosen": "b", "rejected": "c"}]
    assert "commas" in note


@pytest.mark.parametrize("directive", ["sep=;\r\n", "SEP=;\n", '"sep=;"\n'])
def test_excels_first_line_names_the_separator(tmp_path, directive):
    content = directive + "prompt;chosen, too;rejected\na;b, b;c\n"
    path = written(tmp_path, content, "csv")
    assert read(path, "csv") == ([{"prompt": "a", "chosen, too": "b, b", "rejected": "c"}], [])
    assert [item.source.line for item in HOST.load(READER, "csv").record.read(path)] == [3]


@pytest.mark.parametrize("text", ["prompt\nsep=;\n", "a;b,c;d\n1,2\n"])
def test_the_readers_own_separator_wins_where_the_header_has_it_or_none(tmp_path, text):
    rows, notes = read(written(tmp_path, text, "csv"), "csv")
    assert rows == ([{"prompt": "sep=;"}] if text.startswith("prompt") else [{"a;b": "1", "c;d": "2"}])
    assert notes == []


@pytest.mark.parametrize("content", [LINES, ARRAY, PRETTY, "\ufeff" + LINES])
@pytest.mark.parametrize("reader", ["csv", "tsv"])
def test_json_under_a_tables_name_is_told_its_reader(tmp_path, content, reader):
    assert '[data] reader = "jsonl"' in refusal(written(tmp_path, content, reader), reader)


WINDOWS = {
    "one letter": ("Größe".encode("cp1252"), "it is 'öß'"),
    "quotes": ("say “so” to".encode("cp1252"), "it is '“'"),
    "Chinese": ("你好吗".encode("gbk"), "ITS-ENCODING"),
    "Russian": ("Почему".encode("koi8-r"), "ITS-ENCODING"),
    "a cut emoji": ("😀 ".encode()[:3] + b" x", "ITS-ENCODING"),
}


@pytest.mark.parametrize("case", WINDOWS)
def test_a_text_in_another_encoding_is_told_it(tmp_path, case):
    raw, message = WINDOWS[case]
    for reader, row in (("jsonl", b'{"prompt": "%b"}\n'), ("csv", b"prompt,chosen\nx %b,y\n")):
        (found,), _ = read(written(tmp_path, row % raw, reader), reader)
        assert message in str(found)


@pytest.mark.parametrize(("reader", "separator"), [("csv", ","), ("tsv", "\t")])
@pytest.mark.parametrize("encode", [str.encode, lambda text: text.encode("utf-16"), lambda text: text.encode("utf-32")])
def test_tables_are_read_packed_and_in_any_unicode(tmp_path, reader, separator, encode):
    raw = encode(TABLE.replace(",", separator))
    for suffix, content in ((reader, raw), (reader, gzip.compress(raw)), (f"{reader}.gz", gzip.compress(raw))):
        path = written(tmp_path, content, suffix)
        assert read(path, suffix) == ([{"prompt": "a", "chosen": "b", "rejected": "c"}], [])


def test_half_a_surrogate_pair_in_utf16_refuses_its_row_alone(tmp_path):
    raw = LINES.encode("utf-16-le") + '{"prompt": "'.encode("utf-16-le") + b"\x00\xd8" + '"}\n'.encode("utf-16-le")
    rows, _ = read(written(tmp_path, codecs.BOM_UTF16_LE + raw + LINES.encode("utf-16-le")), "jsonl")
    assert (rows[:2], rows[3:]) == (ROWS, ROWS)
    assert "not UTF-8" in str(rows[2])


@pytest.mark.parametrize("reader", ["jsonl", "json", "csv"])
def test_utf16_that_ends_within_a_character_is_truncated(tmp_path, reader):
    content = {"jsonl": LINES, "json": ARRAY, "csv": TABLE}[reader].encode("utf-16")[:-1]
    assert "damaged UTF-16 text" in refusal(written(tmp_path, content, reader), reader)


@pytest.mark.parametrize("reader", ["csv", "csv.gz"])
def test_a_truncated_gzip_table_stops_at_its_line(tmp_path, reader):
    content = gzip.compress((TABLE * 3000).encode())[:-9]
    assert "gzip data end too early" in refusal(written(tmp_path, content, reader), reader)


# What is refused, once.


def zipped(*names: str) -> bytes:
    box = io.BytesIO()
    with zipfile.ZipFile(box, "w") as archive:
        for name in names:
            archive.writestr(name, LINES)
    return box.getvalue()


def tarred() -> bytes:
    box = io.BytesIO()
    with tarfile.open(fileobj=box, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("pairs.jsonl"))
    return box.getvalue()


def arrow(write: str) -> bytes:
    box, table = io.BytesIO(), pyarrow.Table.from_pylist(ROWS)
    if write == "parquet":
        pyarrow.parquet.write_table(table, box)
    else:
        with getattr(pyarrow.ipc, f"new_{write}")(box, table.schema) as writer:
            writer.write_table(table)
    return box.getvalue()


def database() -> bytes:
    connection = sqlite3.connect(":memory:")
    connection.execute("create table pairs (prompt text)")
    return connection.serialize()


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 12345\n"
FOREIGN = {
    "zstd": (b"\x28\xb5\x2f\xfd\x04\x00", "zstd data", "zstd -d"),
    "xz": (lzma.compress(LINES.encode()), "xz data", "unxz"),
    "bzip2": (bz2.compress(LINES.encode()), "bzip2 data", "bunzip2"),
    "bzip2, level 1": (bz2.compress(LINES.encode(), 1), "bzip2 data", "bunzip2"),
    "zip": (zipped("pairs.jsonl"), "a zip archive", "unpack it"),
    "Excel": (zipped("[Content_Types].xml", "xl/workbook.xml"), "an Excel workbook", "CSV UTF-8"),
    "old Excel": (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600), "an Excel workbook", "CSV UTF-8"),
    "Word": (zipped("[Content_Types].xml", "word/document.xml"), "a Word document", "JSON Lines or CSV"),
    "tar": (tarred(), "a tar archive", "unpack it"),
    "tar in gzip": (gzip.compress(tarred()), "a tar archive", "unpack it"),
    "gzip in gzip": (gzip.compress(gzip.compress(LINES.encode())), "gzip data", "gunzip"),
    "Parquet": (arrow("parquet"), "Parquet data", 'reader = "parquet"'),
    "an Arrow file": (arrow("file"), "an Arrow file", "Parquet"),
    "an Arrow stream": (arrow("stream"), "an Arrow stream", "Parquet"),
    "Feather": (b"FEA1" + bytes(99), "a Feather file", "Parquet"),
    "SQLite": (database(), "an SQLite database", "sqlite3 -json"),
    "PDF": (b"%PDF-1.7\n", "a PDF document", "data that it was made from"),
    "pickle": (pickle.dumps(ROWS), "pickled Python objects", "never unpickles"),
    "pickle of protocol 2": (pickle.dumps(ROWS, 2), "pickled Python objects", "never unpickles"),
    "a Git LFS pointer": (POINTER.encode(), "a Git LFS pointer", "git lfs pull"),
    "a git-annex pointer": (b"/annex/objects/SHA256E-s12--ab.jsonl\n", "a git-annex pointer", "git annex get"),
    "an HTML page": (b"<!DOCTYPE html>\n<html><head>\n", "an HTML page", "raw address"),
    "an HTML page without its type": (b"\xef\xbb\xbf\n <HTML lang='en'>", "an HTML page", "raw address"),
    "an HTML page after a comment": (b"<!-- x -->\n<!doctype HTML>", "an HTML page", "raw address"),
    "XML": (b'<?xml version="1.0"?>\n<rows/>', "XML", "JSON Lines"),
    "RTF": (b"{\\rtf1\\ansi {\\fonttbl}", "an RTF document", "plain text"),
    "a server's error": (b"Entry not found", "a server's error message", "download"),
    "a server's 404": (b"404: Not Found\n", "a server's error message", "download"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_a_file_that_holds_something_else_is_refused_once_with_the_fix(tmp_path, case):
    content, what, fix = FOREIGN[case]
    for reader in ("jsonl", "json", "csv", "txt", "jsonl.gz"):
        message = refusal(written(tmp_path, content, reader), reader)
        assert message.startswith(f" {what}")
        assert fix in message


@pytest.mark.parametrize("case", [name for name in FOREIGN if name not in ("Parquet", "tar in gzip")])
def test_the_parquet_reader_names_what_isnt_parquet(tmp_path, case):
    content, what, _ = FOREIGN[case]
    assert refusal(written(tmp_path, content, "parquet"), "parquet").startswith(
        f" not a Parquet file but {'gzip data' if case.endswith('gzip') else what}"
    )


@pytest.mark.parametrize(("content", "reader"), [(LINES, "jsonl"), (ARRAY, "json")])
def test_json_under_a_parquet_name_is_told_its_reader(tmp_path, content, reader):
    assert f'[data] reader = "{reader}"' in refusal(written(tmp_path, content, "parquet"), "parquet")


def test_a_saved_dataset_of_pointers_names_them(tmp_path):
    (tmp_path / "state.json").write_text('{"_data_files": [{"filename": "data.arrow"}]}')
    (tmp_path / "dataset_info.json").write_text("{}")
    (tmp_path / "data.arrow").write_text(POINTER)
    assert "data.arrow is a Git LFS pointer" in refusal(tmp_path, "datasets")


@pytest.mark.parametrize(
    ("suffix", "case"), [("xlsx", "Excel"), ("jsonl.zst", "zstd"), ("zip", "zip"), ("db", "SQLite")]
)
def test_a_suffix_without_a_reader_names_the_files_kind(tmp_path, suffix, case):
    path = written(tmp_path, FOREIGN[case][0], suffix)
    with pytest.raises(RecipeError, match=f"it is {FOREIGN[case][1]}"):
        make_data_plan(str(path))


@pytest.mark.parametrize(
    "head", [b"", b"\x1f", b"P", b"not found: a prompt about it", b"<p>a, b", b"version 2", b"PARIS,b", b"\x80"]
)
def test_texts_that_resemble_other_files_are_none(head):
    assert signature_of(head) is None


NOT_JSON = {
    "Python": (LINES.replace('"', "'"), "single quotes, as Python prints a dict; write rows with json.dumps"),
    "Python's None": ('{"a": None}\n' * 3, "None, as Python prints a dict"),
    "typographic quotes": (
        "{\u201ca\u201d: \u201cb\u201d}\n" * 3,
        "typographic quotes (\u201c); JSON has straight ones",
    ),
    "keys without quotes": ("{prompt: 1}\n" * 3, "a key without quotes"),
    "commas before brackets": ('{"a": [1, 2,]}\n' * 3, "a comma before a closing bracket"),
    "commas before braces": ('{"a": 1,}\n' * 3, "a comma before a closing bracket"),
    "CSV": (TABLE, 'none of its first 2 lines is an object; for a table with a header set [data] reader = "csv"'),
    "TSV": (TABLE.replace(",", "\t"), 'reader = "tsv"'),
    "objects encoded twice": ("".join(json.dumps(json.dumps(row)) + "\n" for row in ROWS), "was encoded twice"),
    "prose": ("Once upon a time\nthere was a file\n", "none of its first 2 lines is an object"),
}


@pytest.mark.parametrize("case", NOT_JSON)
def test_a_cause_of_all_lines_is_the_files_and_is_named_once(tmp_path, case):
    content, message = NOT_JSON[case]
    assert message in refusal(written(tmp_path, content), "jsonl")


@pytest.mark.parametrize("case", NOT_JSON)
def test_a_cause_of_one_line_is_that_lines(tmp_path, case):
    bad = NOT_JSON[case][0].splitlines()[0]
    rows, _ = read(written(tmp_path, f"{LINES}{bad}\n{LINES}"), "jsonl")
    assert (rows[:2], rows[3:]) == (ROWS, ROWS)
    assert "not JSON" in str(rows[2]) or "encoded twice" in str(rows[2])


ONE_LINE = {
    "a lost backslash": (r'{"a": "\alpha"}', r"a lone backslash in '\alpha'; JSON writes a backslash twice: '\\alpha'"),
    "a lost backslash before u": (r'{"a": "\upsilon x y"}', r"a lone backslash in '\upsilon'"),
    "a Windows path": (r'{"a": "C:\Users"}', r"a lone backslash in '\Users'"),
    "a quote in a text": ('{"a": "say "b" to c"}', "a quote inside a text isn't written \\\""),
    "two objects": ('{"a": 1}{"a": 2}', "several objects on one line; write each on a line of its own"),
    "two objects and a comma": ('{"a": 1}, {"a": 2}', "several objects on one line"),
    "a comment": ('{"a": 1} // one', "Extra data"),
    "JavaScript's undefined": ('{"a": undefined}', "undefined is not JSON; write null"),
    "pandas' nan": ('{"a": nan}', "nan is not JSON; write null"),
    "NaN": ('{"a": NaN}', "NaN is not JSON; write null"),
    "a key twice": ('{"a": 1, "a": 2}', "duplicate key 'a'; remove one of the two"),
    "5,000 digits": (f'{{"a": {"9" * 5000}}}', "a number of 5000 digits, which is too large"),
    "a closing bracket too many": ('{"a": 1}]', "a closing bracket that nothing opens; remove it"),
    "a fence of Markdown": ("```json", "a fence of Markdown; remove the line"),
    "a byte order mark within": ('\ufeff{"a": 1}', "a byte order mark within the file"),
    "zero bytes": ("\0" * 40, "zero bytes, as where the end of a file was never written"),
    "a line break of old Macs": ('{"a": 1}\r{"a": 2}', "lines end in carriage returns only; convert them to newlines"),
    "a raw carriage return": ('{"a": "x\ry"}', "a raw carriage return inside a text; JSON writes it \\r"),
}


@pytest.mark.parametrize("case", ONE_LINE)
def test_a_bad_line_is_told_its_cause(tmp_path, case):
    bad, message = ONE_LINE[case]
    rows, _ = read(written(tmp_path, f"{LINES}{bad}\n{LINES}"), "jsonl")
    assert (rows[:2], rows[3:]) == (ROWS, ROWS)
    assert message in str(rows[2])


@pytest.mark.parametrize("bad", [r'{"a": "\alpha"}', '{"a": "x', '{"a": "\t"}', '{"a": 1}{"a": 2}', '{"a": 1}]'])
def test_a_fault_that_each_line_has_for_itself_refuses_no_file(tmp_path, bad):
    rows, _ = read(written(tmp_path, f"{bad}\n" * 9 + LINES), "jsonl")
    assert rows[9:] == ROWS
    assert all("not JSON" in str(row) for row in rows[:9])


def test_a_file_cut_anywhere_in_its_last_row_says_so(tmp_path):
    row = '{"a": [true, null, -1.5, "x\\u00e9\\n"]}'
    for length in range(1, len(row)):
        _, message = read(written(tmp_path, f'{{"a": 1}}\n{row[:length]}'), "jsonl")[0]
        assert message == (
            "not JSON: the file ends within this row: it is cut off; write or download it again, or remove the line"
        ), row[:length]


WRAPPED = {
    "under a name of their own": (json.dumps({"pairs": ROWS}), "whose rows are its list 'pairs'"),
    "under their ids": (json.dumps({"a1": ROWS[0], "a2": ROWS[1]}, indent=1), "whose values are the rows"),
    "in data": (json.dumps({"version": "1.0", "data": ROWS}), "whose rows are its list 'data'"),
    "in rows, over several lines": (json.dumps({"rows": ROWS}, indent=1), "whose rows are its list 'rows'"),
    "in train, far beyond the start": (json.dumps({"train": ROWS * 9000}), "whose rows are its list 'train'"),
    "by columns": (json.dumps({key: [row[key] for row in ROWS] for key in ROWS[0]}), "the columns of a table"),
    "as pandas writes by default": (
        json.dumps({key: {str(at): row[key] for at, row in enumerate(ROWS)} for key in ROWS[0]}),
        'orient="records"',
    ),
}


@pytest.mark.parametrize("reader", ["json", "jsonl"])
@pytest.mark.parametrize("case", WRAPPED)
def test_an_object_that_holds_all_rows_says_where_they_are(tmp_path, case, reader):
    content, message = WRAPPED[case]
    assert message in refusal(written(tmp_path, content, reader), reader)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [{"role": "user", "content": "a"}], "chosen": [{"role": "assistant", "content": "b"}]},
        {"instruction": "a", "output": ["b", "c"], "data": []},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"conversations": [{"from": "human", "value": "a"}]},
        {"chosen": {"conversations": [], "prompt": "a"}, "rejected": {"conversations": [], "prompt": "a"}},
        {"prompt": "a", "chosen": "b", "rejected": "c", "data": ["x"]},
    ],
)
def test_one_row_alone_is_read(tmp_path, row):
    assert read(written(tmp_path, json.dumps(row), "json"), "json") == ([row], [])


@pytest.mark.parametrize("content", ["", "Why?\tBecause.\tNo.\n", "prompt,chosen,rejected\n", '"text"\n', "Once\n"])
def test_a_txt_file_without_json_is_refused_with_the_way_out(tmp_path, content):
    message = refusal(written(tmp_path, content, "txt"), "txt")
    assert 'set [data] reader = "csv" or "tsv"' in message
