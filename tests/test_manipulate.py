"""Variations, interpolations, edits, mixtures and inpainting on a tiny chain."""

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_chain import tiny_stages
from torch.testing import assert_close

from unclip.artifact import Manifest
from unclip.batches import Batches, Meter
from unclip.cli.options import Overrides
from unclip.cli.pictures import sampling
from unclip.config import from_plain
from unclip.diffusion.guidance import Guidance
from unclip.diffusion.samplers import Sampler, SamplerConfig
from unclip.errors import ArtifactError, ConfigError
from unclip.manipulate import INVERTIBLE, invertible, latents_of_ends, slerp, text_difference, toward_text
from unclip.models import REGISTRY, build
from unclip.models.sampling import DiffusionSampling
from unclip.nets.conditioned import DecoderText
from unclip.nets.layers import Cond
from unclip.pipeline import Picture, Sampling, UnCLIP
from unclip.recipe import from_png, to_png

DDIM = DiffusionSampling(SamplerConfig(Sampler.ddim, num_steps=4))
DDIM_1 = DiffusionSampling(SamplerConfig(Sampler.ddim, num_steps=4, eta=1.0))
HOW = Sampling(decoder=DDIM)
PICTURES = torch.randint(0, 256, (3, 3, 20, 24), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
MASK = torch.zeros(20, 24, dtype=torch.bool)
MASK[:10] = True
OPERATIONS = {
    "generate": lambda chain: chain.generate(["a red cube", "a small blue sphere"], num=2, batch_size=3),
    "negative": lambda chain: chain.generate(["a red cube"], negative="a blue sphere"),
    "vary": lambda chain: chain.vary(PICTURES, num=1, how=HOW, eta=0.5),
    "vary with captions": lambda chain: chain.vary(PICTURES, captions=["a", "a red cube", "b"], num=1, how=HOW),
    "interpolate": lambda chain: chain.interpolate(PICTURES, frames=3, how=HOW),
    "interpolate captions": lambda chain: chain.interpolate(captions=["a red cube", "a ball"], frames=3, how=HOW),
    "fixed noise": lambda chain: chain.interpolate(PICTURES[:2], frames=3, noise="fixed", how=HOW),
    "edit": lambda chain: chain.edit(PICTURES[0], "a blue cube", thetas=(0.0, 0.5), how=HOW),
    "mix": lambda chain: chain.mix(PICTURES[0], "a blue cube", weights=(0.5,), num=2),
    "inpaint": lambda chain: chain.inpaint(PICTURES[0], MASK, num=2),
    "inpaint with a caption": lambda chain: chain.inpaint(PICTURES[0], MASK, "a blue cube"),
}


@pytest.fixture(scope="module")
def chain() -> UnCLIP:
    return UnCLIP(tiny_stages())


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.float() - other.float()).abs().mean())


def test_slerp_keeps_lengths_and_ends():
    a, b = torch.tensor([[3.0, 0.0], [1.0, 1.0]]), torch.tensor([[0.0, 3.0], [1.0, 1.0]])
    half = slerp(a, b, 0.5)
    assert_close(half, torch.tensor([[3 / 2**0.5, 3 / 2**0.5], [1.0, 1.0]]))
    assert_close(slerp(a, b, 1 / 3)[0], torch.tensor([3 * 0.75**0.5, 1.5]))
    assert torch.equal(slerp(a, b, 0), a)
    assert torch.equal(slerp(a, b, 1), b)


