"""clip-retrieval's layout, in and out, beside the real embedding-reader."""

import json
import pickle
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from embedding_reader import EmbeddingReader
from tests_support import TINY, run_command

from unclip import artifact
from unclip.data.datamodule import DataConfig, UnclipData
from unclip.data.embeddings import Embeddings
from unclip.data.settings import SourceConfig
from unclip.data.texts import StoredTexts
from unclip.errors import ConfigError, DataError
from unclip.interop.public_embeddings import ExportConfig, ImportConfig, export_embeddings, import_embeddings
from unclip.models.clip import CLIP
from unclip.models.diffusion_prior import DiffusionPrior, DiffusionPriorConfig, EmbeddingSpace
from unclip.nets.transformer import PriorNetConfig

from .conftest import PARTS, Spoil, World, save_clip, tiny_clip, unit


def imported(world: World, tmp_path: Path, **changes) -> Path:
    src = tmp_path / "public"
    if not src.exists():
        world.layout(src)
    import_embeddings(ImportConfig(**{"src": src, "clip": world.clip, "out": tmp_path / "emb", **changes}))
    return tmp_path / "emb"


def read(folder: Path, **how) -> tuple[np.ndarray, pd.DataFrame]:
    """Everything that embedding-reader finds."""
    reader = EmbeddingReader(str(folder), **how)
    found = list(reader(batch_size=7, show_progress=False))
    return np.concatenate([rows for rows, _ in found]), pd.concat([meta for _, meta in found], ignore_index=True)


def test_what_embedding_reader_reads_is_what_we_import(world: World, tmp_path: Path) -> None:
    out = imported(world, tmp_path, val=0.0)
    embeddings = Embeddings(out, "train")
    for column, folder in (("image_emb", "img_emb"), ("text_emb", "text_emb")):
        rows, meta = read(
            tmp_path / "public" / folder,
            file_format="parquet_npy",
            metadata_folder=str(tmp_path / "public" / "metadata"),
            meta_columns=["image_path", "caption"],
        )
        assert np.array_equal(embeddings.column(column).astype(np.float32), rows)
        texts = StoredTexts(embeddings)
        assert list(texts.keys) == embeddings.keys == meta["image_path"].tolist() == world.keys
        assert [texts.caption(i) for i in range(len(texts))] == meta["caption"].tolist() == world.captions
    clip = artifact.load(world.clip)[0]
    assert isinstance(clip, CLIP)
    assert np.array_equal(embeddings.column("tokens"), clip.tokenize(world.captions).numpy())
    assert embeddings.column("image_emb").dtype == np.float16
    assert embeddings.normalised
    assert embeddings.manifest["source"] == {"layout": "clip-retrieval", "clip": "asserted"}
    assert embeddings.interface.clip == artifact.read_manifest(world.clip).hash


@pytest.mark.parametrize("kind", ["npy", "parquet"])
def test_embedding_reader_reads_what_we_export(world: World, tmp_path: Path, kind: str) -> None:
    run_embed(world, tmp_path / "emb")
    assert export_embeddings(ExportConfig(tmp_path / "emb", tmp_path / "out", data=world.shards, kind=kind)) == 48
    place = {"file_format": kind} if kind == "parquet" else {"file_format": "parquet_npy"}
    if kind == "npy":
        place["metadata_folder"] = str(tmp_path / "out" / "metadata")
        assert np.load(tmp_path / "out" / "img_emb" / "img_emb_0.npy").dtype == np.float16
    rows, meta = read(tmp_path / "out" / "img_emb", meta_columns=["key", "caption"], **place)
    np.testing.assert_allclose(rows, unit(world.image), atol=1e-3 if kind == "npy" else 1e-6)
    assert meta["key"].tolist() == world.keys
    assert meta["caption"].tolist() == world.captions
    back = tmp_path / "back"
    import_embeddings(ImportConfig(tmp_path / "out", world.clip, back, val=0.0))
    assert np.array_equal(Embeddings(back, "train").column("image_emb"), rows)
    assert Embeddings(back, "train").keys == world.keys


def run_embed(world: World, out: Path) -> None:
    """Our own embeddings of the shards, raw: three times what CLIP says, see ``World.image``."""
    from unclip.data.embeddings_writer import EmbeddingsWriter
    from unclip.data.shards import Shards
    from unclip.models.interface import Interface

    shards = Shards(world.shards / "train")
    interface = Interface(embed_dim=16, context_length=32, clip="c" * 64)
    writer = EmbeddingsWriter(out, "train", interface, ("image_emb", "text_emb"), "float32")
    for number, name in enumerate(shards.names):
        rows = slice(*shards.starts[number : number + 2])
        columns = {"image_emb": world.image[rows], "text_emb": world.text[rows]}
        writer.write(Path(name).stem, shards.sha256[number], shards.keys[rows], columns)
    writer.finish(shards)


