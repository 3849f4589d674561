"""README, CONTRIBUTING and docs/: every command, setting, path and link in them exists. tests/test_docs_run.py runs them."""

import re
from pathlib import Path

import pytest
from doc_check import CHECKS, check, known_settings
from doc_pages import (
    LANGUAGES,
    OURS,
    PAGES,
    ROOT,
    Command,
    anchors,
    blocks,
    commands,
    inline_commands,
    links,
    shell,
    spans,
)

from unclip.errors import ConfigError

named = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
SHOWN_AS_WRONG = {"model.net.widht"}  # README: what becomes of a misspelt setting
ROOTS = ("data", "diversity", "launch", "logger", "model", "optim", "sampling", "trainer")


@named
def test_every_command_is_one_that_exists(page: Path):
    wrong = []
    for command in [*commands(page), *inline_commands(page)]:
        try:
            check(command)
        except Exception as error:  # noqa: BLE001  whatever it says, the page is wrong
            wrong.append(f"{command}\n    {type(error).__name__}: {error}")
    assert not wrong, "\n".join(wrong)


@named
def test_every_setting_is_one_that_exists(page: Path):
    wrong = []
    for line, span in spans(page):
        for word in span.split():
            name = word.lstrip("'\"+").partition("=")[0]
            if re.fullmatch(rf"({'|'.join(ROOTS)})(\.\w+)+", name) and not name.startswith("launch.options."):
                whole = f"model.{name}" if name.startswith("sampling.") else name  # of an evaluation
                known = whole in known_settings() or name in SHOWN_AS_WRONG
                wrong += [f"{page.name}:{line}: {name}"] * (not known)
    assert not wrong, "\n".join(wrong)


@named
def test_every_link_leads_somewhere(page: Path):
    wrong = []
    for line, target in links(page):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists():
            wrong.append(f"{page.name}:{line}: there is no {target}")
        elif anchor and anchor not in anchors(file):
            wrong.append(f"{page.name}:{line}: {file.name} has no heading #{anchor}")
    assert not wrong, "\n".join(wrong)


@named
def test_every_path_of_the_repository_exists(page: Path):
    wrong = []
    for line, span in spans(page):
        if re.fullmatch(r"(src|conf|scripts|tests|docs)/[\w./-]+", span) and not (ROOT / span).exists():
            wrong.append(f"{page.name}:{line}: {span}")
    assert not wrong, "\n".join(wrong)


@named
def test_every_block_says_what_it_is(page: Path):
    """So that none escapes: what a reader would type is bash, python or yaml; an indented block is nothing of the kind."""
    for block in blocks(page):
        assert not block.fenced or block.language in LANGUAGES, f"{block}: write ```bash, python, yaml or text"
        if block.language == "text" or (not block.language and not shell(block)):
            for line in filter(str.strip, block.text.splitlines()):
                hidden = line.split()[0] in (*OURS, *CHECKS) and "=" in line
                assert not hidden, f"{block}: {line!r} is a command: write ```bash"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("unclip genrate x", "there is no unclip genrate"),
        ("unclip generate x --from runs --out o --nmu 3", "--nmu"),
        ("unclip generate x --from runs", "out"),
        ("unclip generate x --from runs --out o --num none", "integer"),
        ("unclip data check a b", "unexpected extra argument"),
        ("train-prior run=r data.path=d model.net.widht=1", "did you mean 'width'"),
        ("train-prior run=r data.path=d optim.lr=fast", "is not a valid float"),
        ("train-decoder data.path=d data.embeddings=e", "run is not set"),
        ("train-decoder run=r experiment=tiny_decode …", "tiny_decode"),
        ("train-prior launch=slurm launch.partitoin=gpu run=r data.path=d", "partition"),
        ("train-prior optim.lr=1e-4,fast run=r data.path=d data.embeddings=e --cfg job", "is no setting"),
        ("unclip-evaluate decoder run=r", "no such evaluation"),
        ("unclip plan experiment=paper_decoder gpu=64", "unknown option 'gpu'"),
        ("make demos", "no target demos"),
        ("make demo MINUTE=3", "no variable MINUTE"),
        ("pip install unclip[gradio]", "no extra"),
        ("python scripts/bench/priors.py", "there is no scripts/bench/priors.py"),
        ("python scripts/bench/prior.py --fast", "no option --fast"),
        ("scripts/demo", "there is no scripts/demo"),
        ("sbatch --nodes=2 scripts/slurm/train.sbatch train-decoder rnu=r …", "did you mean 'run'"),
        ("torchrun --no-python unclip-embde run=r", "none of our commands"),
        ("sudo reboot", "no program that this page may speak of"),
    ],
)
def test_a_wrong_command_is_found(words: str, message: str):
    with pytest.raises(Exception, match=re.escape(message)):
        check(Command(ROOT / "README.md", 1, tuple(words.split())))


def test_a_wrong_setting_would_be_found():
    assert {"model.net.width", "optim.ema_profiles", "launch.max_restarts", "data.path", "trainer"} <= known_settings()
    assert "model.net.widht" not in known_settings()
    with pytest.raises(ConfigError):
        check(Command(ROOT / "README.md", 1, ("train-prior", "model.net.widht=1"), inline=True))
