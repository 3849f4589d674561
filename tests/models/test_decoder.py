from collections import Counter
from dataclasses import replace

import pytest
import torch
from omegaconf import OmegaConf
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

from unclip.data.batch import Batch
from unclip.diffusion.guidance import Guidance
from unclip.diffusion.noise import Noise
from unclip.diffusion.samplers import Sampler, SamplerConfig
from unclip.diffusion.settings import DiffusionConfig, Predict
from unclip.errors import ConfigError
from unclip.models.decoder import Decoder, DecoderConfig, Embedding, EmbeddingNorm, guided_context
from unclip.models.interface import Interface
from unclip.models.sampling import DiffusionSampling
from unclip.nets.conditioned import ConditioningConfig, DecoderText, NullText
from unclip.nets.layers import Cond, Keep
from unclip.nets.transformer import TextTransformerConfig
from unclip.nets.unet import UNetConfig

D, L = 12, 6
INTERFACE = Interface(embed_dim=D, text_width=10, context_length=L, vocab_size=40)
NET = UNetConfig(channels=[16, 32], num_blocks=1, attention_levels=[1], head_dim=16, groups=8)
TEXT = ConditioningConfig(
    text=DecoderText.transformer, context_dim=16, transformer=TextTransformerConfig(width=16, depth=1, num_heads=2)
)
V = DiffusionConfig(predict=Predict.v, clip_range=1.0)
DDIM = DiffusionSampling(SamplerConfig(Sampler.ddim, 4), Guidance(2.0))


def make(randomise: bool = True, **options) -> Decoder:
    torch.manual_seed(0)
    model = Decoder(DecoderConfig(**{"image_size": 8, "net": NET, "conditioning": TEXT, **options}), INTERFACE)
    if randomise:  # a fresh decoder predicts zero whatever it sees
        with torch.no_grad():
            for parameter in model.parameters():
                if not parameter.any():
                    parameter.normal_(std=0.1)
    return model.eval()


def make_batch(size: int = 4, pixels: int = 8) -> Batch:
    torch.manual_seed(1)
    tokens = torch.randint(1, 30, (size, L))
    tokens[:, 3], tokens[:, 4:] = 39, 0
    return Batch(
        position=list(range(10, 10 + size)),
        key=["k"] * size,
        caption=["c"] * size,
        tokens=tokens,
        image=torch.randint(0, 256, (size, 3, pixels, pixels), dtype=torch.uint8),
        image_emb=5 * torch.randn(size, D),
        text_emb=5 * torch.randn(size, D),
        text_seq=torch.randn(size, L, 10),
    )


def test_the_config_is_usable_by_omegaconf():
    cfg = OmegaConf.merge(OmegaConf.structured(DecoderConfig), {"net": {"channels": [64, 64, 128]}, "drop_text": 0.2})
    built = OmegaConf.to_object(cfg)
    assert isinstance(built, DecoderConfig)
    assert built.net.channels == [64, 64, 128]
    assert built.drop_text == 0.2


def test_the_same_seed_gives_the_same_picture_in_any_batch():
    model, batch = make(), make_batch(7)
    noise = Noise.at(3, batch.position)
    steps: list[tuple[int, int]] = []
    together = model.sample(model.cond(batch), DDIM, noise, on_step=lambda *step: steps.append(step))
    total = DDIM.sampler.num_steps
    assert steps == [(done, total) for done in range(1, total + 1)]
    row = slice(4, 5)
    alone = Cond(image_emb=batch.image_emb[row], tokens=batch.tokens[row], text_mask=None)
    picture = model.sample(alone, DDIM, Noise.at(3, batch.position[row]))
    assert (picture - together[row]).abs().mean() <= 1 / 255
    assert_close(picture, together[row], atol=1e-4, rtol=0)
    assert (together[0] - together[4]).abs().mean() > 0.05


def test_losses_of_a_sample_do_not_depend_on_its_batch():
    model, batch = make(), make_batch(4)
    whole = model.losses(batch, Noise.at(3, batch.position))["mse"]
    halves = []
    for rows in (slice(0, 2), slice(2, 4)):
        part = Batch(
            position=batch.position[rows],
            key=["k"] * 2,
            caption=["c"] * 2,
            tokens=batch.tokens[rows],
            image=batch.image[rows],
            image_emb=batch.image_emb[rows],
        )
        halves.append(model.losses(part, Noise.at(3, part.position))["mse"])
    assert_close(torch.stack(halves).mean(), whole)