def test_raw_rows_and_missing_captions_of_an_export(world: World, tmp_path: Path) -> None:
    run_embed(world, tmp_path / "emb")
    export_embeddings(ExportConfig(tmp_path / "emb", tmp_path / "out", raw=True))
    np.testing.assert_allclose(np.load(tmp_path / "out/img_emb/img_emb_0.npy"), world.image[:30], rtol=1e-3, atol=1e-3)
    assert pd.read_parquet(tmp_path / "out/metadata/metadata_0.parquet").columns.tolist() == ["key", "image_path"]
    with pytest.raises(ConfigError, match=r"out exists already"):
        export_embeddings(ExportConfig(tmp_path / "emb", tmp_path / "out"))
    with pytest.raises(ConfigError, match="unit-norm rows: CLIP's raw outputs cannot be had"):
        export_embeddings(ExportConfig(imported(world, tmp_path / "x"), tmp_path / "raw", raw=True))
    huge = World(**{**vars(world), "image": world.image * 1e6})
    run_embed(huge, tmp_path / "huge")
    with pytest.raises(DataError, match="img_emb exceed float16"):
        export_embeddings(ExportConfig(tmp_path / "huge", tmp_path / "half", raw=True))
    assert not (tmp_path / "half").exists()
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("place", ["folder", "shards"])
def test_pictures_prove_the_clip(world: World, tmp_path: Path, place: str) -> None:
    pictures = world.pictures if place == "folder" else world.shards / "train"
    source = Embeddings(imported(world, tmp_path, pictures=pictures), "train").manifest["source"]
    assert source["clip"] == "checked"
    assert source["num_pictures"] == 32
    assert source["cosine"] > 0.999
    with pytest.raises(DataError, match=r"stranger did not make these embeddings: encoded again, \d+ has a cosine of"):
        import_embeddings(ImportConfig(tmp_path / "public", world.stranger, tmp_path / "other", pictures))
    assert not (tmp_path / "other").exists()


def test_pictures_of_other_rows_prove_nothing(world: World, tmp_path: Path) -> None:
    (tmp_path / "else").mkdir()
    with pytest.raises(DataError, match="holds no pictures and no shards"):
        imported(world, tmp_path, pictures=tmp_path / "else")
    (tmp_path / "else" / "cat.png").write_bytes((world.pictures / "000000.png").read_bytes())
    with pytest.raises(DataError, match=r"no row belongs to a picture of .*; rows are called '000000', pictures 'cat'"):
        imported(world, tmp_path, pictures=tmp_path / "else")


def test_text_rows_are_made_where_there_are_none(world: World, tmp_path: Path) -> None:
    src = world.layout(tmp_path / "public")
    for path in [*(src / "text_emb").iterdir()]:
        path.unlink()
    out = imported(world, tmp_path, val=0.0)
    np.testing.assert_allclose(Embeddings(out, "train").column("text_emb"), unit(world.text), atol=2e-3)


def test_raw_rows_say_so(world: World, tmp_path: Path) -> None:
    out = imported(world, tmp_path, src=world.layout(tmp_path / "raw", unit=False))
    assert Embeddings(out, "train").normalised is False
    with pytest.raises(DataError, match="normalised=False, these are not; write to another folder"):
        imported(world, tmp_path)


def change(name: str, how) -> Spoil:
    def spoil(src: Path) -> None:
        path = src / name
        np.save(path, how(np.load(path)))

    return spoil


def put(row: int, value: float):
    def how(rows: np.ndarray) -> np.ndarray:
        rows[row] = value
        return rows

    return how


def without_caption(src: Path) -> None:
    path = src / "metadata" / "metadata_0.parquet"
    pd.read_parquet(path)[["image_path"]].to_parquet(path)


