"""The page end to end, in a real headless Chromium; screenshots stay in the folder screenshots/ui."""

import http.client
import io
import json
import re
import shutil
import signal
import socket
import subprocess
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from smooth_chain import png, write_smooth_chain
from tests_support import command, environment, lacks

from unclip.pipeline import UnCLIP
from unclip.recipe import from_png

pytestmark = pytest.mark.timeout(400)
SCREENSHOTS = Path(__file__).parents[2] / "screenshots" / "ui"
PATIENCE = 60_000  # ms; a loaded machine is slow


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("chain") / "runs"
    write_smooth_chain(runs)
    rows = [{"step": s, "train/mse": 1.0 / s} for s in (10, 20, 40)]
    (runs / "decoder" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (runs / "decoder" / "config.yaml").write_text("secret: settings of this run\n")
    return runs


class Server:
    def __init__(self, runs: Path, *arguments: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = runs.parent / f"ui-{self.port}.log"
        self.files = runs.parent / f"files-{self.port}"
        self.files.mkdir()
        surroundings = {**environment(), "TMPDIR": str(self.files), "GRADIO_ALLOWED_PATHS": "/"}
        surroundings |= {"HTTP_PROXY": "http://127.0.0.1:9", "NO_PROXY": ""}  # nobody is there
        given = [command("unclip"), "ui", "--from", str(runs), "--port", str(self.port), *arguments]
        with self.log.open("w") as file:
            self.process = subprocess.Popen(given, stderr=file, stdout=file, cwd=runs, env=surroundings)
        limit = time.monotonic() + 180
        while "in a browser" not in self.log.read_text():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < limit, "the server does not start"
            time.sleep(0.1)

    def get(
        self, path: str, method: str = "GET", body: str | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, bytes]:
        """The answer to exactly this path; http.client does not tidy it up."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request(method, path, body, {"Content-Type": "application/json", **(headers or {})})
        response = connection.getresponse()
        return response.status, response.read()

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


@pytest.fixture(scope="module")
def server(runs: Path, browser: Any) -> Iterator[Server]:
    """One server for the module; at its end it has written nothing outside of its temporary folder, which is gone."""
    before = sorted(runs.rglob("*"))
    found = Server(runs)
    yield found
    assert found.stop() == 0, found.log.read_text()
    assert sorted(runs.rglob("*")) == before
    assert list(found.files.iterdir()) == []


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        lacks("chromium", "playwright is not installed: pip install playwright")
    path = shutil.which("chromium")
    if path is None:
        lacks("chromium", "chromium is not installed: apt-get install chromium")
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield found
        found.close()


@contextmanager
def visit(browser: Any, server: Server) -> Iterator[Any]:
    """A page of a visitor of its own. It must not have asked any other host for anything, nor thrown an error."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True)
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    asked, thrown = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: thrown.append(str(error)))
    try:
        page.goto(server.url)
        page.wait_for_selector("#header h1")
        yield page
    finally:
        context.close()
    elsewhere = [url for url in asked if not url.startswith((server.url, "data:", "blob:"))]
    assert elsewhere == []
    assert thrown == []


def open_tab(page: Any, name: str) -> None:
    page.get_by_role("tab", name=name, exact=True).click()


def fill(page: Any, elem_id: str, value: str) -> None:
    page.locator(f"#{elem_id} textarea, #{elem_id} input[type=number], #{elem_id} input[type=text]").first.fill(value)


def wait_for(page: Any, tab: str, text: str) -> str:
    """What the status of a tab says once it has ``text`` in it."""
    status = page.locator(f"#{tab}-status")
    status.filter(has_text=re.compile(text)).wait_for()
    return status.inner_text()


def pictures(page: Any, tab: str) -> list[bytes]:
    """The files in the tab's gallery, as the page loads them."""
    sources = [i.get_attribute("src") for i in page.locator(f"#{tab}-gallery .thumbnail-item img").all()]
    return [page.request.get(source).body() for source in sources]


def take(page: Any, name: str) -> None:
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"{name}.png", full_page=True)


def pixels(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).astype(float)


def roughness(content: bytes) -> float:
    """Mean difference of neighbouring pixels; 85 for uniform noise."""
    return float(np.abs(np.diff(pixels(content), axis=1)).mean())


