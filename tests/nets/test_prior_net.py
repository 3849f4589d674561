import pytest
import torch
from net_support import assert_equal_nets, cast
from torch.testing import assert_close

from unclip.nets.layers import ClipWidths, Cond, Keep, NullText, timestep_embedding
from unclip.nets.transformer import PriorNet, PriorNetConfig, PriorText

D, W, N = 24, 20, 7
WIDTHS = ClipWidths(embed_dim=D, text_width=W, context_length=N, vocab_size=50)


def make(text: PriorText = PriorText.clip_states, null: NullText = NullText.zero, **options) -> PriorNet:
    torch.manual_seed(0)
    return PriorNet(PriorNetConfig(width=32, depth=3, num_heads=2, text=text, null_text=null, **options), WIDTHS)


def make_cond(batch: int = 3, lengths: tuple[int, ...] = (7, 4, 2)) -> Cond:
    torch.manual_seed(1)
    mask = torch.arange(N) < torch.tensor(lengths)[:, None]
    tokens = torch.randint(1, 40, (batch, N)) * mask
    return Cond(
        text_emb=torch.randn(batch, D), text_seq=torch.randn(batch, N, W), text_mask=mask, tokens=tokens, num_rows=batch
    )


def test_equals_diffusers_prior_transformer_forward_and_backward():
    diffusers = pytest.importorskip("diffusers")
    reference = diffusers.PriorTransformer(
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=3,
        embedding_dim=D,
        num_embeddings=N,
        clip_embed_dim=D,
        embedding_proj_dim=D,
    )
    # diffusers derives the width of the caption states from embedding_dim
    net = PriorNet(PriorNetConfig(width=32, depth=3, num_heads=2), ClipWidths(D, D, N, 50))
    statistics = {"clip_mean", "clip_std"}
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.normal_(std=0.2)
    net.load_state_dict({k: v for k, v in reference.state_dict().items() if k not in statistics})
    cond = make_cond()
    cond.text_seq = torch.randn(3, N, D)
    x_t, timestep = torch.randn(3, D), torch.tensor([0, 500, 999])

    def run(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        x, given = x_t.to(dtype), cast(cond, dtype)
        theirs = reference(
            x,
            timestep,
            proj_embedding=given.text_emb,
            encoder_hidden_states=given.text_seq,
            attention_mask=cond.text_mask,
        )
        return net(x, timestep, net.prepare(given, Keep())), theirs.predicted_image_embedding

    assert_equal_nets(net, reference, run)


@pytest.mark.parametrize("text", list(PriorText))
def test_trimmed_captions_and_masked_positions_change_nothing(text: PriorText):
    net = make(text)
    cond = make_cond(lengths=(4, 3, 2))
    x_t, timestep = torch.randn(3, D), torch.tensor([3, 400, 900])
    full = net(x_t, timestep, net.prepare(cond, Keep()))

    other = torch.where(cond.text_mask, cond.tokens, 49)
    states = torch.where(cond.text_mask[..., None], cond.text_seq, 100.0)
    masked = Cond(text_emb=cond.text_emb, text_seq=states, text_mask=cond.text_mask, tokens=other)
    assert_close(net(x_t, timestep, net.prepare(masked, Keep())), full)

    short = Cond(
        text_emb=cond.text_emb,
        text_seq=cond.text_seq[:, :4],
        text_mask=cond.text_mask[:, :4],
        tokens=cond.tokens[:, :4],
    )
    assert_close(net(x_t, timestep, net.prepare(short, Keep())), full)


@pytest.mark.parametrize("null", list(NullText))
def test_a_dropped_text_side_hides_caption_and_z_t_but_not_the_noised_embedding(null: NullText):
    net = make(null=null)
    if null is NullText.learned:
        torch.nn.init.normal_(net.null_text_emb)
    if null is NullText.empty:
        net.set_empty_caption(torch.tensor([48, 49]), torch.randn(D), torch.randn(2, W))
    first, second = make_cond(), make_cond()
    second.text_emb, second.text_seq = torch.randn(3, D), torch.randn(3, N, W)
    x_t, timestep, dropped = (
        torch.randn(3, D),
        torch.tensor([3, 400, 900]),
        Keep(text=torch.tensor([True, False, False])),
    )
    a, b = (net(x_t, timestep, net.prepare(cond, dropped)) for cond in (first, second))
    assert_close(a[1:], b[1:])
    assert (a[0] - b[0]).abs().max() > 1e-3
    moved = net(x_t + 1, timestep, net.prepare(first, dropped))
    assert ((moved - a).abs().amax(1) > 1e-3).all()


@pytest.mark.parametrize("text", list(PriorText))
def test_a_dropped_caption_may_be_the_caption_of_no_words(text: PriorText):
    net, cond = make(text, NullText.empty), make_cond()
    tokens, emb, states = torch.tensor([48, 49]), torch.randn(D), torch.randn(2, W)
    net.set_empty_caption(tokens, emb, states)
    dropped = net.prepare(cond, Keep(text=torch.tensor([True, False, True])))
    nothing = Cond(text_emb=emb.expand(3, D), tokens=tokens.expand(3, 2), text_seq=states.expand(3, 2, W))
    x_t, timestep = torch.randn(3, D), torch.tensor([3, 400, 900])
    found, kept = net(x_t, timestep, dropped), net(x_t, timestep, net.prepare(cond, Keep()))
    wanted = net(x_t, timestep, net.prepare(nothing, Keep()))
    assert_close(found[1], wanted[1], atol=1e-6, rtol=1e-5)
    assert_close(found[[0, 2]], kept[[0, 2]], atol=1e-6, rtol=1e-5)
    assert (wanted[1] - kept[1]).abs().max() > 1e-3
    alone = net(x_t[1:2], timestep[1:2], net.null_context())
    assert_close(alone, wanted[1:2], atol=1e-6, rtol=1e-5)


def test_draws_share_a_prefix_and_cannot_see_each_other():
    net = make()
    cond = make_cond()
    context = net.prepare(cond, Keep())
    x_t, timestep = torch.randn(3, 4, D), torch.randint(0, 1000, (3, 4))
    together = net(x_t, timestep, context)
    for k in range(4):
        assert_close(together[:, k], net(x_t[:, k], timestep[:, k], context), atol=1e-5, rtol=1e-5)
    one_time = net(x_t, timestep[:, 0], context)
    assert_close(one_time[:, 0], together[:, 0])
    assert_close(net(x_t[:2], timestep[:2], context.first(2)), together[:2], atol=1e-5, rtol=1e-5)


def test_gradients_reach_the_prefix_and_checkpointing_keeps_them():
    gradients = []
    for checkpointing in (False, True):
        net = make(gradient_checkpointing=checkpointing)
        net(torch.ones(3, D), torch.tensor([1, 2, 3]), net.prepare(make_cond(), Keep())).square().sum().backward()
        gradients.append({name: p.grad for name, p in net.named_parameters()})
    assert all(grad is not None and grad.abs().max() > 0 for grad in gradients[0].values())
    for name, grad in gradients[0].items():
        assert_close(gradients[1][name], grad, msg=name)


def test_the_mask_follows_the_end_of_text_token():
    tokens = torch.tensor([[48, 5, 49, 0, 0], [48, 3, 4, 5, 49]])
    assert Cond(tokens=tokens).caption_mask().tolist() == [[True] * 3 + [False] * 2, [True] * 5]


def test_sinusoids_put_cosines_first():
    emb = timestep_embedding(torch.tensor([2.0]), 4)
    angles = torch.tensor([2.0, 2.0 / 100])
    assert_close(emb, torch.cat((angles.cos(), angles.sin()))[None])


def test_karlos_size():
    with torch.device("meta"):
        net = PriorNet(PriorNetConfig(width=2048, depth=20, num_heads=32), ClipWidths(768, 768, 77, 49408))
    assert (
        sum(parameter.numel() for parameter in net.parameters()) == 1_022_030_080 - 2 * 768
    )  # without clip_mean, clip_std


def test_refuses_what_it_cannot_hold():
    net = make()
    with pytest.raises(ValueError, match="needs text_emb"):
        net.prepare(Cond(num_rows=3), Keep())
    with pytest.raises(ValueError, match="needs text_seq"):
        net.prepare(Cond(text_emb=torch.zeros(3, D)), Keep())
    with pytest.raises(ValueError, match="at most 7"):
        net.prepare(Cond(text_emb=torch.zeros(3, D), text_seq=torch.zeros(3, 8, W)), Keep())
    with pytest.raises(ValueError, match="not divisible"):
        PriorNetConfig(width=30, num_heads=4)
