"""The chain behind the page: loads the stages, takes requests, keeps each visitor's tasks and files apart."""

import logging
import secrets
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from unclip.artifact import locate
from unclip.batches import Progress
from unclip.data.transforms import square, to_pil, to_tensor
from unclip.errors import ConfigError, UnclipError, is_out_of_memory
from unclip.evaluation.sheet import save_picture
from unclip.jobs import Picture, Sampling
from unclip.loading import folders_of
from unclip.manipulate import INVERTIBLE
from unclip.models.sampling import changed
from unclip.pipeline import UnCLIP
from unclip.recipe import text_chunks, to_image
from unclip.report.run import is_run
from unclip.ui.worker import Task, Worker

log = logging.getLogger(__name__)
MOST_KEPT = 200  # tasks whose pictures can still be seen; beyond, the oldest goes
Draw = Callable[[UnCLIP, Progress], Iterator[Picture]]


class Studio:
    """One chain of ``runs`` for all visitors. Pictures go below ``folder``, each task's under a name that cannot be guessed.

    The stages are loaded when they are first needed, and again when one of them was trained on.
    """

    def __init__(self, runs: Path, folder: Path, batch_size: int = 8) -> None:
        if not runs.is_dir():
            raise ConfigError(f"{runs} is not a folder; give the one that holds the runs clip, prior, decoder ...")
        self.runs, self.folder, self.batch_size = runs.resolve(), folder, batch_size
        self.worker = Worker(self._save, _remove)
        self._chain: tuple[dict[str, Path], UnCLIP] | None = None
        self._lock, self._loading = threading.Lock(), threading.Lock()
        self._tasks: dict[tuple[str, str], Task] = {}

    def chain(self) -> UnCLIP:
        """The stages as they are now. Raises ArtifactError for a missing or damaged one, or stages of different CLIPs."""
        with self._loading:
            found = {name: locate(folder).resolve() for name, folder in folders_of(self.runs).items()}
            if self._chain is None or self._chain[0] != found:
                self._chain = None  # before the next one is read
                self._chain = (found, UnCLIP.load(self.runs))
            return self._chain[1]

    def trouble(self) -> str:
        """Why nothing can be drawn now, in words; empty if all is well."""
        try:
            self.chain()
        except UnclipError as error:
            return str(error)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            return f"there is too little memory for the stages in {self.runs}"
        return ""

    def submit(self, visitor: str, tab: str, draw: Draw, beside: Task | None = None) -> Task:
        """Queue a request; the visitor's earlier one of this tab is given up. ``beside``: one whose pictures stay shown."""
        self.cancel(visitor, tab)
        task = self.worker.submit(lambda progress: draw(self.chain(), progress), [*beside.pictures] if beside else [])
        with self._lock:
            earlier = self._tasks.pop((visitor, tab), None)
            self._tasks[visitor, tab] = task
            oldest = next(iter(self._tasks)) if len(self._tasks) > MOST_KEPT else None
            gone = [earlier] if earlier is not beside else []
            gone += [self._tasks.pop(oldest)] if oldest else []
        for other in filter(None, gone):
            other.forget(_remove)
        return task

    def task(self, visitor: str, tab: str) -> Task | None:
        with self._lock:
            return self._tasks.get((visitor, tab))

    def cancel(self, visitor: str, tab: str) -> bool:
        """Give up a visitor's request; False if there was none under way."""
        task = self.task(visitor, tab)
        if task is None or task.state.ended:
            return False
        task.cancel()
        return True

    def repeat(self, visitor: str, tab: str, index: int) -> Task:
        """Draw one picture of the visitor's last task again, from what that picture keeps."""
        task = self.task(visitor, tab)
        if task is None or not 0 <= index < len(task.pictures):
            raise ConfigError("choose a picture first: click on it")
        picture = task.pictures[index][0]

        def draw(chain: UnCLIP, progress: Progress) -> Iterator[Picture]:
            again = chain.repeat(picture, progress)
            if not torch.equal(again.image, picture.image):
                log.warning("the repeated picture differs from the first one in rounding")
            yield again

        return self.submit(visitor, tab, draw, beside=task)

    def leave(self, visitor: str) -> None:
        """A visitor closed the page: give up what is under way, remove the files."""
        with self._lock:
            gone = [self._tasks.pop(key) for key in list(self._tasks) if key[0] == visitor]
        for task in gone:
            task.forget(_remove)

    def run_folders(self) -> dict[str, Path]:
        """All runs below ``runs``, two folders deep, by the names that the page shows."""
        found = [path for pattern in ("*", "*/*") for path in sorted(self.runs.glob(pattern)) if path.is_dir()]
        chosen = [path for path in found if is_run(path) and not path.name.startswith("artifact")]
        return {str(path.relative_to(self.runs)): path for path in chosen}

    def close(self) -> None:
        self.worker.close()

    def _save(self, picture: Picture) -> Path:
        path = self.folder / secrets.token_hex(16) / f"unclip-{picture.seed}.png"
        save_picture(to_image(picture), path, text_chunks(picture))
        return path


def _remove(path: Path) -> None:
    shutil.rmtree(path.parent, ignore_errors=True)


def decoder_sampling(chain: UnCLIP, steps: int | None, guidance: float | None, invertible: bool = False) -> Sampling:
    """The decoder's own settings, or for ``invertible`` DDIM, with steps and guidance in their place."""
    how = INVERTIBLE if invertible else chain.defaults["decoder"]
    longest = chain.configs["decoder"].diffusion.num_timesteps
    return Sampling(decoder=changed(how, "decoder", longest, steps, guidance))


def squares(pictures: list[Tensor]) -> Tensor:
    """uint8 (B, 3, S, S) of pictures (3, H, W) of any sizes: their central squares, as large as the smallest."""
    side = min(512, *(min(picture.shape[1:]) for picture in pictures))
    return torch.stack([to_tensor(square(to_pil(picture), side)) for picture in pictures])
