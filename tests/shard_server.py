"""A small HTTP server of a folder, with range requests and ETags, that can be told to fail."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Server(ThreadingHTTPServer):
    """``failures``: how many more requests get ``status``; ``asked``: paths of the GET requests so far."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.failures, self.status, self.ranges = 0, 503, True
        self.tags: dict[str, str] = {}
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        path = self.server.folder / self.path.lstrip("/")
        status, content, headers = 200, b"", {}
        if self.server.failures > 0:
            self.server.failures -= 1
            status = self.server.status
        elif not path.is_file():
            status = 404
        else:
            content = path.read_bytes()
            headers = {"ETag": self.server.tags.get(self.path, '"one"'), "Accept-Ranges": "bytes"}
            if self.server.ranges and "Range" in self.headers:
                first, last = self.headers["Range"].removeprefix("bytes=").split("-")
                status, content = 206, content[int(first) : int(last) + 1]
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


@contextmanager
def serving(folder: Path) -> Iterator[Server]:
    with Server(folder) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
