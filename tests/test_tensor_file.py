"""Tensors written one at a time, and checkpoints in parts that any number of ranks reads."""

import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from unclip import tensor_file
from unclip.errors import TrainingError
from unclip.stages.parts import drop_older, joined, opened, read_checkpoint, split
from unclip.tensor_file import NAMES, write_tensors


def examples() -> dict[str, Tensor]:
    torch.manual_seed(0)
    found = {f"a.{name}": (torch.randn(3, 5) * 3).to(dtype) for dtype, name in NAMES.items()}
    return {**found, "scalar": torch.tensor(2.0), "empty": torch.zeros(0, 4), "ü.turned": torch.randn(4, 6).t()}


def test_files_are_those_of_the_safetensors_library(tmp_path: Path) -> None:
    tensors = examples()
    write_tensors(tmp_path / "ours", tensors)
    save_file({name: value.contiguous() for name, value in tensors.items()}, tmp_path / "theirs")
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert all(torch.equal(value, tensors[name]) for name, value in load_file(tmp_path / "ours").items())


def test_one_gathered_tensor_is_alive_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[weakref.ref] = []

    def gather(tensor: Tensor) -> Tensor:
        assert not [ref for ref in seen if ref() is not None], "the last gathered tensor is still held"
        whole = tensor.clone()
        seen.append(weakref.ref(whole.untyped_storage()))
        return whole

    monkeypatch.setattr(tensor_file, "_whole", gather)
    for path in (tmp_path / "file", None):
        write_tensors(path, examples())
    assert len(seen) == 2 * len(examples())


def checkpoint() -> dict:
    torch.manual_seed(1)
    weights = {"long": torch.randn(7, 3), "short": torch.randn(2, 2), "scalar": torch.tensor(0.5)}
    state = {n: {"step": torch.tensor(4.0), "ema": torch.randn_like(w)} for n, w in enumerate(weights.values())}
    optimizer = {"state": state, "param_groups": [{"params": [0, 1, 2], "lr": 0.1}]}
    return {"global_step": 4, "state_dict": weights, "optimizer_states": [optimizer], "seconds": 1.5}


def write(path: Path, ranks: int) -> None:
    """As so many ranks of FSDP2 would: rows in equal chunks, the last ones smaller or empty."""
    rest, tensors = split(checkpoint())
    folder = path.parent / "parts-00000004"
    folder.mkdir()
    for rank in range(ranks):
        own = {}
        for name, value in tensors.items():
            if value.ndim:
                size = -(-len(value) // ranks)
                own[name] = value[rank * size : (rank + 1) * size]
            elif rank == 0:
                own[name] = value
        write_tensors(folder / f"{rank:05d}-of-{ranks:05d}.safetensors", own)
    torch.save({**rest, "parts": {"folder": folder.name, "count": ranks}}, path)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5])
def test_parts_of_any_number_are_read_by_any_number(tmp_path: Path, ranks: int) -> None:
    write(tmp_path / "last.ckpt", ranks)
    wanted = checkpoint()
    found = read_checkpoint(tmp_path / "last.ckpt")
    assert found["global_step"] == 4
    assert found["seconds"] == 1.5
    assert found["optimizer_states"][0]["param_groups"] == wanted["optimizer_states"][0]["param_groups"]
    torch.testing.assert_close(found["state_dict"], wanted["state_dict"], rtol=0, atol=0)
    torch.testing.assert_close(
        found["optimizer_states"][0]["state"], wanted["optimizer_states"][0]["state"], rtol=0, atol=0
    )
    with opened(tmp_path / "last.ckpt", torch.load(tmp_path / "last.ckpt", weights_only=True)) as parts:
        for first in range(8):
            for last in range(first, 8):
                assert torch.equal(parts.rows("w/long", first, last), wanted["state_dict"]["long"][first:last])


def test_splitting_and_joining_change_nothing() -> None:
    rest, tensors = split(checkpoint())
    again = joined({**rest, "parts": {}}, tensors)
    torch.testing.assert_close(again, checkpoint(), rtol=0, atol=0)


def test_a_missing_part_is_told(tmp_path: Path) -> None:
    write(tmp_path / "last.ckpt", 3)
    (tmp_path / "parts-00000004" / "00001-of-00003.safetensors").unlink()
    with pytest.raises(
        TrainingError, match=r"needs the 3 files in .*, of which one is missing .*copy the whole folder"
    ):
        read_checkpoint(tmp_path / "last.ckpt")


def test_folders_that_the_checkpoint_does_not_name_are_removed(tmp_path: Path) -> None:
    write(tmp_path / "last.ckpt", 2)
    (tmp_path / "parts-00000002").mkdir()
    drop_older(tmp_path / "last.ckpt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.ckpt", "parts-00000004"]
