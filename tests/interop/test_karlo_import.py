"""Pipelines of diffusers as runs: every component computes what diffusers' does, and so does the whole."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests_support import environment
from tiny_karlo import DECODER_SIZE, FULL_SIZE, D, as_in_2022, components, text_to_image, variation
from torch.testing import assert_close

from unclip import artifact
from unclip.interop.karlo import import_karlo
from unclip.nets.layers import Cond, Keep

CAPTIONS = ["a red horse!", "two small boats on a very calm green lake"]


@pytest.fixture(scope="module")
def karlo(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """diffusers' parts, and the folders of both pipelines in today's form."""
    root = tmp_path_factory.mktemp("karlo")
    parts = components()
    text_to_image(parts).save_pretrained(root / "t2i")
    variation(parts).save_pretrained(root / "variation")
    (root / "t2i" / "LICENSE").write_text("CreativeML Open RAIL-M\n")
    return SimpleNamespace(parts=parts, t2i=root / "t2i", variation=root / "variation")


@pytest.fixture(scope="module")
def runs(karlo: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "karlo"
    import_karlo(karlo.t2i, out, image_encoder=karlo.variation)
    return out


def load(runs: Path, kind: str) -> Any:
    return artifact.load(runs / kind, kind=kind)[0]


@torch.no_grad()
def text_side(karlo: SimpleNamespace) -> tuple[Cond, Any]:
    """The captions as our CLIP's tokens, with diffusers' side of them: its output, and the mask."""
    given = karlo.parts["tokenizer"](CAPTIONS, padding="max_length", return_tensors="pt", truncation=True)
    found = karlo.parts["text_encoder"](given.input_ids)
    mask = given.attention_mask.bool()
    return Cond(text_emb=found.text_embeds, text_seq=found.last_hidden_state, text_mask=mask), given


@torch.no_grad()
def check_clip(runs: Path, karlo: SimpleNamespace, pictures: bool = True) -> None:
    clip = load(runs, "clip")
    cond, _ = text_side(karlo)
    tokens = clip.tokenize(CAPTIONS)
    emb, states = clip.encode_text(tokens)
    assert_close(emb, cond.text_emb, atol=1e-5, rtol=0)
    real = cond.text_mask
    assert_close(states[real], cond.text_seq[real], atol=1e-5, rtol=0)
    if pictures:
        image = torch.rand(2, 3, 32, 32)
        wanted = karlo.parts["image_encoder"](pixel_values=image).image_embeds
        assert_close(clip.model.visual(image), wanted, atol=1e-5, rtol=0)
        assert_close(clip.mean.flatten(), torch.tensor(karlo.parts["feature_extractor"].image_mean), atol=1e-6, rtol=0)


@torch.no_grad()
def check_prior(runs: Path, karlo: SimpleNamespace, atol: float = 1e-5) -> None:
    prior = load(runs, "prior")
    cond, _ = text_side(karlo)
    x_t, timestep = torch.randn(2, D), torch.tensor([10, 900])
    wanted = karlo.parts["prior"](
        x_t, timestep, proj_embedding=cond.text_emb, encoder_hidden_states=cond.text_seq, attention_mask=cond.text_mask
    ).predicted_image_embedding
    assert_close(prior.net(x_t, timestep, prior.net.prepare(cond, Keep())), wanted, atol=atol, rtol=0)
    assert_close(prior.decode(x_t), karlo.parts["prior"].post_process_latents(x_t), atol=atol, rtol=0)
    assert prior.cfg.diffusion.clip_range == 5.0


@torch.no_grad()
def check_decoder(runs: Path, karlo: SimpleNamespace, atol: float = 1e-5) -> None:
    decoder = load(runs, "decoder")
    cond, _ = text_side(karlo)
    cond.image_emb = torch.randn(2, D)
    x_t, timestep = torch.randn(2, 3, DECODER_SIZE, DECODER_SIZE), torch.tensor([10, 900])
    kept = torch.tensor([True, False])
    proj = karlo.parts["text_proj"]
    hidden, additive = proj(
        image_embeddings=torch.where(kept[:, None], cond.image_emb, proj.learned_classifier_free_guidance_embeddings),
        prompt_embeds=cond.text_emb,
        text_encoder_hidden_states=cond.text_seq,
        do_classifier_free_guidance=False,
    )
    mask = torch.nn.functional.pad(cond.text_mask, (4, 0), value=True)
    wanted = karlo.parts["decoder"](
        x_t, timestep, encoder_hidden_states=hidden, class_labels=additive, attention_mask=mask
    ).sample
    found = decoder.net(x_t, timestep, decoder.net.prepare(cond, Keep(image=kept)))
    assert wanted.std() > 0.1
    assert_close(found, wanted, atol=atol, rtol=0)


@torch.no_grad()
def check_upsampler(runs: Path, karlo: SimpleNamespace, atol: float = 1e-5) -> None:
    upsampler = load(runs, "upsampler")
    x_t, low, timestep = *torch.randn(2, 2, 3, FULL_SIZE, FULL_SIZE), torch.tensor([10, 900])
    for name, net in (("super_res_first", upsampler.net), ("super_res_last", upsampler.last_net)):
        wanted = karlo.parts[name](torch.cat((x_t, low), dim=1), timestep).sample
        assert_close(net(x_t, timestep, net.prepare(low)), wanted, atol=atol, rtol=0)


def test_every_component_computes_what_diffusers_does(runs: Path, karlo: SimpleNamespace):
    check_clip(runs, karlo)
    check_prior(runs, karlo)
    check_decoder(runs, karlo)
    check_upsampler(runs, karlo)
    assert (runs / "LICENSE").read_text() == "CreativeML Open RAIL-M\n"


def test_weights_are_equal_to_the_bit(runs: Path, karlo: SimpleNamespace):
    ours = artifact.read_weights(runs / "decoder")
    for part, prefix in (("decoder", "net.unet."), ("text_proj", "net.text_proj.")):
        for name, value in karlo.parts[part].state_dict().items():
            assert torch.equal(ours[prefix + name], value)


class Draws:
    """A noise that hands out one generator's numbers, as the pipeline draws them; ``branch`` is the next stage's."""

    def __init__(self, generator: torch.Generator, rows: int):
        self.generator, self.rows = generator, rows

    def normal(self, shape: tuple[int, ...], stream: str) -> torch.Tensor:
        return torch.randn(self.rows, *shape, generator=self.generator)


@torch.no_grad()
def test_pictures_are_the_pipelines(runs: Path, karlo: SimpleNamespace):
    pipeline = text_to_image(karlo.parts)
    steps = {"prior_num_inference_steps": 5, "decoder_num_inference_steps": 7, "super_res_num_inference_steps": 5}
    wanted = pipeline(CAPTIONS, generator=torch.Generator().manual_seed(0), output_type="np", **steps).images
    wanted = torch.from_numpy(wanted).permute(0, 3, 1, 2)

    from unclip.pipeline import UnCLIP

    chain = UnCLIP.load(runs, device="cpu")
    how = chain.defaults
    assert [how[stage].sampler.name.name for stage in ("prior", "decoder", "upsampler")] == ["karlo"] * 3
    assert [how[s].sampler.num_steps for s in ("prior", "decoder", "upsampler")] == [25, 25, 7]
    for stage, number in (("prior", 5), ("decoder", 7), ("upsampler", 5)):
        how[stage].sampler.num_steps = number
    text, draws = chain.embed_text(CAPTIONS), Draws(torch.Generator().manual_seed(0), 2)
    text.image_emb = chain.models["prior"].sample(text, how["prior"], draws)
    low = chain.models["decoder"].sample(text, how["decoder"], draws)
    found = chain.models["upsampler"].sample(low, how["upsampler"], draws)
    difference = (((found * 0.5) + 0.5).clamp(0, 1) - wanted).abs()
    assert wanted.std() > 0.05
    assert difference.mean() <= 1e-4
    assert (difference > 1e-3).float().mean() <= 1e-3


def test_the_form_of_2022(karlo: SimpleNamespace, tmp_path: Path):
    folder = shutil.copytree(karlo.t2i, tmp_path / "old")
    as_in_2022(folder)
    assert not [*folder.rglob("*.safetensors")]
    import_karlo(folder, tmp_path / "runs")
    check_clip(tmp_path / "runs", karlo, pictures=False)
    check_prior(tmp_path / "runs", karlo)
    check_decoder(tmp_path / "runs", karlo)
    check_upsampler(tmp_path / "runs", karlo)


def in_half(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    for path in [*folder.rglob("*.safetensors")]:
        halves = {name: value.half() for name, value in load_file(path).items()}
        save_file(halves, path.with_name(f"{path.stem}.fp16.safetensors"))
        path.unlink()


def test_half_precision_files_are_read_as_float32(karlo: SimpleNamespace, tmp_path: Path):
    folder = shutil.copytree(karlo.variation, tmp_path / "half")
    in_half(folder)
    import_karlo(folder, tmp_path / "runs")
    assert {p.name for p in (tmp_path / "runs").iterdir()} == {"clip", "decoder", "upsampler"}
    weights = artifact.read_weights(tmp_path / "runs" / "decoder")
    assert {value.dtype for name, value in weights.items() if "tokens" not in name} == {torch.float32}
    check_decoder(tmp_path / "runs", karlo, atol=0.05)


def test_a_clip_without_pictures_says_so(karlo: SimpleNamespace, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    from unclip.errors import ArtifactError

    import_karlo(karlo.t2i, tmp_path / "runs")
    assert "encodes captions only. To embed pictures, import again with --image-encoder" in caplog.text
    with pytest.raises(ArtifactError, match="without its picture tower"):
        load(tmp_path / "runs", "clip").encode_image(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


def test_the_manifest_tells_where_it_comes_from(runs: Path):
    manifest = artifact.read_manifest(runs / "prior")
    assert manifest.settings["imported"] == {"from": "UnCLIPPipeline", "licence": "LICENSE"}
    assert manifest.parents == {"clip": artifact.read_manifest(runs / "clip").hash}
    assert "/" not in json.dumps(artifact.read_manifest(runs / "clip").config)


MEASURE = """
import sys
from pathlib import Path
from unclip.interop.karlo import import_karlo

