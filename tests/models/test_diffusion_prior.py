from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch.testing import assert_close

from unclip.data.batch import Batch
from unclip.diffusion.guidance import Guidance
from unclip.diffusion.noise import Noise
from unclip.diffusion.samplers import Sampler, SamplerConfig, sample
from unclip.diffusion.schedule import ScheduleName
from unclip.diffusion.settings import DiffusionConfig, Predict
from unclip.models.diffusion_prior import DiffusionPrior, DiffusionPriorConfig, EmbeddingSpace, best_candidate
from unclip.models.interface import Interface
from unclip.models.sampling import DiffusionSampling, PriorSampling
from unclip.nets.layers import Cond, Keep
from unclip.nets.prior_run import PriorRun
from unclip.nets.transformer import PriorNet, PriorNetConfig, PriorText

D, L = 12, 6
INTERFACE = Interface(embed_dim=D, text_width=10, context_length=L, vocab_size=40)
DDIM = PriorSampling(SamplerConfig(Sampler.ddim, 4))


def make(text: PriorText = PriorText.clip_states, **options) -> DiffusionPrior:
    torch.manual_seed(0)
    net = PriorNetConfig(width=32, depth=2, num_heads=2, text=text)
    return DiffusionPrior(DiffusionPriorConfig(net=net, **options), INTERFACE).eval()


def make_batch(size: int = 4) -> Batch:
    torch.manual_seed(1)
    tokens = torch.randint(1, 30, (size, L))
    tokens[:, 3], tokens[:, 4:] = 39, 0
    return Batch(
        position=list(range(10, 10 + size)),
        key=["k"] * size,
        caption=["c"] * size,
        tokens=tokens,
        image_emb=5 * torch.randn(size, D),
        text_emb=5 * torch.randn(size, D),
        text_seq=torch.randn(size, L, 10),
    )


def test_the_config_is_usable_by_omegaconf_and_is_the_papers():
    cfg = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(DiffusionPriorConfig), {"num_draws": 4}))
    assert isinstance(cfg, DiffusionPriorConfig)
    assert cfg.num_draws == 4
    assert cfg.diffusion.predict is Predict.x0
    assert cfg.drop_text == 0.1
    assert cfg.sampling.num_candidates == 2
    assert cfg.sampling.guidance.scale == 1.0


def test_the_papers_scale_at_its_width():
    prior = make()
    prior.interface = replace(INTERFACE, embed_dim=1024)
    encoded = prior.encode(torch.randn(3, 1024))
    assert_close(encoded.norm(dim=1), torch.full((3,), 17.2), atol=1e-3, rtol=0)
    assert_close(encoded.std(), torch.tensor(0.5375), atol=0.02, rtol=0)


def test_whitening_uses_the_statistics_and_comes_back():
    prior = make(embedding_space=EmbeddingSpace.whitened)
    rows = np.random.default_rng(0).normal(3.0, 2.0, (500, D))
    prior.fit(SimpleNamespace(normalised=False, stats={"image_mean": rows.mean(0), "image_std": rows.std(0)}))
    raw = torch.tensor(rows, dtype=torch.float32)
    white = prior.encode(raw)
    assert_close(white.mean(0), torch.zeros(D), atol=1e-5, rtol=0)
    assert_close(white.std(0, correction=0), torch.ones(D), atol=1e-5, rtol=0)
    assert_close(prior.decode(white), raw)
    assert {"clip_mean", "clip_std"} <= set(prior.state_dict())


def test_the_candidate_nearest_to_the_caption_wins_whatever_its_norm():
    drawn = torch.tensor([[[10.0, 10.0], [1.0, 0.1]], [[0.0, 1.0], [1.0, 0.0]]])
    assert_close(best_candidate(drawn, torch.tensor([[2.0, 0.0], [0.0, 3.0]])), torch.tensor([[1.0, 0.1], [0.0, 1.0]]))


@pytest.mark.parametrize("text", list(PriorText))
def test_the_same_seed_gives_the_same_unit_norm_embedding_in_any_batch(text: PriorText):
    prior, batch = make(text), make_batch(7)
    cond = prior.cond(batch)
    steps: list[tuple[int, int]] = []
    together = prior.sample(cond, DDIM, Noise.at(3, batch.position), on_step=lambda *step: steps.append(step))
    total = DDIM.sampler.num_steps
    assert steps == [(done, total) for done in range(1, total + 1)]
    assert_close(together.norm(dim=1), torch.ones(7))
    row = slice(4, 5)
    alone = Cond(text_emb=cond.text_emb[row], text_seq=cond.text_seq[row], tokens=cond.tokens[row])
    assert_close(prior.sample(alone, DDIM, Noise.at(3, batch.position[row])), together[row], atol=1e-5, rtol=1e-4)


