"""`copus watch --web`: the report of a run, live, on this machine's loopback interface.

Nothing of it can be reached from another machine, and on this one only by whoever has the address: a token in it is
compared, and so is the Host header, which a page of another site that had its name resolved to 127.0.0.1 would betray.
"""

import secrets
import threading
import time
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from launch.report import page
from launch.run_directory import shown

HOST = "127.0.0.1"
LEAST_SECONDS = 2.0
"""Between two renderings: one of a long run takes seconds."""
RENDERING_SHARE = 0.2
"""Share of the time, at most, in which the page is rendered."""


class LivePage:
    """The page as it is now, rendered again only if the run's log has grown."""

    def __init__(self, run: Path) -> None:
        self._run = run
        self._lock = threading.Lock()
        self._version = ""
        self._text = b""
        self._next_look = 0.0

    def update(self) -> tuple[str, bytes]:
        """A version, and the page without the plotting library, which the browser has by then."""
        with self._lock:
            began = time.monotonic()
            if began >= self._next_look and (version := self._current_version()) != self._version:
                self._text = page([self._run], live=True, library=False).encode()
                self._version = version
                now = time.monotonic()
                self._next_look = now + max(LEAST_SECONDS, (now - began) / RENDERING_SHARE)
            return self._version, self._text

    def whole(self) -> bytes:
        """All of it, for a browser that opens it."""
        return page([self._run], live=True).encode()

    def _current_version(self) -> str:
        """Changes whenever the page may: the log grows, workers stop, a minute passes in which a run may stall."""
        log = self._run / "events.jsonl"
        size = log.stat().st_size if log.exists() else 0
        return f"{size}-{int(time.time() // 60)}"


class Server(ThreadingHTTPServer):
    """Serves one run below one address."""

    daemon_threads = True

    def __init__(self, run: Path, port: int = 0) -> None:
        super().__init__((HOST, port), _Handler)
        self.live = LivePage(run)
        self.token = secrets.token_urlsafe(16)

    @property
    def address(self) -> str:
        """Where the page is."""
        return f"http://{HOST}:{self.server_port}/{self.token}/"


class _Handler(BaseHTTPRequestHandler):
    server: Server
    server_version, sys_version = "copus", ""

    def do_GET(self) -> None:
        hosts = {f"{name}:{self.server.server_port}" for name in (HOST, "localhost")}
        token, _, name = self.path.removeprefix("/").partition("/")
        allowed = secrets.compare_digest(token.encode(), self.server.token.encode())
        if self.headers.get("Host") not in hosts or not allowed or name not in ("", "update"):
            self._answer(HTTPStatus.NOT_FOUND, b"")
        elif name == "":
            self._answer(HTTPStatus.OK, self.server.live.whole())
        else:
            version, text = self.server.live.update()
            same = self.headers.get("If-None-Match") == f'"{version}"'
            self._answer(HTTPStatus.NOT_MODIFIED if same else HTTPStatus.OK, b"" if same else text, version)

    def _answer(self, status: HTTPStatus, body: bytes, version: str | None = None) -> None:
        self.send_response(status)
        if version is not None:
            self.send_header("ETag", f'"{version}"')
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-cache")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        """Requests are not worth a line."""


def serve(run: Path) -> int:
    """Serve the run's page until Ctrl-C."""
    with Server(run) as server:
        print(f"{shown(run)}: {server.address}", flush=True)
        print(
            "Ctrl-C ends the page; the run keeps running. From another machine: "
            f"ssh -L {server.server_port}:{HOST}:{server.server_port} HOST",
            flush=True,
        )
        server.serve_forever()
    return 0
