"""Whatever a file holds, each line becomes a row at its place or a finding that says why, and the next one is read."""

import json

import pytest

from qpref.records import Finding
from qpref_read_jsonl import MAX_ARRAY_BYTES, MAX_LINE_BYTES, read_array, read_lines


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


DIGITS = "not JSON: Exceeds the limit (4300 digits) for integer string conversion: value has 5000 digits"
BAD_VALUES = {
    "NaN": (b'{"a": NaN}', "NaN is not JSON"),
    "Infinity": (b'{"a": [Infinity]}', "Infinity is not JSON"),
    "-Infinity": (b'{"a": -Infinity}', "-Infinity is not JSON"),
    "a key twice": (b'{"a": 1, "b": 2, "a": 1}', "the key 'a' stands twice"),
    "a key twice inside": (b'{"a": {"x": 1, "x": 2}}', "the key 'x' stands twice"),
    "half a surrogate pair": (
        b'{"a": "\\ud83d"}',
        "text holds half of a surrogate pair, which no UTF-8 text can",
    ),
    "half a surrogate pair in a key": (
        b'{"\\udc00": 1}',
        "text holds half of a surrogate pair, which no UTF-8 text can",
    ),
    "deep nesting": (b'{"a": ' + NESTED.encode() + b"}", "nested too deeply"),
    "deep nesting of objects": (b'{"a": ' * 100_000, "nested too deeply"),
    "single quotes": (
        b"{'a': 1}",
        "not JSON: Expecting property name enclosed in double quotes at column 2",
    ),
    "a raw tab in a text": (b'{"a": "x\ty"}', "not JSON: Invalid control character at column 9"),
    "a second value": (b'{"a": 1} {"a": 2}', "not JSON: Extra data at column 10"),
    "no JSON": (b"prompt,chosen,rejected", "not JSON: Expecting value at column 1"),
    "an empty value": (b'{"a": }', "not JSON: Expecting value at column 7"),
    "cut off in a text": (b'{"a": 1, "b": "cut o', "not JSON: Unterminated string starting at column 15"),
    "cut off after a value": (b'{"a": 1, "b": 2', "not JSON: Expecting ',' delimiter at column 16"),
    "null": (b"null", "expected a JSON object, found NoneType"),
    "an array": (b'[{"a": 1}]', "expected a JSON object, found list"),
    "a text": (b'"a"', "expected a JSON object, found str"),
    "a number": (b"3", "expected a JSON object, found int"),
}


@pytest.mark.parametrize("case", BAD_VALUES)
def test_a_bad_line_is_a_finding_and_the_next_line_is_read(lines, case):
    content, message = BAD_VALUES[case]
    assert lines(b'{"a": 1}\n' + content + b"\n" + UTF8_A_B[1]) == [(1, A), (2, message), (3, B)]


@pytest.mark.parametrize("case", BAD_VALUES)
def test_a_bad_last_line_is_a_finding(lines, case):
    content, message = BAD_VALUES[case]
    assert lines(b'{"a": 1}\n' + content) == [(1, A), (2, message)]


def test_a_number_of_5000_digits_is_a_finding(lines):
    (first, message), second = lines(b'{"a": %b}\n{"a": 1}' % (b"1" * 5000))
    assert (first, message.startswith(DIGITS), second) == (1, True, (2, A))


@pytest.mark.parametrize(
    ("content", "byte"),
    [(b'{"a": "\xff"}', 8), (b'{"a": "\xc3', 8), (b"\xff\xfe{\x00}\x00", 1), (b'{"a": "\xed\xa0\x80"}', 8)],
    ids=["a stray byte", "a cut character", "UTF-16", "an encoded surrogate"],
)
def test_bytes_that_are_no_utf8_are_a_finding_with_the_place(lines, content, byte):
    assert lines(content + b'\n{"a": 1}') == [(1, f"not UTF-8 (byte {byte} of the line)"), (2, A)]


def line_of(num_bytes):
    """A JSON line of so many bytes, its newline among them."""
    return b'{"a": "' + b"x" * (num_bytes - 10) + b'"}\n'


@pytest.mark.parametrize("num_bytes", [MAX_LINE_BYTES + 1, 2 * MAX_LINE_BYTES, 2 * MAX_LINE_BYTES + 1])
def test_an_over_long_line_is_a_finding_and_the_next_line_is_read(lines, num_bytes):
    assert lines(line_of(num_bytes) + b'{"a": 1}') == [(1, "the line is longer than 4 MiB"), (2, A)]


def test_an_over_long_last_line_is_a_finding(lines):
    assert lines(b'{"a": 1}\n' + line_of(3 * MAX_LINE_BYTES).rstrip()) == [
        (1, A),
        (2, "the line is longer than 4 MiB"),
    ]


def test_the_longest_line_is_read(lines):
    (number, values), *rest = lines(line_of(MAX_LINE_BYTES) + b'{"a": 1}')
    assert (number, len(values["a"]), rest) == (1, MAX_LINE_BYTES - 10, [(2, A)])


def test_many_keys_of_which_one_stands_twice_take_no_time(lines):
    keys = ", ".join(f'"{number}": 0' for number in range(200_000))
    assert lines(b'{%b, "199999": 0}' % keys.encode()) == [(1, "the key '199999' stands twice")]


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
    assert array(b"[]") == []


@pytest.mark.parametrize("value", [None, [], "a", 3, True])
def test_an_element_that_is_no_object_is_a_finding_at_its_place(array, value):
    content = json.dumps([A, value, B]).encode()
    assert array(content) == [(1, A), (2, f"expected a JSON object, found {type(value).__name__}"), (3, B)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1}', "expected an array of objects, found dict"),
        (b"null", "expected an array of objects, found NoneType"),
        (b'{"a": 1}\n{"a": 2}\n', "not JSON: Extra data at line 2, column 1"),
        (b'[{"a": 1},\n{"a": 2},\nx]', "not JSON: Expecting value at line 3, column 1"),
        (b'[{"a": 1}, {"a": ', "not JSON: Expecting value at column 18"),
        (b"", "not JSON: Expecting value at column 1"),
        (b'[{"a": NaN}]', "NaN is not JSON"),
        (b'[{"a": 1, "a": 2}]', "the key 'a' stands twice"),
        (b'[{"a": "\\ud800"}]', "text holds half of a surrogate pair, which no UTF-8 text can"),
        (b'[{"a": "\xff"}]', "not UTF-8 (byte 9)"),
        (NESTED.encode(), "nested too deeply"),
    ],
)
def test_a_file_that_is_no_array_is_one_finding(array, content, message):
    assert array(content) == [(1, message)]


def test_a_number_of_5000_digits_in_an_array_is_one_finding(array):
    [(number, message)] = array(b"[%b]" % (b"1" * 5000))
    assert (number, message.startswith(DIGITS)) == (1, True)


def test_an_array_over_a_gibibyte_is_refused_unread(tmp_path):
    path = tmp_path / "huge.json"
    with path.open("wb") as file:
        file.truncate(MAX_ARRAY_BYTES + 1)
    assert found(read_array, path) == [(1, "larger than 1 GiB; make it JSON Lines, which is read line by line")]
