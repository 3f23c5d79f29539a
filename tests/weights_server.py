"""A server on 127.0.0.1 that plays the Hugging Face hub and a plain host of files, and misbehaves on request."""

import hashlib
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

HTML = b"<!DOCTYPE html>\n<html><head><title>Just a moment...</title></head><body>Are you human?</body></html>\n"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 120352\n"


@dataclass
class Behaviour:
    """How one path is answered."""

    status: int = 200
    body: bytes | None = None
    """In place of the file."""
    cut: int | None = None
    """Break the connection after so many bytes, once."""
    always_cut: bool = False
    delay: float = 0.0
    """Seconds between pieces of 1/8 of the file."""
    stall: float = 0.0
    """Seconds before the body."""
    ranges: bool = True
    html_status: bool = False


@dataclass
class Server:
    """What is served, and what was asked."""

    files: dict[str, bytes] = field(default_factory=dict)
    """``repository/path`` (hub) or path (plain) -> contents."""
    behaviour: dict[str, Behaviour] = field(default_factory=dict)
    requests: list[tuple[str, str, str]] = field(default_factory=list)
    """Method, path and range of every request."""
    commit: str = "c" * 40
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def bodies(self, name: str) -> list[str]:
        """Return the ranges of all GET requests for a file."""
        return [asked for method, path, asked in self.requests if method == "GET" and path.endswith(f"/{name}")]


@contextmanager
def serve() -> Iterator[Server]:
    """Run a server for the length of a ``with`` block."""
    server = Server()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer(with_body=False)

        def do_GET(self) -> None:
            self.answer(with_body=True)

        def answer(self, *, with_body: bool) -> None:
            asked = self.headers.get("Range", "")
            path = self.path.partition("?")[0]
            server.requests.append((self.command, path, asked))
            if path == "/":
                self.plain(200, b"hub\n", with_body)
                return
            hub = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([0-9a-f]{40})/(.+)", path)
            name = f"{hub[1]}/{hub[3]}" if hub else path.lstrip("/")
            how = server.behaviour.get(name, Behaviour())
            if how.status != 200:
                self.plain(how.status, HTML if how.html_status else b"no\n", with_body, html=how.html_status)
                return
            content = server.files.get(name) if how.body is None else how.body
            if content is None or (hub and hub[2] != server.commit):
                code = "EntryNotFound" if content is None else "RevisionNotFound"
                self.plain(404, b"no\n", with_body, {"X-Error-Code": code} if hub else {})
                return
            etag = f'"{hashlib.sha256(content).hexdigest()}"'
            start = 0
            match = re.fullmatch(r"bytes=(\d+)-", asked)
            unchanged = self.headers.get("If-Range") in (None, etag)
            if match and how.ranges and unchanged:
                start = int(match[1])
                if start >= len(content):
                    self.plain(416, b"", with_body)
                    return
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.send_header("ETag", etag)
            if hub:
                self.send_header("X-Repo-Commit", server.commit)
            self.send_header("Content-Length", str(len(content) - start))
            self.send_header("Accept-Ranges", "bytes")
            self.end_headers()
            if not with_body:
                return
            time.sleep(how.stall)
            body, cut = content[start:], None
            if how.cut is not None:
                cut = how.cut
                if not how.always_cut:
                    how.cut = None
            end = len(body) if cut is None else min(cut, len(body))
            piece = max(1, len(body) // 8)
            try:
                for begin in range(0, end, piece):
                    self.wfile.write(body[begin : min(begin + piece, end)])
                    self.wfile.flush()
                    time.sleep(how.delay)
                if end < len(body):
                    self.connection.shutdown(socket.SHUT_RDWR)
                    self.close_connection = True
            except OSError:
                self.close_connection = True

        def plain(self, status: int, body: bytes, with_body: bool, headers: dict[str, str] | None = None, *, html: bool = False) -> None:
            self.send_response(status)
            for key, value in (headers or {}).items():
                self.send_header(key, value)
            self.send_header("Content-Type", "text/html" if html else "text/plain")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if with_body:
                self.wfile.write(body)

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.daemon_threads = True
    server.port = httpd.server_address[1]
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        httpd.shutdown()
        httpd.server_close()
        thread.join()
