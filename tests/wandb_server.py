"""As much of wandb's server as its own client needs to send offline runs: it keeps the lines of one run's history."""

import gzip
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class WandbServer(ThreadingHTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.history: list[dict[str, Any]] = []
        self.names: set[str] = set()
        self.refuses = False

    def stream(self, files: dict[str, Any]) -> None:
        """Lines of a file, from an offset on."""
        if found := files.get("wandb-history.jsonl"):
            self.history[found["offset"] :] = [json.loads(line) for line in found["content"]]

    def bucket(self, asked: dict[str, Any]) -> dict[str, Any]:
        """The run, and how long its history is: the client of a resumed run goes on there."""
        self.names.add(asked["name"])
        lines = len(self.history)
        project = {"id": "p", "name": asked["project"], "entity": {"id": "e", "name": "me"}}
        run = {"id": "r", "name": asked["name"], "displayName": asked["displayName"], "project": project}
        return {"bucket": {**run, "config": "{}", "historyLineCount": lines}, "inserted": not lines}


class Answers(BaseHTTPRequestHandler):
    server: WandbServer
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self._body()
        if self.server.refuses:
            return self.send_error(403, "Forbidden")
        if self.path == "/graphql":
            asked = json.loads(body)
            if "upsertBucket" in asked["query"]:
                return self._send({"data": {"upsertBucket": self.server.bucket(asked["variables"])}})
            if "createRunFiles" in asked["query"]:
                files = [{"name": name, "uploadUrl": f"{self.server.url}/put"} for name in asked["variables"]["files"]]
                return self._send({"data": {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}})
            if "createArtifact(" in asked["query"]:  # says that it has it already
                sequence = {"id": "s", "latestArtifact": {"id": "a", "versionIndex": 0}}
                artifact = {"id": "a", "state": "COMMITTED", "artifactSequence": sequence}
                return self._send({"data": {"createArtifact": {"artifact": artifact}}})
            return self._send({"data": {}})
        if self.path.endswith("/file_stream"):
            self.server.stream(json.loads(body).get("files", {}))
        self._send({})

    def do_PUT(self) -> None:
        self._body()
        self._send({})

    def _body(self) -> bytes:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

    def _send(self, answer: Any) -> None:
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""


@contextmanager
def wandb_server() -> Iterator[WandbServer]:
    server = WandbServer()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