def test_the_default_form_is_the_papers():
    cfg = DecoderConfig()
    assert (cfg.drop_image, cfg.drop_text) == (0.1, 0.5)
    assert cfg.diffusion.learned_variance
    assert cfg.diffusion.predict is Predict.eps
    terms = make().losses(make_batch(), Noise([1, 2, 3, 4]))
    assert set(terms) == {"mse", "vlb"}


def test_a_decoder_may_be_trained_on_z_t_in_place_of_z_i():
    model, batch = make(embedding=Embedding.text), make_batch()
    assert set(model.cfg.columns) == {"image", "text_emb", "tokens"}
    without = replace(batch, image_emb=None)
    noise = Noise.at(3, batch.position)
    on_text = model.losses(without, noise)["mse"]
    assert_close(on_text, make().losses(replace(batch, image_emb=batch.text_emb), noise)["mse"])
    assert not torch.equal(on_text, make().losses(batch, noise)["mse"])
    with pytest.raises(ValueError, match="embedding=text puts z_t in z_i's place, which image=false leaves out"):
        make(embedding=Embedding.text, conditioning=replace(TEXT, image=False))


class Recorder(torch.nn.Module):
    """A net that keeps what the model hands it, and stands for its own context."""

    sketch = None

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def prepare(self, cond, keep):
        self.cond, self.keep = cond, keep
        return self

    def forward(self, x_t, timestep, context):
        return x_t * 0 + self.weight


def test_conditions_are_dropped_independently_at_the_set_rates():
    model = make(diffusion=V, drop_image=0.2, drop_text=0.4)
    model.net = Recorder()
    size = 4000
    batch = Batch(
        position=list(range(size)),
        image=torch.zeros(size, 3, 8, 8, dtype=torch.uint8),
        image_emb=torch.randn(size, D),
        tokens=torch.zeros(size, L, dtype=torch.int64),
    )
    model.losses(batch, Noise.at(0, batch.position))
    image, text = model.net.keep.image, model.net.keep.text
    assert_close(image.float().mean(), torch.tensor(0.8), atol=0.03, rtol=0)
    assert_close(text.float().mean(), torch.tensor(0.6), atol=0.03, rtol=0)
    assert_close((image & text).float().mean(), torch.tensor(0.48), atol=0.03, rtol=0)


def test_embeddings_enter_at_unit_variance_or_raw():
    batch = make_batch()
    for options, wanted in (
        ({}, torch.nn.functional.normalize(batch.image_emb, dim=1) * D**0.5),
        ({"embedding_scale": 2.0}, torch.nn.functional.normalize(batch.image_emb, dim=1) * 2),
        ({"embedding_norm": EmbeddingNorm.raw}, batch.image_emb),
    ):
        model = make(diffusion=V, **options)
        model.net = Recorder()
        model.losses(batch, Noise([1, 2, 3, 4]))
        assert_close(model.net.cond.image_emb, wanted)


def test_guidance_scale_one_and_zero_are_the_plain_branches():
    model, batch = make(diffusion=V), make_batch()
    cond, noise = model.cond(batch), Noise([1, 2, 3, 4])

    def draw(cond: Cond, scale: float) -> torch.Tensor:
        return model.sample(cond, replace(DDIM, guidance=Guidance(scale)), noise)

    nothing = cond.without_text().without_image()
    assert_close(draw(cond, 0.0), draw(nothing, 1.0), atol=1e-4, rtol=0)
    assert_close(draw(cond, 1.0 + 1e-6), draw(cond, 1.0), atol=1e-4, rtol=0)
    assert (draw(cond, 3.0) - draw(cond, 1.0)).abs().mean() > 1e-3


def test_a_negative_caption_takes_the_place_of_none():
    model, batch = make(diffusion=V), make_batch()
    cond, noise = model.cond(batch), Noise([1, 2, 3, 4])
    plain = model.sample(cond, DDIM, noise)
    negative = Cond(tokens=cond.tokens.flip(0)[:, :5], text_emb=cond.text_emb, text_seq=cond.text_seq[:, :5])
    assert (model.sample(cond, DDIM, noise, negative=negative) - plain).abs().mean() > 1e-4
    zero = replace(DDIM, guidance=Guidance(0.0))
    wanted = model.sample(negative, replace(DDIM, guidance=Guidance(1.0)), noise)
    assert_close(model.sample(cond, zero, noise, negative=negative), wanted, atol=1e-4, rtol=0)