def test_a_text_difference_turns_z_i_by_a_share_of_the_angle():
    z_t, z_t0 = torch.tensor([[2.0, 0.0, 0.0]]), torch.tensor([[0.0, 5.0, 0.0]])
    z_d = text_difference(z_t, z_t0)
    assert_close(z_d, torch.tensor([[0.5**0.5, -(0.5**0.5), 0.0]]))
    assert_close(text_difference(z_t, None), torch.tensor([[1.0, 0.0, 0.0]]))
    z_i = torch.tensor([[0.0, 0.0, 7.0]])
    turned = toward_text(z_i, z_d, 0.25)
    assert_close(turned.norm(dim=1), torch.tensor([7.0]))
    assert_close(turned[0, 2], 7 * torch.tensor(torch.pi / 8).cos())
    with pytest.raises(ConfigError, match="the same to CLIP; give two that differ"):
        text_difference(z_t, 2 * z_t)


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_picture_can_be_repeated_from_its_file_and_every_step_is_counted(chain: UnCLIP, name: str):
    drawn = list(OPERATIONS[name](chain))
    assert len({picture.image.numpy().tobytes() for picture in drawn}) == len(drawn)
    for picture in drawn:
        stored = from_png(to_png(picture))
        stored.image = torch.zeros_like(picture.image)  # it is not read
        steps: list[tuple[int, int]] = []
        again = chain.repeat(stored, progress=lambda *step, steps=steps: steps.append(step))
        assert torch.equal(again.image, picture.image)
        assert (again.caption, again.seed, again.words) == (picture.caption, picture.seed, picture.words)
        total = steps[0][1]
        assert [done for done, _ in steps] == sorted(done for done, _ in steps)
        assert steps[-1] == (total, total)


def counted(chain: UnCLIP, name: str) -> list[tuple[int, int]]:
    steps: list[tuple[int, int]] = []
    calls = {
        "generate": lambda p: chain.generate(["a", "b"], num=2, batch_size=3, progress=p),
        "vary": lambda p: chain.vary(PICTURES, num=2, how=HOW, batch_size=4, progress=p),
        "interpolate": lambda p: chain.interpolate(PICTURES, frames=3, how=HOW, batch_size=4, progress=p),
        "interpolate captions": lambda p: chain.interpolate(
            PICTURES[:2], captions=["a cube"], frames=3, how=HOW, batch_size=4, progress=p
        ),
        "edit": lambda p: chain.edit(
            PICTURES[0], "a cube", thetas=(0, 0.1), how=replace(HOW, refinements=2), progress=p
        ),
        "mix": lambda p: chain.mix(PICTURES[0], "a cube", weights=(0.5,), num=2, progress=p),
        "inpaint": lambda p: chain.inpaint(PICTURES[0], MASK, "a cube", num=2, progress=p),
    }
    list(calls[name](lambda *step: steps.append(step)))
    return steps


@pytest.mark.parametrize(
    ("name", "total"),
    [
        ("generate", 4 * (3 + 3 + 3)),
        ("vary", 3 * 4 + 6 * (4 + 3)),
        ("interpolate", 3 * 4 + 5 * (4 + 3)),
        ("interpolate captions", 2 * 4 + 3 + 5 * (4 + 3)),
        ("edit", 2 * 4 + 2 * (4 + 3)),
        ("mix", 2 * 3 + 2 * (3 + 3)),
        ("inpaint", 2 * (3 + 3 + 3)),
    ],
)
def test_progress_counts_steps_over_the_whole_job(chain: UnCLIP, name: str, total: int):
    steps = counted(chain, name)
    done = [step for step, _ in steps]
    assert {of for _, of in steps} == {total}
    assert done == sorted(set(done))
    assert done[-1] == total
    assert done[0] <= 3, "the first step is told, not the first batch"


def test_progress_can_cancel(chain: UnCLIP):
    calls = []

    def cancel(done: int, total: int) -> None:
        calls.append(done)
        if done >= 8:
            raise InterruptedError("cancelled")

    pictures = chain.generate(["a red cube"], num=8, batch_size=2, progress=cancel)
    with pytest.raises(InterruptedError, match="cancelled"):
        list(pictures)
    assert calls == [2, 4, 6, 8]


def test_eta_zero_reconstructs_whatever_the_seed_and_eta_one_varies(chain: UnCLIP):
    base = replace(HOW, last="decoder")
    same = [p.image for p in chain.vary(PICTURES[:1], num=2, eta=0.0, how=base)]
    assert torch.equal(same[0], same[1])
    assert same[0].shape == (3, 16, 16)
    one, other = (p.image for p in chain.vary(PICTURES[:1], num=2, eta=1.0, how=base))
    assert difference(one, other) > 3


