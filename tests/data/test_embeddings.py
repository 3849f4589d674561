import errno
import json
import os
import pickle
import socket
from pathlib import Path

import numpy as np
import pytest

from unclip.data import embeddings as module
from unclip.data.embeddings import Embeddings, lengths
from unclip.data.embeddings_writer import EmbeddingsWriter, Moments
from unclip.data.shards import Shards
from unclip.errors import DataError
from unclip.models.interface import Interface

CLIP = Interface(embed_dim=5, text_width=3, context_length=8, vocab_size=100, clip="c" * 64)
COLUMNS = ("image_emb", "text_emb", "tokens", "text_seq")


def rows_of(count: int, seed: int, longest: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    tokens = np.zeros((count, 8), np.int32)
    for row, length in zip(tokens, rng.integers(2, longest + 1, count), strict=True):
        row[: length - 1] = 1 + rng.integers(0, 90, length - 1)
        row[length - 1] = 99
    return {
        "image_emb": rng.normal(3, 2, (count, 5)).astype(np.float32),
        "text_emb": rng.normal(0, 1, (count, 5)).astype(np.float32),
        "tokens": tokens,
        "text_seq": rng.normal(size=(count, longest, 3)).astype(np.float16),
    }


def write(folder: Path, shards: Shards, interface: Interface = CLIP, columns: tuple[str, ...] = COLUMNS) -> list[dict]:
    writer = EmbeddingsWriter(folder, "train", interface, columns, "float32")
    parts = []
    for i, name in enumerate(shards.names):
        keys = shards.keys[shards.starts[i] : shards.starts[i + 1]]
        rows = rows_of(len(keys), i, 4 + i)
        parts.append({column: rows[column] for column in columns})
        writer.write(Path(name).stem, shards.sha256[i], keys, parts[-1])
    writer.finish(shards)
    return parts


def test_rows_come_from_every_shard_in_the_order_asked(tmp_path: Path, data: Path) -> None:
    shards = Shards(data / "train")
    parts = write(tmp_path, shards)
    embeddings = Embeddings(tmp_path, "train")
    whole = {c: np.concatenate([part[c] for part in parts]) for c in ("image_emb", "text_emb", "tokens")}
    indices = np.array([19, 0, 7, 7, 13, 2, 6])
    rows = pickle.loads(pickle.dumps(embeddings)).rows(indices, COLUMNS)
    for column, values in whole.items():
        assert np.array_equal(rows[column], values[indices])
        assert rows[column].dtype == values.dtype
        assert np.array_equal(embeddings.column(column), values)
    assert rows["text_seq"].shape == (7, 7, 3)
    assert np.array_equal(rows["text_seq"][0], parts[3]["text_seq"][1])
    assert np.array_equal(rows["text_seq"][1, :4], parts[0]["text_seq"][0])
    assert not rows["text_seq"][1, 4:].any()
    assert embeddings.keys == shards.keys
    assert embeddings.interface == CLIP
    assert len(embeddings) == 20
    assert np.array_equal(lengths(rows["tokens"]), (rows["tokens"] == 99).argmax(1) + 1)


def test_statistics_are_those_of_all_rows(tmp_path: Path, data: Path) -> None:
    parts = write(tmp_path, Shards(data / "train"))
    stats = Embeddings(tmp_path, "train").stats
    images = np.concatenate([part["image_emb"] for part in parts]).astype(np.float64)
    assert stats["count"] == 20
    np.testing.assert_allclose(stats["image_mean"], images.mean(0), rtol=1e-12)
    np.testing.assert_allclose(stats["image_std"], images.std(0), rtol=1e-12)
    np.testing.assert_allclose(stats["image_norm"], np.linalg.norm(images, axis=1).mean(), rtol=1e-12)
    assert not np.allclose(stats["text_mean"], stats["image_mean"])
    assert json.loads((tmp_path / "manifest.json").read_text())["normalised"] is False


def test_moments_far_from_zero_merge_exactly() -> None:
    rows = np.random.default_rng(0).normal(1e6, 1e-2, (300, 4))
    merged = Moments()
    for part in np.split(rows, [1, 50, 51, 290]):
        merged = merged.merge(Moments.from_json(Moments.of(part).to_json()))
    np.testing.assert_allclose(np.sqrt(merged.squares / 300), rows.std(0), rtol=1e-6)
    np.testing.assert_allclose(merged.mean, rows.mean(0), rtol=1e-15)


def test_embeddings_belong_to_samples_not_to_picture_sizes(
    tmp_path: Path, data: Path, larger: Path, other: Path
) -> None:
    write(tmp_path, Shards(data / "train"))
    embeddings = Embeddings(tmp_path, "train")
    embeddings.check_belongs_to(Shards(larger / "train"))
    assert Shards(larger / "train").fingerprint != Shards(data / "train").fingerprint
    with pytest.raises(DataError, match="row 0 is train0, not xtrain0"):
        embeddings.check_belongs_to(Shards(other / "train"))


def test_another_clip_or_other_columns_are_refused(tmp_path: Path, data: Path) -> None:
    shards = Shards(data / "train")
    write(tmp_path, shards)
    stranger = Interface(**{**CLIP.__dict__, "clip": "d" * 64})
    with pytest.raises(DataError, match="clip cccccccc, not dddddddd"):
        EmbeddingsWriter(tmp_path, "val", stranger, COLUMNS, "float32")
    with pytest.raises(DataError, match="columns"):
        EmbeddingsWriter(tmp_path, "train", CLIP, COLUMNS[:2], "float32")
    with pytest.raises(DataError, match="dtype"):
        EmbeddingsWriter(tmp_path, "train", CLIP, COLUMNS, "float16")
    with pytest.raises(DataError, match="precision"):
        EmbeddingsWriter(tmp_path, "train", CLIP, COLUMNS, "float32", precision="bf16")


def test_unfinished_and_damaged_folders_are_refused(tmp_path: Path, data: Path) -> None:
    shards = Shards(data / "train")
    with pytest.raises(DataError, match="run unclip-embed"):
        Embeddings(tmp_path, "train")
    write(tmp_path, shards, columns=("image_emb",))
    embeddings = Embeddings(tmp_path, "train")
    with pytest.raises(DataError, match="not tokens; embed again"):
        embeddings.rows(np.array([0]), ["tokens"])
    with pytest.raises(DataError, match=r"splits \['train'\], not val"):
        Embeddings(tmp_path, "val")
    path = tmp_path / "train" / "00001" / "image_emb.npy"
    path.write_bytes(path.read_bytes()[:150])
    assert embeddings.rows(np.array([0]), ["image_emb"])["image_emb"].shape == (1, 5)
    with pytest.raises(DataError, match=r"00001/image_emb\.npy is missing or damaged"):
        embeddings.rows(np.array([7]), ["image_emb"])


def test_many_shards_keep_few_files_open(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A descriptor for every shard and column would meet the usual limit of 1,024."""
    write(tmp_path, Shards(data / "train"))
    monkeypatch.setattr(module, "_MOST_OPEN", 2)
    embeddings, before = Embeddings(tmp_path, "train"), len(os.listdir("/proc/self/fd"))
    found = embeddings.rows(np.arange(20), COLUMNS)
    assert len(os.listdir("/proc/self/fd")) <= before + 2
    again = embeddings.rows(np.arange(20), COLUMNS)
    assert all(np.array_equal(found[column], again[column]) for column in COLUMNS)


def test_a_limit_of_open_files_is_not_called_damage(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, Shards(data / "train"))

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    embeddings = Embeddings(tmp_path, "train")
    monkeypatch.setattr(np, "load", full)
    with pytest.raises(DataError, match=r"Too many open files\): raise the limit, as ulimit -n 65536"):
        embeddings.rows(np.array([0]), ["image_emb"])


def test_a_draft_of_a_killed_process_of_the_same_number_is_no_obstacle(tmp_path: Path, data: Path) -> None:
    """As in a container, whose command has the same number at every start."""
    shards = Shards(data / "train")
    (tmp_path / "train" / f"00000.{socket.gethostname()}-{os.getpid()}.tmp").mkdir(parents=True)
    write(tmp_path, shards)
    assert len(Embeddings(tmp_path, "train")) == 20


def test_changed_data_replaces_its_shards(tmp_path: Path, data: Path, larger: Path) -> None:
    write(tmp_path, Shards(data / "train"))
    writer = EmbeddingsWriter(tmp_path, "train", CLIP, COLUMNS, "float32")
    old, new = Shards(data / "train"), Shards(larger / "train")
    keys = old.keys[:6]
    assert writer.done("00000", old.sha256[0], keys)
    assert not writer.done("00000", old.sha256[0], keys[:5]), "another index of the same tar leaves one out"
    assert not writer.done("00000", old.sha256[0], [*keys[:5], "other"]), "and takes another in"
    assert not writer.done("00000", new.sha256[0], keys)
    writer.write("00000", new.sha256[0], new.keys[:6], rows_of(6, 77, 4))
    assert writer.done("00000", new.sha256[0], new.keys[:6])
    assert sorted(path.name for path in (tmp_path / "train").iterdir()) == ["00000", "00001", "00002", "00003"]
    with pytest.raises(DataError, match="run unclip-embed"):
        Embeddings(tmp_path, "train")
    with pytest.raises(ValueError, match="of other lengths"):
        writer.write("00001", new.sha256[1], new.keys[:5], rows_of(6, 77, 4))