def test_the_context_is_prepared_once_and_both_halves_go_through_the_net_together():
    """Heun's 7 evaluations stand at the levels 3 2 | 2 1 | 1 0 | 0, of which the interval leaves out the last."""
    model, batch = make(diffusion=V), make_batch()
    calls, rows = Counter[str](), list[int]()
    prepared = [
        name for name, _ in model.net.named_modules() if name.endswith(("text_proj", "add_k_proj", "add_v_proj"))
    ]
    assert len(prepared) > 6
    for name in prepared:
        model.net.get_submodule(name).register_forward_hook(lambda *_, name=name: calls.update([name]))
    model.net.unet.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    how = DiffusionSampling(SamplerConfig(Sampler.heun, 7), Guidance(2.0, interval=(0.3, 1.0)))
    model.sample(model.cond(batch), how, Noise([1, 2, 3, 4]))
    assert calls == dict.fromkeys(prepared, 1)
    assert rows == [8] * 5 + [4] * 2


@pytest.mark.parametrize("sampler", [name for name in Sampler if name is not Sampler.analytic])
@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
def test_one_step_is_the_guided_prediction(sampler: Sampler, scale: float):
    model, batch, noise = make(diffusion=V), make_batch(), Noise([1, 2, 3, 4])
    cond, x_T = model.cond(batch), noise.normal((3, 8, 8), "x_T")
    how = DiffusionSampling(SamplerConfig(sampler, 1), Guidance(scale))
    context = guided_context(model.net, model._scaled(cond), replace(how, guidance=Guidance(2.0)))
    with torch.no_grad():
        given, nothing = model.net(torch.cat((x_T, x_T)), torch.full((8,), 999), context).chunk(2)
    x0 = model.diffusion.schedule.x0_from_v(999, nothing + scale * (given - nothing), x_T)
    assert (x0.abs() < 1).float().mean() > 0.3
    assert_close(model.sample(cond, how, noise), x0.clamp(-1, 1), atol=1e-5, rtol=0)


def test_larger_pictures_are_resized_and_smaller_ones_refused():
    model, batch, noise = make(diffusion=V), make_batch(), Noise([1, 2, 3, 4])
    grid = torch.linspace(0, 255, 8)
    batch.image = grid.round().to(torch.uint8).expand(4, 3, 8, 8)
    larger = replace(batch, image=batch.image.repeat_interleave(4, 2).repeat_interleave(4, 3))
    assert_close(model.losses(larger, noise), model.losses(batch, noise), rtol=0.02, atol=0)
    with pytest.raises(ValueError, match="smaller image_size"):
        model.losses(make_batch(pixels=4), noise)


def test_bf16_autocast_stays_near_float32():
    model, batch, noise = make(), make_batch(pixels=16), Noise([1, 2, 3, 4])
    exact = model.losses(batch, noise)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model.losses(batch, noise)
    for name, value in rough.items():
        assert value.dtype == torch.float32
        assert_close(value, exact[name], rtol=0.05, atol=0)


def test_losses_and_sampling_never_wait_for_the_device():
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"):
        model = Decoder(DecoderConfig(image_size=8, net=NET, conditioning=TEXT), INTERFACE)
        batch = Batch(
            position=[0, 1],
            tokens=torch.zeros(2, L, dtype=torch.int64),
            image_emb=torch.zeros(2, D),
            image=torch.zeros(2, 3, 16, 16, dtype=torch.uint8),
        )
        noise = Noise.at(0, batch.position, "cuda")
        assert sum(model.losses(batch, noise).values()).device.type == "cuda"
        assert model.sample(model.cond(batch), DDIM, noise).device.type == "cuda"


def test_it_learns_to_draw_what_the_embedding_says():
    colours = torch.tensor([[230, 20, 20], [20, 20, 230]], dtype=torch.uint8)
    model = make(randomise=False, conditioning=ConditioningConfig(context_dim=16), diffusion=V).train()
    embeddings = torch.randn(2, D)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    which = torch.arange(16) % 2
    for step in range(60):
        batch = Batch(
            position=list(range(16 * step, 16 * step + 16)),
            image_emb=embeddings[which],
            image=colours[which][:, :, None, None].expand(-1, -1, 8, 8),
        )
        optimizer.zero_grad()
        sum(model.losses(batch, Noise.at(0, batch.position)).values()).backward()
        optimizer.step()
    how = DiffusionSampling(SamplerConfig(Sampler.ddim, 8))
    drawn = model.eval().sample(Cond(image_emb=embeddings), how, Noise([7, 8])).mean((2, 3))
    assert_close(drawn, colours.float() / 127.5 - 1, atol=0.25, rtol=0)