def test_an_interpolation_ends_in_the_reconstructions(chain: UnCLIP):
    frames = list(chain.interpolate(PICTURES, frames=4, seed=5, how=HOW))
    assert len(frames) == 2 * 3 + 1
    ends = [p.image for p in chain.vary(PICTURES, num=1, seed=5, eta=0.0, how=HOW)]
    for frame, end in zip(frames[::3], ends, strict=True):
        assert difference(frame.image, end) <= 1
    assert difference(frames[0].image, frames[1].image) > 1
    fixed = list(chain.interpolate(PICTURES[:2], frames=2, seed=5, noise="fixed", how=HOW))
    assert difference(fixed[0].image, ends[0]) > 1


def test_an_interpolation_between_captions_ends_in_what_their_own_seeds_draw(chain: UnCLIP):
    base = replace(HOW, last="decoder")
    captions, full = ["a red cube", "a blue sphere"], invertible(chain, base)
    frames = list(chain.interpolate(captions=captions, frames=3, seed=5, how=base))
    for frame, caption, seed in zip(frames[::2], captions, (5, 6), strict=True):
        z_i = chain.sample_embeddings([caption], seed=seed, how=HOW)
        assert difference(frame.image, chain.decode(Cond(image_emb=z_i), [seed], full)[0]) <= 1
    assert difference(frames[0].image, frames[2].image) > 1


def test_pictures_and_captions_are_ends_of_one_interpolation(chain: UnCLIP):
    frames = list(chain.interpolate(PICTURES[:2], captions=["a cube"], frames=3, seed=5, how=HOW))
    alone = list(chain.interpolate(PICTURES[:2], frames=3, seed=5, how=HOW))
    assert len(frames) == 5
    assert all(difference(a.image, b.image) <= 1 for a, b in zip(frames, alone, strict=False))
    (z_i,) = chain.sample_embeddings(["a cube"], seed=5, how=HOW)
    end = frames[-1].job.image_emb
    assert end is not None
    assert_close(torch.nn.functional.normalize(end, dim=0), z_i)
    fixed = list(chain.interpolate(captions=["a cube", "a ball"], frames=2, noise="fixed", how=HOW))
    assert all(frame.job.x_T is None for frame in fixed)


def test_a_prior_of_unit_norm_interpolates_at_the_pictures_norm(chain: UnCLIP):
    """Else the middle would lie nearly where the longer end does."""
    how = chain.resolved(HOW, decoder=INVERTIBLE)
    ends = latents_of_ends(
        chain, PICTURES[:1], ["a red cube"], 0, how, Batches(4, Meter(None, 0)), noisy=False
    ).image_emb
    assert ends[0].norm() > 1.5, "a picture's z_i has not unit norm"
    assert_close(ends[1].norm(), ends[0].norm())
    middle = slerp(ends[0], ends[1], 0.5)
    angles = [torch.cosine_similarity(middle, end, dim=0) for end in ends]
    assert_close(angles[0], angles[1], atol=1e-4, rtol=0)


def test_an_edit_begins_with_the_reconstruction_and_keeps_its_noise(chain: UnCLIP):
    edits = list(chain.edit(PICTURES[0], "a blue cube", base_caption=None, thetas=(0.0, 0.5), how=HOW))
    (same,) = chain.vary(PICTURES[:1], num=1, eta=0.0, how=HOW)
    assert difference(edits[0].image, same.image) <= 1
    assert torch.equal(edits[0].job.x_T, edits[1].job.x_T)
    assert difference(edits[0].image, edits[1].image) > 0.5
    assert edits[1].words == {"operation": "edit", "caption": "a blue cube", "theta": 0.5, "base_caption": None}


def test_a_mixture_lies_between_picture_and_caption(chain: UnCLIP):
    first, middle, last = chain.mix(PICTURES[0], "a blue cube", weights=(0, 0.5, 1), seed=3)
    z_i = chain.embed_image(PICTURES[:1])[0]
    assert_close(first.job.image_emb, z_i)
    wanted = chain.sample_embeddings(["a blue cube"], seed=3)[0]
    assert_close(torch.cosine_similarity(last.job.image_emb, wanted, dim=0), torch.tensor(1.0))
    cosines = [torch.cosine_similarity(middle.job.image_emb, end, dim=0) for end in (z_i, wanted)]
    assert_close(*cosines, atol=1e-5, rtol=0)


