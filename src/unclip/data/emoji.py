"""`unclip data emoji`: real captioned pictures from four open emoji sets, split by concept and by style.

DIR/{size}/{train,val,test,test_styles} hold the shards. A key names the same picture at each size, in the same order.
val and test hold concepts (an emoji with all its skin tones, genders and styles) that are never trained on; test_styles
holds concepts that are trained on, in a style in which they are not.
"""

import json
import logging
import multiprocessing
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from unclip.data.emoji_captions import caption, phrase
from unclip.data.emoji_fetch import cache_dir, fetch
from unclip.data.emoji_licenses import write_licenses
from unclip.data.emoji_render import BASE_SIZE, Drawing, Rendered, distinct, render, render_large
from unclip.data.emoji_sources import NAMES, STYLES, Name, Style, concept, read_drawings, read_names
from unclip.data.emoji_split import SPLITS, share, split_pairs
from unclip.data.shards import ShardWriter
from unclip.data.write_lock import WriteLock
from unclip.drafts import write_atomic
from unclip.errors import ConfigError, DataError
from unclip.progress import track

_log = logging.getLogger(__name__)
_RECIPE = 2  # rises when the same arguments would give other pictures, captions or splits
_CHUNK = 32  # pictures that a worker gets at a time
_T = TypeVar("_T")
_R = TypeVar("_R")


@dataclass(frozen=True)
class Emoji:
    """One picture to draw, with its caption and metadata."""

    drawing: Drawing
    style: Style
    name: Name

    @property
    def concept(self) -> str:
        return concept(self.name.code)

    def phrase(self) -> str:
        return phrase(self.name.label, self.name.subgroup, self.name.tone)

    def meta(self) -> dict[str, Any]:
        return {
            "phrase": self.phrase(),
            "style": self.style.name,
            "label": self.name.label,
            "tags": list(self.name.tags),
            "group": self.name.group,
            "subgroup": self.name.subgroup,
            "concept": self.concept,
            "tone": self.name.tone,
            "source": self.style.package.spec,
            "license": self.style.license,
        }


def write_emoji(
    out: Path,
    *,
    sizes: Sequence[int] = (64, 256),
    seed: int = 0,
    tones: bool = False,
    cache: Path | None = None,
    workers: int | None = None,
) -> dict[int, dict[str, int]]:
    """Fetch, draw, caption, split and write the emoji; sizes that are finished already are left as they are.

    Args:
        sizes: edge lengths in pixels. Those above 256 hold the vector styles only, drawn at that size.
        seed: of the order of the samples. The splits do not depend on it.
        tones: keep the variants with a skin tone; they double the number of pictures and fill half of it with people.
        cache: where fetched packages are kept; by default UNCLIP_CACHE or the user's cache folder.
        workers: processes that draw, by default two.

    Returns:
        Samples per split, for each size.

    Raises:
        ConfigError: a size is not positive or is given twice.
        DataError: npm or a package is missing or altered, or `out` holds a set made with other arguments.
        UnclipError: another process writes to `out`.
    """
    if len(set(sizes)) < len(sizes) or min(sizes, default=0) < 1:
        raise ConfigError(f"sizes must be different positive numbers of pixels, got {list(sizes)}")
    recipe = _recipe(seed, tones)
    counts = _finished_sizes(out, sizes, recipe)
    if len(counts) < len(sizes):
        emoji = _read_sources(cache or cache_dir(), tones)
        with WriteLock(out), _workers(min(2, os.cpu_count() or 1) if workers is None else workers) as pool:
            write_licenses(out)
            counts = _finished_sizes(out, sizes, recipe)  # again: another process may have ended meanwhile
            missing = [size for size in sizes if size not in counts]
            counts |= _write_sizes(out, emoji, missing, recipe, pool)
    else:
        _log.info("%s is complete already; nothing to do", out)
    return {size: counts[size] for size in sizes}


def _finished_sizes(out: Path, sizes: Sequence[int], recipe: dict[str, Any]) -> dict[int, dict[str, int]]:
    """Samples per split of those sizes that are there."""
    counts = {size: _finished(out / str(size), recipe) for size in sizes}
    return {size: count for size, count in counts.items() if count is not None}


def _recipe(seed: int, tones: bool) -> dict[str, Any]:
    """All that decides a size's bytes; kept in DIR/{size}/dataset.json."""
    packages = {package.spec: package.sha256 for package in (NAMES, *(style.package for style in STYLES))}
    return {"kind": "emoji", "recipe": _RECIPE, "seed": seed, "tones": tones, "packages": packages}


