"""Pieces of a self-contained HTML page. Whatever comes from outside is escaped here, and nothing is fetched."""

import base64
import html
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from unclip.drafts import replacing

STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:1100px;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:1em 0}td,th{border:1px solid #ccc;padding:.3em .7em;text-align:right}
td:first-child,th:first-child{text-align:left}img{max-width:100%;border:1px solid #ddd}svg{background:#fafafa;margin:.3em}
figcaption{color:#555}code{background:#f3f3f3;padding:0 .2em}pre{background:#f6f6f6;padding:.8em;overflow:auto}
.strip{display:flex;gap:1em;overflow-x:auto}.strip figure{flex:0 0 auto;margin:0}.strip img{max-width:none;max-height:560px}"""


def write_page(path: Path, title: str, parts: Iterable[str]) -> None:
    """Write the page; a reader never sees half of it."""
    head = f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title><style>{STYLE}</style>"
    with replacing(path, durable=False) as draft:
        draft.write_text(head + "\n".join(part for part in parts if part) + "\n", encoding="utf-8")


def heading(text: str, level: int = 2) -> str:
    return f"<h{level}>{html.escape(text)}</h{level}>"


def paragraph(text: str) -> str:
    return f"<p>{html.escape(text)}</p>" if text else ""


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Rows of texts and numbers; floats with four digits. Nothing where there are no rows."""
    lines = ["".join(f"<td>{html.escape(_text(cell))}</td>" for cell in row) for row in rows]
    if not lines:
        return ""
    title = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    return f"<table><tr>{title}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def _text(cell: object) -> str:
    if isinstance(cell, float):
        return format(cell, ".4g")
    return f"{cell:,}" if isinstance(cell, int) and not isinstance(cell, bool) else str(cell)


def picture(path: Path, title: str) -> str:
    """The PNG itself, within the page; nothing where it is missing."""
    if not path.exists():
        return ""
    inline = base64.b64encode(path.read_bytes()).decode()
    return f"<figure><img src='data:image/png;base64,{inline}'><figcaption>{html.escape(title)}</figcaption></figure>"


def folded(title: str, content: str) -> str:
    """Content behind a line that opens it."""
    return f"<details><summary>{html.escape(title)}</summary>{content}</details>" if content else ""


def read_json(path: Path) -> Any:
    """What a JSON file holds; None where it is missing."""
    return json.loads(path.read_text()) if path.exists() else None


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file; none where it is missing, and without a last line that a crash cut short."""
    lines = path.read_text().split("\n") if path.exists() else [""]
    return [json.loads(line) for line in lines[:-1]]  # a whole line ends with a newline
