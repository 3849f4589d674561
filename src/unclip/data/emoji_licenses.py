"""Writes who made the emoji, and under which licence, beside the pictures."""

import shutil
from importlib import resources
from pathlib import Path

from unclip.data.emoji_fetch import Package
from unclip.data.emoji_sources import NAMES, STYLES
from unclip.drafts import write_atomic

_NAMES_CREDIT = "Copyright (c) 2017-2019 Miles Johnson (names and tags from Unicode CLDR)"

_MIT = """MIT License

{credit}

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to
permit persons to whom the Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of
the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO
THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE
AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT,
TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE
SOFTWARE.
"""

_CC_BY = """{credit}

Licensed under the Creative Commons Attribution 4.0 International licence:
https://creativecommons.org/licenses/by/4.0/legalcode
"""

_HEADER = """# Attribution

The pictures in this folder were drawn from the packages below: placed on white, scaled, and stripped of duplicates;
nothing else was changed. Keep this file and LICENSES/ with the pictures. KEY.json of each sample names its source and
licence.

| style | package | sha256 of the tarball | licence | credit | origin |
|---|---|---|---|---|---|
"""


def write_licenses(out: Path) -> None:
    """ATTRIBUTION.md and LICENSES/ in `out`."""
    rows = [(s.name, s.package, s.license, s.credit, s.origin) for s in STYLES]
    rows.append(("names and tags", NAMES, "MIT", _NAMES_CREDIT, "https://github.com/milesj/emojibase"))
    lines = []
    (out / "LICENSES").mkdir(exist_ok=True)
    for style, package, license_id, credit, origin in rows:
        name = _write_text(out / "LICENSES", package, license_id, credit)
        lines.append(
            f"| {style} | {package.spec} | {package.sha256} | [{license_id}](LICENSES/{name}) | {credit} | {origin} |\n"
        )
    write_atomic(out / "ATTRIBUTION.md", (_HEADER + "".join(lines)).encode())


def _write_text(folder: Path, package: Package, license_id: str, credit: str) -> str:
    """The licence's text in a file of its own; its name."""
    if license_id == "Apache-2.0":
        name = "Apache-2.0.txt"
        with resources.as_file(resources.files("unclip.data") / "licenses" / name) as text:
            shutil.copyfile(text, folder / name)
        return name
    name = f"{license_id}-{package.name.split('/')[-1]}.txt"
    text = {"MIT": _MIT, "CC-BY-4.0": _CC_BY}[license_id].format(credit=credit)
    write_atomic(folder / name, text.encode())
    return name
