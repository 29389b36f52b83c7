"""Each record of a CSV or TSV file becomes a row at the line where it begins, or a finding that says why not."""

import csv
import random
import re
import subprocess
import sys
import time

import pytest

from qpref.errors import DataError
from qpref.hooks.manager import READER, PluginHost
from qpref.records import Finding
from qpref_plugins.read_csv import MAX_ROW_BYTES


def found(path, name="csv"):
    """(line, values) of each row and (line, message) of each finding."""
    items = PluginHost().load(READER, name).record.read(path)
    return [(item.source.line, item.message if isinstance(item, Finding) else item.values) for item in items]


@pytest.fixture
def read(tmp_path):
    """`read(b"...")`: what a CSV file of these bytes is read as."""

    def read(content, name="csv"):
        path = tmp_path / f"pairs.{name}"
        path.write_bytes(content)
        return found(path, name)

    return read


def row(line, *fields):
    return line, dict(zip("ab", fields, strict=True))


GOOD = {
    "plain": (b"a,b\n1,2\n3,4\n", [row(2, "1", "2"), row(3, "3", "4")]),
    "no newline at the end": (b"a,b\n1,2", [row(2, "1", "2")]),
    "CRLF": (b"a,b\r\n1,2\r\n3,4\r\n", [row(2, "1", "2"), row(3, "3", "4")]),
    "a byte order mark": (b"\xef\xbb\xbfa,b\n1,2\n", [row(2, "1", "2")]),
    "a byte order mark before a quote": (b'\xef\xbb\xbf"a","b"\n1,2\n', [row(2, "1", "2")]),
    "quoted fields": (b'"a","b"\n"1","2"\n', [row(2, "1", "2")]),
    "a separator in quotes": (b'a,b\n"1,1",2\n', [row(2, "1,1", "2")]),
    "a quote in quotes": (b'a,b\n"say ""x""",""""\n', [row(2, 'say "x"', '"')]),
    "newlines in quotes": (b'a,b\n"1\n\n1",2\n3,4\n', [row(2, "1\n\n1", "2"), row(5, "3", "4")]),
    "CRLF in quotes": (b'a,b\r\n"1\r\n1","2\r\n"\r\n3,4\r\n', [row(2, "1\r\n1", "2\r\n"), row(5, "3", "4")]),
    "two fields over several lines": (b'a,b\n"1\n2","3\n4"\n', [row(2, "1\n2", "3\n4")]),
    "a newline in the header": (b'"a","b"\n1,2\n', [row(2, "1", "2")]),
    "a quote within an unquoted field": (b'a,b\n5" disk,6"\n7,8\n', [row(2, '5" disk', '6"'), row(3, "7", "8")]),
    "such a quote before an open field": (b'a,b\n5",",\n"\n7,8\n', [row(2, '5"', ",\n"), row(4, "7", "8")]),
    "such a quote after an open field": (b'a,b\n"\n",5"\n7,8\n', [row(2, "\n", '5"'), row(4, "7", "8")]),
    "empty fields": (b'a,b\n,\n"",""\n', [row(2, None, None), row(3, None, None)]),
    "white space is the field's": (b"a,b\n 1 ,\t2\n", [row(2, " 1 ", "\t2")]),
    "blank lines": (b"a,b\n\n1,2\n\r\n3,4\n\n", [row(3, "1", "2"), row(5, "3", "4")]),
    "blank lines first": (b"\n\na,b\n1,2\n", [row(4, "1", "2")]),
    "no rows": (b"a,b\n", []),
    "nothing": (b"", []),
    "other alphabets": ("a,b\nü,😀\n".encode(), [row(2, "ü", "😀")]),
    "line separators of Unicode": ("a,b\nx\u2028y,z\x85\n".encode(), [row(2, "x\u2028y", "z\x85")]),
}


@pytest.mark.parametrize("case", GOOD)
def test_records_are_read_with_the_line_where_they_begin(read, case):
    content, rows = GOOD[case]
    assert read(content) == rows


def test_tabs_separate_a_tsv_file(read):
    assert read(b'a\tb\n1,1\t"2\t2"\n', "tsv") == [row(2, "1,1", "2\t2")]