def test_refused_settings():
    with pytest.raises(ValueError, match="attention_levels"):
        DecoderConfig(net=UNetConfig())
    with pytest.raises(ValueError, match="not a multiple of 4"):
        DecoderConfig(image_size=30, net=UNetConfig([32, 64, 64], attention_levels=[1], head_dim=32))
    with pytest.raises(ValueError, match="drop_text"):
        DecoderConfig(drop_text=1.5)
    with pytest.raises(ValueError, match="self-conditioning is for the diffusion prior"):
        DecoderConfig(net=UNetConfig(attention_levels=[1]), diffusion=DiffusionConfig(self_conditioning=True))
    for column in ("image_emb", "tokens"):
        with pytest.raises(ValueError, match=f"no column {column}"):
            make().losses(replace(make_batch(), **{column: None}), Noise([1, 2, 3, 4]))


class Stored:
    """Embeddings that hold the caption "" only."""

    def __init__(self):
        torch.manual_seed(5)
        self.found = {"tokens": torch.tensor([38, 39]), "text_emb": 3 * torch.randn(D), "text_seq": torch.randn(2, 10)}

    def empty_caption(self) -> dict[str, torch.Tensor]:
        return self.found


@pytest.mark.parametrize("norm", list(EmbeddingNorm))
def test_a_stored_empty_caption_is_what_guidance_pushes_away_from(norm: EmbeddingNorm):
    text = ConditioningConfig(text=DecoderText.clip_states, text_emb=True, context_dim=16, null_text=NullText.empty)
    model, embeddings = make(conditioning=text, diffusion=V, embedding_norm=norm), Stored()
    with pytest.raises(ConfigError, match=r"null_text=empty needs .* set data\.embeddings"):
        model.fit(None)
    model.fit(embeddings)
    batch, zero = make_batch(2), replace(DDIM, guidance=Guidance(0.0))
    drawn = model.sample(model.cond(batch), zero, Noise([1, 2]))
    empty = {name: value.expand(2, *value.shape) for name, value in embeddings.found.items()}
    alone = model.sample(Cond(**empty), replace(DDIM, guidance=Guidance(1.0)), Noise([1, 2]))
    assert_close(drawn, alone, atol=1e-4, rtol=0)
    assert (model.sample(model.cond(batch), DDIM, Noise([1, 2])) - drawn).abs().mean() > 1e-3


def test_odd_shapes_are_told():
    model, noise = make(diffusion=V), Noise([1, 2, 3, 4])
    batch = make_batch()
    with pytest.raises(ValueError, match=r"image_emb has the shape \(4, 5\) where this decoder takes \(4, 12\)"):
        model.losses(replace(batch, image_emb=batch.image_emb[:, :5]), noise)
    with pytest.raises(ValueError, match=r"image_emb has the shape \(4, 1, 12\)"):
        model.sample(replace(model.cond(batch), image_emb=batch.image_emb[:, None]), DDIM, noise)
    for channels in (1, 4):
        with pytest.raises(
            ValueError, match=rf"pictures of shape \(4, {channels}, 8, 8\).*convert grey and alpha to RGB"
        ):
            model.losses(replace(batch, image=torch.zeros(4, channels, 8, 8, dtype=torch.uint8)), noise)
    with pytest.raises(ValueError, match="sides must be multiples of 2"):
        model.net(torch.zeros(1, 3, 8, 7), torch.zeros(1), model.net.prepare(Cond(num_rows=1), Keep()))
    with pytest.raises(ValueError, match=r"pictures of shape \(3, 8, 8\); a U-Net takes"):
        model.net(torch.zeros(3, 8, 8), torch.zeros(1), model.net.prepare(Cond(num_rows=1), Keep()))


def test_a_nan_in_an_embedding_makes_the_loss_nan():
    """So that the stage stops there and names the sample."""
    model, batch = make(diffusion=V, drop_image=0.0), make_batch()
    batch.image_emb[1, 3] = torch.nan
    assert model.losses(batch, Noise([1, 2, 3, 4]))["mse"].isnan()
