"""Whatever a file holds, each line becomes a row at its place or a finding that says why, and the next one is read."""

import gzip
import json
import re
import subprocess
import sys
import zlib

import pytest

from qpref.errors import DataError
from qpref.hooks.streams import FREE_BYTES, MAX_RATIO
from qpref.records import Finding
from qpref_plugins.read_jsonl import read_array, read_lines
from qpref_plugins.read_jsonl.parse import MAX_ROW_BYTES


def found(reader, path):
    """(line, values) of each row and (line, message) of each finding."""
    return [
        (item.source.line, item.message if isinstance(item, Finding) else dict(item.values)) for item in reader(path)
    ]


@pytest.fixture
def lines(tmp_path):
    """`lines(b"...")`: what a JSON Lines file of these bytes is read as."""

    def read(content):
        path = tmp_path / "pairs.jsonl"
        path.write_bytes(content)
        return found(read_lines, path)

    return read


@pytest.fixture
def array(tmp_path):
    """`array(b"...")`: what a JSON file of these bytes is read as."""

    def read(content):
        path = tmp_path / "pairs.json"
        path.write_bytes(content)
        return found(read_array, path)

    return read


A, B = {"a": 1}, {"b": "ü"}
UTF8_A_B = b'{"a": 1}', '{"b": "ü"}'.encode()
NESTED = "[" * 100_000

GOOD_LINES = {
    "a newline after each": (b"%b\n%b\n" % UTF8_A_B, [(1, A), (2, B)]),
    "no newline at the end": (b"%b\n%b" % UTF8_A_B, [(1, A), (2, B)]),
    "CRLF": (b"%b\r\n%b\r\n" % UTF8_A_B, [(1, A), (2, B)]),
    "a byte order mark": (b"\xef\xbb\xbf%b\n%b\n" % UTF8_A_B, [(1, A), (2, B)]),
    "blank lines, which count": (b"\n%b\n \t\r\n\n%b\n\n" % UTF8_A_B, [(2, A), (5, B)]),
    "a byte order mark alone": (b"\xef\xbb\xbf", []),
    "nothing": (b"", []),
    "white space around": (b"  %b  \n\t%b\t\n" % UTF8_A_B, [(1, A), (2, B)]),
    "a whole surrogate pair": (b'{"a": "\\ud83d\\ude00"}', [(1, {"a": "\U0001f600"})]),
    "line separators of Unicode inside a text": (
        '{"a": "x\u2028y\x85z"}\n{"a": 1}'.encode(),
        [(1, {"a": "x\u2028y\x85z"}), (2, A)],
    ),
    "an escaped newline": (b'{"a": "x\\ny"}', [(1, {"a": "x\ny"})]),
    "the same key in two objects": (b'{"a": {"a": 1}}', [(1, {"a": {"a": 1}})]),
    "null as a value": (b'{"a": null}', [(1, {"a": None})]),
    "an empty object": (b"{}", [(1, {})]),
}


@pytest.mark.parametrize("case", GOOD_LINES)
def test_lines_are_read_with_their_numbers(lines, case):
    content, rows = GOOD_LINES[case]
    assert lines(content) == rows


