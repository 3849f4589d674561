"""unclip-embed by several processes, stopped anywhere, gives the files of one that was never stopped."""

import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from unclip.artifact import Manifest, save
from unclip.config import to_plain
from unclip.data.embed import EmbedConfig
from unclip.data.embeddings import Embeddings
from unclip.data.embeddings_writer import EmbeddingsWriter, Moments
from unclip.data.shards import Shards
from unclip.errors import ConfigError
from unclip.models.clip import CLIP, CLIPConfig
from unclip.models.interface import Interface

SBATCH = Path(__file__).parents[2] / "scripts" / "slurm" / "embed.sbatch"
KILLED = """
import os, signal
from unclip.cli import train
from unclip.data.embeddings_writer import EmbeddingsWriter
from pathlib import Path
fill = EmbeddingsWriter._fill
def fill_or_die(self, draft, sha256, keys, columns):
    fill(self, draft, sha256, keys, columns)
    if draft.name.startswith("00002"):
        (draft / "shard.json").unlink()
        os.kill(os.getpid(), signal.SIGKILL)
EmbeddingsWriter._fill = fill_or_die
train.embed()
"""


INTERFACE = Interface(embed_dim=5, text_width=3, context_length=8, vocab_size=100, clip="c" * 64)


def rows_of(count: int, seed: int) -> dict[str, np.ndarray]:
    return {"image_emb": np.random.default_rng(seed).normal(size=(count, 5)).astype(np.float32)}


@pytest.fixture(scope="module")
def clip_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    small = {"embed_dim": 12, "image_size": 16, "vision_width": 16, "vision_layers": 1, "vision_heads": 2}
    clip = CLIP(CLIPConfig(**small, text_width=16, text_layers=1, text_heads=2, context_length=12)).eval()
    run = tmp_path_factory.mktemp("clip")
    save(run, clip, Manifest("clip", "clip", to_plain(clip.cfg), to_plain(clip.interface())))
    return run


def start(arguments: list[str], code: str = "", **environment: str) -> subprocess.Popen:
    script = code or "from unclip.cli import train; train.embed()"
    return launch([sys.executable, "-c", script, *arguments], OMP_NUM_THREADS="1", **environment)


def launch(command: list[str], **environment: str) -> subprocess.Popen:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.Popen(command, env={**os.environ, "PATH": path, **environment}, stderr=subprocess.PIPE, text=True)


