"""The drawing commands on a tiny chain of artifacts."""

import base64
import io
import json
import re
import shutil
import struct
import weakref
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tiny_chain import write_tiny_chain
from typer.testing import CliRunner

from unclip import UnCLIP as FromTop
from unclip import artifact
from unclip.cli.app import app
from unclip.cli.pictures import ddim_sampling
from unclip.data.shapes import write_shapes
from unclip.data.shards import Shards
from unclip.errors import ArtifactError, ConfigError, DataError
from unclip.evaluation.sheet import draw_table
from unclip.pipeline import Memory, UnCLIP

FAST = ["--decoder-steps", "3", "--upsampler-steps", "2"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """runs, two pictures, a mask and files of lines."""
    root = tmp_path_factory.mktemp("draw")
    write_tiny_chain(root / "runs")
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    for name, picture in zip("ab", pixels, strict=True):
        Image.fromarray(picture).save(root / f"{name}.png")
    mask = np.zeros((32, 32), np.uint8)
    mask[:, :10] = 255
    Image.fromarray(mask).save(root / "mask.png")
    (root / "captions.txt").write_text("a red cube\n\na blue sphere\n")
    return root


def run(place: Path, *arguments: str, out: str) -> str:
    """One command in this process; paths are those below ``place``."""
    result = CliRunner().invoke(
        app, [*_located(place, arguments), "--from", str(place / "runs"), "--out", str(place / out)]
    )
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def _located(place: Path, arguments: tuple[str, ...]) -> list[str]:
    return [str(place / a) if a.endswith((".png", ".txt")) else a for a in arguments]


def files(place: Path, out: str) -> list[str]:
    return sorted(path.name for path in (place / out).iterdir())


@pytest.mark.parametrize(
    ("arguments", "count", "more"),
    [
        (["generate", "--prompts", "captions.txt", "--num", "2"], 4, []),
        (["generate", "a cube", "--negative", "a sphere", "--num", "1", "--prior-sampler", "ancestral"], 1, []),
        (["vary", "a.png", "b.png", "--num", "2", "--eta", "0.5"], 4, []),
        (["vary", "a.png", "b.png", "--num", "1", "--prompts", "captions.txt"], 2, []),
        (["interpolate", "a.png", "b.png", "a.png", "--num", "3"], 5, ["interpolation.gif", "interpolation.mp4"]),
        (["interpolate", "--prompts", "captions.txt", "--num", "3"], 3, ["interpolation.gif", "interpolation.mp4"]),
        (["edit", "a.png", "a blue cube", "--num", "2", "--theta", "0.4", "--base", ""], 2, []),
        (["edit", "a.png", "--prompts", "captions.txt", "--num", "2"], 4, []),
        (["mix", "a.png", "a blue cube", "--weights", "0.2,0.8", "--num", "1"], 2, []),
        (["inpaint", "a.png", "--mask", "mask.png", "--num", "1", "--num-resamples", "2", "--jump-length", "1"], 1, []),
        (["inpaint", "a.png", "a cube", "--mask", "mask.png", "--num", "2"], 2, []),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) and value else "",
)
def test_every_command_writes_pictures_that_repeat_bit_for_bit(place: Path, arguments: list[str], count: int, more):
    out = re.sub(r"\W+", "-", " ".join(arguments))
    told = json.loads(run(place, *arguments, *FAST, "--json", out=out))
    assert len(told["pictures"]) == count
    assert (told["width"], told["height"]) == (32, 32)
    assert files(place, out) == sorted([*(Path(p["file"]).name for p in told["pictures"]), "sheet.png", *more])
    last = Path(told["pictures"][-1]["file"])
    assert told["pictures"][-1]["operation"] == arguments[0]
    assert str(place) not in json.dumps({**Image.open(last).info, "icc_profile": ""})
    again = json.loads(run(place, "repeat", str(last), "--json", out="again.png"))
    assert again["largest_difference"] == 0
    assert (np.asarray(Image.open(place / "again.png")) == np.asarray(Image.open(last))).all()
    assert Image.open(place / "again.png").info == Image.open(last).info


def test_artifacts_without_their_runs_make_a_chain(place: Path, tmp_path: Path):
    for stage in ("clip", "prior", "decoder", "upsampler"):
        shutil.copytree(place / "runs" / stage / "artifact", tmp_path / stage)
    assert UnCLIP.load(tmp_path).size == UnCLIP.load(place / "runs").size == 32


def test_films_show_every_frame(place: Path):
    av = pytest.importorskip("av")
    run(place, "interpolate", "a.png", "b.png", "--num", "4", "--size", "24x16", "--seconds", "1", *FAST, out="film")
    with Image.open(place / "film" / "interpolation.gif") as gif:
        assert (gif.size, gif.n_frames) == ((48, 32), 6), "there and back"
    with av.open(str(place / "film" / "interpolation.mp4")) as film:
        frames = [frame.to_ndarray(format="rgb24") for frame in film.decode(video=0)]
    assert len(frames) == 4
    assert frames[0].shape == (256, 384, 3)
    stills = sorted((place / "film").glob("0*.png"))
    for frame, still in zip(frames, stills, strict=True):
        large = np.asarray(Image.open(still)).repeat(8, axis=0).repeat(8, axis=1)
        assert np.abs(frame.astype(int) - large).mean() < 12


def test_without_pyav_there_is_a_gif_and_a_word(tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture):
    from unclip.cli import film

    monkeypatch.setattr(film.importlib.util, "find_spec", lambda name: None)
    frames = [torch.full((3, 8, 8), value, dtype=torch.uint8) for value in (0, 100, 200)]
    assert film.write_films(frames, tmp_path / "interpolation", rate=4) == [tmp_path / "interpolation.gif"]
    assert "no interpolation.mp4: it needs `pip install unclip[video]`" in capsys.readouterr().err
    with Image.open(tmp_path / "interpolation.gif") as gif:
        assert (gif.n_frames, gif.info["duration"]) == (4, 250)


def test_stages_can_be_left_out(place: Path):
    told = json.loads(run(place, "generate", "a cube", "--num", "1", "--stop-after", "decoder", "--json", out="base"))
    assert (told["width"], told["height"]) == (16, 16)
    told = json.loads(run(place, "vary", "a.png", "--num", "1", *FAST, "--stop-after", "upsampler", "--json", out="up"))
    assert told["width"] == 32
    told = json.loads(run(place, "generate", "a", "b", "--num", "2", "--stop-after", "prior", "--json", out="prior"))
    found = np.load(place / "prior" / "image_emb.npy")
    assert found.shape == (4, 256)
    assert [(row["caption"], row["seed"]) for row in told["rows"]] == [("a", 0), ("a", 1), ("b", 0), ("b", 1)]
    chain = UnCLIP.load(place / "runs")
    np.testing.assert_array_equal(found, chain.sample_embeddings(["a", "b"], num=2).numpy())


def test_sampling_options_are_obeyed_and_recorded(place: Path):
    options = ["--decoder-sampler", "dpmpp_2m", "--decoder-guidance", "1.5", "--prior-steps", "2", "--candidates", "3"]
    told = json.loads(
        run(place, "generate", "a", "--num", "1", *FAST, *options, "--size", "24x16", "--json", out="how")
    )
    how = json.loads(Image.open(told["pictures"][0]["file"]).info["unclip"])["repeat"]["how"]
    assert how["decoder"]["sampler"] == {**how["decoder"]["sampler"], "name": "dpmpp_2m", "num_steps": 3, "eta": None}
    assert how["decoder"]["guidance"]["scale"] == 1.5
    assert (how["prior"]["sampler"]["num_steps"], how["prior"]["num_candidates"]) == (2, 3)
    assert how["upsamplers"]["upsampler"]["sampler"]["num_steps"] == 2
    assert (told["width"], told["height"]) == (48, 32)


def test_one_stage_at_a_time_draws_the_same(place: Path):
    one, all_ = (UnCLIP.load(place / "runs", keep_in_memory=memory) for memory in (Memory.one, Memory.all))
    assert FromTop is UnCLIP
    for batch_size in (2, 8):
        pairs = zip(*(c.generate(["a", "a b c"], num=2, batch_size=batch_size) for c in (one, all_)), strict=True)
        for mine, theirs in pairs:
            assert (mine.image.int() - theirs.image.int()).abs().float().mean() <= 1
    held = one.models._stages._last  # type: ignore[attr-defined]
    assert held is not None
    assert held[0] == "upsampler", "only the last stage is held"


def test_one_stage_at_a_time_means_one_while_loading_too(place: Path, monkeypatch: pytest.MonkeyPatch):
    alive: list[weakref.ref[torch.nn.Module]] = []
    load = artifact.load

    def watched(folder: Path, kind: str | None = None):
        assert not any(model() is not None for model in alive), "the stage before is still in memory"
        found = load(folder, kind=kind)
        alive.append(weakref.ref(found[0]))
        return found

    monkeypatch.setattr("unclip.loading.artifact.load", watched)
    assert len(list(UnCLIP.load(place / "runs", keep_in_memory=Memory.one).generate(["a"], num=1))) == 1
    assert len(alive) >= 8, "each is read for its settings and to draw"


def test_upsamplers_may_be_named_by_their_size(place: Path, tmp_path: Path):
    shutil.copytree(place / "runs", tmp_path / "runs", symlinks=True)
    (tmp_path / "runs" / "upsampler").rename(tmp_path / "runs" / "upsampler-32")
    chain = UnCLIP.load(tmp_path / "runs")
    assert chain.upsamplers == ["upsampler-32"]
    assert next(chain.generate(["a"])).image.shape == (3, 32, 32)
    names = ("upsampler-256", "upsampler2", "upsampler_1024", "upsampler", "clip")
    assert [artifact.kind_named(name) for name in names] == ["upsampler"] * 4 + ["clip"]


def test_a_stage_that_changes_meanwhile_is_noticed(tmp_path: Path):
    chain = UnCLIP.load(write_tiny_chain(tmp_path / "runs"), keep_in_memory=Memory.one)
    model, manifest = artifact.load(tmp_path / "runs" / "prior")
    next(model.parameters()).add_(1)
    artifact.save(tmp_path / "runs" / "prior", model, manifest)
    with pytest.raises(ArtifactError, match="prior was trained on while it was in use; load the stages again"):
        list(chain.generate(["a"]))


def huge_png(path: Path) -> None:
    """A small file that claims to hold 90 megapixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 10_000, 9_000, 8, 2, 0, 0, 0)
    chunks = [header, b"IDAT" + zlib.compress(bytes(100))]
    written = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(written))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            ["generate", "a", "--size", "32"],
            ConfigError,
            "--size 32 is not WIDTHxHEIGHT in pixels of the decoder, such as",
        ),
        (
            ["generate", "a", "--size", "15x16"],
            ConfigError,
            "a size of 15x16 is not possible: both must be multiples of 2",
        ),
        (
            ["generate", "a", "--stop-after", "nothing"],
            ConfigError,
            "no stage nothing to stop after; choose decoder, upsa",
        ),
        (
            ["generate", "a", "--decoder-sampler", "dimm"],
            ConfigError,
            "there is no sampler dimm; choose one of ancestral,",
        ),
        (
            ["generate", "a", "--decoder-sampler", "analytic"],
            ConfigError,
            "the decoder: .*analytic is for diffusion priors",
        ),
        (["generate", "a", "--decoder-guidance", "-1"], ConfigError, "the decoder: .*scale"),
        (["generate", "a", ""], ConfigError, "caption 2 of 2 is empty; say what the picture shows"),
        (["generate", "--prompts", "latin.txt"], ConfigError, "latin.txt is not text in UTF-8 .*; save it as such"),
        (["generate", "a", "--stop-after", "decoder", "--upsampler-steps", "2"], ConfigError, "no upsampler runs here"),
        (
            ["generate", "a", "--stop-after", "prior", "--size", "16x16"],
            ConfigError,
            "--size is not for --stop-after prior",
        ),
        (["generate", "a", "--stop-after", "prior", "--decoder-steps", "2"], ConfigError, "--decoder-steps is not for"),
        (["edit", "a.png", "a cube", "a photo"], ConfigError, "the caption and the base caption are the same to CLIP"),
        (["inpaint", "a.png", "--mask", "a.png", "a cube", ""], ConfigError, "caption 1 of 1 is empty"),
        (["inpaint", "a.png", "--mask", "a.png", "--candidates", "3"], ConfigError, "the prior draws nothing"),
        (["generate", "a", "--precision", "fp8"], ConfigError, "--precision fp8 is not one of fp32, bf16"),
        (["generate", "a", "--keep-in-memory", "two"], ConfigError, "--keep-in-memory two is not one of all, one"),
        (["vary", "a.png", "--stop-after", "prior"], ConfigError, "--stop-after prior is for `unclip generate`"),
        (["vary", "a.png", "--prompts", "captions.txt"], ConfigError, "2 captions for 1 pictures; give one for each"),
        (
            ["vary", "cut.png"],
            DataError,
            r"cut.png: the picture cannot be decoded .*; give a picture as png, jpg or webp",
        ),
        (["vary", "text.png"], DataError, r"text.png: the picture cannot be decoded"),
        (["vary", "huge.png"], DataError, r"huge.png: .*90 megapixels, more than 80: make it smaller"),
        (["interpolate", "a.png"], ConfigError, "1 pictures and captions are too few to go"),
        (["interpolate", "a.png", "b.png", "--candidates", "3"], ConfigError, "the prior draws nothing"),
        (["edit", "a.png"], ConfigError, 'say what the picture is to become, for example "a blue cube"'),
        (["edit", "a.png", "a cube", "--theta", "1.5"], ConfigError, r"theta is 1.5; it must lie in \[0, 1\]"),
        (
            ["mix", "a.png", "a cube", "--weights", "half"],
            ConfigError,
            "--weights half is not a list of numbers such as",
        ),
        (
            ["inpaint", "a.png", "--mask", "small.png"],
            ConfigError,
            "the mask has 8x8 pixels but the picture 32x32; draw",
        ),
        (
            ["inpaint", "a.png", "--mask", "black.png"],
            ConfigError,
            r"the mask is empty: what is white \(True\) in it is",
        ),
        (["repeat", "a.png"], DataError, "a.png does not say how it was drawn: it is not a PNG of unclip, or another"),
        (["repeat", "text.png"], DataError, "text.png cannot be read .*; give a PNG that unclip wrote"),
        (["repeat", "broken.png"], DataError, "broken.png has a recipe that this unclip .* cannot read"),
        (
            ["repeat", "bomb.png"],
            DataError,
            "bomb.png has a recipe that this unclip .* cannot read .x_T is not of the sh",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_refused_in_words_and_nothing_is_written(place: Path, arguments: list[str], error, message: str):
    bad_files(place)
    with pytest.raises(error, match=message):
        run(place, *arguments, out="refused")
    assert not (place / "refused").exists()


def test_decoder_settings_that_cannot_be_are_told_by_the_measures_too():
    pipeline: Any = SimpleNamespace(configs={"decoder": SimpleNamespace(diffusion=SimpleNamespace(num_timesteps=100))})
    with pytest.raises(ConfigError, match="the decoder was trained with 100 timesteps; it cannot sample in 5000"):
        ddim_sampling(pipeline, 5000)
    with pytest.raises(ConfigError, match=r"the decoder: .*scale"):
        ddim_sampling(pipeline, 10, -1.0)


def test_a_file_is_no_folder_to_write_to(place: Path):
    (place / "taken").write_text("")
    with pytest.raises(ConfigError, match=r"--out .*: .*taken is a file; name another folder"):
        run(place, "generate", "a", out="taken/there")


def bad_files(place: Path) -> None:
    (place / "cut.png").write_bytes((place / "a.png").read_bytes()[:200])
    (place / "text.png").write_text("no picture")
    (place / "latin.txt").write_bytes("ein Würfel".encode("latin-1"))
    huge_png(place / "huge.png")
    for name, side in (("small", 8), ("black", 32)):
        Image.new("L", (side, side)).save(place / f"{name}.png")
    bomb = {"shape": [3, 16, 16], "data": base64.b64encode(zlib.compress(bytes(10**7))).decode()}
    how = {"prior": None, "prior_kind": "NoneType", "decoder": None, "upsamplers": {}}
    again = {"job": {"seed": 0, "x_T": bomb}, "how": how, "places": {}, "num_tokens": 0, "precision": "fp32"}
    for name, text in (("broken", "{}"), ("bomb", json.dumps({"artifacts": {}, "repeat": again}))):
        info = PngInfo()
        info.add_itxt("unclip", text)
        Image.new("RGB", (4, 4)).save(place / f"{name}.png", pnginfo=info)


def test_a_picture_of_another_stage_is_refused_naming_both_hashes(place: Path, tmp_path: Path):
    told = json.loads(run(place, "generate", "a", "--num", "1", *FAST, "--json", out="first"))
    file = Path(told["pictures"][0]["file"])
    ours = json.loads((place / "runs" / "decoder" / "artifact" / "manifest.json").read_text())["hash"]
    content = file.read_bytes().replace(ours.encode(), b"0" * 64)
    altered = io.BytesIO(content)
    with Image.open(file) as image:
        info = PngInfo()
        info.add_itxt("unclip", image.info["unclip"].replace(ours, "0" * 64))
        image.save(altered, format="PNG", pnginfo=info)
    (place / "altered.png").write_bytes(altered.getvalue())
    with pytest.raises(
        ArtifactError, match=rf"drawn by decoder 00000000, but .*runs/decoder is {ours[:8]}; give the runs"
    ):
        run(place, "repeat", "altered.png", out="x.png")
    assert not (place / "x.png").exists()


def test_typographic_probe_shows_probabilities(place: Path):
    probe = (
        "typographic-probe",
        "a.png",
        "b.png",
        "--classes",
        "captions.txt",
        "--word",
        "pizza",
        "--num",
        "1",
        "--json",
    )
    told = json.loads(run(place, *probe, out="typo"))
    assert [(Path(row["picture"]).name, row["word"]) for row in told["pictures"]] == [
        ("a.png", None), ("a.png", "pizza"), ("b.png", None), ("b.png", "pizza")
    ]  # fmt: skip
    for row in told["pictures"]:
        assert sum(row["probabilities"].values()) == pytest.approx(1)
    assert told["pictures"][0]["probabilities"] != told["pictures"][1]["probabilities"]
    assert Image.open(told["sheet"]).height > 4 * 96


def test_edit_verdict_judges_fixed_cases(place: Path):
    told = json.loads(
        run(place, "edit-verdict", "--num", "3", "--decoder-steps", "2", "--thetas", "0,0.5", out="verdict")
    )
    assert (told["cases"], set(told["by_theta"])) == (3, {"0", "0.5"})
    row = told["by_theta"]["0.5"]
    assert set(row) == {"colour_turned", "colour_as_before", "shape_kept", "readable", "both"}
    assert 0 <= row["colour_turned"]["interval"][0] <= row["colour_turned"]["share"] <= 1
    assert files(place, "verdict") == ["edits.json", "edits.png"]
    with pytest.raises(ConfigError, match="--base other is not one of own, photo, none"):
        run(place, "edit-verdict", "--base", "other", out="x")


def test_the_cases_are_fixed_and_the_oracle_reads_them():
    from unclip.cli.edit_verdict import _judged, cases
    from unclip.evaluation.probes import read_scenes

    found = cases(100, 64)
    assert len(found) == 100
    assert len({case.solid for case in found}) == 40
    assert all(case.colour != case.solid.colour for case in found)
    assert (found[0].caption, found[0].wanted) == (cases(1, 32)[0].caption, cases(1, 32)[0].wanted)
    judged = _judged(found[:40], read_scenes([case.picture for case in found[:40]]))
    assert judged["colour_as_before"]["share"] == judged["shape_kept"]["share"] == 1
    assert judged["colour_turned"]["share"] == judged["both"]["share"] == 0


@pytest.mark.parametrize(("num", "wanted"), [(3, [0, 1, 3]), (32, [0, 1, 2, 3, 4])])
def test_compare_shows_each_sample_once(place: Path, num: int, wanted: list[int], monkeypatch: pytest.MonkeyPatch):
    if not (place / "data").exists():
        write_shapes(place / "data", num=5, size=32, workers=1)
    shown: list[str] = []

    def draw(rows: list[tuple[str, Any]], *given: Any, **more: Any) -> Image.Image:
        shown.extend(caption for caption, pictures in rows)
        assert all(len(pictures) == 3 for _, pictures in rows)
        return draw_table(rows, *given, **more)

    monkeypatch.setattr("unclip.cli.pictures.draw_table", draw)
    given = ["compare", "--from", str(place / "runs"), "--data", str(place / "data" / "train"), "--num", str(num)]
    result = CliRunner().invoke(app, [*given, "--out", str(place / "compared.png")])
    assert result.exit_code == 0, result.exception
    samples = Shards(place / "data" / "train")
    assert shown == [samples.read(i).caption for i in wanted]
    with Image.open(place / "compared.png") as sheet:
        assert sheet.width > sheet.height > 0
