"""A server that speaks as much of the Hugging Face hub's API as downloads need, over a directory of repositories.

Source: https://huggingface.co/docs/hub/api and what huggingface_hub asks for.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "a" * 40
OLD = "b" * 40


class Hub:
    """``repositories``: name -> commit -> directory; ``private``: name -> token that opens it; ``asked``: paths."""

    def __init__(self, repositories: dict[str, dict[str, Path]], private: dict[str, str]):
        self.repositories = repositories
        self.private = private
        self.gated: set[str] = set()
        self.cut: set[str] = set()  # names of files whose contents end too early
        self.asked: list[str] = []
        self.url = ""

    def files(self) -> set[str]:
        """Whose contents were sent."""
        return {
            path.rpartition("/")[2] for path in self.asked if path.startswith("GET ") and "/resolve/" in path
        }


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """At ``hub.url`` for as long as the context lasts."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer(with_body=False)

        def do_GET(self) -> None:
            self.answer(with_body=True)

        def answer(self, with_body: bool) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.asked.append(f"{self.command} {path}")
            parts = path.strip("/").split("/")
            api = parts[:2] == ["api", "models"]
            name = "/".join(parts[2:4] if api else parts[:2])
            commits = hub.repositories.get(name)
            token = self.headers.get("Authorization", "").removeprefix("Bearer ")
            if commits is None or (name in hub.private and hub.private[name] != token):
                return self.refuse(401, "RepoNotFound", with_body)
            revision = parts[5] if api and len(parts) > 5 else COMMIT if api else parts[3]
            commit = {"main": COMMIT, "v1": OLD}.get(revision, revision)
            if commit not in commits:
                return self.refuse(404, "RevisionNotFound", with_body)
            directory = commits[commit]
            if not api:
                if name in hub.gated:
                    return self.refuse(403, "GatedRepo", with_body)
                return self.file(directory / "/".join(parts[4:]), commit, with_body)
            listed = sorted(p for p in directory.iterdir() if p.is_file())
            if len(parts) > 4 and parts[4] == "tree":
                entries = [
                    {"type": "file", "path": p.name, "size": p.stat().st_size, "oid": digest(p)}
                    for p in listed
                ]
                return self.send(200, json.dumps(entries).encode(), {}, with_body)
            siblings = [{"rfilename": p.name} for p in listed]
            info = {
                "id": name,
                "modelId": name,
                "sha": commit,
                "siblings": siblings,
                "private": False,
                "tags": [],
            }
            return self.send(200, json.dumps(info).encode(), {}, with_body)

        def file(self, file: Path, commit: str, with_body: bool) -> None:
            if not file.is_file():
                return self.refuse(404, "EntryNotFound", with_body)
            self.send(
                200, file.read_bytes(), {"ETag": f'"{digest(file)}"', "X-Repo-Commit": commit}, with_body
            )

        def refuse(self, status: int, code: str, with_body: bool) -> None:
            headers = {"X-Error-Code": code, "X-Error-Message": code}
            self.send(status, json.dumps({"error": code}).encode(), headers, with_body)

        def send(self, status: int, body: bytes, headers: dict[str, str], with_body: bool) -> None:
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            if with_body and self.path.rpartition("/")[2] in hub.cut:
                self.wfile.write(body[: len(body) // 2])
                self.close_connection = True
            elif with_body:
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def digest(file: Path) -> str:
    """As git names a blob, about."""
    return hashlib.sha1(file.read_bytes()).hexdigest()