def files(folder: Path) -> dict[str, bytes]:
    """What readers see: everything but the locks, and the report, which knows times."""
    paths = [path for path in folder.rglob("*") if path.is_file() and "lock" not in path.name]
    paths = [path for path in paths if path.name != "report.html"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def test_two_ranks_a_kill_and_a_second_try_give_the_files_of_one_process(
    tmp_path: Path, data: Path, clip_run: Path
) -> None:
    same = [f"clip={clip_run}", f"data={data}", "batch_size=4", "crops=2", "device=cpu"]
    runs = [start([f"run={tmp_path / 'one'}", *same])]
    runs += [start([f"run={tmp_path / 'two'}", *same], RANK=str(r), WORLD_SIZE="2") for r in range(2)]
    runs += [start([f"run={tmp_path / 'killed'}", *same], code=KILLED)]
    said = [run.communicate(timeout=500)[1] for run in runs]
    assert [run.returncode for run in runs] == [0, 0, 0, -signal.SIGKILL], said
    wanted = files(tmp_path / "one")
    assert len(wanted) == 4 * 5 + 2 * 5 + 2 + 1 + 1
    assert files(tmp_path / "two") == wanted
    assert "part 1 of 2" in said[2]
    assert sorted(path.name for path in (tmp_path / "killed" / "train").iterdir() if path.suffix != ".tmp") == [
        "00000",
        "00001",
    ]
    assert any((tmp_path / "killed" / "train").glob("00002.*.tmp"))
    again = start([f"run={tmp_path / 'killed'}", *same])
    assert again.wait(500) == 0, again.communicate()[1]
    assert files(tmp_path / "killed") == wanted


@pytest.mark.slow
def test_a_slurm_array_gives_the_files_of_one_process(tmp_path: Path, data: Path, clip_run: Path) -> None:
    same = [f"clip={clip_run}", f"data={data}", "device=cpu"]
    script = ["bash", str(SBATCH), f"run={tmp_path / 'array'}", *same]
    array = {"SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_MAX": "1", "SLURM_ARRAY_TASK_COUNT": "2"}
    runs = [launch(script, **array, SLURM_ARRAY_TASK_ID=str(task)) for task in range(2)]
    runs.append(start([f"run={tmp_path / 'one'}", *same]))
    said = [run.communicate(timeout=500)[1] for run in runs]
    assert [run.returncode for run in runs] == [0, 0, 0], said
    assert "part 0 of 2" in said[0]
    assert "part 1 of 2" in said[1]
    assert files(tmp_path / "array") == files(tmp_path / "one")


def test_whoever_ends_last_writes_the_index_and_both_may(tmp_path: Path, data: Path) -> None:
    """Two processes enter finish() again and again at the same time: always a whole manifest with both splits."""
    for split in ("train", "val"):
        shards = Shards(data / split)
        writer = EmbeddingsWriter(tmp_path, split, INTERFACE, ["image_emb"], "float32")
        assert not writer.complete(shards)
        for i, name in enumerate(shards.names):
            keys = shards.keys[shards.starts[i] : shards.starts[i + 1]]
            writer.write(name.removesuffix(".tar"), shards.sha256[i], keys, rows_of(len(keys), i))
        assert writer.complete(shards)
    writers = {s: EmbeddingsWriter(tmp_path, s, INTERFACE, ["image_emb"], "float32") for s in ("train", "val")}
    children = []
    for split in ("train", "val"):
        if (pid := os.fork()) == 0:
            try:
                for _ in range(20):
                    writers[split].finish(Shards(data / split))
                os._exit(0)
            finally:
                os._exit(1)
        children.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0, 0]
    assert list(json.loads((tmp_path / "manifest.json").read_text())["data"]) == ["train", "val"]
    assert len(Embeddings(tmp_path, "train")) == 20
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_slower_writer_of_the_same_shard_leaves_the_first_one_alone(tmp_path: Path, data: Path) -> None:
    shards = Shards(data / "train")
    writer = EmbeddingsWriter(tmp_path, "train", INTERFACE, ["image_emb"], "float32")
    inodes = set()
    for seed in (0, 1):
        writer.write("00000", shards.sha256[0], shards.keys[:6], rows_of(6, seed))
        inodes.add((tmp_path / "train" / "00000").stat().st_ino)
    assert len(inodes) == 1
    assert [path.name for path in (tmp_path / "train").iterdir()] == ["00000"]


def test_parts_come_from_settings_ranks_and_job_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = EmbedConfig("r", "c", "d")
    assert cfg.share() == (0, 1)
    for name, value in {"ID": "7", "MIN": "1", "MAX": "9", "COUNT": "5"}.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", value)
    assert cfg.share() == (3, 5)  # --array=1-9:2
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert cfg.share() == (13, 20)
    assert EmbedConfig("r", "c", "d", part=1, parts=3).share() == (5, 12)
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "2")
    with pytest.raises(ConfigError, match="the tasks 1 to 9 of this SLURM job array have gaps"):
        cfg.share()


def test_statistics_do_not_depend_on_the_order_of_the_shards() -> None:
    rows = np.random.default_rng(0).normal(1e3, [1e-2, 1, 50], (1000, 3)).astype(np.float32)
    parts = np.split(rows, [1, 30, 31, 500, 990])
    for order in itertools.permutations(range(len(parts)), len(parts)):
        merged = Moments()
        for place in order:
            merged = merged.merge(Moments.of(parts[place]))
        exact = rows.astype(np.float64)
        assert merged.count == 1000
        np.testing.assert_allclose(merged.mean, exact.mean(0), rtol=1e-14)
        np.testing.assert_allclose(merged.squares / 1000, exact.var(0), rtol=1e-11)
        np.testing.assert_allclose(merged.norm, np.linalg.norm(exact, axis=1).mean(), rtol=1e-13)