def in_parquet(src: Path, widths: tuple[int, ...]) -> None:
    (src / "img_emb" / "img_emb_1.npy").unlink()
    rows = [np.ones(widths[i % len(widths)], np.float32).tolist() for i in range(PARTS[1])]
    pd.DataFrame({"embedding": rows}).to_parquet(src / "img_emb" / "img_emb_1.parquet")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda src: (src / "img_emb").rename(src / "img"), r"holds no img_emb/\*\.npy"),
        (
            lambda src: (src / "text_emb/text_emb_1.npy").unlink(),
            r"parts 0, 1 \(2\) of img_emb but 0 \(1\) of text_emb",
        ),
        (lambda src: (src / "metadata/metadata_1.parquet").unlink(), r"metadata has no \.parquet file of part 1"),
        (without_caption, r"has the columns \['image_path'\], not caption"),
        (
            change("img_emb/img_emb_1.npy", lambda rows: rows[:-1]),
            "img_emb_1.npy has 27 rows but .*text_emb_1.npy has 28",
        ),
        (change("text_emb/text_emb_0.npy", lambda rows: rows[1:]), "has 20 rows but .*text_emb_0.npy has 19"),
        (
            change("img_emb/img_emb_1.npy", lambda rows: rows[:, :9]),
            "rows of 9 numbers, but .* makes 16: .*another CLIP",
        ),
        (change("img_emb/img_emb_1.npy", put(3, np.nan)), r"row 3 of .*img_emb_1\.npy is NaN"),
        (
            change("img_emb/img_emb_0.npy", put(5, np.inf)),
            r"row 5 of .*img_emb_0\.npy is infinite, an overflow of fp16",
        ),
        (change("text_emb/text_emb_0.npy", put(0, 0)), r"row 0 of .*text_emb_0\.npy is zero"),
        (
            change("img_emb/img_emb_1.npy", lambda rows: 7 * rows),
            r"is unit-norm but .* is not: two exports, or two CLIPs",
        ),
        (
            change("img_emb/img_emb_0.npy", lambda rows: rows.astype(int)),
            r"holds int64 of shape .*, not rows of floating",
        ),
        (lambda src: (src / "img_emb/img_emb_0.npy").write_bytes(b"x"), r"img_emb_0\.npy is damaged or no array"),
        (lambda src: (src / "metadata/metadata_0.parquet").write_bytes(b"x" * 99), "is damaged or no parquet file"),
        (change("img_emb/img_emb_0.npy", lambda rows: rows[:0]), "img_emb_0.npy has 0 rows but"),
        (lambda src: np.save(src / "img_emb/img_emb_00.npy", np.ones(3)), "are both part 0; remove one"),
        (
            lambda src: np.save(src / "img_emb/all.npy", np.ones(3)),
            r"no number at the end of its name; .* img_emb_0\.npy",
        ),
        (lambda src: in_parquet(src, (16, 3)), r"embeddings of \[3, 16\] numbers; they must be of one width"),
    ],
)
def test_bad_input_is_named_and_nothing_is_written(world: World, tmp_path: Path, spoil: Spoil, message: str) -> None:
    spoil(world.layout(tmp_path / "public"))
    with pytest.raises(DataError, match=message):
        imported(world, tmp_path)
    assert not (tmp_path / "emb").exists()


def test_column_and_keys_of_other_lengths(world: World, tmp_path: Path) -> None:
    """Of metadata on import, and of what lies in the folder later."""
    src = world.layout(tmp_path / "public")
    path = src / "metadata" / "metadata_1.parquet"
    whole = pd.read_parquet(path)
    whole[:-2].to_parquet(path)
    with pytest.raises(DataError, match=r"img_emb_1\.npy has 28 rows but .*metadata_1\.parquet has 26"):
        imported(world, tmp_path)
    whole.to_parquet(path)
    out = imported(world, tmp_path, val=0.0)
    shard = out / "train" / "00001-0000"
    (shard / "keys.txt").write_text("one\ntwo\n")
    with pytest.raises(DataError, match="2 keys and 28 captions for 28 rows; import the embeddings again"):
        StoredTexts(Embeddings(out, "train")).caption(47)
    rows = np.load(shard / "image_emb.npy")
    np.save(shard / "image_emb.npy", rows[:-1])
    with pytest.raises(DataError, match="has 27 rows; its index says otherwise"):
        Embeddings(out, "train").column("image_emb")
    np.save(shard / "image_emb.npy", rows[:, :7])
    with pytest.raises(DataError, match=r"rows of shape \(7,\), the manifest says 16 numbers: two CLIPs in one folder"):
        Embeddings(out, "train").column("image_emb")


def test_rows_of_two_clips_do_not_share_a_folder(world: World, tmp_path: Path) -> None:
    imported(world, tmp_path)
    with pytest.raises(DataError, match="holds embeddings with clip"):
        imported(world, tmp_path, clip=world.stranger)
    with pytest.raises(DataError, match=r"rows of 16 numbers, but .*wide makes 24"):
        imported(world, tmp_path, clip=save_clip(tmp_path / "wide", tiny_clip(0, 24)), out=tmp_path / "w")


