"""The page: a header that says what it draws with, the forms, and the runs."""

import html
from typing import Any

import gradio as gr

from unclip.errors import UnclipError
from unclip.report.lineage import draw_lineage, find_nodes
from unclip.report.run import run_parts
from unclip.ui.forms import FORMS
from unclip.ui.panel import PRIVATE, visitor
from unclip.ui.studio import Studio


def build_page(studio: Studio) -> gr.Blocks:
    """All tabs, wired to ``studio``."""

    def leave(request: gr.Request) -> None:
        studio.leave(visitor(request))

    with gr.Blocks(title="unclip", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        header = gr.HTML(elem_id="header")
        with gr.Tabs():
            for title, build in FORMS.items():
                with gr.Tab(title, id=title.lower()), gr.Row(equal_height=False):
                    build(studio)
            with gr.Tab("Runs", id="runs"):
                _runs(studio, page)
        page.load(lambda: _header(studio), outputs=header, **PRIVATE)
        page.unload(leave)
    return page


def _header(studio: Studio) -> str:
    """What the page draws with, or why it cannot."""
    trouble = studio.trouble()
    if trouble:
        return f"<h1>unclip</h1><p class='unclip-error'>Nothing can be drawn now: {html.escape(trouble)}</p>"
    chain = studio.chain()
    chips = [(name, value, value[:8]) for name, value in chain.hashes.items()]
    stages = " ".join(
        f"<span class='unclip-chip' title='{html.escape(whole)}'>{html.escape(name)} <code>{html.escape(short)}</code></span>"
        for name, whole, short in chips
    )
    size = (
        f"<span class='unclip-chip'>{chain.size} &times; {chain.size} pixels on {html.escape(str(chain.device))}</span>"
    )
    return f"<h1>unclip</h1><p>{html.escape(studio.runs.name)} {stages} {size}</p>"


def _runs(studio: Studio, page: gr.Blocks) -> None:
    """Lineage of all artifacts, and one run's curves, sheets and settings."""
    with gr.Row():
        names = gr.Dropdown([], label="Run", elem_id="runs-name", scale=4)
        refresh = gr.Button("Look again", elem_id="runs-refresh", scale=1)
    graph = gr.HTML(elem_id="runs-lineage")
    found = gr.HTML(elem_id="runs-report")

    def look() -> tuple[Any, str, str]:
        folders = studio.run_folders()
        if not folders:
            return gr.update(choices=[], value=None), "", _said("There are no runs yet.")
        first = next((name for name in ("decoder", "prior", "clip") if name in folders), next(iter(folders)))
        return gr.update(choices=list(folders), value=first), _graph(list(folders.values())), _told(studio, first)

    names.input(lambda name: _told(studio, name), names, found, preprocess=False, **PRIVATE)
    refresh.click(look, outputs=[names, graph, found], **PRIVATE)
    page.load(look, outputs=[names, graph, found], **PRIVATE)


def _graph(folders: list[Any]) -> str:
    drawn = draw_lineage(find_nodes(folders))
    return f"<h2>What was trained on what</h2><div class='unclip-graph'>{drawn}</div>" if drawn else ""


def _told(studio: Studio, name: Any) -> str:
    """One run's page, without what belongs to a file of its own."""
    folder = studio.run_folders().get(name) if isinstance(name, str) else None
    if folder is None:
        return _said("There is no such run; look again.")
    try:
        return f"<div class='unclip-report'>{''.join(run_parts(folder))}</div>"
    except (UnclipError, OSError, ValueError) as error:
        return _said(f"{name} cannot be shown: {error}")


def _said(text: str) -> str:
    return f"<p class='unclip-error'>{html.escape(text)}</p>"
