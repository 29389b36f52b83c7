"""Files that aren't text, or aren't data, recognized by their first bytes, each with the way to use it.

Content often doesn't fit the suffix: a workbook saved as .csv, a Git LFS pointer, the login page of a host. Parsed as
text, each of them is thousands of errors about characters.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

HEAD_BYTES = 4096
"""Bytes of a file that `signature_of` needs."""
_TAR_OFFSET = 257
_WORKBOOK = 'save its sheet as "CSV UTF-8"'
_PARQUET = "write it as Parquet, such as with Dataset.to_parquet"


@dataclass(frozen=True, slots=True)
class Signature:
    """A kind of file, and the way to use it."""

    what: str
    fix: str

    def __str__(self) -> str:
        return f"{self.what}; {self.fix}"


_BINARY = (
    (b"\x1f\x8b", Signature("gzip data", "unpack it with gunzip")),
    (b"\x28\xb5\x2f\xfd", Signature("zstd data", "unpack it with zstd -d")),
    (b"\xfd7zXZ\0", Signature("xz data", "unpack it with unxz")),
    (b"\x04\x22\x4d\x18", Signature("lz4 data", "unpack it with lz4 -d")),
    (b"7z\xbc\xaf\x27\x1c", Signature("a 7z archive", "unpack it and name the file inside")),
    (b"Rar!\x1a\x07", Signature("a RAR archive", "unpack it and name the file inside")),
    (b"PAR1", Signature("Parquet data", 'name it .parquet, or set [data] reader = "parquet"')),
    (b"ARROW1", Signature("an Arrow file", _PARQUET)),
    (b"\xff\xff\xff\xff", Signature("an Arrow stream", _PARQUET)),
    (b"FEA1", Signature("a Feather file", _PARQUET)),
    (b"ORC", Signature("ORC data", _PARQUET)),
    (b"Obj\x01", Signature("Avro data", _PARQUET)),
    (b"\x89HDF\r\n\x1a\n", Signature("an HDF5 file", _PARQUET)),
    (b"\x93NUMPY", Signature("a NumPy array", "write its rows as JSON Lines")),
    (b"SQLite format 3\0", Signature("an SQLite database", "export its table: sqlite3 -json FILE 'SELECT ...'")),
    (b"%PDF-", Signature("a PDF document", "find the data that it was made from")),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", Signature("an Excel workbook (.xls)", _WORKBOOK)),
    (b"{\\rtf", Signature("an RTF document", "save it as plain text")),
)
_PICKLE = re.compile(rb"\x80[\x02-\x05]")
_BZIP2 = re.compile(rb"BZh[1-9]1AY&SY")
_PICKLED = Signature("pickled Python objects", "qpref never unpickles, which runs code; write the rows as JSON Lines")
_ZIPPED = {
    b"xl/": Signature("an Excel workbook", _WORKBOOK),
    b"word/": Signature("a Word document", "save its rows as JSON Lines or CSV"),
    b"mimetypeapplication/vnd.oasis.opendocument.spreadsheet": Signature("a spreadsheet (.ods)", _WORKBOOK),
    b"data.pkl": _PICKLED,
}
_ZIP = Signature("a zip archive", "unpack it and name the file inside")
_TAR = Signature("a tar archive", "unpack it and name the file inside")
_TEXTS = (
    (
        re.compile(r"version https://git-lfs\.github\.com/spec/"),
        Signature("a Git LFS pointer, not the data", "fetch them: git lfs pull"),
    ),
    (
        re.compile(r"(?:\.\./)*\.git/annex/objects/|/annex/objects/"),
        Signature("a git-annex pointer, not the data", "fetch them: git annex get FILE"),
    ),
    (
        re.compile(r"(?:<!--.*?-->\s*)*<(?:!doctype html|html|head)\b", re.IGNORECASE | re.DOTALL),
        Signature("an HTML page, perhaps of an error or a login", "download the file's raw address"),
    ),
    (re.compile(r"<\?xml\b|<svg\b|<rss\b"), Signature("XML", "write its rows as JSON Lines")),
)
_MESSAGE = re.compile(
    r"(?:entry not found|repository not found|invalid username or password\.?|invalid credentials.*|"
    r"access to \S+ \S+ is restricted.*|404: not found|404 page not found|403 forbidden|unauthorized|not found)\s*",
    re.IGNORECASE,
)
_MAX_MESSAGE_BYTES = 400
_SERVER = Signature("a server's error message, not the data", "look at it, and download the file again")


def signature_of_file(path: Path) -> Signature | None:
    """Return the kind of a file, see `signature_of`; None where it can't be read."""
    try:
        with path.open("rb") as file:
            return signature_of(file.read(HEAD_BYTES))
    except OSError:
        return None


def signature_of(head: bytes) -> Signature | None:
    """Return the kind of a file that starts with `head`; None where it may be text of data, gzip data included.

    Args:
        head: up to `HEAD_BYTES` of the file.
    """
    for start, signature in _BINARY:
        if head.startswith(start):
            return signature
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return next((signature for name, signature in _ZIPPED.items() if name in head), _ZIP)
    if head[_TAR_OFFSET : _TAR_OFFSET + 5] == b"ustar":
        return _TAR
    if _BZIP2.match(head):
        return Signature("bzip2 data", "unpack it with bunzip2")
    return _PICKLED if _PICKLE.match(head) else _text_signature(head)


def _text_signature(head: bytes) -> Signature | None:
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().decode("latin-1")
    if len(head) < _MAX_MESSAGE_BYTES and _MESSAGE.fullmatch(text):
        return _SERVER
    return next((signature for pattern, signature in _TEXTS if pattern.match(text)), None)
