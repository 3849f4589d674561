"""The five forms that draw. Each function makes its form; the one within turns the form's raw values into work."""

from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr
import torch

from unclip.batches import Progress
from unclip.jobs import Picture
from unclip.pipeline import UnCLIP
from unclip.ui.panel import PRIVATE, advanced, checked, make_buttons, num_and_seed, upload, wire
from unclip.ui.studio import Draw, Studio, decoder_sampling, squares
from unclip.ui.uploads import MOST_PICTURES, caption_of, mask_of, number_of, picture_of, whole_of

EXAMPLES = ("a red cube on top of a blue cube", "a small green sphere left of a yellow cone", "a purple ring")


def _generate(studio: Studio) -> None:
    with gr.Column(scale=2, min_width=320):
        caption = gr.Textbox(label="Caption", lines=2, max_lines=4, placeholder=EXAMPLES[0], elem_id="generate-caption")
        for_example = gr.Radio(list(EXAMPLES), label="Or one of these", elem_id="generate-examples")
        negative = gr.Textbox(label="Away from (negative caption, optional)", elem_id="generate-negative")
        num, seed = num_and_seed("generate")
        steps, guidance = advanced("generate")
        buttons = make_buttons("generate", "Generate")
    for_example.change(lambda text: text, for_example, caption, queue=False, **PRIVATE)

    def form(caption: Any, negative: Any, num: Any, seed: Any, steps: Any, guidance: Any) -> Draw:
        captions, against = [caption_of(caption)], caption_of(negative, "the negative caption") if negative else None
        count, first, settings = checked(num, seed, steps, guidance)

        def draw(chain: UnCLIP, progress: Progress) -> Iterator[Picture]:
            how = decoder_sampling(chain, *settings)
            return chain.generate(
                captions,
                num=count,
                seed=first,
                how=how,
                batch_size=studio.batch_size,
                progress=progress,
                negative=against,
            )

        return draw

    wire(studio, buttons, form, [caption, negative, num, seed, steps, guidance], caption.submit)


def _vary(studio: Studio) -> None:
    with gr.Column(scale=2, min_width=320):
        picture = upload("vary-picture", "Picture")
        caption = gr.Textbox(label="Caption (optional: read by decoders with a caption path)", elem_id="vary-caption")
        eta = gr.Slider(0, 1, 1, step=0.05, label="η: 0 reconstructs, 1 varies most", elem_id="vary-eta")
        num, seed = num_and_seed("vary")
        steps, guidance = advanced("vary")
        buttons = make_buttons("vary", "Vary")

    def form(picture: Any, caption: Any, eta: Any, num: Any, seed: Any, steps: Any, guidance: Any) -> Draw:
        source = picture_of(picture, studio.folder)[None]
        captions, share = [caption_of(caption)] if caption else None, number_of(eta, "η", 0, 1)
        count, first, settings = checked(num, seed, steps, guidance)

        def draw(chain: UnCLIP, progress: Progress) -> Iterator[Picture]:
            how = decoder_sampling(chain, *settings, invertible=True)
            return chain.vary(
                source, captions=captions, num=count, seed=first, eta=share, how=how, batch_size=studio.batch_size,
                progress=progress,
            )  # fmt: skip

        return draw

    wire(studio, buttons, form, [picture, caption, eta, num, seed, steps, guidance])


def _interpolate(studio: Studio) -> None:
    with gr.Column(scale=2, min_width=320):
        with gr.Row():
            first, last = upload("interpolate-first", "From"), upload("interpolate-last", "To")
        frames = gr.Slider(
            2, MOST_PICTURES, 8, step=1, label="Frames, both ends included", elem_id="interpolate-frames"
        )
        noise = gr.Radio(
            [("between the pictures' own x_T", "slerp"), ("the seed's, for all frames", "fixed")],
            value="slerp", label="Noise", elem_id="interpolate-noise",
        )  # fmt: skip
        seed = gr.Number(0, label="Seed", precision=0, elem_id="interpolate-seed")
        steps, guidance = advanced("interpolate")
        buttons = make_buttons("interpolate", "Interpolate")

    def form(first: Any, last: Any, frames: Any, noise: Any, seed: Any, steps: Any, guidance: Any) -> Draw:
        named = ((first, "the first picture"), (last, "the last picture"))
        ends = squares([picture_of(value, studio.folder, what) for value, what in named])
        count = whole_of(frames, "the number of frames", 2, MOST_PICTURES)
        _, number, settings = checked(1, seed, steps, guidance)
        kind = noise if isinstance(noise, str) else ""

        def draw(chain: UnCLIP, progress: Progress) -> Iterator[Picture]:
            how = decoder_sampling(chain, *settings, invertible=True)
            return chain.interpolate(
                ends, frames=count, seed=number, noise=kind, how=how, batch_size=studio.batch_size, progress=progress
            )

        return draw

    wire(studio, buttons, form, [first, last, frames, noise, seed, steps, guidance])