def test_the_same_import_again_writes_nothing_and_mends_what_is_missing(world: World, tmp_path: Path) -> None:
    out = imported(world, tmp_path, val=0.3)
    shard = out / "train" / "00000-0000"
    before = (shard / "image_emb.npy").stat().st_mtime_ns
    captions = (shard / "captions.json").read_text()
    (shard / "captions.json").unlink()
    imported(world, tmp_path, val=0.3)
    assert (shard / "captions.json").read_text() == captions
    assert (shard / "image_emb.npy").stat().st_mtime_ns == before
    splits = {split: Embeddings(out, split).keys for split in ("train", "val")}
    assert sorted(splits["train"] + splits["val"]) == world.keys
    assert 5 < len(splits["val"]) < 25
    with pytest.raises(ConfigError, match=r"--val is 1\.5"):
        imported(world, tmp_path, val=1.5)


def test_batches_without_shards_hold_keys_captions_and_stored_types(world: World, tmp_path: Path) -> None:
    out = imported(world, tmp_path, val=0.3)
    needs = ("image_emb", "text_emb", "tokens")
    data = UnclipData(DataConfig(embeddings=str(out)), 5, 8, needs)
    batch = next(iter(data.train_dataloader()))
    rows = [world.keys.index(key) for key in batch.key]
    assert batch.caption == [world.captions[row] for row in rows]
    assert batch.image_emb.dtype == torch.float16
    wide = pickle.loads(pickle.dumps(batch)).to("cpu")
    assert (wide.image_emb.dtype, wide.tokens.dtype) == (torch.float32, torch.int64)
    np.testing.assert_allclose(wide.image_emb, unit(world.image[rows]), atol=1e-3)
    assert type(wide.key) is type(wide.caption) is type(wide.rows(slice(1, 3)).key)
    assert batch.rows(slice(1, 3)).caption == batch.caption[1:3]
    assert data.fingerprint != UnclipData(DataConfig(embeddings=str(out), train_split="val"), 5, 8, needs).fingerprint
    with pytest.raises(ConfigError, match=r"data\.path is not set.*reads image, tokens; only a prior"):
        UnclipData(DataConfig(embeddings=str(out)), 5, 8, ("image", "tokens"))
    run_embed(world, tmp_path / "ours")
    with pytest.raises(DataError, match="holds no captions: unclip-embed leaves them in the shards"):
        UnclipData(DataConfig(embeddings=str(tmp_path / "ours")), 5, 8, ("image_emb",)).train_dataloader()


def test_whitening_refuses_unit_rows_and_the_papers_form_takes_them(world: World, tmp_path: Path) -> None:
    embeddings = Embeddings(imported(world, tmp_path), "train")
    net = PriorNetConfig(width=32, depth=1, num_heads=2)
    whitened = DiffusionPriorConfig(net=net, embedding_space=EmbeddingSpace.whitened)
    for sources in ({}, {"others": [SourceConfig(path="", embeddings=str(embeddings.folder))]}):
        place = DataConfig(embeddings=str(embeddings.folder), **sources)
        with pytest.raises(ConfigError, match="unit-norm rows, but the model takes CLIP's raw outputs"):
            UnclipData(place, 0, 4, whitened.columns, raw=whitened.is_raw).train_dataloader()
    DiffusionPrior(DiffusionPriorConfig(net=net), embeddings.interface).fit(embeddings)
    raw = imported(world, tmp_path / "r", src=world.layout(tmp_path / "raw", unit=False))
    prior = DiffusionPrior(whitened, embeddings.interface)
    prior.fit(Embeddings(raw, "train"))
    assert prior.clip_std.max() > 0.05


def test_the_commands_train_a_prior_on_public_embeddings(world: World, tmp_path: Path) -> None:
    world.layout(tmp_path / "public")
    pictures = ("--pictures", str(world.pictures))
    said = run_command(
        *(
            "unclip",
            "import",
            "embeddings",
            "public",
            "--clip",
            str(world.clip),
            "--out",
            "emb",
            "--val",
            "0.3",
            *pictures,
        ),
        cwd=tmp_path,
    )
    assert "unit-norm, float16" in said
    assert "32 pictures encoded again: least cosine 0.9" in said or "least cosine 1.0" in said
    run_command("train-prior", "run=prior", "data.embeddings=emb", *TINY["prior"], cwd=tmp_path)
    manifest = json.loads((tmp_path / "prior/artifact/manifest.json").read_text())
    assert manifest["interface"]["clip"] == artifact.read_manifest(world.clip).hash
    assert list((tmp_path / "prior/samples").glob("step-*.png"))
    said = run_command("unclip", "export", "embeddings", "emb", "--out", "out", cwd=tmp_path)
    assert "without captions" not in said
    assert len(read(tmp_path / "out" / "img_emb", file_format="npy")[0]) == len(Embeddings(tmp_path / "emb", "train"))
