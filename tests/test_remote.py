"""Images from hosts that a server allows by name, and from nowhere else."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

pytest.importorskip("pydantic", reason="pydantic is not installed")
from ppexport.server import remote
from ppexport.server.errors import ApiError

PLACES = {
    "/image": (200, {}, b"image"),
    "/moved": (302, {"Location": "/image"}, b""),
    "/elsewhere": (302, {"Location": "http://example.org/image"}, b""),
    "/loop": (301, {"Location": "/loop"}, b""),
    "/nowhere": (307, {}, b""),
    "/missing": (404, {}, b"no"),
    "/large": (200, {}, b"x" * 5000),
}


class Handler(BaseHTTPRequestHandler):
    """Answers with PLACES, and under /slow byte by byte."""

    def do_GET(self) -> None:
        if self.path == "/slow":
            self.send_response(200)
            self.end_headers()
            for _ in range(100):
                self.wfile.write(b"x")
                time.sleep(0.05)
            return
        status, headers, body = PLACES[self.path]
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture(scope="module")
def host() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://localhost:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def as_public(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if this machine were somewhere else."""
    monkeypatch.setattr(remote, "public_address", lambda *_: "127.0.0.1")


def test_an_allowed_host(host: str, as_public: None) -> None:
    for path in ("/image", "/moved"):
        assert remote.fetch(host + path, ("localhost",), 1000, "x") == b"image"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/elsewhere", "images from 'example.org' are not fetched .hosts that are: localhost"),
        ("/loop", "redirects more than 3 times"),
        ("/nowhere", "redirects more than 3 times"),
        ("/missing", "the host answers 404"),
        ("/large", "the image takes more than"),
    ],
)
def test_what_comes_back_is_no_image(host: str, as_public: None, path: str, message: str) -> None:
    with pytest.raises(ApiError, match=message):
        remote.fetch(host + path, ("localhost",), 1000, "x")


def test_a_host_that_is_slow(host: str, as_public: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "IN_ALL", 0.3)
    monkeypatch.setattr(remote, "PART", 1)
    with pytest.raises(ApiError, match="it takes more than 0.3 s"):
        remote.fetch(f"{host}/slow", ("localhost",), 1000, "x")


@pytest.mark.parametrize(
    "name",
    [
        *("localhost", "127.0.0.1", "::1", "10.0.0.1", "169.254.169.254", "0.0.0.0", "224.0.0.1", "ff02::1"),
        *("fec0::1", "2002:7f00:1::1", "64:ff9b::7f00:1", "::ffff:127.0.0.1"),
    ],
)
def test_this_machine_and_its_network_are_never_asked(name: str) -> None:
    """Also where a user allows the name."""
    url = f"http://[{name}]/x" if ":" in name else f"http://{name}/x"
    with pytest.raises(ApiError, match="expected a public address|cannot be fetched"):
        remote.fetch(url, (name,), 1000, "x")


@pytest.mark.parametrize(
    "url", ["http://", "https://a b/", "http://[::1", "http://host:99999/x", "http:///x"]
)
def test_urls_that_are_none(url: str) -> None:
    with pytest.raises(ApiError) as found:
        remote.fetch(url, ("host", "a b", ""), 1000, "x")
    assert found.value.status == 400