def test_a_caption_becomes_a_picture_that_can_be_repeated(browser: Any, server: Server, runs: Path):
    with visit(browser, server) as page:
        fill(page, "generate-caption", "a red cube")
        fill(page, "generate-seed", "3")
        page.locator("#generate-start").click()
        assert "4 pictures" in wait_for(page, "generate", "Done")
        found = pictures(page, "generate")
        drawn = list(UnCLIP.load(runs).generate(["a red cube"], num=4, seed=3, batch_size=8))
        assert len(found) == 4
        for content, expected in zip(found, drawn, strict=True):
            assert np.abs(pixels(content) - expected.image.permute(1, 2, 0).numpy()).max() <= 2
            assert roughness(content) < 15, "not noise"
            assert from_png(content).seed == expected.seed, "the file carries what repeats it"
        page.locator("#generate-gallery .thumbnail-item").nth(1).click()
        page.locator("#generate-details", has_text="seed").wait_for()
        details = page.locator("#generate-details").inner_text()
        assert re.search(r"caption\s+a red cube", details)
        assert re.search(r"seed\s+4", details)
        with page.expect_download() as download:
            page.locator("#generate-gallery button[aria-label='Download'], #generate-gallery a[download]").first.click()
        assert Path(download.value.path()).read_bytes() == found[1]
        take(page, "generate")
        page.locator("#generate-repeat").click()
        said = wait_for(page, "generate", "5 pictures")
        assert "the same picture, bit for bit" in said
        again = page.locator("#generate-gallery .thumbnail-item img").last.get_attribute("src")
        assert (pixels(page.request.get(again).body()) == pixels(found[1])).all()


def test_a_long_run_is_cancelled_and_the_next_one_works(browser: Any, server: Server):
    with visit(browser, server) as page:
        fill(page, "generate-caption", "a blue cone")
        page.locator("#generate-advanced button").first.click()
        fill(page, "generate-steps", "1000")
        page.locator("#generate-start").click()
        assert "of" in wait_for(page, "generate", r"step [1-9]\d* of 4\d\d\d")
        assert page.locator("#generate-status progress").count() == 1
        take(page, "progress")
        page.locator("#generate-cancel").click()
        wait_for(page, "generate", "Cancelled")
        assert pictures(page, "generate") == []
        fill(page, "generate-steps", "2")
        page.locator("#generate-start").click()
        wait_for(page, "generate", "Done: 4 pictures")


def test_bad_input_is_told_in_words(browser: Any, server: Server):
    with visit(browser, server) as page:
        page.locator("#generate-start").click()
        assert "the caption is empty; say what the picture shows" in wait_for(page, "generate", "empty")
        fill(page, "generate-caption", "a {{value}} ${1 + 1} <b>cube</b>")
        page.locator("#generate-start").click()
        wait_for(page, "generate", "Done")
        page.locator("#generate-gallery .thumbnail-item").first.click()
        details = page.locator("#generate-details").filter(has_text="a {{value}} ${1 + 1} <b>cube</b>")
        details.wait_for()  # shown as it is: neither a template nor a tag
        fill(page, "generate-caption", "red " * 2500)
        page.locator("#generate-start").click()
        wait_for(page, "generate", r"Done[\s\S]*only \d+ of 25\d\d tokens are read of: red red")
        open_tab(page, "Vary")
        page.locator("#vary-start").click()
        assert "the picture is missing; choose a PNG, JPEG or WebP" in wait_for(page, "vary", "missing")
        corrupt = {"name": "cat.png", "mimeType": "image/png", "buffer": png((9, 9, 9))[:50]}
        page.locator("#vary-picture input[type=file]").set_input_files(corrupt)
        page.locator("#vary-picture img").wait_for(state="attached")
        page.locator("#vary-start").click()
        wait_for(
            page, "vary", "the picture (is damaged or no picture|cannot be read).*; choose a PNG, JPEG or WebP file"
        )
        take(page, "corrupt")
        status, _ = server.get("/")
        assert status == 200


