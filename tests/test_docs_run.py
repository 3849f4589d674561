"""The code blocks of README and docs/ do what they say: commands and Python run as they stand, on 64 pictures.

The README's commands train a chain. Each page then works in a copy of its folder, from the first block to the last; a run
that a page trains anew is removed from the copy first. Everything runs in this process, by the functions behind the commands.
"""

import contextlib
import shutil
from pathlib import Path

import numpy as np
import pytest
from doc_pages import PAGES, ROOT, blocks, commands
from doc_run import PageRunner, line_of, named_in
from PIL import Image
from tests_support import TINY
from typer.testing import CliRunner

from unclip.cli.app import app

pytestmark = pytest.mark.timeout(1800)  # the chain is part of the first test

# What is not run, by how it begins or by a setting or path in it, and why. All of it is parsed: tests/test_docs.py.
NOT_RUN = {
    "make": "sets up environments, trains for minutes, or runs the tests; CI sets up and tests, tests/test_demo.py runs the demo",
    "pip install": "changes the environment",
    "model.pretrained=laion2b_s34b_b79k": "fetches weights from a hub; tests/models/test_clip_sources.py loads local ones",
    "unclip import clip": "fetches weights from a hub; tests/test_app.py imports local ones",
    "unclip ui": "serves until Ctrl-C; tests/ui",
    "unclip sync": "sends to wandb's server; tests/test_wandb.py",
    "torchrun": "eight GPUs; tests/test_ranks.py starts ranks",
    "sbatch": "needs a cluster; tests/slurm submit these scripts to a real one",
    "scripts/slurm/pipeline.sh": "the same",
    "launch=slurm": "the same",
    "scripts/compare_priors.sh": "trains six priors for minutes; tests/test_compare_priors.py",
    "python scripts/": "measure for minutes, or write pages; tests/test_bench*.py run them at --smoke",
    "trainer.max_minutes=": "the README's commands once more, with a limit",
    "unclip verdict": "draws 256 pictures in five ways; tests/test_chain.py",
    "unclip plan experiment=paper_decoder": "half a minute; tests/test_plan.py plans smaller nets",
    "unclip plan experiment=karlo_prior": "the same",
    "unclip plan stage=upsampler": "the same",
    "experiment=karlo_upsampler": "nets of 0.7 billion weights; tests/test_upsampler_chain.py trains two small ones so",
    "unclip import karlo": "needs Karlo's weights; tests/interop import small ones",
    "runs/karlo": "the same",
    "runs/tuned": "the same",
    "unclip export diffusers": "of a chain in Karlo's form; tests/interop",
    'from_pretrained("pipeline")': "the same",
    'sys.modules["diffusers.pipelines.unclip"] =': "moves modules of this process",
    "unclip export onnx": "traces every net; tests/interop",
    "unclip-evaluate pictures": "wants a hundred pictures and a second CLIP; tests/evaluation",
    "unclip-evaluate coco": "wants MS-COCO; the same",
    "unclip binding-probe": "draws hundreds of pictures; tests/evaluation",
    "unclip words-probe": "the same",
    "unclip busy-probe": "the same",
    "unclip sweep-probe": "the same",
    "unclip enlarge-probe": "the same",
    "scripts/binding.sh": "trains a chain for minutes",
    "scripts/busy.sh": "the same",
    "scripts/words.sh": "the same",
    "scripts/ablate_decoder.py": "trains thirteen decoders; tests/test_ablate_decoder.py, small ones",
    "unclip push": "a hub; tests/interop push to a folder",
    "unclip pull": "the same",
    "hf://": "the same",
}
# Run by `make test-slow` only: minutes.
SLOW = {"sweep=": "trains one model for each trial"}
# What makes a command small enough for a test, appended to it.
SMALL = {
    "unclip data shapes": ["--num", "64"],
    "unclip data folder": ["--val", "0.2"],
    "unclip import embeddings": ["--val", "0.2"],
    "unclip prior-stats": ["--num", "8"],
    "train-clip": TINY["clip"],
    "train-prior sweep=ar_prior_pca": [*TINY["ar_prior"], "model.num_components=2,4"],
    "train-prior sweep=prior_lr_dropout": [*TINY["prior"], "hydra.sweeper.num_trials=2"],
    "train-prior": TINY["prior"],
    "train-decoder sweep=grid": [setting for setting in TINY["decoder"] if not setting.startswith("optim.lr=")],
    "train-decoder": [*TINY["decoder"], "model.sampling.sampler.temperature=1"],  # its ddim adds no noise
    "train-upsampler": [*TINY["upsampler"], "model.diffusion.predict=x0", "data.image_size=32"],
    "unclip vary": ["--decoder-steps", "2"],
    "unclip interpolate": ["--decoder-steps", "2"],
    "unclip edit": ["--decoder-steps", "2"],
    "unclip inpaint": ["--decoder-steps", "4", "--num-resamples", "1"],
    "unclip reconstruct": ["--num", "4", "--steps", "2,4"],
    "unclip edit-verdict": ["--num", "2", "--decoder-steps", "2"],
    "unclip pca-probe": ["--decoder-steps", "2", "--components", "1,4"],
}


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the README was followed, and what the pages of docs/ take as given."""
    root = tmp_path_factory.mktemp("docs")
    _write_pictures(root)
    PageRunner(root, {**NOT_RUN, **SLOW}, SMALL).run(ROOT / "README.md")
    (root / "DATA").symlink_to("data/shapes")
    (root / "SOME_PICTURES").symlink_to("data/shapes/train")
    with contextlib.chdir(root):
        words = "export embeddings runs/embeddings --out SRC --data DATA"
        exported = CliRunner().invoke(app, words.split())
    assert exported.exit_code == 0, exported.exception
    return root


def _write_pictures(root: Path) -> None:
    draw = np.random.default_rng(0)
    names = [*(f"{name}.png" for name in ("photo", "one", "two", "three", "apple"))]
    names += [f"my-pictures/{i}.jpg" for i in range(40)]
    for name in names:
        path = root / name
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
        if path.parent != root:
            path.with_suffix(".txt").write_text(f"picture number {path.stem}\n")
    mask = np.zeros((64, 64), np.uint8)
    mask[16:48, 16:48] = 255
    Image.fromarray(mask).save(root / "mask.png")
    (root / "fruits.txt").write_text("an apple\na pear\n")


def test_the_readme_trains_a_chain_that_draws(chain: Path):
    for stage in ("clip", "prior", "decoder", "upsampler"):
        assert (chain / "runs" / stage / "artifact" / "manifest.json").exists()
    assert len(list((chain / "pictures").glob("0*.png"))) == 4
    assert (chain / "data/mine/train/index.json").exists()


def _runnable(page: Path) -> bool:
    texts = [line_of(command) for command in commands(page)]
    texts += [block.text for block in blocks(page) if block.language == "python"]
    return any(not named_in(text, {**NOT_RUN, **SLOW}) for text in texts)


@pytest.mark.parametrize("page", [page for page in PAGES[1:] if _runnable(page)], ids=lambda page: page.stem)
def test_the_blocks_of_a_page_run(page: Path, chain: Path, tmp_path: Path):
    copy = shutil.copytree(chain, tmp_path / "copy", symlinks=True)
    assert PageRunner(copy, {**NOT_RUN, **SLOW}, SMALL).run(page).ran


@pytest.mark.slow
@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if any(named_in(line_of(c), SLOW) for c in commands(page))],
    ids=lambda page: page.stem,
)
def test_the_long_commands_of_a_page_run(page: Path, chain: Path, tmp_path: Path):
    copy = shutil.copytree(chain, tmp_path / "copy", symlinks=True)
    assert PageRunner(copy, NOT_RUN, SMALL).run(page).ran


def test_the_tables_hold_nothing_that_no_page_says():
    said = [line_of(command) for page in PAGES for command in commands(page)]
    said += [block.text for page in PAGES for block in blocks(page)]
    unused = [key for key in (*NOT_RUN, *SLOW, *SMALL) if not any(named_in(text, {key: ""}) for text in said)]
    assert not unused, "leave these out of the tables above"
