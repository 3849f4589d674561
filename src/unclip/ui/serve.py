"""Serve the page: to this machine only unless visitors must log in, and without a word to any other host."""

import hmac
import ipaddress
import logging
import os
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from types import FrameType
from typing import Any

from unclip.errors import ConfigError
from unclip.ui.uploads import MAX_BYTES

log = logging.getLogger(__name__)
Scope = MutableMapping[str, Any]
Messages = Callable[..., Awaitable[Any]]
POLICY = (  # the browser itself then contacts no other host
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; "
    "worker-src 'self' blob:; object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)


def serve(runs: Path, *, host: str, port: int, auth_file: Path | None) -> None:
    """Serve until SIGINT or SIGTERM. Everything that the server writes lies in a temporary folder, which it removes at its end.

    Raises ConfigError for an address other than this machine's without ``auth_file``, and for a port that is taken.
    """
    users = _read_users(auth_file) if auth_file is not None else {}
    local = _is_loopback(host)
    if not local and not users:
        raise ConfigError(
            f"--host {host} can be reached from other machines: name those who may use it, --auth-file FILE (a line "
            "NAME:PASSWORD for each), or leave --host out"
        )
    _refuse_taken(host, port)
    with tempfile.TemporaryDirectory(prefix="unclip-ui-") as folder:
        _isolate(Path(folder), host)
        try:
            from unclip.ui.page import build_page  # imports gradio, which reads its environment
        except ModuleNotFoundError as error:
            raise ConfigError(f"the page needs {error.name}: pip install unclip[ui]") from error
        from unclip.ui.studio import Studio

        logging.getLogger("httpx").setLevel(logging.WARNING)  # Gradio asks itself whether it is there
        studio = Studio(runs, Path(folder))
        if trouble := studio.trouble():
            log.warning("nothing can be drawn yet: %s", trouble)
        page = build_page(studio)
        try:
            _launch(page, host, port, users, local)
        except ValueError as error:  # Gradio's own question whether the page is there got no answer
            page.close(verbose=False)
            raise ConfigError(
                f"the page was started at --host {host} --port {port} but does not answer ({error}); a machine that is "
                "very busy may need another try"
            ) from error
        try:
            log.info(
                "open http://%s:%d in a browser; Ctrl-C ends the server", f"[{host}]" if ":" in host else host, port
            )
            _until_told_to_end()
        finally:
            studio.close()
            page.close(verbose=False)


def _isolate(folder: Path, host: str) -> None:
    """Gradio's settings are ours alone: none from the environment, which could open files or call home.

    It asks itself for its page, which must not go through a proxy.
    """
    for name in [name for name in os.environ if name.startswith("GRADIO_")]:
        del os.environ[name]
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": str(folder), "HF_HUB_OFFLINE": "1"}
    direct = [os.environ.get("no_proxy") or os.environ.get("NO_PROXY"), host, "localhost"]  # its name for 0.0.0.0
    os.environ |= dict.fromkeys(("no_proxy", "NO_PROXY"), ",".join(filter(None, direct)))
    tempfile.tempdir = str(folder)  # Starlette's, for uploads on their way


def _launch(page: Any, host: str, port: int, users: dict[str, str], local: bool) -> None:
    from starlette.middleware import Middleware

    page.queue(default_concurrency_limit=None, api_open=False)
    page.launch(
        server_name=host,
        server_port=port,
        share=False,
        quiet=True,
        inbrowser=False,
        prevent_thread_lock=True,
        auth=_checker(users) if users else None,
        allowed_paths=[],
        blocked_paths=[],
        max_file_size=MAX_BYTES,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        show_error=False,
        app_kwargs={"middleware": [Middleware(Guard, local_only=local)]},
        theme=_theme(),
        css=(Path(__file__).parent / "page.css").read_text(encoding="utf-8"),
    )


def _theme() -> Any:
    """Quiet labels, and fonts that every machine has."""
    from gradio.themes import Soft

    labels = {
        f"block_{part}_text_color{mode}": "*body_text_color" for part in ("label", "title") for mode in ("", "_dark")
    }
    fills = {
        f"block_{part}_background_fill{mode}": "transparent" for part in ("label", "title") for mode in ("", "_dark")
    }
    fonts, mono = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]
    return Soft(primary_hue="indigo", font=fonts, font_mono=mono).set(
        **labels, **fills, block_title_padding="0", block_title_text_weight="600", block_title_text_size="*text_sm"
    )


class Guard:
    """Refuses what no visitor of the page asks for, and tells the browser to stay with this server.

    On a loopback address the Host header must name this machine: a page of another site cannot read ours by rebinding
    its name. URLs and proxied hosts are never fetched for a visitor.
    """

    def __init__(self, app: Messages, local_only: bool) -> None:
        self.app, self.local_only = app, local_only

    async def __call__(self, scope: Scope, receive: Messages, send: Messages) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        if self.local_only and not _names_this_machine(_header(scope, b"host")):
            await _refuse(send, "this server answers to 127.0.0.1 and localhost only")
            return
        path = scope["path"].lower()
        if "/proxy=" in path or ("/file=" in path and "://" in path) or "/component_server" in path:
            await _refuse(send, "this server fetches nothing from elsewhere")
            return

        async def marked(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                headers = [(b"content-security-policy", POLICY.encode()), (b"x-content-type-options", b"nosniff")]
                message["headers"] = [*message.get("headers", []), *headers, (b"referrer-policy", b"no-referrer")]
            await send(message)

        await self.app(scope, receive, marked)


async def _refuse(send: Messages, why: str) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8")]
    await send({"type": "http.response.start", "status": 403, "headers": headers})
    await send({"type": "http.response.body", "body": why.encode()})


def _header(scope: Scope, name: bytes) -> str:
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), "")


def _names_this_machine(host: str) -> bool:
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() else host
    return _is_loopback(name.strip("[]"))


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _refuse_taken(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            raise ConfigError(f"--host {host} --port {port} cannot be used ({error}); take another --port") from error


def _read_users(path: Path) -> dict[str, str]:
    """Names and passwords: a line NAME:PASSWORD for each, # for remarks."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise ConfigError(f"--auth-file {path} cannot be read: {error}") from error
    users = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        name, colon, password = line.partition(":")
        if not (name.strip() and colon and password):
            raise ConfigError(f"{path}, line {number}: write NAME:PASSWORD")  # never the line itself
        users[name.strip()] = password
    if not users:
        raise ConfigError(f"--auth-file {path} names nobody; write a line NAME:PASSWORD for each visitor")
    if path.stat().st_mode & 0o077:
        log.warning("%s can be read by others on this machine; chmod 600 %s", path, path)
    return users


def _checker(users: dict[str, str]) -> Callable[[str, str], bool]:
    """Compares in constant time, and takes half a second over a wrong password."""

    def check(name: str, password: str) -> bool:
        right = hmac.compare_digest(users.get(name, "").encode(), password.encode()) and name in users
        if not right:
            time.sleep(0.5)
        return right

    return check


def _until_told_to_end() -> None:
    told = threading.Event()

    def end(number: int, frame: FrameType | None) -> None:
        told.set()

    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        told.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