def test_pictures_are_varied_edited_and_interpolated(browser: Any, server: Server):
    red, blue = ({"name": "a.png", "mimeType": "image/png", "buffer": png(c)} for c in ((220, 30, 30), (30, 30, 220)))
    with visit(browser, server) as page:
        open_tab(page, "Vary")
        page.locator("#vary-picture input[type=file]").set_input_files(red)
        page.locator("#vary-picture img").wait_for()
        page.locator("#vary-start").click()
        wait_for(page, "vary", "Done: 4 pictures")
        assert all(pixels(content).shape == (16, 16, 3) for content in pictures(page, "vary"))
        take(page, "vary")
        open_tab(page, "Edit")
        page.locator("#edit-picture input[type=file]").set_input_files(red)
        page.locator("#edit-picture img").wait_for()
        fill(page, "edit-caption", "a blue cone")
        page.locator("#edit-start").click()
        wait_for(page, "edit", "Done: 5 pictures")
        titles = page.locator("#edit-gallery .caption-label").all_inner_texts()
        assert [re.search(r"θ = ([\d.]+)", title)[1] for title in titles] == ["0", "0.1", "0.2", "0.3", "0.4"]
        take(page, "edit")
        open_tab(page, "Interpolate")
        page.locator("#interpolate-first input[type=file]").set_input_files(red)
        page.locator("#interpolate-last input[type=file]").set_input_files(blue)
        page.locator("#interpolate-last img").wait_for()
        page.locator("#interpolate-start").click()
        wait_for(page, "interpolate", "Done: 8 pictures")
        take(page, "interpolate")


