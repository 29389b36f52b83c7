"""A hub on the loopback: the URLs and headers of huggingface.co that huggingface_hub and datasets rely on."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import pyarrow
import pyarrow.parquet

LFS_SUFFIXES = (".safetensors", ".parquet")
"""Files that the hub keeps elsewhere: their `resolve` URL redirects."""


class Call(NamedTuple):
    method: str
    path: str
    token: str | None
    body: bytes


@dataclass(frozen=True)
class Repository:
    """A model or a dataset.

    Attributes:
        gated: its description is public, its files need a token.
        broken: every download of its files ends after the first half.
    """

    kind: str
    name: str
    files: dict[str, bytes]
    gated: bool = False
    broken: bool = False

    @classmethod
    def of_folder(cls, kind: str, name: str, folder: Path, **how: bool) -> Repository:
        files = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
        return cls(kind, name, files, **how)

    @property
    def commit(self) -> str:
        digest = hashlib.sha1(self.name.encode())
        for name, data in sorted(self.files.items()):
            digest.update(name.encode() + data)
        return digest.hexdigest()

    @property
    def facts(self) -> dict[str, object]:
        siblings = [{"rfilename": name} for name in sorted(self.files)]
        return {"id": self.name, "sha": self.commit, "private": False, "gated": "auto" if self.gated else False,
                "disabled": False, "downloads": 0, "likes": 0, "tags": [], "siblings": siblings}  # fmt: skip

    def entries(self, under: str, recursive: bool) -> list[dict[str, object]]:
        """What the tree lists: files, and the folders that they are in."""
        start = f"{under}/" if under else ""
        inside = sorted(name.removeprefix(start) for name in self.files if name.startswith(start))
        folders = {"/".join(name.split("/")[:depth]) for name in inside for depth in range(1, name.count("/") + 1)}
        names = [name for name in (*folders, *inside) if recursive or "/" not in name]
        return [self.entry(start + name) for name in sorted(names)]

    def entry(self, name: str) -> dict[str, object]:
        if name not in self.files:
            return {"type": "directory", "path": name, "oid": hashlib.sha1(name.encode()).hexdigest(), "size": 0}
        data = self.files[name]
        entry: dict[str, object] = {"type": "file", "path": name, "oid": etag_of(name, data), "size": len(data)}
        if name.endswith(LFS_SUFFIXES):
            digest = hashlib.sha256(data).hexdigest()
            entry["lfs"] = {"oid": digest, "size": len(data), "pointerSize": 130}
        return entry


def dataset_files(splits: dict[str, list[dict[str, object]]], config: str = "default") -> dict[str, bytes]:
    """The files of a dataset as the hub keeps them: one Parquet file for each split, and a card that names them."""
    listed = [f"  - split: {split}\n    path: data/{split}-*\n" for split in splits]
    card = "".join(["---\nconfigs:\n", f"- config_name: {config}\n  data_files:\n", *listed, "---\n"])
    files = {f"data/{split}-00000-of-00001.parquet": _parquet(rows) for split, rows in splits.items()}
    return {"README.md": card.encode(), **files}


def _parquet(rows: list[dict[str, object]]) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


def etag_of(name: str, data: bytes) -> str:
    hashed = hashlib.sha256(data) if name.endswith(LFS_SUFFIXES) else hashlib.sha1(b"blob %d\0" % len(data) + data)
    return hashed.hexdigest()


@dataclass
class State:
    """What the server holds, and what it was asked.

    Attributes:
        refuses: answer every upload with 403.
    """

    repositories: dict[tuple[str, str], Repository] = field(default_factory=dict)
    calls: list[Call] = field(default_factory=list)
    refuses: bool = False

    def put(self, repository: Repository) -> Repository:
        self.repositories[repository.kind, repository.name] = repository
        return repository


class LoopbackHub(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.state = State()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def environment(self, home: Path) -> dict[str, str]:
        """The environment of a process that knows this hub alone, with caches of its own."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        caches = {"HF_HOME": str(home / "hf"), "QPREF_CACHE": str(home / "qpref")}
        return kept | caches | {"HF_ENDPOINT": self.address, "NO_PROXY": "127.0.0.1,localhost", "OMP_NUM_THREADS": "1"}


