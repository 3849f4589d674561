"""The documentation as a site: mkdocs builds it strictly, all pages are in it, and its reference shows the public names."""

import html
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from doc_pages import ROOT


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)],
        cwd=ROOT, capture_output=True, text=True, timeout=540, check=False, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def in_navigation() -> list[str]:
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    sections = [pages for section in settings["nav"] for pages in section.values()]
    return [page for pages in sections for page in ([pages] if isinstance(pages, str) else pages)]


def test_the_navigation_holds_every_page_once():
    pages = {path.name for path in (ROOT / "docs").glob("*.md")}
    found = in_navigation()
    assert sorted(found) == sorted(pages)


def test_every_page_is_built_and_linked(site: Path):
    home = (site / "index.html").read_text()
    for path in (ROOT / "docs").glob("*.md"):
        page = path.with_suffix(".html").name
        assert (site / page).exists()
        assert f'href="{page}"' in home or page == "index.html", page


def test_the_reference_shows_what_may_be_relied_on(site: Path):
    page = (site / "api.html").read_text()
    for name in (
        *(f"unclip.pipeline.UnCLIP.{method}" for method in ("load", "generate", "vary", "edit", "embed_image")),
        *("unclip.artifact.load", "unclip.artifact.Manifest", "unclip.train.train"),
        *(
            "unclip.config.TrainerConfig",
            "unclip.models.decoder.DecoderConfig",
            "unclip.errors.UnclipError",
            "unclip.recipe.from_png",
        ),
    ):
        assert f'id="{name}"' in page, name
    text = html.unescape(re.sub(r"<[^>]+>", "", page))
    assert "the same seed gives the same picture in any batch" in " ".join(text.split())
    assert "accumulate: int = 1" in text, "settings with their defaults"
    assert not re.findall(r":(?:class|func|meth):", text)


def test_pages_ask_no_other_host(site: Path):
    for path in site.glob("*.html"):
        fetched = re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=\"?(https?:[^\" >]+)", path.read_text())
        assert not [url for url in fetched if "canonical" not in url], path.name