NOT_UTF8 = "the row is not UTF-8 (byte 1 of the field)"
BAD = {
    "a field too few": (b"1", "1 fields, where the header has 2"),
    "a field too many": (b"1,2,3", "3 fields, where the header has 2"),
    "a field too many, quoted": (b'"1",2,3', "more fields than the 2 of the header"),
    "text after a closing quote": (
        b'"1"x,2',
        "text after a closing quote; a quote inside a quoted field has to be doubled",
    ),
    "no UTF-8": (b"\xff,2", f"{NOT_UTF8}; in Windows-1252 it is 'ÿ': iconv -f WINDOWS-1252 -t UTF-8 converts the file"),
    "no UTF-8 in quotes": (
        b'"\xff",2',
        f"{NOT_UTF8}; in Windows-1252 it is 'ÿ': iconv -f WINDOWS-1252 -t UTF-8 converts the file",
    ),
    "no UTF-8 at the end of a field": (
        b"\xc3,2",
        f"{NOT_UTF8}; in Windows-1252 it is 'Ã': iconv -f WINDOWS-1252 -t UTF-8 converts the file",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_record_is_a_finding_and_the_next_line_is_read(read, case):
    content, message = BAD[case]
    assert read(b"a,b\n1,2\n" + content + b"\n3,4\n") == [row(2, "1", "2"), (3, message), row(4, "3", "4")]


def test_a_quote_that_is_never_closed_costs_its_row_alone(read):
    assert read(b'a,b\n1,2\n"3,4\n5,6\n7,8\n') == [
        row(2, "1", "2"),
        (3, "an unclosed quote"),
        row(4, "5", "6"),
        row(5, "7", "8"),
    ]


def test_a_quote_that_a_later_field_seems_to_close_costs_its_row_alone(read):
    (first, message), *rest = read(b'a,b\n"3,4\n"5","6"\n7,8\n')
    assert (first, message.startswith("text after a closing quote")) == (2, True)
    assert rest == [row(3, "5", "6"), row(4, "7", "8")]


def test_the_rows_numbers_that_pandas_writes_are_a_column_of_its_name(read):
    assert read(b",a\n0,x\n1,y\n") == [(2, {"Unnamed: 0": "0", "a": "x"}), (3, {"Unnamed: 0": "1", "a": "y"})]


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"a,b,a", "the header: duplicate column 'a'"),
        (b"a,,b", "the header: a column has no name"),
        (b'"a"x,b', "the header: text after a closing quote; a quote inside a quoted field has to be doubled"),
        (b"a,\xff", "the header: the row is not UTF-8"),
        (b"a,b\r1,2\r", "the header: lines end in carriage returns only; convert them to newlines"),
        (b'a,"b', "the header: an unclosed quote"),
    ],
)
def test_a_file_with_a_bad_header_stops_the_reading(read, header, message):
    """As one refused row it would cost all the others, whatever share of bad rows is allowed."""
    with pytest.raises(DataError, match=re.escape(f":1: {message}")):
        read(header + b"\n1,2\n")


def test_broken_quotes_one_after_the_other_are_not_each_read_to_the_end(read):
    header = b",".join(b"%d" % number for number in range(2000)) + b"\n"
    started = time.process_time()
    found = read(header + b'a","b\n' * 4000)
    assert time.process_time() - started < 2
    assert [line for line, _ in found] == list(range(2, 4002))


@pytest.mark.parametrize("quote", [b"", b'"'], ids=["plain", "quoted"])
def test_an_over_long_row_is_a_finding_and_the_next_line_is_read(read, quote):
    long = quote + b"x" * (2 * MAX_ROW_BYTES) + quote + b",2\n"
    (line, message), after = read(b"a,b\n" + long + b"3,4\n")
    assert (line, message.split(",")[0], after) == (2, "the row is longer than 4 MiB", row(3, "3", "4"))


def test_an_over_long_quoted_field_of_many_lines_gives_up_at_the_limit(read):
    num_lines = MAX_ROW_BYTES // 1000 + 2
    lines = (b"x" * 999 + b"\n") * num_lines
    (line, message), *rest = read(b'a,b\n"' + lines + b'",2\n')
    assert (line, message) == (2, "the row is longer than 4 MiB, or has an unclosed quote")
    assert len(rest) == num_lines  # each of the lines by itself, none of two fields; then a lone quote


def test_the_longest_row_is_read(read):
    content = b"x" * (MAX_ROW_BYTES - 3)
    assert read(b"a,b\n" + content + b",2\n3,4\n")[1] == row(3, "3", "4")


def test_records_are_those_of_pythons_csv_module(tmp_path):
    """Python's csv module wrote them, with each of its ways to quote and to end a line."""
    choose = random.Random(0)
    path = tmp_path / "pairs.csv"
    for quoting in (csv.QUOTE_MINIMAL, csv.QUOTE_ALL):
        for end in ("\n", "\r\n"):
            characters = 'ab ,"\n\t' + "\r" * (quoting == csv.QUOTE_ALL)  # Python 3.11 leaves a lone \r unquoted
            texts = ["".join(choose.choices(characters, k=choose.randrange(8))) for _ in range(3000)]
            rows = [dict(zip("ab", pair, strict=True)) for pair in zip(texts[::2], texts[1::2], strict=True)]
            rows = [pair for pair in rows if pair["a"] + pair["b"]]
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, "ab", quoting=quoting, lineterminator=end)
                writer.writeheader()
                writer.writerows(rows)
            written = [{name: text or None for name, text in pair.items()} for pair in rows]
            assert [values for _, values in found(path)] == written


def test_lines_are_those_of_the_file(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_bytes(b'a,b\n"1\n1",2\n\n"3","4\n"\n5,6\n')
    lines = path.read_bytes().split(b"\n")
    assert [lines[line - 1] for line, _ in found(path)] == [b'"1', b'"3","4', b"5,6"]


def test_many_fields_over_many_lines_take_no_time(read):
    """Each line opens a field that the next one closes; reading on from each of them would take hours."""
    rest = read(b"a,b\n" + b'x","\n' * 50_000)
    assert len(rest) > 0


def test_a_file_far_larger_than_a_row_is_read_in_little_memory(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_bytes(b"a,b\n" + (b'"' + (b"x" * 999 + b"\n") * 100 + b'",2\n') * 1000)  # 100 MB
    program = r"""
import re, sys
from functools import partial
from pathlib import Path
from qpref_plugins.read_csv import read_separated
size = lambda: int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) // 1000
before = size()
print(sum(1 for _ in read_separated(b",", Path(sys.argv[1]))), size() - before)
"""
    result = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True, check=True)
    rows, growth = map(int, result.stdout.split())
    assert (rows, growth < 40) == (1000, True)
