"""Serve folders on 127.0.0.1 as the Hugging Face hub would: the requests that huggingface_hub and datasets make."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
API = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+)(?:/(.*))?)?")
FILE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/[^/]+/(.+)")


class Handler(BaseHTTPRequestHandler):
    """Answer for the repositories of `server.folders`, {"models/OWNER/NAME" or "datasets/OWNER/NAME": folder}."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        """Keep requests off the terminal."""

    def do_GET(self) -> None:
        place = unquote(urlsplit(self.path).path)
        if found := API.fullmatch(place):
            return self.describe(*found.groups())
        if found := FILE.fullmatch(place):
            return self.file(f"{'datasets' if found[1] else 'models'}/{found[2]}", found[3])
        self.refuse(404, "EntryNotFound", "Not found")

    do_HEAD = do_POST = do_GET

    def folder(self, repository: str) -> Path | None:
        """Return the folder of a repository; where there is none, answer as the hub does."""
        if new := self.server.renamed.get(repository):
            self.send(307, b"", Location=self.path.replace(repository.partition("/")[2], new))
        elif repository not in self.server.folders:
            self.refuse(401, "RepoNotFound", "Invalid username or password.")  # as for a private one
        else:
            return self.server.folders[repository]

    def describe(self, kind: str, name: str, part: str | None, _revision: str | None, path: str | None) -> None:
        if (folder := self.folder(f"{kind}/{name}")) is None:
            return
        length = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(length).decode()
        entries = [self.entry(folder, file) for file in sorted(folder.rglob("*"))]
        if part == "tree":
            above = path or ""
            deep = parse_qs(urlsplit(self.path).query).get("recursive") in (["true"], ["True"])
            inside = [e for e in entries if e["path"].startswith(f"{above}/" if above else "")]
            answer = inside if deep else [e for e in inside if str(Path(e["path"]).parent) == (above or ".")]
        elif part == "paths-info":
            asked = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body)["paths"]
            answer = [e for e in entries if e["path"] in asked]
        else:
            files = [{"rfilename": e["path"]} for e in entries if e["type"] == "file"]
            answer = {"id": name, "sha": COMMIT, "private": False, "tags": [], "downloads": 0, "siblings": files}
        self.send(200, json.dumps(answer).encode(), **{"Content-Type": "application/json"})

    @staticmethod
    def entry(folder: Path, file: Path) -> dict:
        path = file.relative_to(folder).as_posix()
        if file.is_dir():
            return {"type": "directory", "path": path, "oid": COMMIT, "size": 0}
        return {"type": "file", "path": path, "oid": COMMIT, "size": file.stat().st_size}

    def file(self, repository: str, path: str) -> None:
        if (folder := self.folder(repository)) is None:
            return
        if repository in self.server.gated:
            return self.refuse(401, "GatedRepo", f"Access to {repository} is restricted.")
        if not (folder / path).is_file():
            return self.refuse(404, "EntryNotFound", "Entry not found")
        content = (folder / path).read_bytes()
        if start := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            content = content[int(start[1]) :]
        etag = hashlib.sha1((folder / path).read_bytes()).hexdigest()
        broken = repository in self.server.breaks and path.endswith(".safetensors")
        self.send(200, content, broken, ETag=f'"{etag}"', **{"X-Repo-Commit": COMMIT})

    def refuse(self, status: int, code: str, words: str) -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": words}
        self.send(status, json.dumps({"error": words}).encode(), **headers)

    def send(self, status: int, content: bytes, broken: bool = False, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if broken else content)
        if broken:
            self.close_connection = True


@contextmanager
def serving(
    folders: dict[str, Path], gated: Sequence[str], breaks: Sequence[str], renamed: dict[str, str]
) -> Iterator[ThreadingHTTPServer]:
    """Serve until the context ends; the address is `http://127.0.0.1:{server.server_port}`.

    gated: repositories that want a login. breaks: repositories whose weights are cut off halfway. renamed:
    {"models/OWNER/OLD": "OWNER/NEW"}.
    """
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.folders, server.gated, server.breaks, server.renamed = folders, gated, breaks, renamed
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
