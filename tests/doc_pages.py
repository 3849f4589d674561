"""What the README and the pages of docs/ say, taken apart: code blocks, commands, settings and links."""

import re
import shlex
import string
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
HYDRA = {
    "train-clip": "train_clip",
    "train-prior": "train_prior",
    "train-decoder": "train_decoder",
    "train-upsampler": "train_upsampler",
    "unclip-embed": "embed",
    "unclip-evaluate": "evaluate",
}
OURS = ("unclip", *HYDRA)
OTHERS = ("make", "pip", "python", "torchrun", "sbatch", "scancel", "scontrol", "ssh", "tensorboard", "mkdir", "cp")
LANGUAGES = {"bash", "python", "yaml", "text"}
_FENCE = re.compile(r"^\s*```(\w*)\s*$")
_SPAN = re.compile(r"`([^`]+)`")


@dataclass(frozen=True)
class Block:
    """A code block of a page, fenced or indented; ``line`` is that of its first line of code."""

    page: Path
    line: int
    language: str
    text: str
    fenced: bool = True

    @property
    def after(self) -> int:
        """The line after its last line of code."""
        return self.line + self.text.count("\n") + 1

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


@dataclass(frozen=True)
class Command:
    """One command: of a block to be copied, or ``inline`` in a sentence, where NAME and … stand for something else."""

    page: Path
    line: int
    words: tuple[str, ...]
    inline: bool = False

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}: {shlex.join(self.words)}"


def blocks(page: Path) -> list[Block]:
    """All code blocks of a page, in order."""
    found: list[Block] = []
    fence: tuple[int, str] | None = None
    text: list[str] = []
    before = ""
    for number, line in enumerate(page.read_text().splitlines(), 1):
        mark = _FENCE.match(line)
        if mark and fence is None:
            fence, text = (number + 1, mark[1]), []
        elif mark and fence is not None:
            found.append(Block(page, fence[0], fence[1], "\n".join(text)))
            fence = None
        elif fence is not None:
            text.append(line)
        elif line.startswith("    ") and not before.strip():
            found.append(Block(page, number, "", line[4:], fenced=False))
        elif line.startswith("    ") and found and not found[-1].fenced and found[-1].after == number:
            found[-1] = Block(page, found[-1].line, "", f"{found[-1].text}\n{line[4:]}", fenced=False)
        before = line
    assert fence is None, f"{page}: a code block is not closed"
    return found


def commands(page: Path) -> list[Command]:
    """The commands of the blocks of a page that a shell would run."""
    return [command for block in blocks(page) for command in shell(block)]


def shell(block: Block) -> list[Command]:
    """The commands of a block, none if it is no shell's: continued lines joined, comments gone, variables filled in."""
    if block.language != "bash" and (block.language or block.text.split()[0] not in (*OURS, *OTHERS)):
        return []
    found, variables = [], {}
    start, pending = 0, ""
    for number, line in enumerate(block.text.splitlines(), block.line):
        start = number if not pending else start
        pending += line.removesuffix("\\")
        if line.endswith("\\"):
            continue
        words = shlex.split(string.Template(pending).safe_substitute(variables), comments=True)
        pending = ""
        if len(words) == 1 and re.match(r"[A-Za-z_]+=", words[0]):
            name, _, value = words[0].partition("=")
            variables[name] = value
        elif words:
            found.append(Command(block.page, start, tuple(words)))
    return found


def inline_commands(page: Path) -> list[Command]:
    """Commands within sentences that have at least one word more than their name."""
    found = []
    for line, span in spans(page):
        first, _, rest = span.partition(" ")
        if first in OURS and rest and "\\" not in span:
            found += [Command(page, line, tuple(words), inline=True) for words in _alternatives(span)]
    return found


def _alternatives(span: str) -> list[list[str]]:
    """``unclip vary | edit`` and ``model=a|b`` as several commands; ``[--option VALUE]`` as if it were given."""
    first, *others = span.replace("[--", "--").replace("] ", " ").split(" | ")
    if first.count("[") < first.count("]"):
        first = first.removesuffix("]")
    found = [[]]
    for word in shlex.split(first):
        key, equals, value = word.partition("=")
        choices = [f"{key}={v}" for v in value.split("|")] if equals and "," not in value else word.split("|")
        found = [[*words, choice] for words in found for choice in choices]
    return found + [[first.split()[0], *shlex.split(other)] for other in others]


def spans(page: Path) -> list[tuple[int, str]]:
    """Line and text of everything in single backticks outside of code blocks; a span may go on in the next line."""
    text = prose(page)
    found = [(m, " ".join(m[1].split())) for m in _SPAN.finditer(text) if "\n\n" not in m[1]]
    return [(text.count("\n", 0, match.start()) + 1, span) for match, span in found]


def prose(page: Path) -> str:
    """The page with empty lines in the places of its code blocks."""
    lines = page.read_text().splitlines()
    for block in blocks(page):
        edge = int(block.fenced)
        for number in range(block.line - edge, block.after + edge):
            lines[number - 1] = ""
    return "\n".join(lines)


def anchors(page: Path) -> list[str]:
    """Those of the headings, as GitHub makes them."""
    titles = [line.lstrip("# ").strip().lower() for line in prose(page).splitlines() if re.match(r"#+ ", line)]
    return [re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in titles]


def links(page: Path) -> list[tuple[int, str]]:
    """Line and target of every link and picture."""
    text = prose(page)
    found = re.finditer(r"\]\(([^)\s]+)(?: \"[^)]*\")?\)", text)
    return [(text.count("\n", 0, match.start()) + 1, match[1]) for match in found]
