"""The chain behind the page: visitors kept apart, stages missing, replaced and mixed, runs by name."""

import resource
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_chain import write_tiny_chain

from unclip.errors import ConfigError
from unclip.nets.layers import Cond
from unclip.pipeline import UnCLIP
from unclip.recipe import from_png
from unclip.ui.studio import Draw, Studio, decoder_sampling, squares
from unclip.ui.worker import State, Task

FAST = (2, None)  # steps and guidance of the decoder


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_chain(tmp_path_factory.mktemp("chain"))


@pytest.fixture
def studio(chain: Path, tmp_path: Path) -> Iterator[Studio]:
    runs = tmp_path / "runs"
    shutil.copytree(chain, runs, symlinks=True)
    found = Studio(runs, tmp_path / "files")
    yield found
    found.close()


def drawing(caption: str, num: int = 1) -> Draw:
    return lambda chain, progress: chain.generate(
        [caption], num=num, how=decoder_sampling(chain, *FAST), progress=progress
    )


def wait(task: Task) -> Task:
    limit = time.monotonic() + 120
    while not task.state.ended:
        assert time.monotonic() < limit, "a task does not end"
        time.sleep(0.01)
    return task


def test_visitors_are_kept_apart_and_leave_nothing(studio: Studio):
    ada, bob = (
        studio.submit("ada", "generate", drawing("a cube", 2)),
        studio.submit("bob", "generate", drawing("a cone")),
    )
    for task, caption, count in ((ada, "a cube", 2), (bob, "a cone", 1)):
        assert wait(task).state is State.done, task.error
        assert [from_png(path).caption for _, path in task.pictures] == [caption] * count
    assert studio.task("ada", "generate") is ada
    assert studio.task("ada", "vary") is None
    assert studio.task("eve", "generate") is None
    assert not studio.cancel("bob", "generate"), "it has ended"
    studio.leave("ada")
    assert studio.task("ada", "generate") is None
    assert not any(path.exists() for _, path in ada.pictures)
    assert all(path.exists() for _, path in bob.pictures)
    folders = [path for path in studio.folder.iterdir() if any(path.iterdir())]
    assert len(folders) == 1
    assert len(folders[0].name) == 32, "a name that cannot be guessed"


def test_under_a_memory_limit_a_request_is_halved_and_the_next_one_works(
    studio: Studio, monkeypatch: pytest.MonkeyPatch
):
    """A limit on this process's address space: the CPU allocator itself refuses 200 MB for each of 16 or 8 pictures."""
    assert wait(studio.submit("ada", "generate", drawing("a cube"))).state is State.done
    base = UnCLIP._base

    def hungry(chain: UnCLIP, cond: Cond, seeds: list[int], *rest: Any) -> torch.Tensor:
        held = torch.empty(len(seeds), 200 * 2**20, dtype=torch.uint8)
        return base(chain, cond, seeds, *rest)[: len(held)]

    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with monkeypatch.context() as context:
        context.setattr(UnCLIP, "_base", hungry)
        try:
            resource.setrlimit(resource.RLIMIT_AS, (now + 1500 * 2**20, hard))
            task = wait(studio.submit("ada", "generate", drawing("a cube", 16)))
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert (task.state, len(task.pictures)) == (State.done, 16), task.error
    told = [f"the decoder runs out of memory with {n} pictures at once; going on with {n // 2}" for n in (16, 8)]
    assert task.notes == told
    assert wait(studio.submit("ada", "generate", drawing("a cube"))).state is State.done


def test_a_picture_is_repeated_beside_the_others(studio: Studio):
    first = wait(studio.submit("ada", "generate", drawing("a cube", 3)))
    again = wait(studio.repeat("ada", "generate", 1))
    assert [picture.seed for picture, _ in again.pictures] == [0, 1, 2, 1]
    assert torch.equal(again.pictures[3][0].image, first.pictures[1][0].image)
    assert again.notes == []
    assert all(path.exists() for _, path in again.pictures), "those of the first request are still shown"
    wait(studio.submit("ada", "generate", drawing("a cone")))
    assert not any(path.exists() for _, path in again.pictures)
    for visitor, index in (("bob", 0), ("ada", 7), ("ada", -1)):
        with pytest.raises(ConfigError, match="choose a picture first: click on it"):
            studio.repeat(visitor, "generate", index)


def test_a_new_request_gives_the_earlier_one_up(studio: Studio):
    long = studio.submit(
        "ada",
        "generate",
        lambda chain, progress: chain.generate(
            ["a cube"], num=9, how=decoder_sampling(chain, 1000, None), progress=progress
        ),
    )
    short = studio.submit("ada", "generate", drawing("a cone"))
    assert wait(short).state is State.done
    assert long.state is State.cancelled


def test_a_missing_stage_is_told_and_works_once_it_is_there(studio: Studio, chain: Path):
    assert studio.trouble() == ""
    shutil.rmtree(studio.runs / "decoder")
    assert "decoder does not exist; give the run folder of a finished stage" in studio.trouble()
    task = wait(studio.submit("ada", "generate", drawing("a cube")))
    assert (task.state, "decoder does not exist" in task.error) == (State.failed, True)
    shutil.copytree(chain / "decoder", studio.runs / "decoder", symlinks=True)
    assert wait(studio.submit("ada", "generate", drawing("a cube"))).state is State.done


def test_stages_of_two_clips_are_told(studio: Studio):
    from unclip import artifact

    model, manifest = artifact.load(studio.runs / "clip")
    with torch.no_grad():
        next(model.parameters()).add_(1.0)
    artifact.save(studio.runs / "clip", model, manifest)
    assert "was trained on CLIP" in studio.trouble()
    task = wait(studio.submit("ada", "generate", drawing("a cube")))
    assert "was trained on CLIP" in task.error


def test_bad_settings_are_told(studio: Studio):
    chain = studio.chain()
    with pytest.raises(ConfigError, match="the decoder was trained with 1000 timesteps; it cannot sample in 1001"):
        decoder_sampling(chain, 1001, None)
    how = decoder_sampling(chain, 7, 4.0).decoder
    assert how is not None
    assert (how.sampler.num_steps, how.guidance.scale) == (7, 4.0)
    with pytest.raises(ConfigError, match="nowhere is not a folder"):
        Studio(studio.runs / "nowhere", studio.folder)


def test_runs_are_named_below_the_folder_only(studio: Studio):
    (studio.runs / "sweep" / "a").mkdir(parents=True)
    (studio.runs / "sweep" / "a" / "metrics.jsonl").write_text("")
    (studio.runs / "pictures").mkdir()
    assert list(studio.run_folders()) == ["clip", "decoder", "prior", "upsampler", "sweep/a"]


def test_pictures_of_several_sizes_become_squares():
    pictures = [torch.zeros(3, 40, 60, dtype=torch.uint8), torch.full((3, 30, 20), 9, dtype=torch.uint8)]
    found = squares(pictures)
    assert found.shape == (2, 3, 20, 20)
    assert found[1].eq(9).all()
