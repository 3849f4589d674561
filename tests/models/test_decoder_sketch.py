"""A decoder that draws a sketch of its condition beside the noised picture."""

from dataclasses import replace

import pytest
import torch
from models.test_decoder import DDIM, INTERFACE, NET, TEXT, make, make_batch
from models.test_decoder_split import LAST, SPLIT, saved
from torch.testing import assert_close

from unclip.diffusion.noise import Noise
from unclip.models.decoder import DecoderConfig
from unclip.nets.conditioned import ConditioningConfig, DecoderNet, DecoderText, SketchConfig
from unclip.nets.layers import ClipWidths, Cond, Keep

SKETCHED = replace(TEXT, sketch=SketchConfig(size=4, width=6))
WIDTHS = ClipWidths(INTERFACE.embed_dim, INTERFACE.text_width, INTERFACE.context_length, INTERFACE.vocab_size)


def test_the_sketch_learns_the_mean_picture_of_its_condition():
    """Two conditions with two pictures each, which differ in one channel: what is left of the loss is their variance."""
    torch.manual_seed(0)
    model = make(randomise=False, drop_image=0.0, conditioning=replace(SKETCHED, text=DecoderText.none)).train()
    batch = make_batch(4)
    batch.image_emb = batch.image_emb[[0, 0, 1, 1]]
    batch.image = batch.image[[0, 0, 1, 1]].clone()
    batch.image[[0, 2], 0], batch.image[[1, 3], 0] = 0, 255
    optimizer = torch.optim.Adam(model.net.parameters(), lr=0.02)
    for step in range(400):
        loss = model.losses(batch, Noise.at(step, batch.position))["sketch"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert_close(loss.detach(), torch.tensor(1 / 3), atol=0.01, rtol=0)  # ±1 in one channel of three
    sketch = model.prepare(model.cond(batch), Keep()).sketch
    assert sketch is not None
    assert sketch.shape == (4, 3, 4, 4)
    assert sketch[:, 0].abs().max() < 0.2


def test_the_unet_sees_the_sketch_and_does_not_train_it():
    model, batch = make(conditioning=SKETCHED), make_batch()
    assert set(model.losses(batch, Noise(range(4)))) == {"mse", "vlb", "sketch"}
    model.losses(batch, Noise(range(4)))["mse"].backward()
    assert model.net.sketch is not None
    assert all(p.grad is None for p in model.net.sketch.parameters())
    context = model.prepare(model.cond(batch), Keep())
    assert context.sketch is not None
    x_t, timestep = torch.randn(4, 3, 8, 8), torch.full((4,), 900)
    with torch.no_grad():
        seen = model.net(x_t, timestep, context)
        other = model.net(x_t, timestep, replace(context, sketch=context.sketch + 1))
    assert (seen - other).abs().max() > 1e-3
    large = model.net(torch.randn(4, 3, 16, 16), timestep, context)  # of another size than it was trained for
    assert large.shape == (4, 6, 16, 16)


def test_a_dropped_condition_is_not_in_the_sketch():
    model = make(conditioning=SKETCHED)
    batches = [model.cond(make_batch(2)), model.cond(make_batch(2))]
    batches[1] = replace(batches[1], image_emb=torch.randn(2, 12), tokens=batches[1].tokens.roll(1, dims=0) % 7 + 1)
    nothing = Keep(image=torch.zeros(2, dtype=torch.bool), text=torch.zeros(2, dtype=torch.bool))
    a, b = (model.prepare(cond, nothing).sketch for cond in batches)
    assert_close(a, b)
    c, d = (model.prepare(cond, Keep()).sketch for cond in batches)
    assert c is not None
    assert d is not None
    assert (c - d).abs().max() > 1e-3
    halves = model.prepare(Cond.cat(batches[0], batches[0]), Keep.halves(2, torch.device("cpu")))
    assert_close(halves.first(2).sketch, c)


def test_sampling_with_guidance_and_a_second_net_that_has_no_sketch(tmp_path):
    first = make(conditioning=SKETCHED, **SPLIT)
    model = make(conditioning=SKETCHED, last_net=LAST, first=str(saved(first, tmp_path / "first")), **SPLIT)
    model.fit(None)
    assert model.last_net is not None
    assert model.last_net.sketch is None
    assert model.last_net.unet.conv_in.in_channels == 3
    assert_close(model.net.state_dict(), first.net.state_dict())
    assert set(model.losses(make_batch(), Noise(range(4)))) == {"mse"}
    cond = model.cond(make_batch(2))
    drawn = model.sample(cond, DDIM, Noise(range(2)))
    second = Cond(image_emb=cond.image_emb[1:], tokens=cond.tokens[1:])
    assert_close(model.sample(second, DDIM, Noise([1])), drawn[1:], atol=1e-4, rtol=0)
    with torch.no_grad():
        model.net.sketch.out.bias += 1
    assert (model.sample(cond, DDIM, Noise(range(2))) - drawn).abs().max() > 0.01


def test_the_timestep_embedding_gets_what_it_gets_without_a_sketch():
    torch.manual_seed(0)
    net, plain = DecoderNet(NET, SKETCHED, WIDTHS), DecoderNet(NET, TEXT, WIDTHS)
    width = NET.time_dim
    state = {}
    for name, value in plain.state_dict().items():
        found = net.state_dict()[name]
        state[name] = found[:width] if found.shape != value.shape and "conv_in" not in name else found
    state["unet.conv_in.weight"] = net.unet.conv_in.weight.detach()[:, :3]
    plain.load_state_dict(state)
    cond = Cond(image_emb=torch.randn(2, 12), tokens=make_batch(2).tokens)
    a, b = net.prepare(cond, Keep()), plain.prepare(cond, Keep())
    assert a.emb is not None
    assert b.emb is not None
    assert b.sketch is None
    assert_close(a.emb, b.emb)
    assert_close(a.keys_values, b.keys_values)


def test_wrong_settings_are_refused():
    for bad in ({"size": -1}, {"width": 0}, {"dropout": 1.0}):
        with pytest.raises(ValueError, match="a size is at least 0, a width at least 1"):
            SketchConfig(**bad)


def test_a_condition_that_no_vector_holds_has_no_sketch():
    for text in (DecoderText.clip_states, DecoderText.none):
        with pytest.raises(ValueError, match=r"of which there is none: set image or text_emb|has no condition"):
            ConditioningConfig(image=False, text=text, sketch=SketchConfig(size=4))
    ConditioningConfig(image=False, text=DecoderText.tokens, sketch=SketchConfig(size=4))
    ConditioningConfig(image=False, text=DecoderText.clip_states, text_emb=True, sketch=SketchConfig(size=4))


def test_two_decoders_that_differ_in_the_sketchs_dropout_only_share_a_first_net():
    kinds = [
        DecoderConfig(conditioning=ConditioningConfig(sketch=SketchConfig(size=size, dropout=dropout))).kind_of_net()
        for size, dropout in ((4, 0.0), (4, 0.2), (8, 0.0))
    ]
    assert kinds[0] == kinds[1] != kinds[2]
