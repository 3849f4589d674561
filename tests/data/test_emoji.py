import hashlib
import io
import json
import os
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unclip.data import emoji, emoji_fetch
from unclip.data.emoji_fetch import Package, cache_dir, fetch, read_members
from unclip.data.emoji_render import Drawing, distinct, draw, render
from unclip.data.emoji_sources import STYLES, Name, Style, read_drawings, read_names
from unclip.data.shards import Shards
from unclip.errors import ConfigError, DataError


def test_pictures_that_look_alike_are_found():
    rng = np.random.default_rng(0)
    thumbs = rng.integers(0, 250, (4, 32, 32, 3), dtype=np.uint8)
    thumbs[1] = thumbs[0]
    thumbs[2] = thumbs[0]
    thumbs[2, :16] += 1  # half of the pixels differ by one: 0.5 on average
    thumbs[3] = thumbs[0] + np.uint8(1)
    assert distinct(thumbs) == [True, False, False, True]


def test_of_two_equal_pictures_the_better_known_name_stays():
    def name(label):
        return Name("1f1fa", label, (), "flags", "country-flag", None)

    labels = ["flag: U.S. Outlying Islands", "flag: United States", "family: man, boy", "family: adult, child", "man"]
    assert [name(label).yields for label in labels] == [True, False, True, False, False]


def test_transparency_shows_white():
    svg = svg_file('<path fill="#000" fill-opacity=".5" d="M0 0h16v32H0z"/>')
    raster = io.BytesIO()
    Image.fromarray(np.array([[[0, 0, 0, 128], [9, 9, 9, 0]]] * 2, np.uint8), "RGBA").resize((64, 64), 0).save(
        raster, "PNG"
    )
    for drawing in (Drawing("svg", svg=svg), Drawing("raster", raster=raster.getvalue())):
        pixels = np.asarray(draw(drawing, 64))
        assert pixels.shape == (64, 64, 3)
        assert abs(int(pixels[32, 8, 0]) - 127) <= 1
        assert pixels[32, 56].tolist() == [255, 255, 255]


def test_a_raster_is_never_enlarged():
    picture = io.BytesIO()
    Image.new("RGBA", (256, 256)).save(picture, "WEBP", lossless=True)
    with pytest.raises(ValueError, match="not enlarged to 1024"):
        draw(Drawing("fluent-3d-1f34e", raster=picture.getvalue()), 1024)


def test_the_bytes_of_a_size_do_not_depend_on_the_other_sizes():
    drawing = Drawing("x", svg=svg_file('<circle cx="16" cy="16" r="9" fill="red"/>'))
    assert render(drawing, [64]).pngs[64] == render(drawing, [64, 256]).pngs[64]


# --- fetching


@pytest.mark.parametrize(
    ("variables", "expected"),
    [({"UNCLIP_CACHE": "/a"}, "/a"), ({"XDG_CACHE_HOME": "/b"}, "/b/unclip"), ({"HOME": "/c"}, "/c/.cache/unclip")],
)
def test_the_cache_folder_follows_the_environment(monkeypatch, variables, expected):
    for name in ("UNCLIP_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache_dir() == Path(expected)


def test_without_npm_the_message_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(DataError, match=r"npm was not found on the PATH.*Install Node\.js.*run the same command again"):
        emoji.write_emoji(tmp_path / "out", cache=tmp_path / "cache")
    assert list(tmp_path.iterdir()) == []


def fake_npm(folder: Path, monkeypatch, script: str) -> Path:
    """Puts a shell script named npm alone on the PATH; it logs each call to the returned file."""
    folder.mkdir()
    calls = folder / "calls"
    npm = folder / "npm"
    npm.write_text(f'#!/bin/sh\necho "$@" >> {calls}\n{script}\n')
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}/usr/bin{os.pathsep}/bin")
    return calls


