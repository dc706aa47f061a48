"""A local server with the part of the Hugging Face file API that `hf_hub_download` uses.

    HEAD /owner/name/resolve/main/config.json          200, ETag, X-Repo-Commit, Content-Length
    HEAD /owner/name/resolve/main/model.safetensors    302 to /cdn/..., X-Linked-Etag, X-Linked-Size
    GET  /cdn/...            Range: bytes=100-         206, Content-Range: bytes 100-199/200
    anything that does not exist                       401 or 404 with X-Error-Code

Small text files are answered directly. Weights are kept in LFS (large file storage), on a second
host: this server under its other name, localhost. The client does not follow redirects to another
host when it requests metadata, so the second host is part of the protocol.
"""

from __future__ import annotations

import hashlib
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

LARGE = (".safetensors", ".bin", ".pth")  # files kept in LFS


@dataclass
class Fault:
    """A failing transfer of a large file: the answer ends after `keep` bytes.

    honest: Content-Length is that of the whole answer, so the client notices that it is cut off.
    """

    keep: int
    times: int  # how many transfers fail
    honest: bool = True


@dataclass
class Repository:
    """One repository: revision -> file name -> bytes, and how it fails, if at all."""

    revisions: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refusal: tuple[int, dict[str, str]] | None = None  # status and headers of every answer
    fault: Fault | None = None


class Hub(ThreadingHTTPServer):
    """`with Hub() as hub:` serves on 127.0.0.1 at a free port until the block ends."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, Repository] = {}
        self.requests: list[tuple[str, str, str | None]] = []  # method, path, Range
        self.thread = threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> Hub:
        self.thread.start()
        return self

    def __exit__(self, *error) -> None:
        self.shutdown()
        self.server_close()
        self.thread.join()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def publish(self, name: str, files: dict[str, bytes], revision: str = "main") -> Repository:
        """Make `files` the contents of a revision of the repository "owner/name"."""
        repository = self.repositories.setdefault(name, Repository())
        repository.revisions[revision] = files
        return repository

    def asked(self, name: str) -> list[tuple[str, str, str | None]]:
        """The requests so far for the files of one repository, wherever they are stored."""
        return [r for r in self.requests if r[1].startswith((f"/{name}/", f"/cdn/{name}/"))]


class Handler(BaseHTTPRequestHandler):
    """Answers one connection."""

    protocol_version = "HTTP/1.1"
    server: Hub

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def log_message(self, *_) -> None:
        """Do not log requests."""

    def answer(self) -> None:
        self.server.requests.append((self.command, self.path, self.headers.get("Range")))
        large = re.fullmatch(r"/cdn/([^/]+/[^/]+)/(\w+)", self.path)
        small = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.path)
        found = large or small
        repository = self.server.repositories.get(found[1]) if found else None
        if repository is None:
            return self.send(404, {"X-Error-Code": "RepoNotFound"})
        if large:
            return self.send_large(repository, large[2])
        if repository.refusal is not None:
            return self.send(*repository.refusal)
        name, revision, file = small.groups()
        commits = {commit(files): files for files in repository.revisions.values()}
        files = repository.revisions.get(revision, commits.get(revision))
        if files is None:
            return self.send(404, {"X-Error-Code": "RevisionNotFound"})
        headers = {"X-Repo-Commit": commit(files)}
        if file not in files:
            return self.send(404, headers | {"X-Error-Code": "EntryNotFound"})
        content = files[file]
        digest = sha256(content)
        if not file.endswith(LARGE):
            return self.send(200, headers | {"ETag": f'"{digest[:40]}"'}, content)
        linked = {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(content))}
        location = f"http://localhost:{self.server.server_port}/cdn/{name}/{digest}"
        return self.send(302, headers | linked | {"Location": location})

    def send_large(self, repository: Repository, digest: str) -> None:
        """Send a file, from the byte that the client requests, up to where a fault cuts it off."""
        contents = (c for files in repository.revisions.values() for c in files.values())
        whole = next(content for content in contents if sha256(content) == digest)
        status, headers, content = 200, {"ETag": f'"{digest}"'}, whole
        if wanted := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start = int(wanted[1])
            status, content = 206, whole[start:]
            headers["Content-Range"] = f"bytes {start}-{len(whole) - 1}/{len(whole)}"
        fault = repository.fault
        if fault is None or not fault.times:
            return self.send(status, headers, content)
        fault.times -= 1
        self.close_connection = True
        length = len(content) if fault.honest else fault.keep
        return self.send(status, headers, content[: fault.keep], length)

    def send(
        self, status: int, headers: dict[str, str], content: bytes = b"", length: int | None = None
    ) -> None:
        """Send one answer; length: a false Content-Length."""
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def commit(files: dict[str, bytes]) -> str:
    """The commit of exactly these files: 40 hexadecimal digits."""
    listing = "\n".join(f"{name} {sha256(content)}" for name, content in sorted(files.items()))
    return hashlib.sha1(listing.encode()).hexdigest()
