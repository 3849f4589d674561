"""The autoregressive prior: codes that see what stands before them, learned to their entropy, drawn alike in any batch."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from torch.testing import assert_close

from unclip.cli.train import CONF
from unclip.config import typed
from unclip.data.batch import Batch
from unclip.diffusion.noise import Noise
from unclip.errors import ConfigError
from unclip.models import Interface, build
from unclip.models.ar_prior import ARPrior, ARPriorConfig
from unclip.models.pca import Edges
from unclip.models.sampling import ARSampling
from unclip.nets.ar_transformer import ARNetConfig, ARRun
from unclip.nets.layers import Cond, Keep, Null
from unclip.nets.transformer import TextTransformerConfig
from unclip.train import PriorTrainConfig

D, L, K = 12, 6, 5
INTERFACE = Interface(embed_dim=D, text_width=10, context_length=L, vocab_size=40)
NET = ARNetConfig(width=32, depth=2, num_heads=2, context=8, text=TextTransformerConfig(16, 1, 2))
FIVE: dict[str, Any] = {"explained_variance": None, "num_components": K, "num_buckets": 16}


class Pairs:
    """Embeddings in memory."""

    def __init__(self, image_emb: torch.Tensor, text_emb: torch.Tensor) -> None:
        self.columns = {"image_emb": image_emb.numpy(), "text_emb": text_emb.numpy()}

    def __len__(self) -> int:
        return len(self.columns["image_emb"])

    def rows(self, indices: np.ndarray, columns: list[str]) -> dict[str, np.ndarray]:
        return {name: self.columns[name][indices] for name in columns}


def pairs(count: int = 400) -> Pairs:
    generator = torch.Generator().manual_seed(5)
    image = torch.randn(count, D, generator=generator) * torch.linspace(2, 0.2, D)
    return Pairs(3 * image, image + torch.randn(count, D, generator=generator))


def make(net: ARNetConfig = NET, **options: Any) -> ARPrior:
    torch.manual_seed(0)
    prior = ARPrior(ARPriorConfig(net=net, **{**FIVE, **options}), INTERFACE)
    prior.fit(pairs())
    with torch.no_grad():  # far enough from its start that everything matters
        for p in prior.parameters():
            p.add_(0.1 * torch.randn(p.shape))
    return prior.eval()


def make_batch(size: int = 4) -> Batch:
    torch.manual_seed(1)
    tokens = torch.randint(1, 30, (size, L))
    tokens[:, 3], tokens[:, 4:] = 39, 0
    image, text = (torch.from_numpy(pairs().columns[name][:size]) for name in ("image_emb", "text_emb"))
    return Batch(["k"] * size, list(range(10, 10 + size)), ["c"] * size, tokens=tokens, image_emb=image, text_emb=text)


def other_text(batch: Batch) -> Batch:
    return replace(batch, text_emb=batch.column("text_emb").flip(0), tokens=batch.column("tokens").flip(1).flip(0))


def prefix_of(prior: ARPrior, batch: Batch):
    return prior.net.prepare(prior._scaled(prior.cond(batch)), Keep())


def test_fit_finds_k_for_a_share_of_the_variance_and_fills_the_buffers():
    prior = make(num_components=None, explained_variance=0.8)
    images = F.normalize(torch.from_numpy(pairs().columns["image_emb"]).double(), dim=1)
    variances = torch.linalg.eigvalsh(images.T.cov(correction=0)).flip(0)
    held = variances.cumsum(0) / variances.sum()
    assert prior.num_codes == int((held < 0.8).sum()) + 1
    texts = F.normalize(torch.from_numpy(pairs().columns["text_emb"]).double(), dim=1)
    dots = (images * texts).sum(1)
    assert_close(prior.dot_edges, torch.quantile(dots, torch.linspace(0, 1, 101).double()).float(), rtol=0, atol=1e-6)
    fresh = ARPrior(prior.cfg, INTERFACE)
    fresh.load_state_dict(prior.state_dict())
    assert torch.equal(fresh.encode(make_batch().column("image_emb")), prior.encode(make_batch().column("image_emb")))


def test_every_row_is_fitted_on_or_evenly_spread_ones():
    few = make(fit_rows=50)
    chosen = np.linspace(0, 399, 50).round().astype(int)
    images = F.normalize(torch.from_numpy(pairs().columns["image_emb"][chosen]).double(), dim=1)
    assert_close(few.pca.mean, images.mean(0).float(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("edges", list(Edges))
def test_measures_tell_what_components_and_buckets_lose(edges: Edges):
    batch = make_batch(200)
    prior = make(edges=edges, num_buckets=256)
    found = prior.measures(batch, Noise(batch.position))
    true = F.normalize(batch.column("image_emb"), dim=1)
    kept = prior.pca.decode(prior.pca.encode(true))
    tail = (kept - true).square().sum(1)
    assert_close(found["reconstruction_mse"].mean(), tail.mean(), rtol=0.02, atol=0)
    assert_close(found["reconstruction_cosine"], F.cosine_similarity(kept, true), rtol=0, atol=0.01)
    assert {name: value.shape for name, value in found.items()} == dict.fromkeys(found, (200,))
    drawn = prior.decode(prior.encode(batch.column("image_emb")))
    assert_close(drawn.norm(dim=1), torch.ones(200))
    assert_close((drawn * true).sum(1), found["reconstruction_cosine"])


@pytest.mark.parametrize("separate", [False, True])
def test_a_code_changes_no_logits_before_it_and_all_after(separate: bool):
    prior, batch = make(replace(NET, separate_tables=separate)), make_batch()
    prefix, codes, dot = prefix_of(prior, batch), prior.encode(batch.column("image_emb")), torch.tensor([3, 1, 4, 1])
    logits = prior.net(codes, dot, prefix)
    for j in range(K):
        changed = codes.clone()
        changed[:, j] = (changed[:, j] + 5) % 16
        difference = (prior.net(changed, dot, prefix) - logits).abs().amax(dim=(0, 2))
        assert difference[: j + 1].max() < 1e-6
        assert (difference[j + 1 :] > 1e-4).all()
    assert ((prior.net(codes, dot + 1, prefix) - logits).abs().amax(dim=(0, 2)) > 1e-4).all()


@pytest.mark.parametrize("separate", [False, True])
def test_steps_with_a_memory_equal_the_whole_pass(separate: bool):
    prior, batch = make(replace(NET, separate_tables=separate)), make_batch()
    prefix, codes, dot = prefix_of(prior, batch), prior.encode(batch.column("image_emb")), torch.tensor([3, 1, 4, 1])
    whole = prior.net(codes, dot, prefix)
    run, token, steps = ARRun(prior.net, prefix, K), prior.net.embed_dot(dot), []
    for j in range(K):
        steps.append(run.step(token, j))
        token = prior.net.embed_codes(codes[:, j : j + 1], j)
    assert_close(torch.stack(steps, dim=1), whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "how", [ARSampling(guidance_scale=3.0, top_p=0.8), ARSampling(temperature=0.5), ARSampling(temperature=0.0)]
)
def test_codes_drawn_with_a_memory_are_those_drawn_without(how: ARSampling):
    prior, batch = make(), make_batch()
    noise = Noise(batch.position)
    steps: list[tuple[int, int]] = []
    drawn = prior.sample(prior.cond(batch), how, noise, on_step=lambda *step: steps.append(step))
    assert steps == [(done, K) for done in range(1, K + 1)]
    prefix, dot, uniform = prefix_of(prior, batch), prior.draw_dot(how, noise), noise.uniform((K,), "codes")
    codes = torch.zeros(4, K, dtype=torch.int64)
    for j in range(K):
        logits = prior.net(codes, dot, prefix)
        null = prior.net(codes, torch.full_like(dot, prior.cfg.num_dots), prior.net.null_prefix(4))
        codes[:, j] = how.pick((null + how.guidance_scale * (logits - null))[:, j], uniform[:, j])
    assert_close(drawn, prior.decode(codes))


def test_the_same_seed_gives_the_same_embedding_in_any_batch_however_captions_are_padded():
    prior, batch = make(), make_batch(7)
    how = ARSampling(guidance_scale=2.0, num_candidates=3, top_p=0.9)
    together = prior.sample(prior.cond(batch), how, Noise.at(3, batch.position))
    for i in range(7):
        alone = Cond(text_emb=batch.column("text_emb")[i : i + 1], tokens=batch.column("tokens")[i : i + 1, :4])
        found = prior.sample(alone, how, Noise.at(3, batch.position[i : i + 1]))
        assert_close(found, together[i : i + 1], rtol=0, atol=1e-5)
    assert (together[0] - prior.sample(prior.cond(batch), how, Noise.at(4, batch.position))[0]).abs().max() > 0.01


def test_guidance_one_is_none_and_zero_ignores_the_caption():
    prior, batch = make(), make_batch()
    cond, noise = prior.cond(batch), Noise(batch.position)
    other = prior.cond(other_text(batch))
    plain = prior.sample(cond, ARSampling(), noise)
    nearly = prior.sample(cond, ARSampling(guidance_scale=1.0 + 1e-9), noise)
    assert_close(plain, nearly)
    zero = ARSampling(guidance_scale=0.0)
    assert_close(prior.sample(cond, zero, noise), prior.sample(other, zero, noise))
    assert (plain - prior.sample(other, ARSampling(), noise)).abs().max() > 0.01
    stronger = prior.sample(cond, ARSampling(guidance_scale=4.0), noise)
    against = prior.sample(cond, ARSampling(guidance_scale=4.0), noise, negative=other)
    assert (stronger - plain).abs().max() > 0.01
    assert (against - stronger).abs().max() > 0.01
    itself = prior.sample(cond, ARSampling(guidance_scale=4.0), noise, negative=cond)
    assert_close(itself, plain, rtol=0, atol=1e-5)
    one, two = cond.rows([0]), ARSampling(guidance_scale=4.0, num_candidates=2)
    assert_close(
        prior.sample(cond, two, noise, negative=one), prior.sample(cond, two, noise, negative=cond.rows([0] * 4))
    )


@pytest.mark.parametrize("null", list(Null))
def test_dropped_captions_leave_the_loss_and_undropped_enter_it(null: Null):
    batch, noise = make_batch(), Noise([1, 2, 3, 4])
    for rate, same in ((1.0, True), (0.0, False)):
        prior = make(replace(NET, null_text=null), drop_text=rate)
        terms = [prior.losses(b, noise)["cross_entropy"] for b in (batch, other_text(batch))]
        assert ((terms[0] - terms[1]).abs() < 1e-6) == same


def test_dropped_rows_and_the_null_prefix_are_the_same():
    prior, batch = make(replace(NET, null_text=Null.learned)), make_batch()
    codes, dot = prior.encode(batch.column("image_emb")), torch.full((4,), prior.cfg.num_dots)
    dropped = prior.net.prepare(prior._scaled(prior.cond(batch)), Keep(text=torch.zeros(4, dtype=torch.bool)))
    assert_close(prior.net(codes, dot, dropped), prior.net(codes, dot, prior.net.null_prefix(4)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("percentile", [0, 50, 85])
def test_the_dot_product_comes_from_above_its_percentile(percentile: float):
    prior = make()
    found = prior.draw_dot(ARSampling(percentile=percentile), Noise(range(20_000)))
    counts = torch.bincount(found, minlength=100)
    assert (counts[:percentile] == 0).all()
    expected = 20_000 / (100 - percentile)
    assert (counts[percentile:] - expected).abs().max() < 6 * math.sqrt(expected)


def test_picking_follows_the_shares_and_top_p_cuts_their_tail():
    shares = torch.tensor([0.1, 0.5, 0.15, 0.25])
    logits, uniform = shares.log().expand(40_000, 4), Noise([0]).uniform((40_000,), "u")[0]

    def frequencies(how: ARSampling) -> torch.Tensor:
        return torch.bincount(how.pick(logits, uniform), minlength=4) / 40_000

    assert_close(frequencies(ARSampling()), shares, rtol=0, atol=0.01)
    assert_close(frequencies(ARSampling(top_p=0.74)), torch.tensor([0, 2 / 3, 0, 1 / 3]), rtol=0, atol=0.01)
    half = shares.square() / shares.square().sum()
    assert_close(frequencies(ARSampling(temperature=0.5)), half, rtol=0, atol=0.01)
    assert frequencies(ARSampling(temperature=0.0)).tolist() == [0, 1, 0, 0]
    assert frequencies(ARSampling(top_p=1e-6)).tolist() == [0, 1, 0, 0]


def coin_world(count: int) -> Batch:
    """z_i = (1, ±1, ±1, 0 ...): the caption tells the first sign, the second is + three times in four; z_t tells nothing."""
    index = torch.arange(count)
    first, second = 2.0 * (index % 2) - 1, torch.where((index // 2) % 4 < 3, 1.0, -1.0)
    image, text = torch.zeros(count, D), torch.zeros(count, D)
    image[:, 0], image[:, 1], image[:, 2], text[:, 0] = 1, first, second, 1
    tokens = torch.stack((index % 2 + 1, torch.full_like(index, 39)), dim=1)
    return Batch(["k"] * count, list(range(count)), ["c"] * count, tokens=tokens, image_emb=image, text_emb=text)


def test_it_learns_to_the_entropy_and_draws_from_the_distribution():
    torch.manual_seed(0)
    data = coin_world(64)
    net = replace(NET, depth=1)
    prior = ARPrior(ARPriorConfig(net=net, explained_variance=0.999, num_buckets=8), INTERFACE)
    prior.fit(Pairs(data.column("image_emb"), data.column("text_emb")))
    assert prior.num_codes == 2
    optimizer = torch.optim.AdamW(prior.parameters(), lr=3e-3)
    for step in range(200):
        batch = replace(data, position=list(range(64 * step, 64 * step + 64)))
        optimizer.zero_grad()
        prior.losses(batch, Noise.at(0, batch.position))["cross_entropy"].backward()
        optimizer.step()
    prior.eval()
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / 2  # of the coin, over two codes
    assert prior.measures(data, Noise(data.position))["nats_per_code"].mean().item() == pytest.approx(entropy, abs=0.01)
    many = coin_world(4000)
    drawn = prior.sample(prior.cond(many), ARSampling(), Noise(many.position)).sign()
    assert (drawn[:, 1] == many.column("image_emb")[:, 1]).float().mean() > 0.99
    assert (drawn[:, 2] > 0).float().mean().item() == pytest.approx(0.75, abs=0.04)
    assert_close(drawn[:, 0], torch.ones(4000))


def test_bf16_autocast_stays_near_float32_and_keeps_the_codes():
    prior, batch, noise = make(), make_batch(), Noise([1, 2, 3, 4])
    exact = prior.losses(batch, noise)["cross_entropy"]
    with torch.autocast("cpu", torch.bfloat16):
        rough = prior.losses(batch, noise)["cross_entropy"]
        inside = prior.encode(batch.column("image_emb"))
        assert prior.sample(prior.cond(batch), ARSampling(guidance_scale=2.0), noise).dtype == torch.float32
    assert rough.dtype == torch.float32
    assert_close(rough, exact, rtol=0.05, atol=0)
    assert torch.equal(inside, prior.encode(batch.column("image_emb")))


def test_blocks_gathered_in_bfloat16_draw_too():
    """As FSDP2 leaves them while a sharded prior samples; its forward casts what comes in, the steps of a run must."""
    prior, batch, noise = make(), make_batch(), Noise([1, 2, 3, 4])
    for block in prior.net.transformer_blocks:
        block.bfloat16().register_forward_pre_hook(lambda _, args: (args[0].bfloat16(), *args[1:]))
        block.keys_values = lambda x, own=block.keys_values: own(x.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        drawn = prior.sample(prior.cond(batch), prior.default_sampling(), noise)
    assert_close(drawn.float().norm(dim=1), torch.ones(4), atol=1e-2, rtol=0)


def preset(name: str, interface: Interface) -> tuple[PriorTrainConfig, ARPrior]:
    with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
        raw = compose("train_prior", [f"experiment={name}", "run=r", "data.path=d"])
    cfg = typed(raw, PriorTrainConfig)
    with torch.device("meta"):
        return cfg, build(cfg.model, interface)


def test_the_papers_prior():
    """Table 3 gives sizes and "1B" parameters, which do not agree: the blocks alone hold 2.0 B.

    12 w² a block: 1.21 B in the encoder and 0.80 B in the decoder, which alone would be the "1B".
    """
    cfg, prior = preset("paper_ar_prior", Interface(1024, 1024, 256, 49408))
    decoder, encoder = prior.net.transformer_blocks, prior.net.encoder.transformer_blocks
    assert (12 * 2048**2 * 24, 12 * 1664**2 * 24) == (1_207_959_552, 797_442_048)
    assert sum(p.numel() for p in encoder.parameters()) == 24 * (12 * 2048**2 + 13 * 2048)
    assert sum(p.numel() for p in decoder.parameters()) == 24 * (12 * 1664**2 + 13 * 1664)
    tables = sum(m.weight.numel() for m in prior.modules() if isinstance(m, torch.nn.Embedding))
    assert sum(p.numel() for p in prior.parameters()) - tables == pytest.approx(2.0e9, rel=0.01)
    assert prior.net.positional_embedding.shape == (1, 384, 1664)
    assert prior.net.encoder.positional_embedding.shape == (1, 256, 2048)
    assert encoder.gradient_checkpointing
    assert decoder.gradient_checkpointing
    assert (prior.cfg.num_components, prior.cfg.num_buckets, prior.cfg.drop_text) == (319, 1024, 0.1)
    assert (prior.default_sampling().percentile, cfg.trainer.batch_size, cfg.trainer.max_steps) == (50, 4096, 1_000_000)
    optim = cfg.optim
    assert (optim.lr, optim.beta2, optim.eps, optim.weight_decay) == (1.6e-4, 0.91, 1e-10, 0.04)
    assert optim.ema_decay == 0.999


def test_the_tiny_prior_is_tiny():
    _, prior = preset("tiny_ar_prior", Interface(64, 64, 32, 49408))
    assert sum(p.numel() for p in prior.parameters()) - prior.net.encoder.token_embedding.weight.numel() < 1e6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_components": None}, "give explained_variance or num_components"),
        ({"explained_variance": 0.9}, "set the other to null"),
        ({"num_components": None, "explained_variance": 1.5}, "explained_variance is 1.5; it is a share"),
        ({"num_components": 8}, "net.context=8 holds 7 codes"),
        ({"num_buckets": 1}, "num_buckets=1, .* must be at least 2"),
        ({"bucket_range": 0.0}, "bucket_range is 0.0"),
        ({"bucket_range": 3.0, "edges": Edges.quantile}, "bucket_range is the reach of edges=uniform"),
        (
            {"net": replace(NET, text=replace(NET.text, gradient_checkpointing=True))},
            "set net.gradient_checkpointing, which holds",
        ),
        ({"drop_text": 2.0}, "drop_text is 2.0"),
    ],
)
def test_refused_settings(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        ARPriorConfig(**{"net": NET, **FIVE, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"percentile": 100.0}, r"percentile is 100.0; it must lie in \[0, 100\)"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 0.5, "temperature": 0.0}, "top_p has no effect at temperature=0"),
        ({"num_candidates": 0}, "num_candidates is 0"),
        ({"guidance_scale": -1.0}, "guidance_scale is -1.0; it must be at least 0"),
    ],
)
def test_refused_sampling(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        ARSampling(**options)


def test_what_else_is_refused():
    batch, noise = make_batch(), Noise([1, 2, 3, 4])
    with pytest.raises(ValueError, match="image_emb, text_emb and tokens"):
        make().losses(replace(batch, tokens=None), noise)
    with pytest.raises(ValueError, match=r"call fit\(embeddings\)"):
        ARPrior(ARPriorConfig(net=NET, **FIVE), INTERFACE).losses(batch, noise)
    with pytest.raises(ValueError, match="num_components=7 of embeddings of width 4"):
        ARPrior(ARPriorConfig(net=NET, **{**FIVE, "num_components": 7}), Interface(4, 4, 6, 40))
    with pytest.raises(ValueError, match="separate_tables needs num_components"):
        ARPriorConfig(net=replace(NET, separate_tables=True))
    with pytest.raises(ValueError, match="width=30 is not divisible by num_heads=4"):
        ARNetConfig(width=30, num_heads=4)
    with pytest.raises(ConfigError, match=r"takes 12 components, but model\.net\.context=8 holds 7; raise it"):
        ARPrior(ARPriorConfig(net=NET, explained_variance=1.0), INTERFACE).fit(pairs())
    with pytest.raises(ValueError, match="needs text_emb"):
        make().sample(Cond(tokens=batch.tokens), ARSampling(), noise)
