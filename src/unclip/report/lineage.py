"""Which artifact was trained on which, by content hash, as a graph."""

import html
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from unclip.artifact import MANIFEST, locate, read_manifest
from unclip.errors import ArtifactError

BOX_WIDTH, BOX_HEIGHT, GAP_X, GAP_Y = 200, 58, 70, 16
FILLS = {"clip": "#e8f0fb", "prior": "#eaf6ea", "decoder": "#fdf0e3", "upsampler": "#f5eafa"}


@dataclass(frozen=True)
class Node:
    """One artifact: its content hash and, unless it is only known as a parent, its run's folder and what it is."""

    hash: str
    kind: str
    folder: Path | None = None
    note: str = ""
    parents: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.folder.name if self.folder else "not in this folder"


def find_nodes(folders: Iterable[Path]) -> dict[str, Node]:
    """The artifacts of these run folders by hash, and their parents where those lie elsewhere.

    A folder without a readable artifact is left out: a run that is not finished, for instance.
    """
    nodes: dict[str, Node] = {}
    for folder in folders:
        try:
            manifest = read_manifest(folder)
        except ArtifactError:
            continue
        note = f"{manifest.model}, step {manifest.step:,}"
        nodes[manifest.hash] = Node(manifest.hash, manifest.kind, folder, note, manifest.parents)
    for node in list(nodes.values()):
        for role, parent in node.parents.items():
            nodes.setdefault(parent, Node(parent, role))
    return nodes


def siblings(run: Path) -> list[Path]:
    """The run folders beside ``run``, itself among them, which hold an artifact."""
    return sorted(locate(path.parent.parent).parent for path in run.resolve().parent.glob(f"*/artifact/{MANIFEST}"))


def ancestors(nodes: dict[str, Node], of: str) -> dict[str, Node]:
    """The node with hash ``of`` and all that it stems from."""
    found, ahead = {}, [of]
    while ahead:
        node = nodes[ahead.pop()]
        if node.hash not in found:
            found[node.hash] = node
            ahead += [parent for parent in node.parents.values() if parent in nodes]
    return found


def draw_lineage(nodes: dict[str, Node], highlight: str = "") -> str:
    """An SVG with parents left of what was trained on them; nothing for no nodes."""
    if not nodes:
        return ""
    places = _places(nodes)
    width = max(x for x, _ in places.values()) + BOX_WIDTH + 8
    height = max(y for _, y in places.values()) + BOX_HEIGHT + 8
    edges = [
        _edge(places[parent], places[node.hash], role)
        for node in nodes.values()
        for role, parent in node.parents.items()
    ]
    boxes = [_box(node, *places[node.hash], node.hash == highlight) for node in nodes.values()]
    return (
        f"<svg width={width} height={height} role=img font-size=12 font-family='system-ui,sans-serif'>"
        f"<rect width={width} height={height} fill='#fafafa' />{''.join(edges)}{''.join(boxes)}</svg>"
    )


def _places(nodes: dict[str, Node]) -> dict[str, tuple[int, int]]:
    """Left upper corners: a column for each distance from the roots."""
    columns: dict[int, list[Node]] = {}
    for node in sorted(nodes.values(), key=lambda node: (node.kind, node.name, node.hash)):
        columns.setdefault(_depth(nodes, node.hash), []).append(node)
    places = {}
    for column, members in columns.items():
        for row, node in enumerate(members):
            places[node.hash] = (8 + column * (BOX_WIDTH + GAP_X), 8 + row * (BOX_HEIGHT + GAP_Y))
    return places


def _depth(nodes: dict[str, Node], of: str, limit: int = 32) -> int:
    """The longest way to a root. A hash covers its parents', so no circle can be; ``limit`` holds for forged files."""
    parents = [parent for parent in nodes[of].parents.values() if parent in nodes]
    return 1 + max(_depth(nodes, parent, limit - 1) for parent in parents) if parents and limit else 0


def _edge(start: tuple[int, int], end: tuple[int, int], role: str) -> str:
    x1, y1 = start[0] + BOX_WIDTH, start[1] + BOX_HEIGHT // 2
    x2, y2 = end[0], end[1] + BOX_HEIGHT // 2
    middle = (x1 + x2) // 2
    return (
        f"<path d='M{x1} {y1}C{middle} {y1} {middle} {y2} {x2} {y2}' fill=none stroke='#999'>"
        f"<title>{html.escape(role)}</title></path><circle cx='{x2}' cy='{y2}' r='3' fill='#999' />"
    )


def _box(node: Node, x: int, y: int, highlight: bool) -> str:
    known = node.folder is not None
    fill = FILLS.get(node.kind, "#f0f0f0") if known else "none"
    style = f"stroke-width='{2.5 if highlight else 1}'" + ("" if known else " stroke-dasharray='4 3'")
    lines = [(node.name[:26], "#222"), (f"{node.kind} {node.hash[:12]}", "#222"), (node.note[:30], "#777")]
    text = "".join(
        f"<text x='{x + 10}' y='{y + 17 + 17 * i}' fill='{colour}'>{html.escape(line)}</text>"
        for i, (line, colour) in enumerate(lines)
    )
    box = (
        f"<rect x='{x}' y='{y}' width='{BOX_WIDTH}' height='{BOX_HEIGHT}' rx='6' fill='{fill}' stroke='#888' {style} />"
    )
    return f"<g><title>{html.escape(f'{node.kind} {node.hash}')}</title>{box}{text}</g>"
