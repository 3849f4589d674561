"""The emoji packages that we draw from, the styles they hold, and the names that Unicode gives the pictures."""

import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from unclip.data.emoji_fetch import Package, read_members
from unclip.data.emoji_render import Drawing
from unclip.errors import DataError

NAMES = Package("emojibase-data", "17.0.0", "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a")
_COUNTRY_FLAGS = {"country-flag", "subdivision-flag"}
# Territories that fly the flag of a better known country.
_BORROWED_FLAGS = {"Bouvet Island", "Ceuta & Melilla", "Clipperton Island", "Diego Garcia", "U.S. Outlying Islands"}
_TONES = {f"1f3f{digit}" for digit in "bcdef"}
_GENDERS_AND_RIGHT = {"2640", "2642", "27a1"}
_JOINER = "-200d-"
# A gendered or right-hand form to the form that stands for its concept.
_SAME_CONCEPT = {
    "1f468": "1f9d1", "1f469": "1f9d1",  # man, woman: person
    "1f466": "1f9d2", "1f467": "1f9d2",  # boy, girl: child
    "1f474": "1f9d3", "1f475": "1f9d3",  # old man, old woman: older person
    "1f478": "1f934",  # princess: prince
    "1f936": "1f385",  # Mrs. Claus: Santa Claus
    "1f930": "1fac4", "1fac3": "1fac4",  # pregnant woman, pregnant man: pregnant person
    "1f57a": "1f483",  # man dancing: woman dancing
    "1f9d5": "1f472",  # woman with headscarf: person with skullcap
    "1f46b": "1f9d1-200d-1f91d-200d-1f9d1", "1f46c": "1f9d1-200d-1f91d-200d-1f9d1",
    "1f46d": "1f9d1-200d-1f91d-200d-1f9d1",  # couples holding hands
    "1f9d1-200d-2764-200d-1f48b-200d-1f9d1": "1f48f",  # kisses
    "1f9d1-200d-2764-200d-1f9d1": "1f491",  # couples with a heart
    "1f9d1-200d-1f384": "1f385",  # Mx Claus: Santa Claus
    "1f449": "1f448", "1f91c": "1f91b", "1faf2": "1faf1", "1faf8": "1faf7",  # right hands: left hands
    "1f50e": "1f50d",  # magnifying glass tilted right: left
}  # fmt: skip


@dataclass(frozen=True)
class Style:
    """One way of drawing emoji. `kind` is "iconify" (icons.json with SVG bodies) or "webp" (assets/CODE.webp)."""

    name: str
    package: Package
    kind: str
    license: str
    credit: str
    origin: str

    @property
    def slug(self) -> str:
        return self.name.replace(" ", "-")


STYLES = (
    Style(
        "noto",
        Package("@iconify-json/noto", "1.2.9", "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad"),
        "iconify",
        "Apache-2.0",
        "Copyright Google Inc. and the Noto Emoji contributors",
        "https://github.com/googlefonts/noto-emoji",
    ),
    Style(
        "twemoji",
        Package("@iconify-json/twemoji", "1.2.5", "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7"),
        "iconify",
        "CC-BY-4.0",
        "Copyright Twitter, Inc. and other contributors (Twemoji)",
        "https://github.com/jdecked/twemoji",
    ),
    Style(
        "fluent flat",
        Package(
            "@iconify-json/fluent-emoji-flat",
            "1.2.6",
            "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
        ),
        "iconify",
        "MIT",
        "Copyright (c) Microsoft Corporation",
        "https://github.com/microsoft/fluentui-emoji",
    ),
    Style(
        "fluent 3d",
        Package(
            "@lobehub/fluent-emoji-3d", "1.1.0", "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58"
        ),
        "webp",
        "MIT",
        "Copyright (c) Microsoft Corporation; packaged by LobeHub, Copyright (c) 2023 LobeHub",
        "https://github.com/microsoft/fluentui-emoji, https://github.com/lobehub/fluent-emoji",
    ),
)


