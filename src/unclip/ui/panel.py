"""What all forms share: their fields, buttons, progress and pictures, and how a request is followed to its end."""

import asyncio
import html
import json
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr
from gradio.components import Component

from unclip.errors import ConfigError
from unclip.jobs import Picture
from unclip.ui.studio import Draw, Studio
from unclip.ui.uploads import MAX_SEED, MOST_PICTURES, MOST_STEPS, number_of, whole_of
from unclip.ui.worker import State, Task, in_words

Form = Callable[..., Draw]
PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
HINT = "Click on a picture to see what it is."
LOOK_EVERY = 0.2  # seconds between two looks at a task


@dataclass
class Buttons:
    tab: str
    start: gr.Button
    cancel: gr.Button


def make_buttons(tab: str, verb: str) -> Buttons:
    with gr.Row():
        start = gr.Button(verb, variant="primary", elem_id=f"{tab}-start", scale=2)
        cancel = gr.Button("Cancel", elem_id=f"{tab}-cancel", scale=1)
    return Buttons(tab, start, cancel)


def upload(elem_id: str, label: str) -> gr.Image:
    return gr.Image(
        label=label, type="filepath", sources=["upload", "clipboard"], height=220, buttons=[], elem_id=elem_id
    )


def num_and_seed(tab: str) -> tuple[gr.Slider, gr.Number]:
    with gr.Row():
        num = gr.Slider(1, MOST_PICTURES, 4, step=1, label="Pictures", elem_id=f"{tab}-num", scale=2)
        seed = gr.Number(0, label="Seed", precision=0, minimum=0, elem_id=f"{tab}-seed", scale=1)
    return num, seed


def advanced(tab: str) -> tuple[gr.Number, gr.Number]:
    """Steps and guidance of the decoder; left empty they are as the artifact says."""
    with gr.Accordion("Sampling of the decoder", open=False, elem_id=f"{tab}-advanced"), gr.Row():
        steps = gr.Number(None, label="Steps", placeholder="as trained", precision=0, elem_id=f"{tab}-steps")
        guidance = gr.Number(None, label="Guidance", placeholder="as trained", elem_id=f"{tab}-guidance")
    return steps, guidance


def checked(num: Any, seed: Any, steps: Any, guidance: Any) -> tuple[int, int, tuple[int | None, float | None]]:
    """Number of pictures, first seed, and the decoder's steps and guidance, None where they are left empty."""
    count = whole_of(num, "the number of pictures", 1, MOST_PICTURES)
    first = whole_of(seed, "the seed", 0, MAX_SEED)
    own_steps = None if steps in (None, "") else whole_of(steps, "the number of steps", 1, MOST_STEPS)
    scale = None if guidance in (None, "") else number_of(guidance, "the guidance", 0, 100)
    return count, first, (own_steps, scale)


def wire(studio: Studio, buttons: Buttons, form: Form, fields: Sequence[Component], *also: Callable[..., Any]) -> None:
    """Make the column with progress and pictures, and connect the buttons; ``also``: other events that start."""
    tab = buttons.tab
    with gr.Column(scale=3, min_width=320):
        status = gr.HTML(_line("Pictures appear here."), elem_id=f"{tab}-status")
        gallery = gr.Gallery(
            columns=4, height="auto", object_fit="contain", format="png", interactive=False, show_label=False,
            buttons=["download", "fullscreen"], elem_id=f"{tab}-gallery",
        )  # fmt: skip
        details = gr.HTML(HINT, elem_id=f"{tab}-details")
        repeat = gr.Button("Repeat the chosen picture", size="sm", elem_id=f"{tab}-repeat")
    chosen = gr.State(-1)

    async def start(request: gr.Request, *values: Any) -> AsyncIterator[tuple[Any, ...]]:
        yield _line("Checking &hellip;"), gr.skip(), -1, ""
        try:
            draw = await asyncio.to_thread(form, *values)
            task = studio.submit(visitor(request), tab, draw)
        except Exception as error:  # noqa: BLE001  logged there; the server must go on
            yield _failed(in_words(error)), gr.skip(), -1, ""
            return
        async for seen, pictures in _follow(studio, task):
            yield seen, pictures, -1, HINT

    async def again(index: Any, request: gr.Request) -> AsyncIterator[tuple[Any, Any]]:
        try:
            task = studio.repeat(visitor(request), tab, index)
        except Exception as error:  # noqa: BLE001
            yield _failed(in_words(error)), gr.skip()
            return
        async for seen, pictures in _follow(studio, task, "drawn again: the same picture, bit for bit"):
            yield seen, pictures

    def cancel(request: gr.Request) -> Any:
        return gr.skip() if studio.cancel(visitor(request), tab) else _line("There is nothing to cancel.")

    def choose(event: gr.SelectData, request: gr.Request) -> tuple[int, str]:
        index = event.index if isinstance(event.index, int) else -1
        task = studio.task(visitor(request), tab)
        if task is None or not 0 <= index < len(task.pictures):
            return -1, ""
        return index, _details(task.pictures[index][0])

    raw = {"preprocess": False, "concurrency_limit": None, **PRIVATE}
    gr.on([buttons.start.click, *also], start, list(fields), [status, gallery, chosen, details], **raw)
    repeat.click(again, chosen, [status, gallery], **raw)
    buttons.cancel.click(cancel, outputs=status, queue=False, **PRIVATE)
    gallery.select(choose, outputs=[chosen, details], queue=False, **PRIVATE)


