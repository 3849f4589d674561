"""``unclip words-probe``: whether the chain writes the words that a caption asks for."""

from pathlib import Path

import numpy as np
import typer

from unclip.cli.asked import REAL, Asked, artifacts_of, load_chain, with_captions_decoder
from unclip.data.shapes_exams import sign_scenes
from unclip.data.shapes_render import render
from unclip.data.shapes_scene import HELD_OUT_WORDS, WORDS
from unclip.errors import ConfigError
from unclip.evaluation.ocr import WordReader, word_measures, word_share
from unclip.evaluation.probes import Share
from unclip.evaluation.sheet import draw_table
from unclip.report.probe import Cell, Finding

LEAST_SIZE = 48  # pixels at which they are
LEAST = 0.95  # of real renders that must be read, or the probe says nothing about the chain
SHOWN = 10  # rows of the sheet for each kind of words


def probe_words(runs: Path, out: Path, *, text_decoder: Path | None, num: int, seed: int, batch_size: int) -> Finding:
    """``num`` captions with words that training signs say, and ``num`` with words that none says; ``words.json|md|png``.

    ConfigError where the reader cannot read real renders at the chain's size: then it cannot judge drawn ones either.
    """
    reader, pipeline = WordReader(), load_chain(runs)
    other = None if text_decoder is None else with_captions_decoder(runs, text_decoder)
    rows: dict[str, dict[str, Cell]] = {}
    lines: list[tuple[str, list[np.ndarray]]] = []
    for kind, words in (("seen", WORDS), ("unseen", HELD_OUT_WORDS)):
        scenes = sign_scenes(words, num)
        signs = [str(scene.sign) for scene in scenes]
        pictures = {REAL: [render(scene, pipeline.size) for scene in scenes]}
        _refuse_unreadable(word_share([reader(picture) for picture in pictures[REAL]], signs), pipeline.size)
        asked = Asked(pipeline, [scene.caption for scene in scenes], seed, batch_size)
        pictures |= asked.draw_ways(pictures[REAL], other)
        for title, some in pictures.items():
            measures = word_measures([reader(picture) for picture in some], signs)
            rows.setdefault(title, {}).update({f"{kind} {name}": cell for name, cell in measures.items()})
        shown = range(min(num, SHOWN))
        lines += [(f"{kind}: {scenes[i].caption}", [some[i] for some in pictures.values()]) for i in shown]
    facts = {"captions": 2 * num, "seed": seed, "size": pipeline.size, "artifacts": artifacts_of(pipeline)}
    finding = Finding("words", f"Written words: {num} captions with seen and {num} with unseen words", rows, facts)
    typer.echo(finding.write(out, draw_table(lines, list(rows))))
    return finding


def _refuse_unreadable(ceiling: Share, size: int) -> None:
    if ceiling.share < LEAST:
        raise ConfigError(
            f"only {ceiling.share:.0%} of real renders of {size} px can be read, fewer than {LEAST:.0%}, so that nothing can "
            f"be said of drawn ones; train a chain of {LEAST_SIZE} px or more"
        )
