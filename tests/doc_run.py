"""Running what a page of the documentation shows, in one folder and in this process."""

import contextlib
import io
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from doc_pages import HYDRA, Block, Command, blocks, shell
from hydra.core.global_hydra import GlobalHydra
from typer.testing import CliRunner

from unclip.cli import train as hydra_commands
from unclip.cli.app import app

Table = Mapping[str, object]


def named_in(text: str, table: Table) -> bool:
    """Whether a command or a block begins as a key of ``table`` does, or holds one that is a setting, a path or Python."""
    return any(key in text if re.search(r"[=/(]", key) else text.startswith(key) for key in table)


def line_of(command: Command) -> str:
    return " ".join(command.words)


@dataclass
class PageRunner:
    """Runs a page's blocks in ``root``, leaving out what ``leave_out`` names, with ``small`` appended to those it names.

    A folder that was there before is removed by the page's first command that writes it. Python blocks share their names.
    """

    root: Path
    leave_out: Table
    small: Mapping[str, Sequence[str]]
    ran: list[str] = field(default_factory=list)
    _own: set[str] = field(default_factory=set)
    _names: dict[str, object] = field(default_factory=dict)

    def run(self, page: Path) -> "PageRunner":
        with contextlib.chdir(self.root):
            for block in blocks(page):
                if block.language == "python":
                    self._python(block)
                elif block.language == "yaml":
                    self._yaml(block)
                else:
                    for command in shell(block):
                        self._command(command)
        return self

    def _python(self, block: Block) -> None:
        if named_in(block.text, self.leave_out):
            return
        exec(compile(block.text, str(block), "exec"), self._names)
        self.ran.append(str(block))

    def _yaml(self, block: Block) -> None:
        """A file, which one of its first lines names: for a command below it."""
        name = re.search(r"^# (\S+\.yaml)$", block.text, re.MULTILINE)
        assert name, f"{block}: name the file in a comment, such as # my-conf/experiment/mine.yaml"
        Path(name[1]).parent.mkdir(parents=True, exist_ok=True)
        Path(name[1]).write_text(block.text + "\n")

    def _command(self, command: Command) -> None:
        if named_in(line_of(command), self.leave_out):
            return
        words = list(command.words)
        self._remove_old(words)
        small = next((list(more) for key, more in self.small.items() if line_of(command).startswith(key)), [])
        said, code = (_hydra if words[0] in HYDRA else _other)([*words, *small])
        assert code == 0, f"{command}\n{said[-3000:]}"
        self.ran.append(str(command))

    def _remove_old(self, words: list[str]) -> None:
        """What this command writes: the folder of ``run=`` or ``--out``."""
        written = [word.partition("=")[2] for word in words if word.startswith("run=")]
        written += [words[i + 1] for i, word in enumerate(words) if word == "--out"]
        for name in written:
            if name not in self._own:
                self._own.add(name)
                shutil.rmtree(name, ignore_errors=True)


def _other(words: list[str]) -> tuple[str, int]:
    """A command of ``unclip``, or one that makes or copies folders."""
    if words[0] in ("mkdir", "cp"):
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        return done.stderr, done.returncode
    assert words[0] == "unclip", f"{words[0]} is neither run here nor in the table of what is not"
    result = CliRunner().invoke(app, words[1:])
    return result.output + (repr(result.exception) if result.exception else ""), result.exit_code


def _hydra(words: list[str]) -> tuple[str, int]:
    with _argv(words), contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            getattr(hydra_commands, HYDRA[words[0]])()
        except SystemExit as ended:
            return said.getvalue(), int(bool(ended.code))
        finally:
            GlobalHydra.instance().clear()
    return said.getvalue(), 0


@contextlib.contextmanager
def _argv(words: list[str]) -> Iterator[None]:
    before, sys.argv = sys.argv, words
    try:
        yield
    finally:
        sys.argv = before