@dataclass(frozen=True)
class Name:
    """What Unicode says about one emoji. `label` is without the skin tone; `tone` is 1 (light) to 5 (dark) or None."""

    code: str
    label: str
    tags: tuple[str, ...]
    group: str
    subgroup: str
    tone: int | None

    @property
    def yields(self) -> bool:
        """Whether a picture that looks the same under another name is the one to keep: its name fits both better.

        Some sets draw all families of a size alike, without showing genders.
        """
        kind, _, rest = self.label.partition(": ")
        return rest in _BORROWED_FLAGS or (kind == "family" and "adult" not in rest)


def normal_code(code: str) -> str:
    """One spelling of a code point sequence: lower case, "-" between, no leading zeros, no variation selector fe0f."""
    parts = [part.lstrip("0") for part in code.lower().replace("_", "-").split("-")]
    return "-".join(part for part in parts if part != "fe0f")


def concept(code: str) -> str:
    """The code with tone, gender and direction removed: what all its variants, in all styles, have in common."""
    kept = []
    for part in normal_code(code).split(_JOINER):
        bare = "-".join(point for point in part.split("-") if point not in _TONES) or part
        if bare not in _GENDERS_AND_RIGHT:
            kept.append(_SAME_CONCEPT.get(bare, bare))
    bare = _JOINER.join(kept) or normal_code(code)
    return _SAME_CONCEPT.get(bare, bare)


def read_names(tarball: Path) -> dict[str, Name]:
    """Names by normal code, in Unicode's order. Two-tone couples (two different skin tones) are left out."""
    members = read_members(tarball, ["en/data.json", "meta/groups.json"])
    groups = json.loads(members["meta/groups.json"])
    names = {}
    for entry in json.loads(members["en/data.json"]):
        group = groups["groups"].get(str(entry.get("group")), "symbols")
        subgroup = groups["subgroups"].get(str(entry.get("subgroup")), "regional-indicator")
        for form in (entry, *entry.get("skins", [])):
            tone = form.get("tone")
            if not isinstance(tone, list):
                code = normal_code(form["hexcode"])
                names[code] = Name(code, entry["label"], tuple(entry.get("tags", [])), group, subgroup, tone)
    return names


def read_drawings(style: Style, tarball: Path, names: dict[str, Name]) -> dict[str, Drawing]:
    """Drawings by normal code, for the emoji in `names` and in their order.

    The 3d package has country flags, but the original artwork has none, so their origin is unclear: left out.
    """
    if style.kind == "iconify":
        found = _iconify(style, tarball)
    else:
        files = read_members(tarball, ["assets/"])
        found = {normal_code(PurePosixPath(name).stem): data for name, data in files.items() if name.endswith(".webp")}
        found = {
            code: Drawing(f"{style.slug}-{code}", raster=data)
            for code, data in found.items()
            if code in names and names[code].subgroup not in _COUNTRY_FLAGS
        }
    drawings = {code: found[code] for code in names if code in found}
    if not drawings:
        raise DataError(
            f"{tarball} holds no picture of a named emoji; is it the pinned version of {style.package.name}?"
        )
    return drawings


def _iconify(style: Style, tarball: Path) -> dict[str, Drawing]:
    members = read_members(tarball, ["icons.json", "chars.json"])
    icons, chars = json.loads(members["icons.json"]), json.loads(members["chars.json"])
    return {
        normal_code(code): Drawing(f"{style.slug}-{normal_code(code)}", svg=_svg(icons, name))
        for code, name in chars.items()
        if name in icons["icons"]
    }


def _svg(icons: dict, name: str) -> str:
    """A whole SVG file from an icon's body, centred in a square box."""
    icon = icons["icons"][name]
    left, top, width, height = (
        icon[field] if field in icon else icons.get(field, default)
        for field, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
    )
    side = max(width, height)
    box = f"{left - (side - width) / 2:g} {top - (side - height) / 2:g} {side:g} {side:g}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{box}">'
        f"{icon['body']}</svg>"
    )
