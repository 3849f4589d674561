"""Who may use the page, and what the server refuses before Gradio sees it."""

import asyncio
import logging
import os
import socket
import stat
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from unclip.errors import ConfigError
from unclip.ui import serve as module
from unclip.ui.serve import Guard, serve


@pytest.fixture
def users(tmp_path: Path) -> Path:
    path = tmp_path / "users.txt"
    path.write_text("# who may\nada:se:cret\n\n bob :x\n")
    path.chmod(0o600)
    return path


def test_another_address_needs_users(tmp_path: Path):
    for host in ("0.0.0.0", "192.0.2.1", "::", "example.org"):
        with pytest.raises(ConfigError, match=f"--host {host} can be reached from other machines: name those who"):
            serve(tmp_path, host=host, port=7860, auth_file=None)


def test_without_the_extra_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    for name in [name for name in sys.modules if name.startswith(("gradio", "unclip.ui.p", "unclip.ui.forms"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Missing(), *sys.meta_path])
    with pytest.raises(ConfigError, match=r"the page needs gradio: pip install unclip\[ui\]"):
        serve(tmp_path, host="localhost", port=free_port(), auth_file=None)


class Missing:
    """An import system without gradio."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == "gradio":
            raise ModuleNotFoundError("No module named 'gradio'", name=name)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_users_are_read_and_compared(users: Path, monkeypatch: pytest.MonkeyPatch):
    found = module._read_users(users)
    assert found == {"ada": "se:cret", "bob": "x"}
    slept = []
    monkeypatch.setattr(module.time, "sleep", slept.append)
    check = module._checker(found)
    assert check("ada", "se:cret")
    assert slept == []
    assert not any(check(*wrong) for wrong in (("ada", "x"), ("", ""), ("eve", ""), ("ada", "")))
    assert slept == [0.5] * 4


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "names nobody; write a line NAME:PASSWORD"),
        ("# nobody\n", "names nobody"),
        ("ada:secret\nbob\n", "line 2: write NAME:PASSWORD"),
        ("ada:\n", "line 1: write NAME:PASSWORD"),
        (":secret\n", "line 1: write NAME:PASSWORD"),
    ],
)
def test_bad_files_of_users(tmp_path: Path, text: str, said: str):
    path = tmp_path / "users.txt"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said) as caught:
        serve(tmp_path, host="0.0.0.0", port=7860, auth_file=path)
    assert "secret" not in str(caught.value)


def test_a_missing_file_of_users_and_one_that_all_can_read(
    tmp_path: Path, users: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    with pytest.raises(ConfigError, match=r"--auth-file .*none.txt cannot be read"):
        serve(tmp_path, host="127.0.0.1", port=7860, auth_file=tmp_path / "none.txt")
    monkeypatch.setattr(module.log, "disabled", False)
    users.chmod(users.stat().st_mode | stat.S_IROTH)
    module._read_users(users)
    assert "can be read by others" in caplog.text


def test_a_port_in_use_is_told(tmp_path: Path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"--host 127.0.0.1 --port {port} cannot be used"):
            serve(tmp_path, host="127.0.0.1", port=port, auth_file=None)


def test_the_environment_opens_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(os, "environ", {"GRADIO_ALLOWED_PATHS": "/", "GRADIO_SHARE": "True", "NO_PROXY": "a.org"})
    module._isolate(tmp_path, "127.0.0.2")
    assert {name for name in os.environ if name.startswith("GRADIO_")} == {
        "GRADIO_ANALYTICS_ENABLED",
        "GRADIO_TEMP_DIR",
    }
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
    assert os.environ["NO_PROXY"] == os.environ["no_proxy"] == "a.org,127.0.0.2,localhost"
    assert tempfile.gettempdir() == str(tmp_path)


def asked(path: str, host: str, local_only: bool = True) -> tuple[int, dict[bytes, bytes]]:
    """Status and headers of one request through the guard; 200 comes from the app behind it."""
    sent: list[dict[str, Any]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {"type": "http", "path": path, "headers": [(b"host", host.encode())]}
    asyncio.run(Guard(app, local_only)(scope, None, send))  # type: ignore[arg-type]
    return sent[0]["status"], dict(sent[0]["headers"])


def test_the_guard():
    for host in ("127.0.0.1:7860", "localhost:7860", "localhost", "[::1]:7860", "127.8.9.1"):
        status, headers = asked("/", host)
        assert status == 200
        assert b"default-src 'self'" in headers[b"content-security-policy"]
    for host in ("evil.example:7860", "127.0.0.1.evil.example", "", "0.0.0.0:7860", "evil.example:127.0.0.1"):
        assert asked("/", host)[0] == 403, host
    assert asked("/", "unclip.example", local_only=False)[0] == 200
    for path in ("/gradio_api/file=http://192.0.2.1/x", "/gradio_api/FILE=https://a/x", "/gradio_api/proxy=http://a/"):
        assert asked(path, "localhost")[0] == 403


def test_warnings_of_the_log_hold_no_password(users: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.DEBUG)
    module._read_users(users)
    assert "se:cret" not in caplog.text