CUT = (
    "not JSON: the row doesn't end on its line: it was cut off, or a line break or quote in a text isn't escaped "
    "(column %d)"
)
CUT_FILE = "not JSON: the file ends within this row: it is cut off; write or download it again, or remove the line"
ANY_ENCODING = "convert the file: iconv -f ITS-ENCODING -t UTF-8"
DIGITS = "a number of 5000 digits, which is too large"
BAD_VALUES = {
    "NaN": (b'{"a": NaN}', "NaN is not JSON; write null, or leave the key out"),
    "Infinity": (b'{"a": [Infinity]}', "Infinity is not JSON; write null, or leave the key out"),
    "-Infinity": (b'{"a": -Infinity}', "-Infinity is not JSON; write null, or leave the key out"),
    "a key twice": (b'{"a": 1, "b": 2, "a": 1}', "duplicate key 'a'; remove one of the two"),
    "a key twice inside": (b'{"a": {"x": 1, "x": 2}}', "duplicate key 'x'; remove one of the two"),
    "half a surrogate pair": (
        b'{"a": "\\ud83d"}',
        "text has half of a surrogate pair, which isn't valid Unicode",
    ),
    "half a surrogate pair in a key": (
        b'{"\\udc00": 1}',
        "text has half of a surrogate pair, which isn't valid Unicode",
    ),
    "deep nesting": (b'{"a": ' + NESTED.encode() + b"}", "nested too deeply"),
    "deep nesting of objects": (b'{"a": ' * 100_000, "nested too deeply"),
    "single quotes": (
        b"{'a': 1}",
        "not JSON: single quotes, as Python prints a dict; write rows with json.dumps (column 2)",
    ),
    "a raw tab in a text": (b'{"a": "x\ty"}', "not JSON: a raw tab inside a text; JSON writes it \\t (column 9)"),
    "a second value": (
        b'{"a": 1} {"a": 2}',
        "not JSON: several objects on one line; write each on a line of its own (column 10)",
    ),
    "no JSON": (b"prompt,chosen,rejected", "not JSON: Expecting value at column 1"),
    "an empty value": (b'{"a": }', "not JSON: Expecting value at column 7"),
    "cut off in a text": (b'{"a": 1, "b": "cut o', CUT % 15),
    "cut off after a value": (b'{"a": 1, "b": 2', CUT % 16),
    "null": (b"null", "expected a JSON object, found null"),
    "an array": (b'[{"a": 1}]', "expected a JSON object, found an array"),
    "a text": (b'"a"', "expected a JSON object, found a text"),
    "a number": (b"3", "expected a JSON object, found a number"),
}


@pytest.mark.parametrize("case", BAD_VALUES)
def test_a_bad_line_is_a_finding_and_the_next_line_is_read(lines, case):
    content, message = BAD_VALUES[case]
    assert lines(b'{"a": 1}\n' + content + b"\n" + UTF8_A_B[1]) == [(1, A), (2, message), (3, B)]


@pytest.mark.parametrize("case", BAD_VALUES)
def test_a_bad_last_line_is_a_finding(lines, case):
    content, message = BAD_VALUES[case]
    assert lines(b'{"a": 1}\n' + content) == [(1, A), (2, CUT_FILE if case.startswith("cut off") else message)]


def test_a_number_of_5000_digits_is_a_finding(lines):
    (first, message), second = lines(b'{"a": %b}\n{"a": 1}' % (b"1" * 5000))
    assert (first, message, second) == (1, DIGITS, (2, A))


@pytest.mark.parametrize(
    ("content", "fix"),
    [
        (b'{"a": "\xfc"}', "in Windows-1252 it is 'ü': iconv -f WINDOWS-1252 -t UTF-8 converts the file"),
        (b'{"a": "\x81"}', ANY_ENCODING),  # no character of Windows-1252
        (b'{"a": "\xc3', ANY_ENCODING),
        (b'{"a": "\xc4\xe3\xba\xc3"}', ANY_ENCODING),
        (b'{"a": "\xed\xa0\x80"}', ANY_ENCODING),
    ],
    ids=["Windows-1252", "a stray byte", "a cut character", "GBK", "an encoded surrogate"],
)
def test_bytes_that_are_no_utf8_are_a_finding_with_the_place_and_the_way_out(lines, content, fix):
    assert lines(content + b'\n{"a": 1}') == [(1, f"not UTF-8 (byte 8 of the line); {fix}"), (2, A)]


def line_of(num_bytes):
    """A JSON line of so many bytes, its newline among them."""
    return b'{"a": "' + b"x" * (num_bytes - 10) + b'"}\n'