def memory(name):
    return next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))

out, warm, *folders = map(Path, sys.argv[1:])
import_karlo(warm, out / "warm")
for folder in folders:
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    import_karlo(folder, out / folder.name)
    print(memory("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measured by Linux' own peak")
def test_the_peak_of_memory_is_that_of_the_largest_component(karlo: SimpleNamespace, tmp_path: Path):
    """Two upsamplers of 84 MB each become one artifact of 168 MB, from each form of the files."""
    from diffusers import UNet2DModel

    net = UNet2DModel(
        sample_size=FULL_SIZE, in_channels=6, out_channels=3, layers_per_block=1, add_attention=False,
        down_block_types=("ResnetDownsampleBlock2D",) * 2, up_block_types=("ResnetUpsampleBlock2D",) * 2,
        block_out_channels=(192, 384),
    )  # fmt: skip
    size = sum(4 * p.numel() for p in net.parameters())
    forms = {"safetensors": lambda folder: None, "bin": as_in_2022, "half": in_half}
    for form, change in forms.items():
        folder = shutil.copytree(karlo.t2i, tmp_path / form)
        for name in ("super_res_first", "super_res_last"):
            net.save_pretrained(folder / name)
        change(folder)
    given = [str(tmp_path / "runs"), str(karlo.t2i), *(str(tmp_path / form) for form in forms)]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *given], capture_output=True, text=True, check=True, env=environment()
    )
    found = dict(zip(forms, map(float, done.stdout.split()), strict=True))
    assert size > 80e6
    for form, peak in found.items():
        assert 0 < peak <= 1.2 * size, f"{form}: {peak / size:.2f} times the largest component"
        written = (tmp_path / "runs" / form / "upsampler" / "artifact" / "weights.safetensors").stat().st_size
        assert written > 2 * size
    print({form: round(peak / size, 2) for form, peak in found.items()})