def visitor(request: gr.Request) -> str:
    """Who asks: one open page."""
    if not request.session_hash:
        raise ConfigError("this page must be opened in a browser")
    return str(request.session_hash)


async def _follow(studio: Studio, task: Task, verb: str = "") -> AsyncIterator[tuple[str, Any]]:
    """Status and, when there are new ones, pictures, until the task has ended."""
    shown, before = -1, ""
    while True:
        ended = task.state.ended  # first: what is read after it is whole
        count, seen = len(task.pictures), _status(task, studio.worker.ahead(task), verb)
        if count != shown or seen != before:
            pictures = [(str(path), _label(picture)) for picture, path in task.pictures[:count]]
            yield seen, pictures if count != shown else gr.skip()
            shown, before = count, seen
        if ended:
            return
        await asyncio.sleep(LOOK_EVERY)


def _status(task: Task, ahead: int, verb: str) -> str:
    notes = "".join(f"<p class='unclip-note'>{html.escape(note)}</p>" for note in dict.fromkeys(task.notes))
    match task.state:
        case State.waiting:
            return _line(f"Waiting: {ahead} request{'s' if ahead != 1 else ''} before yours.")
        case State.running:
            left = task.left()
            time_left = "" if left is None else f", {_duration(left)} left"
            bar = f"<progress max='{max(task.num_steps, 1)}' value='{task.step}'></progress>"
            return bar + _line(f"Drawing: step {task.step} of {task.num_steps}{time_left}") + notes
        case State.cancelled:
            return _line("Cancelled.") + notes
        case State.failed:
            return _failed(task.error) + notes
    repeated = verb if not notes else "drawn again"
    what = f"{repeated}, " if verb else ""
    count = len(task.pictures)
    return _line(f"Done: {what}{count} picture{'s' if count != 1 else ''}, {task.seconds:.1f} s.") + notes


def _details(picture: Picture) -> str:
    """What a picture is, with all that fixes it."""
    hashes = {name: value[:12] for name, value in picture.artifacts.items()}
    words = {"caption": _short(picture.caption, 400), "seed": picture.seed, **picture.words, **hashes}
    rows = "".join(
        f"<tr><td>{html.escape(k)}</td><td>{html.escape(v if isinstance(v, str) else json.dumps(v))}</td></tr>"
        for k, v in words.items()
        if v is not None
    )
    return f"<table class='unclip-details'>{rows}</table>"


def _label(picture: Picture) -> str:
    """What tells a picture from its neighbours."""
    if "theta" in picture.words:
        return f"θ = {picture.words['theta']:g}"
    return f"seed {picture.seed}" if picture.words.get("operation") == "generate" else _short(picture.caption)


def _short(text: str, most: int = 80) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _line(text: str) -> str:
    return f"<p class='unclip-line'>{text}</p>"


def _failed(message: str) -> str:
    return f"<p class='unclip-error' role='alert'>{html.escape(message)}</p>"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
