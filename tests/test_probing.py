"""The probes on a tiny chain: what they write, known answers of untrained weights, and what they refuse."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_chain import CONFIGS, random_weights, write_tiny_chain
from typer.testing import CliRunner

from unclip import artifact
from unclip.artifact import Manifest
from unclip.cli.app import app
from unclip.cli.asked import Asked
from unclip.config import from_plain, to_plain
from unclip.data.shapes import write_shapes
from unclip.errors import ArtifactError, ConfigError, DataError
from unclip.evaluation.counting import Count
from unclip.models import REGISTRY, build


def noting(draw: Callable[..., Any], conds: dict[str, Any]) -> Callable[..., Any]:
    """``draw`` of :class:`Asked`, which writes down the conditions under each title."""

    def noted(self: Asked, title: str, cond: Any, *given: Any) -> Any:
        conds[title] = cond
        return draw(self, title, cond, *given)

    return noted


def add_stage(runs: Path, folder: str, model: str, raw: dict[str, Any]) -> None:
    """A stage of the chain's CLIP, beside or in place of one of the tiny chain's."""
    shutil.rmtree(runs / folder, ignore_errors=True)
    clip, manifest = artifact.load(runs / "clip")
    built = random_weights(build(from_plain(raw, REGISTRY[model][0]), clip.interface()))
    interface = to_plain(built.interface) | {"clip": manifest.hash if model != "upsampler" else ""}
    artifact.save(runs / folder, built, Manifest(model, model, to_plain(built.cfg), interface))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """runs (16 to 64 px), small (16 to 32 px), other decoders, another CLIP, and shapes data."""
    root = tmp_path_factory.mktemp("probing")
    runs = write_tiny_chain(root / "runs")
    add_stage(runs, "upsampler", "upsampler", {**CONFIGS["upsampler"], "image_size": 64})
    conditioning = CONFIGS["decoder"]["conditioning"]
    add_stage(
        runs, "captions-only", "decoder", {**CONFIGS["decoder"], "conditioning": {**conditioning, "image": False}}
    )
    add_stage(runs, "z_t", "decoder", {**CONFIGS["decoder"], "embedding": "text"})
    write_tiny_chain(root / "small")
    torch.manual_seed(1)
    judge, manifest = artifact.load(runs / "clip")
    for p in judge.parameters():
        p.data += 0.1 * torch.randn_like(p)
    artifact.save(root / "judge", judge, Manifest("clip", "clip", manifest.config, manifest.interface))
    write_shapes(root / "data", num=8, size=32, workers=1)
    (root / "pairs.txt").write_text("a red cup and a green plate | a green cup and a red plate\n")
    return root


def run(place: Path, *arguments: str, runs: str = "runs", out: str) -> dict[str, Any]:
    """One command in this process; arguments that begin with @ are paths below ``place``. Returns the JSON written."""
    given = [str(place / a[1:]) if a.startswith("@") else a for a in arguments]
    result = CliRunner().invoke(app, [*given, "--from", str(place / runs), "--out", str(place / out)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    (path,) = (place / out).glob("*.json")
    assert path.with_suffix(".md").read_text().strip().endswith(result.stdout.strip())
    assert Image.open(path.with_suffix(".png")).height > 96
    return json.loads(path.read_text())


def test_binding(place: Path):
    told = run(place, "binding-probe", "--num", "3", "--text-decoder", "@runs/captions-only", out="binding")
    assert list(told["rows"]) == [
        "real renders",
        "prior's z_i and caption",
        "prior's z_i only",
        "encode and decode (true z_i)",
        "caption only",
        "GLIDE form (captions alone)",
    ]
    for title, row in told["rows"].items():
        assert row["right"]["total"] == 6
        assert row["both of a pair"]["total"] == 3
        assert row["right"]["hits"] == (6 if title == "real renders" else 0), (
            "an untrained chain draws nothing readable"
        )
    assert "text_decoder" in told["facts"]["artifacts"]


def test_binding_of_caption_pairs_by_another_clip(place: Path):
    given = ["binding-probe", "--captions", "@pairs.txt"]
    told = run(place, *given, "--judge", "@judge", out="pairs")
    ((name, share), (_, both)) = told["rows"]["caption only"].items()
    assert name.startswith("own caption before the exchanged one, by CLIP ")
    assert (share["total"], both["total"]) == (2, 1)
    with pytest.raises(ConfigError, match="itself, which would judge its own work"):
        run(place, *given, "--judge", "@runs/clip", out="x")


@pytest.mark.parametrize("line", ["a red cup", "a | b | c", "a red cup | ", "the same | the same"])
def test_lines_that_are_no_pair_are_named(place: Path, line: str):
    (place / "bad.txt").write_text(f"a | b\n{line}\n")
    with pytest.raises(ConfigError, match=r"is not CAPTION \| EXCHANGED CAPTION") as raised:
        run(place, "binding-probe", "--captions", "@bad.txt", "--judge", "@judge", out="x")
    assert line.strip() in str(raised.value)
    (place / "bad.txt").write_text("\n")
    with pytest.raises(ConfigError, match="holds no captions; write CAPTION"):
        run(place, "binding-probe", "--captions", "@bad.txt", "--judge", "@judge", out="x")


def test_words(place: Path):
    told = run(place, "words-probe", "--num", "2", "--text-decoder", "@runs/captions-only", out="words")
    real = told["rows"]["real renders"]
    assert (real["seen words"]["share"], real["unseen words"]["share"], real["seen letters"]) == (1, 1, 1)
    assert len(told["rows"]) == 6
    assert told["rows"]["caption only"]["unseen words"]["hits"] == 0


def test_words_that_even_real_renders_hide_are_no_probe(place: Path):
    with pytest.raises(ConfigError, match=r"% of real renders of 32 px can be read, fewer than 95%"):
        run(place, "words-probe", "--num", "8", runs="small", out="x")


class Roughness:
    """In place of EfficientNet, which would take half a minute here: how far neighbouring pixels differ, by channel."""

    def __call__(self, pictures: torch.Tensor) -> torch.Tensor:
        return pictures.float().diff(dim=-1).square().mean(dim=(2, 3)) / 1000


def test_busy(place: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("unclip.cli.probe_busy.PictureFeatures", Roughness)
    monkeypatch.setattr("unclip.cli.probe_busy.count_solids", lambda picture: Count((("red", "cube"),), 0.0))
    told = run(place, "busy-probe", "--num", "16", out="busy")
    for row in told["rows"].values():
        assert [row[f"count of {n}"]["hits"] for n in range(1, 9)] == [2] + [0] * 7
    real, drawn = told["rows"]["real renders"], told["rows"]["caption only"]
    assert real["power, octave 0"] == pytest.approx(1, abs=0.4)
    assert drawn["power, octave 0"] > 5, "an untrained net draws noise"
    assert drawn["patch-KID"] > 5 * abs(real["patch-KID"])
    assert told["facts"]["base"] == 16


@pytest.mark.parametrize(
    ("what", "titles"),
    [
        ("captions", ["caption path on", "caption path off", "caption path shuffled", "caption only"]),
        (
            "prior",
            ["prior's z_i", "z_t, zero-shot", "true z_i", "z_t, decoder trained on it", "decoder of captions alone"],
        ),
        ("guidance", ["guidance 1", "guidance 3", "GLIDE form, guidance 1", "GLIDE form, guidance 3"]),
        ("eta", ["η = 0", "η = 1"]),
        ("theta", ["θ = 0", "θ = 0.5"]),
    ],
)
def test_sweeps(place: Path, monkeypatch: pytest.MonkeyPatch, what: str, titles: list[str]):
    monkeypatch.setattr("unclip.cli.sweep_ways.DDIM_STEPS", 2)
    given = ["--data", "@data/test", "--what", what, "--num", "4"]
    given += {"guidance": ["--values", "1,3"], "eta": ["--values", "0,1"], "theta": ["--values", "0,0.5"]}.get(what, [])
    given += ["--text-decoder", "@runs/captions-only"] if what in ("guidance", "prior") else []
    given += ["--text-embedding-decoder", "@runs/z_t"] if what == "prior" else []
    conds: dict[str, Any] = {}
    monkeypatch.setattr(Asked, "draw", noting(Asked.draw, conds))
    rows = run(place, "sweep-probe", *given, out=f"sweep-{what}")["rows"]
    if what == "captions":
        on, off, shuffled, only = (conds[title] for title in titles)
        assert torch.equal(on.image_emb, off.image_emb)
        assert torch.equal(on.image_emb, shuffled.image_emb)
        assert only.image_emb is None
        assert off.text_emb is None
        assert torch.equal(shuffled.text_emb, on.text_emb.roll(-1, 0))
        assert not torch.equal(shuffled.text_emb, on.text_emb)
        assert torch.equal(only.text_emb, on.text_emb)
    assert list(rows) == titles
    first, last = rows[titles[0]], rows[titles[-1]]
    assert {"objects", "pairs", "KID x 1000", "CLIP score"} <= first.keys()
    if what == "prior":
        assert rows["true z_i"]["cosine to true z_i"] == pytest.approx(1, abs=1e-4)
        assert rows["prior's z_i"]["cosine to true z_i"] < 0.999
    if what in ("guidance", "eta"):
        assert first["pixels changed"] == 0
        assert last["pixels changed"] > 1
        assert {row["KID x 1000"] for row in rows.values()} != {first["KID x 1000"]}
    curves = place / f"sweep-{what}" / f"sweep-{what}-curves.png"
    assert curves.exists() == (what in ("guidance", "eta", "theta"))
    if what in ("captions", "theta"):
        assert "shows the next caption" in first


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--what", "seed"], "--what seed is not one of captions, prior, guidance, eta, theta"),
        (
            ["--what", "prior", "--values", "1"],
            "--values goes with guidance, eta, theta; leave it out for --what prior",
        ),
        (["--what", "guidance", "--values", "1,x"], "--values 1,x is not a list of numbers"),
        (["--what", "guidance", "--values", "-1"], "--values -1: "),
        (["--what", "eta", "--values", "0,2"], r"eta is 2.0; it must lie in \[0, 1\]"),
        (["--what", "eta", "--text-decoder", "@runs/captions-only"], "--text-decoder is a further row of"),
        (["--what", "guidance", "--text-embedding-decoder", "@runs/z_t"], "is a further row of --what prior only"),
        (["--what", "prior", "--num", "3"], "3 samples of .* are too few to compare pictures by; take at least 4"),
        (["--what", "prior", "--text-embedding-decoder", "@runs/decoder"], r"train it with model\.embedding=text"),
        (["--what", "guidance", "--text-decoder", "@runs/decoder"], r"trained with model\.conditioning\.image=false"),
    ],
)
def test_sweeps_that_make_no_sense_are_refused(place: Path, given: list[str], message: str):
    with pytest.raises((ConfigError, DataError, ArtifactError), match=message):
        run(place, "sweep-probe", "--data", "@data/test", *given, out="x")
    assert not (place / "x").exists()


@pytest.mark.parametrize(
    ("given", "runs", "message"),
    [
        (["binding-probe", "--num", "9999"], "runs", "scenes; ask for at most so many"),
        (["binding-probe", "--captions", "@pairs.txt"], "runs", "--captions and --judge go together"),
        (["binding-probe", "--text-decoder", "@runs/decoder"], "runs", "is a decoder that sees z_i"),
        (["busy-probe", "--num", "15"], "runs", "give each number of objects, 1 to 8, two pictures at least"),
        (["busy-probe"], "small", "pictures of 32 px hold no eight objects"),
        (["words-probe"], "no-prior", "has no run prior, which this probe needs: run train-prior"),
    ],
)
def test_probes_that_cannot_be_are_refused(place: Path, given: list[str], runs: str, message: str):
    if runs == "no-prior" and not (place / runs).exists():
        shutil.copytree(place / "small", place / runs, symlinks=True)
        shutil.rmtree(place / runs / "prior")
    with pytest.raises((ConfigError, ArtifactError), match=message):
        run(place, *given, runs=runs, out="x")
    assert not (place / "x").exists()


def test_the_report_shows_what_probes_found(place: Path, tmp_path: Path):
    rows = {
        "a way": {"right": {"share": 0.5, "hits": 1, "total": 2, "interval": [0.1, 0.9]}, "KID": 12.345},
        "other": {},
    }
    (tmp_path / "probes").mkdir()
    (tmp_path / "probes" / "binding.json").write_text(json.dumps({"title": "Binding it is", "facts": {}, "rows": rows}))
    Image.new("RGB", (8, 8)).save(tmp_path / "probes" / "binding.png")
    assert CliRunner().invoke(app, ["report", str(tmp_path)]).exit_code == 0
    page = (tmp_path / "report.html").read_text()
    for part in ("Binding it is", "a way", "50.0 [10-90]", "12.3", "<figcaption>Binding it is"):
        assert part in page