def test_guidance_zero_ignores_the_caption():
    prior, batch, noise = make(), make_batch(), Noise([1, 2, 3, 4])
    unguided = replace(DDIM, num_candidates=1, guidance=Guidance(0.0))
    cond = prior.cond(batch)
    other = Cond(text_emb=cond.text_emb.flip(0), text_seq=cond.text_seq.flip(0), tokens=cond.tokens)
    assert_close(prior.sample(cond, unguided, noise), prior.sample(other, unguided, noise))
    guided = replace(unguided, guidance=Guidance(3.0))
    assert (prior.sample(cond, guided, noise) - prior.sample(other, guided, noise)).abs().max() > 1e-4


@pytest.mark.parametrize("sampler", [Sampler.ddim, Sampler.unipc, Sampler.heun])
@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("num_steps", [1, 4])
def test_sampling_equals_plain_steps_of_the_net(sampler: Sampler, scale: float, num_steps: int):
    """The shared prefixes and timesteps of a run change nothing: with null rows and candidates spelt out it is the same."""
    prior, batch, noise = make(), make_batch(), Noise([1, 2, 3, 4])
    steps = SamplerConfig(sampler, num_steps)
    how = PriorSampling(steps, Guidance(scale), num_candidates=3)
    cond = prior._scaled(prior.cond(batch))
    halves = Cond.cat(cond, cond)
    context = prior.net.prepare(halves, Keep.halves(4, torch.device("cpu")))
    plain = prior.diffusion.denoiser(
        prior.net, context, shape=(3, D), num_steps=steps.num_levels, guidance=how.guidance
    )
    wanted = best_candidate(prior.decode(sample(steps, plain, noise)), batch.column("text_emb"))
    assert_close(prior.sample(prior.cond(batch), how, noise), wanted.detach(), atol=1e-5, rtol=1e-5)


def test_a_negative_caption_takes_the_place_of_none():
    prior, batch, noise = make(), make_batch(), Noise([1, 2, 3, 4])
    cond, guided = prior.cond(batch), replace(DDIM, guidance=Guidance(3.0))
    against_itself = prior.sample(cond, guided, noise, negative=cond)
    assert_close(against_itself, prior.sample(cond, DDIM, noise), atol=1e-5, rtol=1e-4)
    assert (prior.sample(cond, guided, noise) - against_itself).abs().max() > 1e-3


def test_with_the_text_side_nulled_the_noised_embedding_still_counts():
    prior, noise = make(), Noise([1, 2, 3, 4])
    net, unguided = prior.net, replace(DDIM, num_candidates=1, guidance=Guidance(0.0))
    run = PriorRun(
        net,
        [net.prepare(Cond(text_emb=torch.zeros(4, D), text_seq=torch.zeros(4, 1, 10)), Keep()), net.null_context()],
        torch.tensor([0, 500, 999]),
        1,
    )
    x_t = noise.normal((1, D), "x_T")
    moved = run(x_t + 0.1, 1, True)[4:] - run(x_t, 1, True)[4:]
    assert (moved.abs().amax(dim=(1, 2)) > 1e-4).all()
    cond = prior.cond(make_batch())
    drawn = prior.sample(cond, unguided, noise)
    assert torch.equal(drawn, prior.sample(cond, unguided, noise))
    assert (drawn - prior.sample(cond, unguided, Noise([5, 6, 7, 8]))).abs().max() > 1e-4


def test_a_limited_prior_stays_in_its_range():
    """Static thresholding: guidance far out drives x0 beyond the range, and is held there."""
    free = DiffusionConfig(predict=Predict.x0)
    far = PriorSampling(SamplerConfig(Sampler.ddim, 4), Guidance(200.0), num_candidates=1)
    largest = []
    for cfg in (free, replace(free, clip_range=0.7)):
        prior = make(diffusion=cfg, embedding_space=EmbeddingSpace.whitened)
        with torch.no_grad():
            prior.net.proj_to_clip_embeddings.weight.normal_()
        largest.append(prior.sample(prior.cond(make_batch()), far, Noise([1, 2, 3, 4])).abs().max())
    assert largest[0] > 1
    assert largest[1] <= 0.7


