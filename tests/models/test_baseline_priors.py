"""The priors without diffusion: closed forms, losses and what they have in common."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from unclip.config import TrainerConfig
from unclip.data.batch import Batch
from unclip.diffusion.noise import Noise
from unclip.errors import ConfigError
from unclip.models import build
from unclip.models.baseline_priors import (
    EclipsePriorConfig,
    IdentityConfig,
    LinearPriorConfig,
    MLPPriorConfig,
    caption_mean,
    scaled,
)
from unclip.models.interface import Interface
from unclip.models.sampling import NoSampling
from unclip.nets.layers import Cond, NullText, caption_mask
from unclip.nets.transformer import PriorNetConfig, PriorText
from unclip.train import PriorTrainConfig

D, L, W = 12, 6, 10
INTERFACE = Interface(embed_dim=D, text_width=W, context_length=L, vocab_size=40)
NET = PriorNetConfig(width=32, depth=2, num_heads=2)
CONFIGS = {
    "identity": IdentityConfig(),
    "linear": LinearPriorConfig(),
    "linear of states": LinearPriorConfig(caption_mean=True),
    "mlp": MLPPriorConfig(width=32, depth=2),
    "eclipse": EclipsePriorConfig(net=NET),
    "eclipse of tokens": EclipsePriorConfig(net=PriorNetConfig(width=32, depth=2, num_heads=2, text=PriorText.tokens)),
}


def make(name: str):
    torch.manual_seed(0)
    return build(CONFIGS[name], INTERFACE).eval()


def make_batch(size: int = 5) -> Batch:
    torch.manual_seed(1)
    tokens = torch.randint(1, 30, (size, L))
    tokens[:, 3], tokens[:, 4:] = 39, 0
    tokens[0, 2], tokens[0, 3] = 39, 0
    columns = {
        "image_emb": torch.randn(size, D),
        "text_emb": 5 * torch.randn(size, D),
        "text_seq": torch.randn(size, L, W),
    }
    return Batch(position=list(range(size)), tokens=tokens, **columns)


class Rows:
    """Embeddings in memory."""

    def __init__(self, **columns: np.ndarray) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(self.columns["image_emb"])

    def rows(self, indices, names):
        return {name: self.columns[name][indices] for name in names}


def as_rows(batch: Batch) -> Rows:
    return Rows(**{name: batch.column(name).numpy() for name in ("image_emb", "text_emb", "tokens", "text_seq")})


@pytest.mark.parametrize("name", list(CONFIGS))
def test_every_baseline_fits_scores_and_answers(name: str):
    model, batch = make(name), make_batch()
    model.fit(as_rows(batch))
    terms = model.losses(batch, Noise(range(5)))
    assert terms["mse"].shape == ()
    assert CONFIGS[name].trains == any(p.requires_grad for p in model.parameters()) == terms["mse"].requires_grad
    steps: list[tuple[int, int]] = []
    z_i = model.sample(
        model.cond(batch), model.default_sampling(), Noise(range(5)), on_step=lambda *step: steps.append(step)
    )
    assert steps == [(1, 1)]
    assert_close(z_i.norm(dim=1), torch.ones(5))
    assert isinstance(model.default_sampling(), NoSampling)
    assert torch.equal(z_i, model.sample(model.cond(batch), NoSampling(), Noise(range(5, 10)))), "one answer"
    one = Cond(**{k: v[2:3] for k, v in vars(model.cond(batch)).items() if isinstance(v, torch.Tensor)})
    assert_close(model.sample(one, NoSampling(), Noise([0])), z_i[2:3], atol=1e-6, rtol=1e-5)
    with pytest.raises(ValueError, match="needs text_emb"):
        model.sample(Cond(num_rows=2), NoSampling(), Noise([0, 1]))


def test_identity_is_z_t():
    batch = make_batch()
    z_i = make("identity").sample(Cond(text_emb=batch.text_emb), NoSampling(), Noise(range(5)))
    assert_close(z_i, F.normalize(batch.column("text_emb"), dim=1))


@pytest.mark.parametrize("states", [False, True])
def test_the_linear_prior_is_ridge_regression(states: bool):
    """Its weights zero the gradient of the mean squared error plus ridge · mean variance · |W|²."""
    batch = make_batch(300)
    model = build(LinearPriorConfig(ridge=0.1, caption_mean=states), INTERFACE)
    model.fit(as_rows(batch))
    x = scaled(batch.column("text_emb"))
    if states:
        x = torch.cat((x, caption_mean(model.cond(batch))), dim=1)
    weight, bias = (value.clone().requires_grad_() for value in (model.weight, model.bias))
    penalty = 0.1 * x.var(dim=0, correction=0).mean() * weight.square().sum()
    loss = (x @ weight + bias - scaled(batch.column("image_emb"))).square().sum(1).mean() + penalty
    loss.backward()
    assert weight.grad is not None
    assert weight.grad.abs().max() < 1e-5 * D
    assert bias.grad is not None
    assert bias.grad.abs().max() < 1e-5 * D


def test_the_linear_prior_finds_a_rotation():
    rotation = torch.linalg.qr(torch.randn(D, D, generator=torch.manual_seed(3)))[0]
    batch = make_batch(200)
    batch.image_emb = batch.column("text_emb") @ rotation
    model = build(LinearPriorConfig(ridge=0.0), INTERFACE)
    model.fit(as_rows(batch))
    z_i = model.sample(model.cond(batch), NoSampling(), Noise(range(200)))
    assert_close(z_i, F.normalize(batch.image_emb, dim=1), atol=1e-4, rtol=0)


def test_the_mean_state_leaves_out_padding():
    batch = make_batch()
    cond = Cond(text_seq=batch.text_seq, tokens=batch.tokens)
    assert_close(caption_mean(cond)[0], batch.column("text_seq")[0, :3].mean(0))
    assert_close(caption_mean(cond)[1], batch.column("text_seq")[1, :4].mean(0))
    with pytest.raises(ValueError, match="embed with columns="):
        caption_mean(Cond(tokens=batch.tokens))


def test_eclipse_adds_the_weighted_cross_entropy_of_captions():
    model, batch = make("eclipse"), make_batch()
    terms = model.losses(batch, Noise(range(5)))
    z_i = model.sample(model.cond(batch), NoSampling(), Noise(range(5)))
    cosines = z_i @ F.normalize(batch.column("text_emb"), dim=1).T
    expected = -(cosines / 0.07).log_softmax(dim=1).diagonal().mean()
    assert_close(terms["contrast"], 0.2 * expected)


@pytest.mark.parametrize("name", ["mlp", "eclipse", "eclipse of tokens"])
def test_all_weights_are_trained_and_learn(name: str):
    model, batch = make(name).train(), make_batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        terms = model.losses(batch, Noise(range(5)))
        torch.stack(list(terms.values())).sum().backward()
        losses.append(float(terms["mse"].detach()))
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
    assert losses[-1] < 0.1 * losses[0]


def test_eclipses_contrast_is_among_the_rows_of_all_ranks(monkeypatch: pytest.MonkeyPatch):
    asked: list[int] = []

    def of_all_ranks(*rows: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], slice]:
        asked.append(len(rows[0]))
        return tuple(torch.cat((row, row.flip(1))) for row in rows), slice(0, len(rows[0]))

    monkeypatch.setattr("unclip.models.baseline_priors.of_all_ranks", of_all_ranks)
    prior, batch = make("eclipse"), make_batch()
    alone = prior.losses(batch, Noise(range(5)))["contrast"]
    assert not asked, "validation's ranks need not have equally many rows"
    assert prior.train().losses(batch, Noise(range(5)))["contrast"] > alone
    assert asked == [len(batch)]
    with pytest.raises(ConfigError, match="accumulate with eclipse_prior: its contrast is among the whole batch"):
        PriorTrainConfig("run", model=EclipsePriorConfig(), trainer=TrainerConfig(accumulate=2))
    PriorTrainConfig("run", model=EclipsePriorConfig(contrast=0.0), trainer=TrainerConfig(accumulate=2))


def test_eclipse_reads_caption_and_z_t():
    model, batch = make("eclipse"), make_batch()
    before = model.sample(model.cond(batch), NoSampling(), Noise(range(5)))
    for changed in ("text_emb", "text_seq"):
        other = make_batch()
        setattr(other, changed, other.column(changed) + 1)
        assert (model.sample(model.cond(other), NoSampling(), Noise(range(5))) - before).abs().max() > 1e-3
    padded = make_batch()
    padded.text_seq = torch.where(caption_mask(padded.column("tokens"))[..., None], padded.column("text_seq"), 100.0)
    assert_close(model.sample(model.cond(padded), NoSampling(), Noise(range(5))), before)


def test_refused_settings():
    with pytest.raises(ValueError, match=r"ridge is -1\.0; it must not be negative"):
        LinearPriorConfig(ridge=-1.0)
    with pytest.raises(ValueError, match="depth=0 must be at least 1"):
        MLPPriorConfig(depth=0)
    with pytest.raises(ValueError, match=r"temperature=0\.0 be positive"):
        EclipsePriorConfig(temperature=0.0)
    with pytest.raises(ValueError, match=r"net\.null_text=empty: this prior drops no captions; leave it at zero"):
        EclipsePriorConfig(net=PriorNetConfig(null_text=NullText.empty))