@contextmanager
def loopback_hub() -> Iterator[LoopbackHub]:
    hub = LoopbackHub()
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: LoopbackHub

    def do_HEAD(self) -> None:
        self._note(b"")
        self._get()

    do_GET = do_HEAD

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self._note(body)
        path = urlsplit(self.path).path
        if "/paths-info/" in path:
            self._paths_info(path, body)
        elif self.server.state.refuses:
            self._json(403, {"error": "no write access"})
        else:
            self._json(200, self._accepted(path, body))

    def _accepted(self, path: str, body: bytes) -> dict[str, object]:
        """As much as an upload of small files needs."""
        if path == "/api/repos/create":
            asked = json.loads(body)
            return {"url": f"{self.server.address}/{asked['organization']}/{asked['name']}"}
        if "/preupload/" in path:
            return {"files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                              for file in json.loads(body)["files"]]}  # fmt: skip
        if "/commit/" in path:
            place = f"{self.server.address}/org/model/commit/{'0' * 40}"
            return {"commitUrl": place, "commitOid": "0" * 40, "pullRequestUrl": None}
        return {"errors": [], "warnings": []}

    def _get(self) -> None:
        address = urlsplit(self.path)
        match [unquote(part) for part in address.path.strip("/").split("/")]:
            case ["api", "models" | "datasets" as kind, owner, name, *rest]:
                if repository := self._repository(kind, f"{owner}/{name}", rest[1] if len(rest) > 1 else "main"):
                    self._describe(repository, rest, parse_qs(address.query))
            case ["datasets", owner, name, "resolve", revision, *file]:
                self._resolve("datasets", f"{owner}/{name}", revision, "/".join(file))
            case [owner, name, "resolve", revision, *file]:
                self._resolve("models", f"{owner}/{name}", revision, "/".join(file))
            case ["lfs", kind, owner, name, *file]:
                self._send_file(self.server.state.repositories[kind, f"{owner}/{name}"], "/".join(file), {})
            case _:
                self._json(404, {"error": "Not found"})

    def _describe(self, repository: Repository, rest: list[str], query: dict[str, list[str]]) -> None:
        if rest[:1] in ([], ["revision"]):
            self._json(200, repository.facts)
        elif rest[0] == "auth-check":
            self._json(*self._refusal(repository))
        elif rest[0] == "tree":
            recursive = query.get("recursive", ["false"])[0].lower() == "true"
            self._json(200, repository.entries("/".join(rest[2:]), recursive))
        else:
            self._json(404, {"error": "Not found"})

    def _refusal(self, repository: Repository) -> tuple[int, dict[str, str], dict[str, str]]:
        """Status, body and headers for one who has not been let in; 200 for others."""
        if not repository.gated or self.headers.get("authorization"):
            return 200, {}, {}
        message = f"Access to {repository.kind} {repository.name} is restricted. Please log in."
        return 401, {"error": message}, {"X-Error-Code": "GatedRepo", "X-Error-Message": message}

    def _paths_info(self, path: str, body: bytes) -> None:
        _, kind, owner, name, _, revision = path.strip("/").split("/")
        if repository := self._repository(kind, f"{owner}/{name}", unquote(revision)):
            asked = json.loads(body)["paths"] if body.startswith(b"{") else parse_qs(body.decode())["paths"]
            self._json(200, [repository.entry(file) for file in asked if file in repository.files])

    def _repository(self, kind: str, name: str, revision: str) -> Repository | None:
        """The repository, or None where its absence is answered."""
        repository = self.server.state.repositories.get((kind, name))
        if repository is None:  # as the hub tells those who have no token
            self._json(401, {"error": "Invalid username or password."}, {"X-Error-Code": "RepoNotFound"})
        elif revision not in ("main", repository.commit):
            self._json(404, {"error": f"Invalid rev id: {revision}"}, {"X-Error-Code": "RevisionNotFound"})
        else:
            return repository
        return None

    def _resolve(self, kind: str, name: str, revision: str, file: str) -> None:
        repository = self._repository(kind, name, revision)
        if repository is None:
            return
        headers = {"X-Repo-Commit": repository.commit}
        status, value, more = self._refusal(repository)
        if status != 200:
            self._json(status, value, headers | more)
        elif file not in repository.files:
            self._json(404, {"error": "Entry not found"}, headers | {"X-Error-Code": "EntryNotFound"})
        elif file.endswith(LFS_SUFFIXES):
            data = repository.files[file]
            linked = {"X-Linked-Size": str(len(data)), "X-Linked-Etag": f'"{etag_of(file, data)}"'}
            place = f"http://localhost:{self.server.server_port}/lfs/{kind}/{name}/{file}"  # another host, as the hub's
            self._send(302, b"", headers | linked | {"Location": place})
        else:
            self._send_file(repository, file, headers)

    def _send_file(self, repository: Repository, file: str, headers: dict[str, str]) -> None:
        data = repository.files[file]
        headers = headers | {"ETag": f'"{etag_of(file, data)}"', "Accept-Ranges": "bytes"}
        start, status = 0, 200
        if asked := self.headers.get("Range"):
            start, status = int(asked.removeprefix("bytes=").split("-")[0]), 206
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        if repository.broken and self.command == "GET":
            self._send(status, data[start:], headers, sent=max(0, len(data) // 2 - start))
            self.close_connection = True
        else:
            self._send(status, data[start:], headers)

    def _json(self, status: int, value: object, headers: dict[str, str] | None = None) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"} | (headers or {}))

    def _send(self, status: int, data: bytes, headers: dict[str, str], sent: int | None = None) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(data))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[:sent])

    def _note(self, body: bytes) -> None:
        self.server.state.calls.append(Call(self.command, self.path, self.headers.get("authorization"), body))

    def log_message(self, *arguments: object) -> None:
        pass
