"""The optimiser against torch's own AdamW and an average computed by hand."""

import copy
import io
import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from unclip.config import Decay, OptimConfig
from unclip.optim import AdamWEMA, clip_gradients, learning_rate, make_optimizer, perturbed

CFG = OptimConfig(lr=0.01, beta1=0.8, beta2=0.95, weight_decay=0.1, ema_decay=0.4)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(6, 4)
        self.conv = nn.Conv1d(4, 4, 3, padding=1)
        self.norm = nn.GroupNorm(2, 4)
        self.linear = nn.Linear(4, 3)
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.register_buffer("statistics", torch.ones(3))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.conv(self.table(ids).transpose(1, 2))).transpose(1, 2)
        return self.frozen(self.linear(x)) * self.scale


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: range, after=lambda: None) -> None:
    for step in steps:
        ids = torch.randint(0, 6, (2, 5), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        net(ids).square().mean().backward()
        optimizer.step()
        after()


def trained_net(steps: int = 3) -> tuple[Net, AdamWEMA]:
    net = Net()
    optimizer = make_optimizer(net, CFG)
    train(net, optimizer, range(steps))
    return net, optimizer


def test_steps_are_adamws_and_the_average_is_the_one_by_hand():
    net, theirs = Net(), Net()
    optimizer = make_optimizer(net, CFG)
    groups = [
        {"params": g["params"], "weight_decay": g["weight_decay"]} for g in make_optimizer(theirs, CFG).param_groups
    ]
    adamw = torch.optim.AdamW(groups, lr=0.01, betas=(0.8, 0.95), eps=1e-8, foreach=False, fused=False)
    weights = [net.linear.weight]
    history: list[torch.Tensor] = []
    train(net, optimizer, range(8), after=lambda: history.append(weights[0].detach().clone()))
    train(theirs, adamw, range(8))
    for (name, mine), other in zip(net.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert_close(mine, other, atol=1e-6, rtol=1e-5, msg=name)

    average = history[0]  # the average starts at the weights after the first step
    for n, value in enumerate(history, start=1):
        decay = min(0.4, (1 + n) / (10 + n))
        average = decay * average + (1 - decay) * value
    assert [round((1 + n) / (10 + n), 3) for n in (1, 4, 5)] == [0.182, 0.357, 0.4], "the limit holds from step 5 on"
    assert_close(optimizer.state[net.linear.weight]["ema"], average, atol=1e-6, rtol=1e-6)
    assert not torch.allclose(average, history[-1], atol=1e-4)


def test_ema_weights_come_and_go_bit_for_bit():
    net, optimizer = trained_net()
    before = copy.deepcopy(net.state_dict())
    with optimizer.ema_weights():
        for p, state in optimizer.state.items():
            assert torch.equal(p, state["ema"])
        assert not torch.equal(net.linear.weight, before["linear.weight"])
        for name in ("frozen.weight", "statistics"):
            assert torch.equal(net.state_dict()[name], before[name])
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    with pytest.raises(ZeroDivisionError), optimizer.ema_weights():
        _ = 1 / 0
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_the_trained_weights_can_be_had_within_a_block_of_averaged_ones():
    net, optimizer = trained_net()
    trained = net.linear.weight.detach().clone()
    with optimizer.ema_weights():
        averaged = net.linear.weight.detach().clone()
        with optimizer.ema_weights(), optimizer.trained_weights():
            assert torch.equal(net.linear.weight, trained)
        assert torch.equal(net.linear.weight, averaged)
    assert not torch.equal(averaged, trained)
    with optimizer.trained_weights():
        assert torch.equal(net.linear.weight, trained)


def test_running_statistics_are_averaged_beside_the_weights():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    norm = net[1]
    optimizer = make_optimizer(net, OptimConfig(lr=0.01, ema_decay=0.5, warmup_steps=0))
    average = None
    for step in range(4):
        net(torch.randn(8, 3, 2, 2) + step).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        share = 1 - min(0.5, (step + 2) / (step + 11))
        average = norm.running_mean.clone() if average is None else average.lerp(norm.running_mean, share)
    trained = norm.running_mean.clone()
    assert (trained - average).abs().max() > 0.01
    with optimizer.ema_weights():
        assert_close(norm.running_mean, average)
        assert torch.equal(norm.running_var, optimizer.state[norm.weight]["ema_running_var"])
        with optimizer.trained_weights():
            assert torch.equal(norm.running_mean, trained)
        assert_close(norm.running_mean, average)
    assert torch.equal(norm.running_mean, trained)
    again = make_optimizer(net, OptimConfig(lr=0.01, ema_decay=0.5, warmup_steps=0))
    again.load_state_dict(optimizer.state_dict())
    with again.ema_weights():
        assert_close(norm.running_mean, average)


def test_no_average_when_it_is_switched_off():
    net = Net()
    optimizer = make_optimizer(net, OptimConfig(lr=0.01, ema_decay=0.0))
    train(net, optimizer, range(2))
    before = net.linear.weight.detach().clone()
    assert not any("ema" in state for state in optimizer.state.values())
    with optimizer.ema_weights():
        assert torch.equal(net.linear.weight, before)


def test_a_step_in_which_a_group_has_no_gradient():
    net = Net()
    optimizer = make_optimizer(net, CFG)
    net.linear.weight.grad = torch.ones_like(net.linear.weight)
    optimizer.step()
    assert [p is net.linear.weight for p in optimizer.state] == [True]


def test_weight_decay_spares_biases_norms_and_embeddings():
    net = Net()
    names = {id(p): name for name, p in net.named_parameters()}
    groups = [(g["weight_decay"], {names[id(p)] for p in g["params"]}) for g in make_optimizer(net, CFG).param_groups]
    plain = {"table.weight", "conv.bias", "norm.weight", "norm.bias", "linear.bias"}
    assert groups == [
        (0.1, {"conv.weight", "linear.weight"}),
        (0.0, plain),
        (0.0, {"scale"}),
    ]  # FSDP2 shards no scalars


def test_resumed_from_its_state_it_goes_on_bit_for_bit():
    whole, _ = trained_net(6)
    net, optimizer = trained_net(3)
    file = io.BytesIO()
    torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)

    resumed = Net()
    resumed.load_state_dict(state["net"])
    second = make_optimizer(resumed, CFG)
    second.load_state_dict(state["optimizer"])
    train(resumed, second, range(3, 6))
    assert all(torch.equal(v, whole.state_dict()[name]) for name, v in resumed.state_dict().items())
    train(net, optimizer, range(3, 6))
    averages = zip(optimizer.state.values(), second.state.values(), strict=True)
    assert all(torch.equal(a["ema"], b["ema"]) for a, b in averages)
    assert {group["updates"] for group in second.param_groups} == {6}


def test_a_state_of_another_memory_layout_takes_the_weights_one():
    """As CUDA's fused step demands: a run goes on in channels_last, or from the contiguous parts of a sharded one."""

    def net() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(4, 8, 3), nn.Flatten(), nn.Linear(32, 2))

    def step(net: nn.Module, optimizer: AdamWEMA) -> None:
        optimizer.zero_grad()
        net(torch.ones(2, 4, 4, 4).cumsum(1)).square().mean().backward()
        optimizer.step()

    plain = net()
    first = make_optimizer(plain, CFG)
    step(plain, first)
    other = net().to(memory_format=torch.channels_last)
    other.load_state_dict(plain.state_dict())
    second = make_optimizer(other, CFG)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    weight = other[0].weight
    assert isinstance(weight, nn.Parameter)
    assert not weight.is_contiguous()
    for name, value in second.state[weight].items():
        assert value.ndim == 0 or value.stride() == weight.stride(), name
    step(plain, first)
    step(other, second)
    for mine, theirs in zip(plain.parameters(), other.parameters(), strict=True):
        assert_close(mine, theirs)


