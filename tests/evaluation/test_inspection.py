from pathlib import Path

import numpy as np
import pytest
import torch
from tests_support import run_command

from unclip.artifact import Manifest, save
from unclip.cli.inspect import inspect_path
from unclip.config import to_plain
from unclip.data.embeddings import Embeddings
from unclip.data.embeddings_writer import EmbeddingsWriter
from unclip.data.variants import Variants
from unclip.errors import ConfigError, DataError
from unclip.evaluation import inspection
from unclip.evaluation.inspection import inspect_embeddings, reconstruction_error
from unclip.evaluation.metrics import effective_rank, spectrum
from unclip.models.clip import CLIP, CLIPConfig
from unclip.models.interface import Interface

INTERFACE = Interface(embed_dim=6, text_width=3, context_length=8, vocab_size=100, clip="c" * 64)
NUM = 300


class FakeShards:
    """What the writer asks of a split."""

    def __init__(self, sizes: list[int]) -> None:
        self.names = [f"{i:05d}.tar" for i in range(len(sizes))]
        self.sha256 = [f"{i}" * 64 for i in range(len(sizes))]
        self.shard_sizes, self.split_dir = sizes, Path("fake")
        self.fingerprint = self.text_fingerprint = "f"


def rows(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    image = rng.normal(2, [5, 3, 1, 1, 0.1, 0.01], (NUM, 6)).astype(np.float32)
    text = (image + rng.normal(0, 1, (NUM, 6))).astype(np.float32)
    return {"image_emb": image, "text_emb": text}


def write(folder: Path, columns: dict[str, np.ndarray], variants: Variants = Variants()) -> Path:  # noqa: B008
    sizes = [100, 150, 50]
    writer = EmbeddingsWriter(folder, "train", INTERFACE, list(columns), "float32", variants)
    start = 0
    for i, size in enumerate(sizes):
        some = {name: values[start : start + size] for name, values in columns.items()}
        writer.write(f"{i:05d}", f"{i}" * 64, [f"k{start + j}" for j in range(size)], some)
        start += size
    writer.finish(FakeShards(sizes))  # type: ignore[arg-type]
    return folder


def test_numbers_are_those_of_all_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    columns = rows()
    monkeypatch.setattr(inspection, "_CHUNK", 70)
    found = inspect_embeddings(Embeddings(write(tmp_path, columns), "train"), max_rows=10**6)
    assert (found.num_rows, found.total) == (NUM, NUM)
    for name, values in columns.items():
        exact = values.astype(np.float64)
        np.testing.assert_allclose(found.columns[name].norms, np.linalg.norm(exact, axis=1), rtol=1e-12)
        torch.testing.assert_close(
            found.columns[name].variances, spectrum(torch.from_numpy(exact)), atol=1e-9, rtol=1e-9
        )
        assert (found.columns[name].num_nonfinite, found.columns[name].num_duplicates) == (0, 0)
    image, text = (
        v.astype(np.float64) / np.linalg.norm(v.astype(np.float64), axis=1)[:, None] for v in columns.values()
    )
    np.testing.assert_allclose(found.pairs, (image * text).sum(1), rtol=1e-12)
    assert found.shuffled is not None
    assert found.pairs is not None
    everything = image @ text.T
    strangers = everything[~np.eye(NUM, dtype=bool)]
    assert abs(found.shuffled.mean() - strangers.mean()) < 4 * strangers.std() / NUM**0.5
    assert found.pairs.mean() > found.shuffled.mean() + 0.2
    assert np.isin(found.shuffled.round(9), everything.round(9)).all()
    few = inspect_embeddings(Embeddings(tmp_path, "train"), max_rows=75)
    np.testing.assert_allclose(few.columns["image_emb"].norms, found.columns["image_emb"].norms[::4], rtol=1e-12)


def test_nans_and_duplicates_are_counted_and_left_out(tmp_path: Path) -> None:
    columns = rows()
    columns["image_emb"][[3, 120, 299]] = columns["image_emb"][5]
    columns["text_emb"][7, 2], columns["text_emb"][8, 0] = np.nan, np.inf
    with np.errstate(invalid="ignore"):
        write(tmp_path, columns)
    found = inspect_embeddings(Embeddings(tmp_path, "train"), max_rows=NUM)
    assert (found.columns["image_emb"].num_nonfinite, found.columns["image_emb"].num_duplicates) == (0, 3)
    assert (found.columns["text_emb"].num_nonfinite, found.columns["text_emb"].num_duplicates) == (2, 0)
    assert len(found.columns["text_emb"].norms) == NUM - 2
    good = np.isfinite(columns["text_emb"]).all(1)
    wanted = spectrum(torch.from_numpy(columns["text_emb"][good].astype(np.float64)))
    torch.testing.assert_close(found.columns["text_emb"].variances, wanted, atol=1e-9, rtol=1e-9)
    assert found.pairs is not None
    assert len(found.pairs) == NUM - 2
    columns["image_emb"][:] = np.nan
    with np.errstate(invalid="ignore"):
        write(tmp_path / "nan", columns)
    with pytest.raises(DataError, match=r"no row of image_emb of .*train is finite; check the CLIP"):
        inspect_embeddings(Embeddings(tmp_path / "nan", "train"), max_rows=NUM)


def test_several_captions_and_crops_count_as_their_first(tmp_path: Path) -> None:
    columns = rows()
    many = {"image_emb": np.stack([columns["image_emb"], 0 * columns["image_emb"]], 1)}
    many["text_emb"] = np.stack([columns["text_emb"]] * 3, 1)
    one = inspect_embeddings(Embeddings(write(tmp_path / "one", columns), "train"), NUM)
    some = inspect_embeddings(Embeddings(write(tmp_path / "many", many, Variants(3, 2, 1)), "train"), NUM)
    assert np.array_equal(some.columns["image_emb"].norms, one.columns["image_emb"].norms)
    assert np.array_equal(some.pairs, one.pairs)  # type: ignore[arg-type]


def test_reconstruction_error_is_that_of_pca() -> None:
    values = torch.from_numpy(rows()["image_emb"].astype(np.float64))
    centred = values - values.mean(0)
    error = reconstruction_error(spectrum(values))
    basis = torch.linalg.svd(centred, full_matrices=False)[2]
    for k in range(7):
        left = centred - centred @ basis[:k].T @ basis[:k]
        torch.testing.assert_close(error[k], left.square().sum() / centred.square().sum(), atol=1e-12, rtol=1e-9)


def test_the_command_prints_tables_and_draws_each_plot(tmp_path: Path) -> None:
    columns = rows()
    columns["image_emb"][3] = columns["image_emb"][5]
    write(tmp_path / "emb", columns)
    said = run_command("unclip", "inspect", "emb", "--out", "plots", cwd=tmp_path)
    assert "emb holds embeddings by CLIP cccccccccccc: image_emb, text_emb in float32, 6 wide, 1 caption(s)" in said
    assert "train: 1 z_i equal an earlier one to the bit" in said
    rank = effective_rank(spectrum(torch.from_numpy(columns["image_emb"])))
    assert f"{rank:.1f}" in said
    names = {"norms", "cosines", "spectrum", "reconstruction", "faults"}
    assert {path.stem for path in (tmp_path / "plots").iterdir()} == names
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (tmp_path / "plots").iterdir())