@pytest.mark.parametrize("num_bytes", [MAX_ROW_BYTES + 1, 2 * MAX_ROW_BYTES, 2 * MAX_ROW_BYTES + 1])
def test_an_over_long_line_is_a_finding_and_the_next_line_is_read(lines, num_bytes):
    assert lines(line_of(num_bytes) + b'{"a": 1}') == [(1, "the line is longer than 4 MiB"), (2, A)]


def test_an_over_long_last_line_is_a_finding(lines):
    assert lines(b'{"a": 1}\n' + line_of(3 * MAX_ROW_BYTES).rstrip()) == [
        (1, A),
        (2, "the line is longer than 4 MiB"),
    ]


def test_the_longest_line_is_read(lines):
    (number, values), *rest = lines(line_of(MAX_ROW_BYTES) + b'{"a": 1}')
    assert (number, len(values["a"]), rest) == (1, MAX_ROW_BYTES - 10, [(2, A)])


def test_many_keys_of_which_one_stands_twice_take_no_time(lines):
    keys = ", ".join(f'"{number}": 0' for number in range(200_000))
    assert lines(b'{%b, "199999": 0}' % keys.encode()) == [(1, "duplicate key '199999'; remove one of the two")]


def test_a_source_names_the_file(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("{}\nx\n")
    assert [str(item.source) for item in read_lines(path)] == [f"{path}:1", f"{path}:2"]


def test_every_finding_refuses_its_row(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b"\n".join(content for content, _ in BAD_VALUES.values()))
    assert {(item.code, item.severity) for item in read_lines(path)} == {("unreadable", "error")}


# One array.


@pytest.mark.parametrize(
    "content",
    [b"[%b, %b]", b"\xef\xbb\xbf[%b,\n%b]\n", b"\r\n[\r\n  %b,\r\n  %b\r\n]"],
    ids=["one line", "a byte order mark", "CRLF"],
)
def test_an_arrays_elements_are_counted_from_1(array, content):
    assert array(content % UTF8_A_B) == [(1, A), (2, B)]


def test_an_empty_array_is_no_rows(array):
    assert array(b" [ ] ") == []


KINDS = [(None, "null"), ([], "an array"), ("a", "a text"), (3, "a number"), (True, "true or false")]


@pytest.mark.parametrize(("value", "kind"), KINDS, ids=[kind for _, kind in KINDS])
def test_an_element_that_is_no_object_is_a_finding_at_its_place(array, value, kind):
    content = json.dumps([A, value, B]).encode()
    assert array(content) == [(1, A), (2, f"expected a JSON object, found {kind}"), (3, B)]


ELEMENTS = ["NaN", "-Infinity", "a key twice", "a key twice inside", "half a surrogate pair"]


@pytest.mark.parametrize("case", ELEMENTS)
def test_a_bad_element_is_a_finding_and_the_next_one_is_read(array, case):
    content, message = BAD_VALUES[case]
    assert array(b"[%b, %b, %b]" % (UTF8_A_B[0], content, UTF8_A_B[1])) == [(1, A), (2, message), (3, B)]


def test_a_number_of_5000_digits_is_a_finding_of_its_element(array):
    assert array(b'[{"a": %b}, {"a": 1}]' % (b"1" * 5000)) == [(1, DIGITS), (2, A)]


@pytest.mark.parametrize("size", [MAX_ROW_BYTES + 2, 2 * MAX_ROW_BYTES - 3])
def test_an_over_long_element_is_a_finding_and_the_next_one_is_read(array, size):
    assert array(b"[%b,%b]" % (line_of(size), UTF8_A_B[0])) == [(1, "the row is longer than 4 MiB"), (2, A)]


def test_an_array_longer_than_the_window_is_read_whole(array):
    # 700 rows of 20 kB, each character of 2 or 4 bytes: chunks end within characters, rows and escapes.
    values = [{"number": number, "text": "ü\U0001f600" * 3000 + '"\\' * number} for number in range(700)]
    content = json.dumps(values, ensure_ascii=False, indent=1).encode()
    assert len(content) > 3 * MAX_ROW_BYTES
    assert array(content) == [(number, value) for number, value in enumerate(values, start=1)]


STOPS = {
    "null": (b"null", "1: expected an array of objects, found 'n'"),
    "nothing": (b"", "1: the file is empty; expected an array of objects"),
    "white space": (b" \n ", "2: the file is empty; expected an array of objects"),
    "no JSON": (b'[{"a": 1},\n{"a": 2},\nx]', "3: not JSON: Expecting value (column 1)"),
    "cut off in a row": (b'[{"a": 1},\n {"a": ', f"2: {CUT_FILE} (column 8)"),
    "cut off in a text": (b'[{"a": "x', f"1: {CUT_FILE} (column 8)"),
    "cut off after a row": (b'[{"a": 1}', "1: the array has no end: the file is cut off, or lacks its closing bracket"),
    "cut off after a comma": (b'[{"a": 1},', "1: the array has no end: the file is cut off, or lacks its closing"),
    "a comma too many": (b'[{"a": 1},]', "1: not JSON: a comma before a closing bracket; remove it (column 11)"),
    "a comma missing": (b'[{"a": 1}\n{"a": 2}]', "2: not JSON: a comma is missing between two rows (column 1)"),
    "more after the end": (b'[{"a": 1}]\nx', "2: not JSON: more after the array's end (column 1)"),
    "deep nesting": (b"[" + NESTED.encode(), "1: the row is nested too deeply (column 2)"),
    "deep objects": (b'[{"b": ' + b'{"a": ' * 100_000, "1: the row is nested too deeply (column 2)"),
    "a row without an end": (b'[{"a": "' + b"x" * 3 * MAX_ROW_BYTES, "1: the row is longer than 4 MiB (column 2)"),
    "a list without an end": (b'[{"a": [' + b"1," * 2 * MAX_ROW_BYTES, "1: the row is longer than 4 MiB (column 2)"),
}


@pytest.mark.parametrize("case", STOPS)
def test_an_array_that_breaks_off_stops_the_reading_at_its_line(array, tmp_path, case):
    content, message = STOPS[case]
    with pytest.raises(DataError, match=re.escape(f"{tmp_path / 'pairs.json'}:{message}")):
        array(content)


def test_a_break_far_within_is_named_by_its_line(array, tmp_path):
    row = b'{"a": "%b"},\n' % (b"x" * 2000)
    with pytest.raises(DataError, match=re.escape(f"{tmp_path / 'pairs.json'}:10001: not JSON: Expecting value")):
        array(b"[" + row * 10_000 + b"x]")  # 20 MB, several windows


def test_rows_before_the_break_are_read(tmp_path):
    path = tmp_path / "pairs.json"
    path.write_bytes(b'[{"a": 1}, {"a": ')
    reading = read_array(path)
    assert next(reading).values == A
    with pytest.raises(DataError):
        next(reading)


@pytest.mark.parametrize("before", [b"", b"x" * (5 * MAX_ROW_BYTES)], ids=["at the start", "far within"])
def test_bytes_that_are_no_utf8_stop_an_array_with_their_place(array, before):
    rows = b'{"a": "' + before[: MAX_ROW_BYTES // 2] + b'"},'
    before = rows * 10 if before else b""
    with pytest.raises(DataError, match=re.escape(f"not UTF-8 (byte {len(before) + 9})")):
        array(b"[" + before + b'{"a": "\xff"}]')


MEASURE = r"""
import re, sys
from pathlib import Path
from qpref_plugins import read_jsonl
from qpref.errors import DataError

def size():
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) // 1000

before, rows = size(), 0
try:
    for item in getattr(read_jsonl, sys.argv[1])(Path(sys.argv[2])):
        rows += hasattr(item, "values")
except DataError:
    pass
print(rows, size() - before)
"""


def rows_and_growth(reader, path):
    """The rows that a reader gives in a process of its own, and by how many MB that process grew."""
    command = [sys.executable, "-c", MEASURE, reader.__name__, path]
    rows, growth = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return int(rows), int(growth)


def test_a_byte_order_mark_counts_among_the_bytes(array):
    with pytest.raises(DataError, match=re.escape("not UTF-8 (byte 12)")):
        array(b'\xef\xbb\xbf[{"a": "\xff"}]')


def test_an_array_of_many_rows_takes_the_memory_of_a_few(tmp_path):
    path = tmp_path / "pairs.json"
    path.write_text("[" + ",".join([json.dumps({"text": "x" * 10**6})] * 150) + "]")  # 150 MB
    rows, growth = rows_and_growth(read_array, path)
    assert (rows, growth < 80) == (150, True)


# The same, gzipped.


def gzipped(tmp_path, content, name="pairs.jsonl.gz"):
    path = tmp_path / name
    path.write_bytes(gzip.compress(content))
    return path


def test_gzipped_lines_are_read_with_their_numbers(tmp_path):
    content = b"%b\n\n%b\nx\n" % UTF8_A_B
    *rows, (line, message) = found(read_lines, gzipped(tmp_path, content))
    assert (rows, line, message) == ([(1, A), (3, B)], 4, "not JSON: Expecting value at column 1")


def test_a_gzipped_array_is_read(tmp_path):
    path = gzipped(tmp_path, b"[%b, %b]" % UTF8_A_B, "pairs.json.gz")
    assert found(read_array, path) == [(1, A), (2, B)]


def test_gzip_members_are_read_one_after_the_other(tmp_path):
    path = tmp_path / "pairs.jsonl.gz"
    path.write_bytes(b"".join(gzip.compress(line + b"\n") for line in UTF8_A_B))
    assert found(read_lines, path) == [(1, A), (2, B)]


MANY = b"".join(b'{"number": %d, "text": "%032x"}\n' % (number, number**9) for number in range(30_000))


def test_a_cut_gzip_file_is_named_at_the_line_where_it_ends(tmp_path):
    path = gzipped(tmp_path, MANY)
    raw = path.read_bytes()[: path.stat().st_size // 2]
    path.write_bytes(raw)
    whole_lines = zlib.decompressobj(wbits=31).decompress(raw).count(b"\n")
    with pytest.raises(DataError) as error:
        found(read_lines, path)
    assert error.value.what == f"{path}:{whole_lines + 1}: the gzip data end too early; the file is truncated"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda raw: raw[:1000] + bytes(40) + raw[1040:], "damaged gzip data: Error -3"),
        (lambda raw: raw[:-8] + bytes(4) + raw[-4:], "damaged gzip data: CRC check failed"),
        (lambda raw: raw + b"garbage", "damaged gzip data: Not a gzipped file"),
    ],
    ids=["zeroed", "another checksum", "garbage at the end"],
)
def test_damaged_gzip_data_are_named(tmp_path, spoil, message):
    path = gzipped(tmp_path, MANY)
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(DataError, match=re.escape(message)):
        found(read_lines, path)


@pytest.mark.parametrize("reader", [read_lines, read_array])
@pytest.mark.parametrize("unit", [b"x", b"\n", b'{"a": 1}\n'], ids=["one line", "blank lines", "rows"])
def test_a_gzip_bomb_is_refused(tmp_path, reader, unit):
    path = gzipped(tmp_path, b"[" + unit * (4 * 2**20 // len(unit)))
    with pytest.raises(DataError, match=rf"decompress to more than {MAX_RATIO} times|Expecting value"):
        found(reader, path)


def test_a_gzip_bomb_takes_little_memory(tmp_path):
    path = gzipped(tmp_path, b"x" * (256 * 2**20))
    rows, growth = rows_and_growth(read_lines, path)
    assert (rows, growth < 80) == (0, True)


def test_a_tiny_file_of_repeated_rows_is_no_bomb(tmp_path):
    row = b'{"a": 1}\n'
    content = row * (FREE_BYTES // len(row))
    path = gzipped(tmp_path, content)
    assert len(content) > MAX_RATIO * path.stat().st_size
    assert len(found(read_lines, path)) == FREE_BYTES // len(row)