def _finished(folder: Path, recipe: dict[str, Any]) -> dict[str, int] | None:
    """Samples per split of a size that is there (its folder gets its name when complete); None if it is not."""
    if not folder.exists():
        return None
    path = folder / "dataset.json"
    if not path.exists():
        raise DataError(f"{folder} is there but was not made by `unclip data emoji`; choose another --out")
    found = json.loads(path.read_text())
    counts = found.pop("num_samples")
    if found != recipe:
        different = sorted(name for name in recipe if found.get(name) != recipe[name])
        raise DataError(
            f"{folder} holds emoji made with another {', '.join(different)}; delete it or choose another --out"
        )
    return counts


def _read_sources(cache: Path, tones: bool) -> list[Emoji]:
    """All emoji that have a name, style after style, in Unicode's order."""
    names = {code: name for code, name in read_names(fetch(NAMES, cache)).items() if tones or name.tone is None}
    return [
        Emoji(drawing, style, names[code])
        for style in STYLES
        for code, drawing in read_drawings(style, fetch(style.package, cache), names).items()
    ]


def _write_sizes(
    out: Path, emoji: list[Emoji], sizes: list[int], recipe: dict[str, Any], pool: ProcessPoolExecutor | None
) -> dict[int, dict[str, int]]:
    small = [size for size in sizes if size <= BASE_SIZE]
    drawn = list(_map(partial(render, sizes=small), [item.drawing for item in emoji], pool, "drawing emoji"))
    chosen = _choose(emoji, drawn, recipe["seed"])
    pngs = {rendered.key: rendered.pngs for rendered in drawn}
    counts = {}
    for size in sizes:
        if size in small:
            counts[size] = _write_size(
                out / str(size), chosen, (pngs[item.drawing.key][size] for _, item in chosen), recipe
            )
        else:
            vectors = [(split, item) for split, item in chosen if item.drawing.svg is not None]
            drawings = [item.drawing for _, item in vectors]
            large = _map(partial(render_large, size=size), drawings, pool, f"drawing at {size} px")
            counts[size] = _write_size(out / str(size), vectors, large, recipe)
    return counts


def _choose(emoji: list[Emoji], drawn: list[Rendered], seed: int) -> list[tuple[str, Emoji]]:
    """The emoji without duplicates inside a style, each with its split; split after split, shuffled in each.

    In the training split neighbours are easily confused: the styles of a concept, and the concepts of a subgroup (fruit,
    flags …), stand side by side, so that a contrastive batch can hold them together.
    """
    kept = []
    for style in STYLES:
        places = [i for i, item in enumerate(emoji) if item.style == style]
        places.sort(key=lambda i: emoji[i].name.yields)
        if places:
            keep = distinct(np.stack([drawn[i].thumb for i in places]))
            kept += [emoji[i] for i, keeps in zip(places, keep, strict=True) if keeps]
    _log.info("left out %d pictures that look like another one of their style", len(emoji) - len(kept))
    splits = split_pairs((item.concept, item.style.name) for item in kept)
    chosen = [(splits[item.concept, item.style.name], item) for item in kept]

    def place(pair: tuple[str, Emoji]) -> tuple[float, ...]:
        split, item = pair
        names = (item.name.subgroup, item.concept, item.drawing.key) if split == "train" else (item.drawing.key,)
        return (SPLITS.index(split), *(share(f"{seed} {name}") for name in names))

    return sorted(chosen, key=place)


def _write_size(
    folder: Path, chosen: list[tuple[str, Emoji]], pngs: Iterable[bytes], recipe: dict[str, Any]
) -> dict[str, int]:
    """Write one size beside its place, then rename it. `chosen` is sorted by split and `pngs` are in its order."""
    partial_folder = folder.with_name(f"{folder.name}.tmp")
    if partial_folder.exists():
        shutil.rmtree(partial_folder)
    counts = dict(Counter(split for split, _ in chosen))
    for split, samples in groupby(zip(chosen, pngs, strict=True), key=lambda sample: sample[0][0]):
        with ShardWriter(partial_folder / split) as writer:
            for (_, item), png in samples:
                writer.write(item.drawing.key, png, caption(item.phrase(), item.style.name), item.meta())
    content = json.dumps({**recipe, "num_samples": counts}, indent=2)
    write_atomic(partial_folder / "dataset.json", content.encode())
    os.replace(partial_folder, folder)
    _log.info("%s is complete: %s", folder, ", ".join(f"{split} {count}" for split, count in counts.items()))
    return counts


@contextmanager
def _workers(count: int) -> Iterator[ProcessPoolExecutor | None]:
    """A pool of processes; None for one worker, which is this process."""
    if count <= 1:
        yield None
        return
    with ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


def _map(work: Callable[[_T], _R], items: list[_T], pool: ProcessPoolExecutor | None, what: str) -> Iterator[_R]:
    """`work` on each item, in order."""
    results = map(work, items) if pool is None else pool.map(work, items, chunksize=_CHUNK)
    return track(results, what, len(items))