@pytest.mark.parametrize("caption", [None, "a blue cube"])
def test_inpainting_changes_what_is_white_and_nothing_else(chain: UnCLIP, caption: str | None):
    picture = PICTURES[0][:, :20, :20].repeat_interleave(2, 1).repeat_interleave(2, 2)[:, :32, :32]
    mask = torch.zeros(32, 32, dtype=torch.bool)
    mask[8:20, 4:12] = True
    for drawn in chain.inpaint(picture, mask, caption, num=2):
        assert torch.equal(drawn.image[:, ~mask], picture[:, ~mask])
        assert difference(drawn.image[:, mask], picture[:, mask]) > 5


def test_temperature_zero_leaves_only_the_noise_it_begins_with(chain: UnCLIP):
    inpainted, varied = [], []
    for temperature in (1.0, 0.0):
        ancestral = Sampling(decoder=DiffusionSampling(SamplerConfig(num_steps=4, temperature=temperature)))
        inpainted.append(next(chain.inpaint(PICTURES[0], MASK, how=ancestral)).image)
        noisy = SamplerConfig(Sampler.ddim, num_steps=4, eta=1.0, temperature=temperature)
        how = Sampling(decoder=DiffusionSampling(noisy), last="decoder")
        varied.append([picture.image for picture in chain.vary(PICTURES[:1], num=2, eta=1.0, how=how)])
    assert difference(*inpainted) > 1
    assert difference(*varied[0]) > 1
    assert difference(*varied[1]) == 0, "both go the same way from the picture's own x_T"


def test_pictures_need_not_be_square(chain: UnCLIP):
    how = replace(HOW, size=(16, 24))
    assert next(chain.generate(["a red cube"], how=Sampling(size=(8, 24)))).image.shape == (3, 16, 48)
    assert next(chain.vary(PICTURES, how=how)).image.shape == (3, 32, 48)
    wide = torch.zeros(40, 60, dtype=torch.bool)
    wide[:20] = True
    picture = torch.zeros(3, 40, 60, dtype=torch.uint8)
    drawn = next(chain.inpaint(picture, wide, how=Sampling(size=(16, 24))))
    assert drawn.image.shape == (3, 32, 48)
    assert not drawn.image[:, 16:].any()