@pytest.mark.parametrize(
    "cfg",
    [
        DiffusionConfig(predict=Predict.eps),
        DiffusionConfig(predict=Predict.v),
        DiffusionConfig(schedule=ScheduleName.flow, predict=Predict.flow),
        DiffusionConfig(predict=Predict.x0, self_conditioning=True),
    ],
    ids=["eps", "v", "flow", "self-conditioning"],
)
def test_other_parametrisations_learn_too(cfg: DiffusionConfig):
    prior, data = make(PriorText.tokens, diffusion=cfg, num_draws=32).train(), make_batch(4)
    optimizer = torch.optim.AdamW(prior.parameters(), lr=5e-3)
    for step in range(150):
        batch = replace(data, position=list(range(4 * step, 4 * step + 4)))
        optimizer.zero_grad()
        prior.losses(batch, Noise.at(0, batch.position))["mse"].backward()
        assert all(p.grad is not None for p in prior.parameters())
        optimizer.step()
    drawn = prior.eval().sample(prior.cond(data), PriorSampling(SamplerConfig(Sampler.ddim, 20)), Noise(range(4)))
    assert (drawn * F.normalize(data.column("image_emb"), dim=1)).sum(1).mean() > 0.5


def test_gathered_variances_are_those_of_an_exact_prior():
    """A net that knows the spread of its data: Var[x0 | x_t] = 1 / (1/s² + SNR), up to the average over the rows."""
    few = DiffusionConfig(predict=Predict.x0, num_timesteps=40)
    prior, std = make(diffusion=few, embedding_space=EmbeddingSpace.whitened, sampling=DDIM), 0.5
    schedule = prior.diffusion.schedule

    class Exact(torch.nn.Module):
        def prepare(self, cond, keep):
            return None

        def forward(self, x_t, timestep, context):
            snr, alpha = schedule.snr[timestep][..., None], schedule.alpha[timestep][..., None]
            return x_t / alpha * snr / (std**-2 + snr)

    prior.net = Exact()  # type: ignore[assignment]
    batches = []
    for part in range(4):
        noise = Noise.at(0, range(500 * part, 500 * part + 500))
        z = std * noise.normal((D,), "data")
        batches.append((Batch(position=[0] * 500, image_emb=z, text_emb=z), noise))
    prior.gather(batches)
    exact = 1 / (std**-2 + schedule.snr)
    assert_close(prior.x0_var[:20], exact[:20], rtol=0.05, atol=0)
    assert (prior.x0_var <= 1.05 * std**2).all(), "never more than the data's own variance"


def test_dropped_captions_leave_the_loss_and_undropped_enter_it():
    batch, noise = make_batch(), Noise([1, 2, 3, 4])
    other = replace(batch, text_emb=batch.text_emb.flip(0), text_seq=batch.text_seq.flip(0))
    for rate, same in ((1.0, True), (0.0, False)):
        prior = make(drop_text=rate)
        difference = (prior.losses(batch, noise)["mse"] - prior.losses(other, noise)["mse"]).abs()
        assert (difference < 1e-6) == same


@pytest.mark.parametrize("options", [{}, {"qk_norm": True}], ids=str)
def test_the_draws_of_a_caption_count_as_separate_sequences(options: dict):
    """Loss and gradients of K draws are the mean over K sequences of their own, not the sum."""
    batch, noise, K = make_batch(), Noise([1, 2, 3, 4]), 3
    prior = make(num_draws=K)
    prior.net = PriorNet(replace(prior.cfg.net, **options), prior.net.widths)
    prior.losses(batch, noise)["mse"].backward()
    together = {name: p.grad.clone() for name, p in prior.named_parameters() if p.grad is not None}
    loss = prior.losses(batch, noise)["mse"]

    prior.zero_grad()
    keep = Keep(text=noise.uniform((), "drop text") >= prior.cfg.drop_text)
    x0 = prior.encode(batch.column("image_emb"))
    step, eps = prior.diffusion.draw_steps(noise, K), noise.normal((K, D), "eps")
    apart = []
    for k in range(K):
        context = prior.net.prepare(prior._scaled(prior.cond(batch)), keep)
        x_t = prior.diffusion.schedule.q_sample(step[:, k], x0, eps[:, k])
        apart.append((prior.net(x_t, step[:, k], context) - x0).square().mean())
    torch.stack(apart).mean().backward()
    assert_close(loss, torch.stack(apart).mean(), atol=1e-6, rtol=1e-5)
    assert set(together) == {name for name, p in prior.named_parameters() if p.grad is not None}
    for name, p in prior.named_parameters():
        if p.grad is not None:
            assert_close(together[name], p.grad, atol=1e-5, rtol=1e-4, msg=name)