def test_what_is_painted_is_drawn_anew(browser: Any, server: Server):
    source = {"name": "a.png", "mimeType": "image/png", "buffer": png((200, 200, 30), (64, 64))}
    with visit(browser, server) as page:
        open_tab(page, "Inpaint")
        page.locator("#inpaint-start").click()
        assert "there is no picture yet" in wait_for(page, "inpaint", "no picture")
        page.locator("#inpaint-drawing input[type=file]").first.set_input_files(source)
        page.locator("#inpaint-drawing canvas").first.wait_for()
        page.wait_for_timeout(1000)
        box = page.locator("#inpaint-drawing canvas").first.bounding_box()
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        page.mouse.move(x - 6, y - 6)
        page.mouse.down()
        page.mouse.move(x + 6, y + 6, steps=6)
        page.mouse.up()
        page.wait_for_timeout(1000)
        page.locator("#inpaint-start").click()
        wait_for(page, "inpaint", "Done: 4 pictures")
        take(page, "inpaint")
        for content in pictures(page, "inpaint"):
            changed = np.abs(pixels(content).astype(int) - (200, 200, 30)).max(axis=-1) > 2
            height, width = changed.shape
            assert changed[height // 2, width // 2], "what was painted is drawn anew"
            edges = np.concatenate([changed[0], changed[-1], changed[:, 0], changed[:, -1]])
            assert not edges.any(), "what was not painted stays as it was"


def test_two_users_at_once_get_their_own_pictures(browser: Any, server: Server):
    with visit(browser, server) as ada, visit(browser, server) as bob:
        for page, caption in ((ada, "a green ring"), (bob, "a blue cone")):
            fill(page, "generate-caption", caption)
            page.locator("#generate-advanced button").first.click()
        fill(ada, "generate-steps", "200")
        fill(bob, "generate-steps", "3")
        ada.locator("#generate-start").click()
        wait_for(ada, "generate", "Drawing")
        bob.locator("#generate-start").click()
        wait_for(bob, "generate", "Waiting: 1 request before yours|Drawing|Done")
        for page, caption in ((ada, "a green ring"), (bob, "a blue cone")):
            wait_for(page, "generate", "Done: 4 pictures")
            assert {from_png(content).caption for content in pictures(page, "generate")} == {caption}


def test_who_leaves_while_pictures_are_drawn_keeps_nobody_waiting_and_leaves_no_file(browser: Any, server: Server):
    with visit(browser, server) as ada, visit(browser, server) as bob:
        before = set(server.files.rglob("unclip-*.png"))
        fill(ada, "generate-caption", "a green ring")
        ada.locator("#generate-start").click()
        wait_for(ada, "generate", "Done: 4 pictures")
        hers = set(server.files.rglob("unclip-*.png")) - before
        assert len(hers) == 4
        open_tab(ada, "Vary")
        ada.locator("#vary-picture input[type=file]").set_input_files(
            {"name": "a.png", "mimeType": "image/png", "buffer": png((30, 200, 30))}
        )
        ada.locator("#vary-picture img").wait_for(state="attached")
        ada.locator("#vary-advanced button").first.click()
        fill(ada, "vary-steps", "1000")
        ada.locator("#vary-start").click()
        began = time.monotonic()
        step, total = map(int, re.findall(r"step (\d+) of (\d+)", wait_for(ada, "vary", r"step [1-9]\d* of"))[0])
        left = (time.monotonic() - began) * (total - step) / step
        ada.close()
        gone = time.monotonic()
        fill(bob, "generate-caption", "a blue cone")
        bob.locator("#generate-start").click()
        wait_for(bob, "generate", "Done: 4 pictures")
        assert time.monotonic() - gone < left / 2
        assert not any(path.exists() for path in hers)


def test_runs_are_shown_with_curves_and_lineage(browser: Any, server: Server, runs: Path):
    with visit(browser, server) as page:
        open_tab(page, "Runs")
        page.locator("#runs-report", has_text="train/mse: 0.1 to 0.025 in 40 steps").wait_for()
        graph = page.locator("#runs-lineage").inner_text()
        for stage in ("clip", "prior", "decoder"):
            digest = json.loads((runs / stage / "artifact" / "manifest.json").read_text())["hash"]
            assert digest[:12] in graph
        take(page, "runs")


def test_no_file_of_the_server_can_be_read(server: Server, runs: Path):
    config = runs / "decoder" / "config.yaml"
    up = "../" * 12
    for target in ("/etc/passwd", str(config), "decoder/config.yaml", str(server.log), "/proc/self/environ"):
        for path in (target, up + target.lstrip("/"), target.replace("/", "%2f"), f"%2e%2e/{target}", f"/./{target}"):
            for route in ("/gradio_api/file=", "/file=", "/gradio_api/file/", "/static/", "/assets/", "/svelte/", "/"):
                status, content = server.get(route + path)
                assert b"root:" not in content, route + path
                assert b"secret: settings" not in content, route + path
                assert b"HOME=" not in content, route + path
                assert status >= 400 or route == "/", (route + path, status)
    assert server.get("/gradio_api/file=http://127.0.0.1:1/x")[0] == 403


def test_no_file_of_the_server_can_be_sent_as_an_upload(server: Server, runs: Path):
    """As a client of its own would: the picture of Vary is a path on the server."""
    config = json.loads(server.get("/config")[1])
    ids = {part["props"].get("elem_id"): part["id"] for part in config["components"]}
    vary = next(d for d in config["dependencies"] if [ids["vary-start"], "click"] in d["targets"])
    file = {"path": str(runs / "decoder" / "config.yaml"), "meta": {"_type": "gradio.FileData"}}
    data = [file, "", 1, 1, 0, None, None]
    assert len(vary["inputs"]) == len(data)
    body = {"data": data, "fn_index": vary["id"], "session_hash": "abcdef", "trigger_id": ids["vary-start"]}
    server.get("/gradio_api/queue/join", "POST", json.dumps(body))
    _, said = server.get("/gradio_api/queue/data?session_hash=abcdef")
    assert b"secret: settings" not in said
    assert b'"success":false' in said.replace(b" ", b"") or b"not a file that was uploaded here" in said


def test_who_is_not_named_stays_outside(runs: Path):
    users = runs.parent / "users.txt"
    users.write_text("ada:lovelace\n")
    users.chmod(0o600)
    server = Server(runs, "--host", "0.0.0.0", "--auth-file", str(users))
    try:
        assert server.get("/config")[0] == 401
        assert server.get("/gradio_api/file=/etc/passwd")[0] == 401
        assert login(server, "ada", "wrong") == (400, "")
        status, cookie = login(server, "ada", "lovelace")
        assert status == 200
        assert server.get("/config", headers={"Cookie": cookie})[0] == 200
        assert server.get("/gradio_api/file=/etc/passwd", headers={"Cookie": cookie})[0] == 403
    finally:
        assert server.stop() == 0
    assert "lovelace" not in server.log.read_text()


def login(server: Server, name: str, password: str) -> tuple[int, str]:
    """Status and cookies of an attempt."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    form = urllib.parse.urlencode({"username": name, "password": password})
    connection.request("POST", "/login", form, {"Content-Type": "application/x-www-form-urlencoded"})
    response = connection.getresponse()
    cookies = [value.split(";")[0] for key, value in response.getheaders() if key.lower() == "set-cookie"]
    return response.status, "; ".join(cookies)


def test_too_large_an_upload_is_refused(server: Server):
    boundary = "----x"
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'.encode()
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    body = head + b"\0" * 21_000_000 + f"\r\n--{boundary}--\r\n".encode()
    headers = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    connection.request("POST", "/gradio_api/upload", body, headers)
    response = connection.getresponse()
    assert response.status == 413
    assert b"maximum allowed size" in response.read()
    assert server.get("/")[0] == 200