def test_a_tarball_with_another_checksum_is_refused(monkeypatch, tmp_path):
    package = Package("@scope/name", "1.0.0", hashlib.sha256(b"good").hexdigest())
    calls = fake_npm(tmp_path / "bin", monkeypatch, "printf evil > scope-name-1.0.0.tgz")
    with pytest.raises(DataError, match=f"{hashlib.sha256(b'evil').hexdigest()} but {package.sha256} was expected"):
        fetch(package, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
    assert len(calls.read_text().splitlines()) == 2, "tried once more"
    assert all("--ignore-scripts" in call for call in calls.read_text().splitlines())


def test_a_failing_fetch_is_tried_once_more(monkeypatch, tmp_path):
    package = Package("name", "1.0.0", hashlib.sha256(b"good").hexdigest())
    once = f'[ -e {tmp_path}/again ] || {{ touch {tmp_path}/again; echo "network down" >&2; exit 7; }}'
    calls = fake_npm(tmp_path / "bin", monkeypatch, f"{once}\nprintf good > name-1.0.0.tgz")
    assert fetch(package, tmp_path / "cache").read_bytes() == b"good"
    fetch(package, tmp_path / "cache")
    assert len(calls.read_text().splitlines()) == 2, "the third call took the cached file"


def test_a_damaged_cached_tarball_is_fetched_again(monkeypatch, tmp_path):
    package = Package("name", "1.0.0", hashlib.sha256(b"good").hexdigest())
    (tmp_path / package.filename).write_bytes(b"cut")
    fake_npm(tmp_path / "bin", monkeypatch, "printf good > name-1.0.0.tgz")
    assert fetch(package, tmp_path).read_bytes() == b"good"


def tarball(path: Path, files: dict[str, bytes], kind: bytes = tarfile.REGTYPE) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.type, info.linkname = len(content), kind, "/etc/passwd"
            tar.addfile(info, io.BytesIO(content))
    return path


@pytest.mark.parametrize("name", ["package/../../evil", "/etc/evil"])
def test_members_outside_the_package_are_refused(tmp_path, name):
    with pytest.raises(DataError, match="no plain file inside the package; refused"):
        read_members(tarball(tmp_path / "p.tgz", {"package/icons.json": b"{}", name: b"x"}), ["icons.json"])


def test_links_are_refused(tmp_path):
    with pytest.raises(DataError, match="no plain file"):
        read_members(tarball(tmp_path / "p.tgz", {"package/icons.json": b""}, kind=tarfile.SYMTYPE), ["icons.json"])


def test_a_missing_file_and_a_cut_tarball_are_reported(tmp_path):
    path = tarball(tmp_path / "p.tgz", {"package/a": os.urandom(5000)})
    with pytest.raises(DataError, match=r"holds no 'icons\.json'"):
        read_members(path, ["icons.json"])
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(DataError, match="cannot be read"):
        read_members(path, ["a"])


# --- the whole way, with packages made here


def svg_file(body: str) -> str:
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32">{body}</svg>'


COLOURS = {"1F34E": "red", "1F34F": "green", "1F34B": "yellow", "1F346": "purple", "1F44B": "orange", "1F955": "coral"}


def names_package(path: Path) -> Path:
    labels = {"1F34E": "red apple", "1F34F": "green apple", "1F34B": "lemon", "1F346": "eggplant", "1F955": "carrot"}
    data = [
        {"label": label, "hexcode": code, "tags": ["food"], "group": 4, "subgroup": 42}
        for code, label in labels.items()
    ]
    skins = [{"label": "waving hand: dark skin tone", "hexcode": "1F44B-1F3FF", "tone": 5}]
    skins.append({"label": "handshake: two", "hexcode": "1FAF1-1F3FB-200D-1FAF2-1F3FC", "tone": [1, 2]})
    data.append({"label": "waving hand", "hexcode": "1F44B", "group": 1, "subgroup": 16, "skins": skins})
    data.append({"label": "flag: Belarus", "hexcode": "1F1E7-1F1FE", "group": 9, "subgroup": 98})
    groups = {
        "groups": {"1": "people-body", "4": "food-drink", "9": "flags"},
        "subgroups": {"16": "hand-fingers-open", "42": "food-fruit", "98": "country-flag"},
    }
    files = {"package/en/data.json": data, "package/meta/groups.json": groups}
    return tarball(path, {name: json.dumps(content).encode() for name, content in files.items()})


def iconify_package(path: Path, radius: int) -> Path:
    bodies = {code: f'<circle cx="16" cy="16" r="{radius}" fill="{colour}"/>' for code, colour in COLOURS.items()}
    bodies["1F44B-1F3FF"] = f'<circle cx="16" cy="16" r="{radius}" fill="brown"/>'
    bodies["1F955"] = bodies["1F346"]  # the carrot looks like the eggplant
    bodies["1F1E7-1F1FE"] = '<path fill="red" d="M2 9h28v14H2z"/>'
    icons = {"width": 32, "height": 32, "icons": {f"n{code}": {"body": body} for code, body in bodies.items()}}
    files = {"package/icons.json": icons, "package/chars.json": {code.lower(): f"n{code}" for code in bodies}}
    return tarball(path, {name: json.dumps(content).encode() for name, content in files.items()})


def webp_package(path: Path) -> Path:
    files = {}
    for code, colour in {**COLOURS, "1F1E7-1F1FE": "red"}.items():
        picture = io.BytesIO()
        Image.new("RGBA", (256, 256), colour).save(picture, "WEBP", lossless=True)
        files[f"package/assets/{code.lower()}.webp"] = picture.getvalue()
    return tarball(path, files)


@pytest.fixture
def packages(monkeypatch, tmp_path) -> Path:
    """A cache folder with packages of six emoji and a flag, which stand in for the real ones; no npm can be reached."""
    cache = tmp_path / "cache"
    cache.mkdir()

    def stand_in(style: Style, radius: int) -> Style:
        path = cache / style.package.filename
        webp_package(path) if style.kind == "webp" else iconify_package(path, radius)
        return Style(style.name, pinned(style.package, path), style.kind, style.license, style.credit, style.origin)

    styles = tuple(stand_in(style, 8 + 2 * i) for i, style in enumerate(STYLES))
    names = pinned(emoji.NAMES, names_package(cache / emoji.NAMES.filename))
    monkeypatch.setattr(emoji, "STYLES", styles)
    monkeypatch.setattr(emoji, "NAMES", names)
    monkeypatch.setenv("PATH", "")
    return cache


def pinned(package: Package, path: Path) -> Package:
    return Package(package.name, package.version, hashlib.sha256(path.read_bytes()).hexdigest())


def read_all(folder: Path) -> dict[str, list]:
    splits = sorted(path.parent for path in folder.glob("*/index.json"))
    return {split.name: [shards.read(i) for shards in [Shards(split)] for i in range(len(shards))] for split in splits}


def test_packages_become_shards_at_each_size(packages, tmp_path):
    out = tmp_path / "out"
    counts = emoji.write_emoji(out, sizes=(64, 256, 512), cache=packages, workers=1)
    small, middle, large = (read_all(out / str(size)) for size in (64, 256, 512))
    assert {split: len(samples) for split, samples in small.items()} == counts[64]
    # 7 names in three vector styles without the carrot, a copy; 6 names and no flag in the raster style
    assert sum(counts[64].values()) == 3 * 6 + 6
    assert sum(counts[512].values()) == 3 * 6
    for split, samples in small.items():
        assert [s.key for s in middle[split]] == [s.key for s in samples]
        vectors = [s.key for s in samples if s.meta["style"] != "fluent 3d"]
        assert [s.key for s in large.get(split, [])] == vectors
        for size, others in ((64, samples), (256, middle[split]), (512, large.get(split, []))):
            pictures = [Image.open(io.BytesIO(s.image)) for s in others]
            assert all(picture.size == (size, size) and picture.mode == "RGB" for picture in pictures)
    by_key = {sample.key: sample for samples in small.values() for sample in samples}
    apple = by_key["twemoji-1f34e"]
    assert apple.caption == "a red apple, twemoji style"
    pixels = np.asarray(Image.open(io.BytesIO(apple.image)))
    assert pixels[32, 32].tolist() == [255, 0, 0]
    assert pixels[0, 0].tolist() == [255, 255, 255]
    assert apple.meta == {
        "phrase": "a red apple",
        "style": "twemoji",
        "label": "red apple",
        "tags": ["food"],
        "group": "food-drink",
        "subgroup": "food-fruit",
        "concept": "1f34e",
        "tone": None,
        "source": "@iconify-json/twemoji@1.2.5",
        "license": "CC-BY-4.0",
    }
    assert by_key["noto-1f1e7-1f1fe"].caption == "the flag of Belarus, noto style"
    assert not [key for key in by_key if key.startswith("fluent-3d-1f1e7")]
    assert not [s for s in by_key.values() if s.meta["tone"]]


def test_tones_are_kept_on_request_and_two_tone_couples_never(packages, tmp_path):
    emoji.write_emoji(tmp_path / "out", sizes=(64,), tones=True, cache=packages, workers=1)
    samples = [sample for split in read_all(tmp_path / "out" / "64").values() for sample in split]
    toned = {sample.key: sample.caption for sample in samples if sample.meta["tone"] == 5}
    assert toned["noto-1f44b-1f3ff"] == "a waving hand with dark skin tone, noto style"
    assert len(toned) == 3
    assert {sample.meta["tone"] for sample in samples} == {None, 5}


def test_the_credits_stand_beside_the_shards(packages, tmp_path):
    emoji.write_emoji(tmp_path / "out", sizes=(64,), cache=packages, workers=1)
    text = (tmp_path / "out" / "ATTRIBUTION.md").read_text()
    for style in STYLES:
        assert style.package.spec in text
        assert style.credit in text
    links = re.findall(r"\(LICENSES/([^)]+)\)", text)
    assert sorted(set(links)) == sorted(path.name for path in (tmp_path / "out" / "LICENSES").iterdir())
    assert "Apache License" in (tmp_path / "out" / "LICENSES" / "Apache-2.0.txt").read_text()


def test_two_processes_write_the_same_bytes_as_one(packages, tmp_path):
    for workers in (1, 2):
        emoji.write_emoji(tmp_path / str(workers), sizes=(64,), cache=packages, workers=workers)
    tars = [{p.relative_to(tmp_path / w): p.read_bytes() for p in (tmp_path / w).rglob("*.tar")} for w in ("1", "2")]
    assert tars[0]
    assert tars[0] == tars[1]


def test_a_second_run_adds_only_what_is_missing(packages, tmp_path, monkeypatch):
    out = tmp_path / "out"
    first = emoji.write_emoji(out, sizes=(64,), cache=packages, workers=1)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.tar")}
    both = emoji.write_emoji(out, sizes=(64, 96), cache=packages, workers=1)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert both == {64: first[64], 96: first[64]}
    monkeypatch.setattr(emoji, "render", None)  # a third run draws nothing
    assert emoji.write_emoji(out, sizes=(64, 96), cache=packages, workers=1) == both


def test_other_arguments_do_not_mix_with_what_is_there(packages, tmp_path):
    emoji.write_emoji(tmp_path / "out", sizes=(64,), cache=packages, workers=1)
    with pytest.raises(DataError, match="made with another seed, tones; delete it or choose another --out"):
        emoji.write_emoji(tmp_path / "out", sizes=(64,), seed=1, tones=True, cache=packages, workers=1)


def test_an_interrupted_run_is_not_taken_for_complete(packages, tmp_path, monkeypatch):
    out = tmp_path / "out"
    write = emoji.ShardWriter.write

    def stop_late(writer, key, *sample):
        if writer.split_dir.name != "train":
            raise KeyboardInterrupt
        write(writer, key, *sample)

    monkeypatch.setattr(emoji.ShardWriter, "write", stop_late)
    with pytest.raises(KeyboardInterrupt):
        emoji.write_emoji(out, sizes=(64,), cache=packages, workers=1)
    assert not (out / "64").exists()
    monkeypatch.setattr(emoji.ShardWriter, "write", write)
    counts = emoji.write_emoji(out, sizes=(64,), cache=packages, workers=1)
    assert sum(counts[64].values()) == 24
    assert sorted(path.name for path in out.iterdir()) == ["64", "ATTRIBUTION.md", "LICENSES"]


def test_the_seed_changes_the_order_and_not_the_splits(packages, tmp_path):
    for seed in (0, 1):
        emoji.write_emoji(tmp_path / str(seed), sizes=(64,), seed=seed, cache=packages, workers=1)
    keys = [{name: [s.key for s in samples] for name, samples in read_all(tmp_path / s / "64").items()} for s in "01"]
    assert keys[0] != keys[1]
    assert {name: sorted(found) for name, found in keys[0].items()} == {n: sorted(f) for n, f in keys[1].items()}


@pytest.mark.parametrize("sizes", [(), (64, 64), (0,)])
def test_bad_sizes_are_refused(tmp_path, sizes):
    with pytest.raises(ConfigError, match="different positive numbers"):
        emoji.write_emoji(tmp_path, sizes=sizes)


@pytest.mark.slow
def test_the_real_packages(tmp_path):
    names = read_names(fetch(emoji.NAMES, cache_dir()))
    assert names["1f34e"].label == "red apple"
    assert len(names) > 3500
    counts = {}
    for style in STYLES:
        drawings = read_drawings(style, fetch(style.package, cache_dir()), names)
        counts[style.name] = len(drawings)
        assert np.asarray(draw(drawings["1f34e"], 64)).mean((0, 1)).argmax() == 0, "a red apple is red"
    assert all(count > 3000 for count in counts.values()), counts
    assert emoji_fetch.cache_dir().is_dir()
