"""A file server on the loopback that answers each request late, as an object store does."""

from __future__ import annotations

import os
import sys
import time
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, Final

_RANGE: Final = "bytes="


class _Handler(BaseHTTPRequestHandler):
    """Answers HEAD and GET of one file, a range of it if asked, each after `delay` seconds."""

    protocol_version = "HTTP/1.1"  # keeps connections open

    def __init__(self, data: bytes, delay: float, *arguments: Any) -> None:
        self._data = data
        self._delay = delay
        super().__init__(*arguments)

    def do_HEAD(self) -> None:
        self._answer(b"")

    def do_GET(self) -> None:
        asked = self.headers.get("Range", "")
        if not asked.startswith(_RANGE):
            self._answer(self._data)
            return
        begin, end = self._range(asked.removeprefix(_RANGE))
        whole = f"bytes {begin}-{end - 1}/{len(self._data)}"
        self._answer(self._data[begin:end], status=206, content_range=whole)

    def _range(self, asked: str) -> tuple[int, int]:
        """Return where a range such as ``0-99``, ``100-`` or ``-8`` begins and ends."""
        size = len(self._data)
        first, _, last = asked.partition("-")
        if not first:
            return max(0, size - int(last)), size
        return int(first), min(size, int(last) + 1) if last else size

    def _answer(self, body: bytes, *, status: int = 200, content_range: str = "") -> None:
        time.sleep(self._delay)
        self.send_response(status)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(body) or len(self._data)))
        if content_range:
            self.send_header("Content-Range", content_range)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def main(file: str, delay: str) -> None:
    """Serve `file` until stdin is closed; print the port first."""
    handler: Any = partial(_Handler, Path(file).read_bytes(), float(delay))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    print(server.server_port, flush=True)
    Thread(target=server.serve_forever, daemon=True).start()
    sys.stdin.read()
    os._exit(0)  # requests may still sleep


if __name__ == "__main__":
    main(*sys.argv[1:])
