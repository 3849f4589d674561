"""`unclip-evaluate pictures` and `coco` as a user runs them: figures, several ranks, going on after a stop, refusals."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from picture_sets import write_coco, write_split
from PIL import Image
from tests_support import command, environment
from tiny_chain import write_tiny_chain

from unclip.cli.evaluate import evaluate
from unclip.cli.train import CONF, forced
from unclip.data.shards import Shards
from unclip.errors import UnclipError
from unclip.evaluation.extractors import ClipFeatures
from unclip.recipe import from_png

pytestmark = pytest.mark.timeout(280)
ALL = "metrics=[fid,kid,cmmd,precision_recall,density_coverage,clip_score,r_precision,vendi,pair_distance,memorisation]"
GIVEN = ["drawn.split=data/test", "real.split=data/val", "train.split=data/train"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of 16 px in splits of 280 and 64, a COCO of 70 pictures, and an untrained chain that draws 32 px."""
    root = tmp_path_factory.mktemp("pictures")
    write_tiny_chain(root / "runs")
    for seed, (split, count) in enumerate({"train": 280, "val": 64, "test": 64}.items()):
        write_split(root / "data" / split, count, seed)
    write_coco(root / "coco", 70)
    write_coco(root / "coco", 30, "train2014")
    for name in ("nothing", "alike"):
        (root / name).mkdir()
    for i in range(100):
        Image.new("RGB", (16, 16), (i, 0, 0)).save(root / "alike" / f"{i:02d}.png")
        (root / "alike" / f"{i:02d}.txt").write_text("a red square")
    return root


@pytest.fixture(autouse=True)
def here(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)


def evaluated(kind: str, *overrides: str) -> dict[str, Any]:
    """The command without its process."""
    with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
        raw = compose("evaluate", [forced(o) for o in (f"evaluation={kind}", *overrides)])
    return evaluate(kind, raw)


def test_every_figure_of_a_split_against_another(root: Path, capsys: pytest.CaptureFixture[str]):
    shutil.copytree(root / "data/train", root / "again")
    given = ["drawn.split=again", "real.split=data/train", "train.split=data/test", "clip=runs/clip"]
    found = evaluated("pictures", "run=all", *given, ALL, "features=[clip]", "replicates=5", "pairs=20")
    names = {
        "fid",
        "kid",
        "cmmd",
        "precision",
        "recall",
        "density",
        "coverage",
        "vendi",
        "vendi_real",
        "score",
        "score_real",
    }
    names |= {"r_precision", "r_precision_real", "nearest_train", "nearest_train_real", "copied_share"}
    assert set(found["measures"]) == {f"clip/{name}" for name in names} | {
        "lite0/pair_distance",
        "lite0/pair_distance_real",
    }
    for name, value in found["measures"].items():
        low, high = found["intervals"][name]
        assert low <= value + 1e-9, name
        assert high >= value - 1e-9, name
    same = found["measures"]
    assert same["clip/precision"] == same["clip/recall"] == same["clip/coverage"] == 1.0
    assert same["clip/fid"] == pytest.approx(0, abs=1e-3)
    assert same["clip/kid"] < 0, "an unbiased estimate of zero from equal rows"
    assert same["clip/score"] == same["clip/score_real"]
    assert json.loads((root / "all" / "evaluation.json").read_text()) == found
    assert found["pictures"]["drawn"] == {"where": "again", "count": 280}
    assert Image.open(root / "all" / "neighbours.png").width > 500
    assert "Nearest training pictures" in (root / "all" / "report.html").read_text()
    said = capsys.readouterr().out
    assert "clip/copied_share" in said
    assert "95 % interval" in said


def test_copies_of_training_pictures_are_found(root: Path):
    """Half of the drawn pictures are training pictures."""
    (root / "copies").mkdir()
    write_split(root / "seen", 40, seed=7)
    for name, split in (("seen", "seen"), ("new", "data/test")):
        shards = Shards(root / split)
        for i in range(20):
            (root / "copies" / f"{name}-{i:02d}.png").write_bytes(shards.image(i))
    given = ["drawn.folder=copies", "real.split=data/val", "train.split=seen", "metrics=[memorisation]"]
    found = evaluated("pictures", "run=copied", "real.num=40", *given)["measures"]
    assert found["lite0/copied_share"] == pytest.approx(0.5, abs=0.1)
    assert found["lite0/nearest_train"] > found["lite0/nearest_train_real"]


DRAWN = ["drawn.runs=runs", "drawn.num=64", "drawn.batch_size=8", "real.split=data/val", "size=16", "clip=runs/clip"]
SHORT = ["drawn.sampling.prior_steps=1", "drawn.sampling.decoder_steps=2", "drawn.sampling.upsampler_steps=1"]
MEASURED = [
    "features=[clip]",
    "metrics=[kid,precision_recall,clip_score,vendi,pair_distance]",
    "replicates=5",
    "pairs=10",
]