def test_several_draws_share_a_caption():
    batch, noise = make_batch(), Noise([1, 2, 3, 4])
    prior = make(num_draws=5)
    terms = prior.losses(batch, noise)
    assert terms["mse"].shape == ()
    shapes = []
    prior.net.register_forward_hook(lambda module, args, output: shapes.append((args[0].shape, args[1].shape)))
    prior.losses(batch, noise)
    assert shapes == [((4, 5, D), (4, 5))]


def test_bf16_autocast_stays_near_float32():
    prior, batch, noise = make(), make_batch(), Noise([1, 2, 3, 4])
    exact = prior.losses(batch, noise)["mse"]
    with torch.autocast("cpu", torch.bfloat16):
        rough = prior.losses(batch, noise)["mse"]
    assert rough.dtype == torch.float32
    assert_close(rough, exact, rtol=0.05, atol=0)


def test_its_measures_keep_the_caption_and_repeat_themselves():
    """A net that answers 0 is wrong by the mean square of the encoded z_i, at every timestep."""
    batch, noise = make_batch(), Noise([1, 2, 3, 4])
    prior = make(drop_text=1.0)
    found = prior.measures(batch, noise)
    assert list(found) == [f"mse_at_{percent:02}" for percent in range(5, 100, 10)]
    assert all(value.shape == (4,) for value in found.values())
    assert_close(found, prior.measures(batch, noise))
    other = prior.measures(replace(batch, text_emb=batch.text_emb.flip(0), text_seq=batch.text_seq.flip(0)), noise)
    assert (found["mse_at_55"] - other["mse_at_55"]).abs().max() > 1e-6
    with torch.no_grad():
        for parameter in prior.net.proj_to_clip_embeddings.parameters():
            parameter.zero_()
    for value in prior.measures(batch, noise).values():
        assert_close(value, prior.encode(batch.image_emb).square().mean(1))


def test_it_learns_which_picture_belongs_to_a_caption():
    prior = make(PriorText.tokens).train()
    data = make_batch(8)
    optimizer = torch.optim.AdamW(prior.parameters(), lr=3e-3)
    for step in range(80):
        batch = replace(data, position=list(range(8 * step, 8 * step + 8)))
        optimizer.zero_grad()
        prior.losses(batch, Noise.at(0, batch.position))["mse"].backward()
        optimizer.step()
    drawn = prior.eval().sample(prior.cond(data), DDIM, Noise(range(8)))
    true = F.normalize(data.image_emb, dim=1)
    assert ((drawn @ true.T).argmax(1) == torch.arange(8)).all()
    assert (drawn * true).sum(1).mean() > 0.9


def test_refused_settings():
    with pytest.raises(ValueError, match="whitening sets the scale"):
        DiffusionPriorConfig(embedding_space=EmbeddingSpace.whitened, embedding_scale=3.0)
    with pytest.raises(ValueError, match="remove it, or set embedding_space=pca"):
        DiffusionPriorConfig(num_components=3)
    with pytest.raises(ValueError, match=f"num_components=13 of embeddings of width {D}; take fewer"):
        make(embedding_space=EmbeddingSpace.pca, num_components=13)
    with pytest.raises(ValueError, match="analytic is for diffusion priors"):
        DiffusionSampling(SamplerConfig(Sampler.analytic))
    with pytest.raises(ValueError, match="no learned variance"):
        DiffusionPriorConfig(diffusion=DiffusionConfig(learned_variance=True, clip_range=1.0))
    with pytest.raises(ValueError, match="a prior has none: set it to null"):
        DiffusionPriorConfig(diffusion=DiffusionConfig(resolution=64))
    with pytest.raises(ValueError, match="num_candidates is 0"):
        PriorSampling(num_candidates=0)
    with pytest.raises(ValueError, match="image_emb and text_emb"):
        make().losses(replace(make_batch(), image_emb=None), Noise([1, 2, 3, 4]))