def test_a_negative_caption_acts_through_guidance(chain: UnCLIP):
    plain, other, third = (
        next(chain.generate(["a red cube"], negative=n)).image for n in (None, "a blue sphere", "a red cube")
    )
    assert difference(plain, other) > 0.5
    assert difference(other, third) > 0.5
    stages = tiny_stages()
    model = build(from_plain({}, REGISTRY["identity"][0]), stages["clip"][0].interface())
    stages["prior"] = (model, Manifest("prior", "identity", {}, {"clip": "c"}, hash="i"), Path("prior"))
    assert len(list(UnCLIP(stages).generate(["a red cube"], negative="a blue sphere"))) == 1, "the decoder is guided"
    unguided = Sampling(decoder=replace(DDIM, guidance=Guidance(1.0)))
    with pytest.raises(ConfigError, match="a negative caption needs guidance"):
        chain.generate(["a red cube"], negative="a blue sphere", how=unguided)
    assert chain.defaults["decoder"].guidance.scale != 1, "which does not count where the prior alone runs"
    with pytest.raises(ConfigError, match="other than 1 of the prior, the only stage here that reads captions"):
        chain.sample_embeddings(["a red cube"], negative="a blue sphere", how=unguided)
    stages["decoder"][0].cfg.conditioning.text = DecoderText.none
    deaf = UnCLIP(stages)
    with pytest.raises(ConfigError, match="other than 1 of the prior, the only stage here that reads captions"):
        deaf.generate(["a red cube"], negative="a blue sphere")
    with pytest.raises(
        ConfigError, match=r"without a caption path \(model.conditioning.text=none\): leave out the captions"
    ):
        deaf.vary(PICTURES, captions=["a", "b", "c"], how=HOW)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c: c.generate(["a red cube", " "]), "caption 2 of 2 is empty; say what the picture shows"),
        (lambda c: c.generate([]), "give at least one caption"),
        (lambda c: c.generate("a red cube"), r"captions must be a list of texts, such as \['a red cube'\]"),
        (lambda c: c.generate(["a"], num=0), "0 pictures are asked for; ask for at least one"),
        (lambda c: c.edit(PICTURES[0], "a cube", thetas=()), "0 pictures are asked for"),
        (lambda c: c.generate(["a"], batch_size=0), "batch_size is 0; it must be at least 1"),
        (
            lambda c: c.generate(["a"], how=Sampling(size=(16, 15))),
            "a size of 15x16 is not possible: both must be mult",
        ),
        (
            lambda c: c.generate(["a"], how=Sampling(last="prior")),
            "no stage prior to stop after; choose decoder, upsam",
        ),
        (lambda c: c.vary(PICTURES.float()), r"pictures must be uint8 \(B, 3, H, W\), not torch.float32"),
        (lambda c: c.vary(PICTURES[0]), r"must be uint8 \(B, 3, H, W\)"),
        (lambda c: c.vary(PICTURES, eta=1.5), r"eta is 1.5; it must lie in \[0, 1\]"),
        (lambda c: c.vary(PICTURES, captions=["a"]), "1 captions for 3 pictures; give one for each"),
        (
            lambda c: c.vary(PICTURES, how=Sampling(decoder=DiffusionSampling())),
            "takes the sampler ddim, .* not ancestr",
        ),
        (
            lambda c: c.vary(PICTURES, how=Sampling(refinements=0)),
            "refinements is 0; each step backwards needs at least",
        ),
        (lambda c: c.interpolate(PICTURES[:1]), "1 pictures and captions are too few to go from one to the next"),
        (lambda c: c.interpolate(PICTURES[:0], captions=["a", "b"]), "there are no pictures; give at least one"),
        (lambda c: c.interpolate(captions=["a cube"]), "1 pictures and captions are too few"),
        (lambda c: c.interpolate(PICTURES[:1], captions=[""]), "caption 1 of 1 is empty"),
        (
            lambda c: c.edit(PICTURES[0], "a cube", how=Sampling(decoder=DDIM_1)),
            "the decoder's sampler has eta 1.0; leave it out",
        ),
        (
            lambda c: c.vary(PICTURES, eta=0.5, how=Sampling(decoder=DDIM_1)),
            "has eta 1.0; leave it out: `vary` takes its own",
        ),
        (lambda c: c.interpolate(PICTURES, frames=1), "frames is 1; an interpolation has at least its 2 ends"),
        (lambda c: c.interpolate(PICTURES, noise="none"), "noise is 'none'; it must be slerp .* or fixed"),
        (lambda c: c.edit(PICTURES[0], "", how=HOW), "caption 1 of 1 is empty"),
        (lambda c: c.edit(PICTURES[0], "a cube", thetas=(0, 1.1)), r"theta is 1.1; it must lie in \[0, 1\]"),
        (lambda c: c.edit(PICTURES[0], "a cube", thetas=(-0.1,)), r"theta is -0.1; it must lie in \[0, 1\]"),
        (lambda c: c.edit(PICTURES[0], "a photo"), "the caption and the base caption are the same to CLIP"),
        (lambda c: c.mix(PICTURES[0], "a cube", weights=(2,)), r"weight is 2; it must lie in \[0, 1\]"),
        (lambda c: c.inpaint(PICTURES[0], MASK.T), "the mask has 20x24 pixels but the picture 24x20; draw the mask on"),
        (
            lambda c: c.inpaint(PICTURES[0], ~MASK & MASK),
            r"the mask is empty: what is white \(True\) in it is repainted",
        ),
        (lambda c: c.inpaint(PICTURES[0], MASK, " "), "caption 1 of 1 is empty"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_done_is_refused_at_once(chain: UnCLIP, call, message: str):
    with pytest.raises(ConfigError, match=message):
        call(chain)


def test_a_caption_of_10_000_characters_is_cut_with_a_warning(
    chain: UnCLIP, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(logging.getLogger("unclip.chain"), "disabled", False)
    caplog.set_level(logging.WARNING)
    letters = "".join(
        chr(97 + int(i)) for i in torch.randint(26, (10_000,), generator=torch.Generator().manual_seed(0))
    )
    (picture,) = chain.generate([letters], how=Sampling(last="decoder"))
    assert picture.image.shape == (3, 16, 16)
    assert "words of more than 256 letters are cut in" in caplog.text
    assert "only 32 of" in caplog.text


def test_a_missing_prior_is_named_and_pictures_can_still_be_varied():
    stages = tiny_stages()
    del stages["prior"]
    chain = UnCLIP(stages)
    calls = (
        lambda: chain.generate(["a"]),
        lambda: chain.mix(PICTURES[0], "a"),
        lambda: chain.inpaint(PICTURES[0], MASK, "a"),
    )
    for call in calls:
        with pytest.raises(ArtifactError, match=r"the stage prior is missing, which .* needs: run train-prior"):
            call()
    assert next(chain.vary(PICTURES, how=HOW)).image.shape == (3, 32, 32)


def test_a_decoder_without_z_i_varies_nothing():
    stages = tiny_stages()
    stages["decoder"][0].cfg.conditioning.image = False
    with pytest.raises(ConfigError, match=r"decoder is a decoder without z_i \(model.conditioning.image=false\)"):
        UnCLIP(stages).vary(PICTURES)
    with pytest.raises(ConfigError, match="decoder is a decoder without z_i"):
        UnCLIP(stages).mix(PICTURES[0], "a red cube")
    with pytest.raises(ConfigError, match="decoder is a decoder without z_i"):
        UnCLIP(stages).inpaint(PICTURES[0], torch.ones(PICTURES.shape[-2:], dtype=torch.bool))


def test_a_decoder_of_captions_alone_needs_no_prior():
    stages = tiny_stages()
    stages["decoder"][0].cfg.conditioning.image = False
    drawn = next(UnCLIP(stages).generate(["a red cube"]))
    del stages["prior"]
    alone = next(UnCLIP(stages).generate(["a red cube"]))
    assert torch.equal(drawn.image, alone.image)
    with pytest.raises(ArtifactError, match="the stage prior is missing, which generate needs"):
        UnCLIP(stages).sample_embeddings(["a red cube"])
    with pytest.raises(ConfigError, match="sees no z_i, so no prior runs: leave out --candidates"):
        sampling(Overrides(candidates=2), UnCLIP({**tiny_stages(), "decoder": stages["decoder"]}))


def test_stages_of_other_sizes_are_refused():
    stages = tiny_stages()
    stages["upsampler"][0].cfg.low_size = 8
    with pytest.raises(ArtifactError, match="upsampler takes pictures of 8 pixels but decoder makes 16"):
        UnCLIP(stages)


def test_other_artifacts_do_not_repeat_a_picture(chain: UnCLIP):
    picture = next(chain.generate(["a red cube"]))
    stages = tiny_stages()
    stages["prior"][1].hash = "another one"
    with pytest.raises(ArtifactError, match="drawn by prior diffusio, but prior is another ; give the runs"):
        UnCLIP(stages).repeat(picture)
    with pytest.raises(ConfigError, match="the picture was drawn in bf16; load the stages with that precision"):
        chain.repeat(replace(picture, precision="bf16"))


def test_when_memory_is_out_a_smaller_batch_gives_the_same_pictures(
    chain: UnCLIP, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    whole = [p.image for p in chain.generate(["a red cube"], num=5, batch_size=5)]
    decoder = chain.models["decoder"]
    sample = decoder.sample

    def small(cond, *arguments, **named):
        if len(cond) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return sample(cond, *arguments, **named)

    monkeypatch.setattr(decoder, "sample", small)
    monkeypatch.setattr(logging.getLogger("unclip.batches"), "disabled", False)
    caplog.set_level(logging.WARNING)
    drawn = list(chain.generate(["a red cube"], num=5, batch_size=5))
    assert all(difference(p.image, one) <= 1 for p, one in zip(drawn, whole, strict=True))
    assert [p.places["decoder"] for p in drawn] == [(2, 0), (2, 1), (2, 0), (2, 1), (1, 0)]
    assert drawn[0].places["upsampler"] == (5, 0)
    assert "the decoder runs out of memory with 5 pictures at once; going on with 2" in caplog.text
    assert torch.equal(chain.repeat(drawn[3]).image, drawn[3].image)


def test_pictures_come_as_their_batches_are_done(chain: UnCLIP):
    steps: list[int] = []
    pictures: Iterator[Picture] = chain.generate(
        ["a red cube"], num=3, batch_size=1, progress=lambda d, _: steps.append(d)
    )
    assert not steps
    next(pictures)
    assert steps[-1] == 9