def _edit(studio: Studio) -> None:
    with gr.Column(scale=2, min_width=320):
        picture = upload("edit-picture", "Picture")
        base = gr.Textbox("a photo", label="What it shows (may be left empty)", elem_id="edit-base")
        caption = gr.Textbox(label="What it should become", placeholder="a blue cube", elem_id="edit-caption")
        theta = gr.Slider(
            0, 1, 0.4, step=0.01, label="θ: how far (the paper goes to 0.25 to 0.5)", elem_id="edit-theta"
        )
        num = gr.Slider(1, MOST_PICTURES, 5, step=1, label="Pictures on the way there", elem_id="edit-num")
        seed = gr.Number(0, label="Seed", precision=0, elem_id="edit-seed")
        steps, guidance = advanced("edit")
        buttons = make_buttons("edit", "Edit")

    def form(picture: Any, base: Any, caption: Any, theta: Any, num: Any, seed: Any, steps: Any, guidance: Any) -> Draw:
        source = picture_of(picture, studio.folder)
        words, before = caption_of(caption), caption_of(base, "what it shows") if base else None
        count, first, settings = checked(num, seed, steps, guidance)
        farthest = number_of(theta, "θ", 0, 1)
        thetas = torch.linspace(0, farthest, count, dtype=torch.float64).tolist() if count > 1 else [farthest]

        def draw(chain: UnCLIP, progress: Progress) -> Iterator[Picture]:
            how = decoder_sampling(chain, *settings, invertible=True)
            return chain.edit(
                source, words, base_caption=before, thetas=thetas, seed=first, how=how, batch_size=studio.batch_size,
                progress=progress,
            )  # fmt: skip

        return draw

    wire(studio, buttons, form, [picture, base, caption, theta, num, seed, steps, guidance], caption.submit)


def _inpaint(studio: Studio) -> None:
    with gr.Column(scale=2, min_width=320):
        gr.HTML("Choose a picture, take the brush, and paint white what is to be drawn anew.")
        drawing = gr.ImageEditor(
            label="Picture", show_label=False, type="filepath", format="png", elem_id="inpaint-drawing",
            brush=gr.Brush(colors=["#ffffff"], color_mode="fixed", default_size=24), layers=False, transforms=(),
            sources=("upload", "clipboard"), buttons=[],
        )  # fmt: skip
        caption = gr.Textbox(label="What the whole picture shows (may be left empty)", elem_id="inpaint-caption")
        num, seed = num_and_seed("inpaint")
        steps, guidance = advanced("inpaint")
        buttons = make_buttons("inpaint", "Inpaint")

    def form(drawing: Any, caption: Any, num: Any, seed: Any, steps: Any, guidance: Any) -> Draw:
        picture, mask = mask_of(drawing, studio.folder)
        words = caption_of(caption) if caption else None
        count, first, settings = checked(num, seed, steps, guidance)

        def draw(chain: UnCLIP, progress: Progress) -> Iterator[Picture]:
            how = decoder_sampling(chain, *settings)
            return chain.inpaint(
                picture, mask, words, num=count, seed=first, how=how, batch_size=studio.batch_size, progress=progress
            )

        return draw

    wire(studio, buttons, form, [drawing, caption, num, seed, steps, guidance], caption.submit)


FORMS: dict[str, Callable[[Studio], None]] = {
    "Generate": _generate,
    "Vary": _vary,
    "Interpolate": _interpolate,
    "Edit": _edit,
    "Inpaint": _inpaint,
}