def test_two_ranks_find_exactly_what_one_process_finds(root: Path):
    given = [*DRAWN, *SHORT, *MEASURED, "real.split=data/train", "drawn.num=150"]  # three blocks and five
    started = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    for launcher, run in (([], "one"), (started, "two")):
        words = [*launcher, command("unclip-evaluate"), "pictures", f"run={run}", *given]
        done = subprocess.run(
            words, cwd=root, env=environment(), capture_output=True, text=True, timeout=240, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = (json.loads((root / run / "evaluation.json").read_text()) for run in ("one", "two"))
    assert one["measures"] == two["measures"]
    assert one["intervals"] == two["intervals"]
    assert one["pictures"]["drawn"]["count"] == 150
    for name in ("00000000.png", "00000100.png"):
        assert (root / "one/pictures" / name).read_bytes() == (root / "two/pictures" / name).read_bytes()


def test_the_same_command_goes_on_where_it_was_stopped(root: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("unclip.evaluation.blocks.BLOCK", 16)
    given = ["run=resumed", *DRAWN, *SHORT, *MEASURED]
    seen: list[int] = []
    look = ClipFeatures.__call__

    def stopped(self: ClipFeatures, pictures: torch.Tensor) -> torch.Tensor:
        if len(seen) == 3:
            raise KeyboardInterrupt
        seen.append(len(pictures))
        return look(self, pictures)

    monkeypatch.setattr(ClipFeatures, "__call__", stopped)
    with pytest.raises(KeyboardInterrupt):
        evaluated("pictures", *given)
    drawn = {path: path.stat().st_mtime_ns for path in (root / "resumed/pictures").glob("*.png")}
    assert len(drawn) == 64
    monkeypatch.setattr(
        ClipFeatures, "__call__", lambda self, pictures: seen.append(len(pictures)) or look(self, pictures)
    )
    first = evaluated("pictures", *given)
    assert sum(seen) == 64 + 64, "drawn and real pictures once each"
    assert {path: path.stat().st_mtime_ns for path in drawn} == drawn, "nothing was drawn again"
    assert evaluated("pictures", *given)["measures"] == first["measures"]
    assert sum(seen) == 64 + 64
    with pytest.raises(
        UnclipError, match=r"pictures was made from something else \(seed: 0 there, 5 now\): take another run"
    ):
        evaluated("pictures", *given, "drawn.seed=5")
    with pytest.raises(UnclipError, match=r"was made from something else \(size: 16 there, 12 now\)"):
        evaluated("pictures", *given, "size=12")


def test_coco_against_its_whole_validation_set_and_the_filtered_one(root: Path):
    given = ["drawn.runs=runs", "drawn.num=60", *SHORT, "size=32", "real.coco=coco", "clip=runs/clip"]
    given += ["train.coco=coco", "train.coco_split=train2014", "replicates=5"]
    given += ["features=[clip]", "inception=null", "metrics=[kid,cmmd,clip_score]"]
    found = evaluated("coco_filtered", "run=coco-run", *given)
    assert {side: source["count"] for side, source in found["pictures"].items()} == {
        "drawn": 60,
        "real": 70,
        "train": 30,
        "real_filtered": 55,
    }
    assert set(found["measures"]) == {
        *("clip/kid", "clip/kid_filtered", "clip/cmmd", "clip/cmmd_filtered", "clip/score", "clip/score_real"),
    }
    captions = [from_png(path).caption for path in sorted((root / "coco-run/pictures").glob("*.png"))]
    assert len(set(captions)) == 60, "of 350 captions, none twice"
    assert len({caption.partition(",")[0] for caption in captions}) > 30, "of many pictures"
    picture = from_png(root / "coco-run/pictures/00000007.png")
    assert (picture.seed, picture.how.decoder.guidance.scale) == (7, 1.25)


def test_pictures_without_captions_can_be_compared(root: Path):
    (root / "bare").mkdir()
    for i in range(20):
        Image.new("RGB", (16, 16), (i, 0, 0)).save(root / "bare" / f"{i:02d}.png")
    (root / "bare" / "00.txt").write_text("the only one with a caption")
    found = evaluated(
        "pictures", "run=bare-run", "drawn.folder=bare", "metrics=[pair_distance,vendi]", "replicates=5", "pairs=10"
    )
    assert {"lite0/pair_distance", "lite0/vendi"} <= set(found["measures"])


def test_several_pictures_of_a_caption_are_compared_with_each_other(root: Path):
    given = ["drawn.runs=runs", "drawn.num=10", "drawn.per_caption=2", *SHORT, "drawn.captions.split=data/val"]
    found = evaluated("pictures", "run=several", *given, "metrics=[pair_distance]", "replicates=5")
    assert set(found["measures"]) == {"lite0/pair_distance_of_a_caption"}
    assert found["measures"]["lite0/pair_distance_of_a_caption"] > 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            [*GIVEN, "metrics=[fid]"],
            "fid needs at least 1,281 drawn pictures, one more than the 1280 features, but there are 64",
        ),
        (
            [*GIVEN, "metrics=[kid]", "real.num=49"],
            "kid needs at least 50 real pictures, but there are 49: give more, or leave",
        ),
        (
            [*GIVEN, "metrics=[r_precision]", "clip=runs/clip"],
            "r_precision needs at least 100 drawn pictures, but there are 64",
        ),
        (
            ["drawn.folder=alike", "metrics=[r_precision]", "clip=runs/clip"],
            "at least 100 different captions, but there are 1",
        ),
        ([*GIVEN, "metrics=[kid]", "size=32"], "16x16 pixels would be enlarged to size=32"),
        (["drawn.folder=alike", "real.coco=coco", "metrics=[kid]"], "set size=, to which all are cut"),
        (["drawn.folder=nothing", "real.split=data/val"], "nothing holds no pictures to take as drawn"),
        (["drawn.split=data/test", "real.folder=nothing"], "nothing holds no pictures to take as real"),
        (["real.split=data/val"], "say which pictures to judge: drawn.runs= draws them"),
        (["drawn.split=data/test"], "density_coverage, kid, precision_recall need real pictures"),
        (["drawn.split=data/test", "metrics=[clip_score]"], "clip_score need a CLIP: give clip=RUN"),
        ([*GIVEN[:2], "metrics=[memorisation]"], "need the training pictures: give train.split=DATA/train"),
        ([*GIVEN[:2], "train.split=data/val", "metrics=[memorisation]"], "real and train are both data/val"),
        ([*GIVEN, "features=[inception]"], "features holds inception, but inception=FILE is not set: fetch https://"),
        ([*GIVEN, "features=[dinov2]", "dinov2=none.pth"], "there is no file dinov2=none.pth: fetch https://"),
        ([*GIVEN, "features=[vgg]"], "must name at least one of: lite0, clip, dinov2, inception"),
        ([*GIVEN, "metrics=[fdi]"], "is not one of: fid, kid"),
        ([*GIVEN, "pairs=9"], "pairs=9 must be at least 10"),
        (
            [*GIVEN, "metrics=[pair_distance]", "real.num=19"],
            "pair_distance needs at least 10 pairs of real pictures, but there are 9: give more, or leave it out of metrics",
        ),
        ([*GIVEN, "metrics=[vendi]", "real.num=19"], "vendi needs at least 20 real pictures, but there are 19"),
        (
            [*GIVEN, "metrics=[kid]", "filtered_share=0.25"],
            "kid needs at least 50 filtered real pictures, but there are 48",
        ),
        (
            ["drawn.split=data/test", "train.split=data/train", "metrics=[vendi]", "filtered_share=0.2"],
            "filtered_share leaves out some",
        ),
        (
            [GIVEN[0], "real.split=data/train", "real.num=60", "train.split=data/train", "metrics=[memorisation]"],
            "real and train are both data/train",
        ),
        ([*GIVEN, "neighbours=64"], "neighbours=64 must be below the number of pictures"),
        (
            ["drawn.runs=runs", "drawn.num=65", "real.split=data/val"],
            "drawn.num=65 asks for more captions than the 64 of data/val: set drawn.num=64, or name pictures",
        ),
        (["drawn.runs=runs", "drawn.folder=x", "real.split=data/val"], "leave out drawn.folder"),
        (
            ["drawn.folder=x", "drawn.per_caption=2", "real.split=data/val"],
            "captions and per_caption are for drawn.runs",
        ),
    ],
)
def test_refusals_come_before_anything_is_done(root: Path, given: list[str], message: str):
    with pytest.raises(UnclipError, match=re.escape(message)):
        evaluated("pictures", "run=refused", *given)
    assert not (root / "refused" / "evaluation.json").exists()
    assert not (root / "refused" / "features").exists()


def test_features_that_are_not_finite_name_the_picture(root: Path, monkeypatch: pytest.MonkeyPatch):
    def broken(self: ClipFeatures, pictures: torch.Tensor) -> torch.Tensor:
        found = torch.ones(len(pictures), self.width)
        found[3:5, 0] = torch.nan
        return found

    monkeypatch.setattr(ClipFeatures, "__call__", broken)
    with pytest.raises(UnclipError, match=r"clip's features of data/test: \S+ are not finite \(2 of 64 pictures\)"):
        evaluated("pictures", "run=broken", *GIVEN, "features=[clip]", "clip=runs/clip", "metrics=[kid]")
    assert not (root / "broken" / "evaluation.json").exists()