def test_pairs_of_strangers_are_remarked(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    columns = rows()
    write(tmp_path, {"image_emb": columns["image_emb"], "text_emb": rows(1)["image_emb"]})
    inspect_path(tmp_path, None, NUM)
    assert "train: pairs are no nearer than shuffled ones" in " ".join(capsys.readouterr().out.split())


def test_an_artifact_is_described_in_words(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    small = {"embed_dim": 12, "image_size": 16, "vision_width": 16, "vision_layers": 1, "vision_heads": 2}
    clip = CLIP(CLIPConfig(**small, text_width=16, text_layers=1, text_heads=2, context_length=12))
    facts = {"step": 1234, "samples": 56789, "parents": {"start": "e" * 64}, "metrics": {"val/contrastive": 0.25}}
    save(tmp_path, clip, Manifest("clip", "clip", to_plain(clip.cfg), to_plain(clip.interface()), **facts))  # type: ignore[arg-type]
    for folder in (tmp_path, tmp_path / "artifact-00001234"):
        inspect_path(folder, None, NUM)
        said = " ".join(capsys.readouterr().out.split())
        assert "is a clip: a model 'clip' of " in said
        assert "at step 1,234 after 56,789 samples" in said
        assert "it was trained on: start eeeeeeeeeeee." in said
        assert "val/contrastive" in said
        assert "vision_width" in said
    with pytest.raises(ConfigError, match="--out draws plots of embeddings only"):
        inspect_path(tmp_path, tmp_path / "plots", NUM)


def test_other_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds neither embeddings nor an artifact"):
        inspect_path(tmp_path, None, NUM)
    with pytest.raises(ConfigError, match=r"there is no .*missing; give"):
        inspect_path(tmp_path / "missing", None, NUM)