@pytest.mark.parametrize(
    ("decay", "final_lr", "step", "progress", "expected"),
    [
        (Decay.constant, 0.0, 0, 0.0, 0.5),  # warm-up: the first of four steps
        (Decay.constant, 0.0, 1, 0.0, 1.0),
        (Decay.constant, 0.0, 3, 0.0, 2.0),
        (Decay.constant, 0.0, 99, 1.0, 2.0),
        (Decay.linear, 0.0, 99, 0.25, 1.5),
        (Decay.linear, 0.1, 99, 1.0, 0.2),
        (Decay.cosine, 0.0, 99, 0.0, 2.0),
        (Decay.cosine, 0.0, 99, 0.5, 1.0),
        (Decay.cosine, 0.0, 99, 1 / 3, 1.5),
        (Decay.cosine, 0.1, 99, 0.5, 1.1),
        (Decay.cosine, 0.1, 99, 1.7, 0.2),  # beyond the end
        (Decay.linear, 0.0, 1, 0.5, 0.5),  # both at once
    ],
)
def test_learning_rates_are_the_known_ones(decay: Decay, final_lr: float, step: int, progress: float, expected: float):
    cfg = OptimConfig(lr=2.0, warmup_steps=4, decay=decay, final_lr=final_lr)
    assert learning_rate(cfg, step, progress) == pytest.approx(expected)


def test_without_warmup_the_first_step_has_the_full_rate():
    assert learning_rate(OptimConfig(lr=2.0, warmup_steps=0), 0, 0.0) == 2.0


@pytest.mark.parametrize("limit", [0.0, 0.5, 1e6])
def test_clipping_is_torchs(limit: float):
    nets = [Net(), Net()]
    for net in nets:
        net(torch.arange(6)[None]).square().sum().backward()
    before = [p.grad.clone() for p in nets[0].parameters() if p.grad is not None]
    norm = clip_gradients(list(nets[0].parameters()), limit)
    theirs = torch.nn.utils.clip_grad_norm_(nets[1].parameters(), limit or math.inf)
    assert_close(norm, theirs, rtol=0, atol=0)
    assert norm > 0.5, "0.5 is a limit that matters"
    clipped = [p.grad for p in nets[0].parameters() if p.grad is not None]
    for mine, other in zip(clipped, [p.grad for p in nets[1].parameters() if p.grad is not None], strict=True):
        assert_close(mine, other, rtol=0, atol=0)
    assert all(map(torch.equal, before, clipped)) == (limit != 0.5)


def test_sam_on_a_quadratic():
    """f(w) = w'Aw / 2 has the gradient Aw, so SAM's is A(w + rho Aw / |Aw|) (Foret et al. 2021, eq. 3)."""
    matrix, start = torch.diag(torch.tensor([4.0, 1.0, 0.25])), torch.tensor([1.0, -2.0, 3.0])
    w = nn.Parameter(start.clone())
    (w @ matrix @ w / 2).backward()
    with perturbed([w, nn.Parameter(torch.ones(2))], rho=0.1):  # the second has no gradient and stays out
        assert w.grad is None
        (w @ matrix @ w / 2).backward()
    flat = matrix @ start
    assert_close(w.grad, matrix @ (start + 0.1 * flat / flat.norm()))
    assert torch.equal(w, start)
