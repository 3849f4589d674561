"""The net in sampling, with all that can be shared, against its plain forward pass."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from unclip.nets import prior_run
from unclip.nets.layers import ClipWidths, Cond, Keep, NullText
from unclip.nets.prior_run import PriorRun
from unclip.nets.transformer import PriorContext, PriorNet, PriorNetConfig, PriorText

B, D, W, N, K = 3, 24, 20, 7, 2
TIMESTEPS = torch.tensor([0, 130, 400, 777, 999])


def make(text: PriorText = PriorText.clip_states, self_conditioning: bool = False, **options) -> PriorNet:
    torch.manual_seed(0)
    cfg = PriorNetConfig(width=32, depth=3, num_heads=2, text=text, **options)
    net = PriorNet(cfg, ClipWidths(D, W, N, 50), self_conditioning=self_conditioning)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(std=0.2)
        if cfg.null_text is NullText.empty:
            net.set_empty_caption(torch.tensor([48, 49]), torch.randn(D), torch.randn(2, W))
    return net.eval()


def make_cond() -> Cond:
    torch.manual_seed(1)
    mask = torch.arange(N) < torch.tensor([7, 4, 2])[:, None]
    tokens = torch.randint(1, 40, (B, N)) * mask
    return Cond(text_emb=torch.randn(B, D), text_seq=torch.randn(B, N, W), text_mask=mask, tokens=tokens)


def plain(net: PriorNet, context: PriorContext, x_t: torch.Tensor, step: int, *x0_last: torch.Tensor) -> torch.Tensor:
    """The net's forward pass, one candidate after the other."""
    timestep = TIMESTEPS[step].expand(B)
    parts = [net(x_t[:, k], timestep, context, *(x[:, k] for x in x0_last)) for k in range(K)]
    return torch.stack(parts, dim=1)


@torch.no_grad()
@pytest.mark.parametrize("text", list(PriorText))
@pytest.mark.parametrize(
    "options", [{}, {"qk_norm": True}, {"null_text": NullText.learned}, {"null_text": NullText.empty}], ids=str
)
def test_every_step_of_a_run_equals_the_plain_forward(text: PriorText, options: dict):
    net, cond, x_t = make(text, **options), make_cond(), torch.randn(B, K, D)
    shown, dropped = net.prepare(cond, Keep()), net.prepare(cond, Keep(text=torch.zeros(B, dtype=torch.bool)))
    run = PriorRun(net, [shown, net.null_context()], TIMESTEPS, K)
    for step in (4, 3, 2, 1, 0, 2):
        wanted = torch.cat((plain(net, shown, x_t, step), plain(net, dropped, x_t, step)))
        assert wanted.std() > 0.1
        assert_close(run(x_t, step, True), wanted, atol=1e-5, rtol=1e-5)
        assert_close(run(x_t, step, False), wanted[:B], atol=1e-5, rtol=1e-5)
        x_t = x_t + 0.1


@torch.no_grad()
def test_long_runs_make_the_timesteps_part_by_part(monkeypatch: pytest.MonkeyPatch):
    net, x_t = make(), torch.randn(B, K, D)
    context = net.prepare(make_cond(), Keep())
    calls, outputs = [], []
    net.time_embedding.register_forward_hook(lambda module, args, output: calls.append(len(args[0])))
    for ahead in (64, 2):
        monkeypatch.setattr(prior_run, "AHEAD", ahead)
        run = PriorRun(net, [context], TIMESTEPS, K)
        outputs.append(torch.stack([run(x_t, step, False) for step in (4, 3, 2, 1, 0)]))
    assert_close(outputs[0], outputs[1], atol=1e-6, rtol=1e-5)
    assert calls == [5, 2, 2, 1]


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, B])
def test_negative_captions_may_be_one_for_all_or_one_each(rows: int):
    net, x_t, negative = make(), torch.randn(B, K, D), make_cond()
    negative.text_emb = negative.text_emb + 1
    if rows == 1:
        negative = Cond(
            **{name: value[1:2] for name, value in vars(negative).items() if isinstance(value, torch.Tensor)}
        )
    context = net.prepare(negative, Keep())
    run = PriorRun(net, [net.prepare(make_cond(), Keep()), context], TIMESTEPS, K)
    all_rows = replace(context, mask=context.mask.expand(B, -1))
    all_rows.keys_values = [(k.expand(B, -1, -1, -1), v.expand(B, -1, -1, -1)) for k, v in context.keys_values]
    assert_close(run(x_t, 3, True)[B:], plain(net, all_rows, x_t, 3), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_self_conditioning_reaches_the_prediction():
    net, x_t, last = make(self_conditioning=True), torch.randn(B, K, D), torch.randn(B, K, D)
    context = net.prepare(make_cond(), Keep())
    run = PriorRun(net, [context], TIMESTEPS, K)
    assert_close(run(x_t, 2, False, last), plain(net, context, x_t, 2, last), atol=1e-5, rtol=1e-5)
    assert (run(x_t, 2, False, last) - run(x_t, 2, False, torch.zeros_like(last))).abs().max() > 1e-2


@torch.no_grad()
def test_the_null_prefix_is_one_row_of_one_token():
    context = make().null_context()
    assert context.mask.shape == (1, 1)
    assert all(side.shape == (1, 2, 1, 16) for pair in context.keys_values for side in pair)


@torch.no_grad()
def test_bf16_stays_near_float32():
    net, cond, x_t = make(), make_cond(), torch.randn(B, K, D)
    exact = PriorRun(net, [net.prepare(cond, Keep()), net.null_context()], TIMESTEPS, K)(x_t, 3, True)
    with torch.autocast("cpu", torch.bfloat16):
        run = PriorRun(net, [net.prepare(cond, Keep()), net.null_context()], TIMESTEPS, K)
        rough = run(x_t, 3, True)
    assert rough.dtype == torch.bfloat16
    assert (rough.float() - exact).abs().mean() < 0.03 * exact.abs().mean()
