from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from unclip.data import embed as embed_module
from unclip.data.embed import EmbedConfig, embed_with
from unclip.data.embeddings import Embeddings, EmbeddingsWriter
from unclip.data.shards import Shards
from unclip.errors import ConfigError, DataError
from unclip.models.clip import CLIP, CLIPConfig
from unclip.models.interface import Interface


@pytest.fixture(scope="module")
def clip() -> CLIP:
    torch.manual_seed(0)
    small = {"embed_dim": 12, "image_size": 16, "vision_width": 16, "vision_layers": 1, "vision_heads": 2}
    return CLIP(CLIPConfig(**small, text_width=16, text_layers=1, text_heads=2, context_length=12)).eval()


@pytest.fixture(scope="module")
def interface(clip: CLIP) -> Interface:
    return replace(clip.interface(), clip="a" * 64)


def config(run: Path, data: Path, **changes: object) -> EmbedConfig:
    return EmbedConfig(**{"run": str(run), "clip": "", "data": str(data), "batch_size": 4, **changes})  # type: ignore[arg-type]


@torch.no_grad()
@pytest.mark.parametrize("num_workers", [0, 2])
def test_rows_are_what_clip_says(
    tmp_path: Path, data: Path, clip: CLIP, interface: Interface, pixels: dict[str, np.ndarray], num_workers: int
) -> None:
    columns = ["image_emb", "text_emb", "tokens", "text_seq"]
    embed_with(clip, interface, config(tmp_path, data, columns=columns, num_workers=num_workers))
    for split in ("train", "val"):
        embeddings, shards = Embeddings(tmp_path, split), Shards(data / split)
        embeddings.check_belongs_to(shards)
        tokens = clip.tokenize([shards.caption(i) for i in range(len(shards))])
        text_emb, text_seq = clip.encode_text(tokens)
        image_emb = clip.encode_image(torch.from_numpy(pixels[split]))
        rows = embeddings.rows(np.arange(len(shards)), columns)
        np.testing.assert_array_equal(rows["tokens"], tokens.numpy())
        np.testing.assert_allclose(rows["image_emb"], image_emb.numpy(), atol=1e-5)
        np.testing.assert_allclose(rows["text_emb"], text_emb.numpy(), atol=1e-5)
        longest = rows["text_seq"].shape[1]
        real = np.arange(longest) <= tokens.argmax(1).numpy()[:, None]
        assert longest == real.sum(1).max()
        np.testing.assert_allclose(rows["text_seq"][real], text_seq[:, :longest].numpy()[real], atol=2e-3)
        assert not rows["text_seq"][~real].any()


def test_a_stopped_run_goes_on_and_ends_alike(
    tmp_path: Path, data: Path, clip: CLIP, interface: Interface, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    embed_with(clip, interface, config(whole, data))
    write, written = EmbeddingsWriter.write, []

    def stop_at_third(self: EmbeddingsWriter, name: str, *rest: object) -> None:
        if len(written) == 2:
            (self.split_dir / f"{name}.tmp").mkdir()  # as a kill in the middle of writing leaves it
            raise KeyboardInterrupt
        written.append(name)
        write(self, name, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(EmbeddingsWriter, "write", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        embed_with(clip, interface, config(cut, data))
    with pytest.raises(DataError, match="no finished embeddings folder"):
        Embeddings(cut, "train")
    monkeypatch.undo()

    encode, encoded = embed_module._encode, []
    monkeypatch.setattr(embed_module, "_encode", lambda *a: encoded.append(len(a[1])) or encode(*a))
    embed_with(clip, interface, config(cut, data))
    assert sum(encoded) == 20 + 7 - 12
    files = sorted(path.relative_to(whole) for path in whole.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(cut) for path in cut.rglob("*") if path.is_file())
    assert all((whole / file).read_bytes() == (cut / file).read_bytes() for file in files)

    encoded.clear()
    embed_with(clip, interface, config(cut, data))
    assert encoded == []


def test_another_clip_is_refused(tmp_path: Path, data: Path, clip: CLIP, interface: Interface) -> None:
    embed_with(clip, interface, config(tmp_path, data, splits=["val"], dtype="float16"))
    assert Embeddings(tmp_path, "val").column("image_emb").dtype == np.float16
    with pytest.raises(DataError, match="clip aaaaaaaa, not bbbbbbbb"):
        embed_with(clip, replace(interface, clip="b" * 64), config(tmp_path, data, splits=["val"], dtype="float16"))


def test_wrong_settings_and_missing_data_are_refused(
    tmp_path: Path, data: Path, clip: CLIP, interface: Interface
) -> None:
    with pytest.raises(ConfigError, match="float32, float16"):
        config(tmp_path, data, dtype="int8")
    with pytest.raises(ConfigError, match="must hold image_emb"):
        config(tmp_path, data, columns=["image_em"])
    with pytest.raises(DataError, match="holds no split"):
        embed_with(clip, interface, config(tmp_path, tmp_path))
