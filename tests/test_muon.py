"""Muon against torch's own for matrices; convolutions as matrices; the rest is left to AdamW; state survives a checkpoint."""

import copy
import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.testing import assert_close

from unclip.config import OptimConfig
from unclip.errors import ConfigError
from unclip.models.clip import CLIP, CLIPConfig
from unclip.muon import _shares, is_hidden_matrix, orthogonal
from unclip.optim import AdamWEMA, learning_rate, make_optimizer

CFG = OptimConfig(lr=0.01, weight_decay=0.1, ema_decay=0.5, muon_lr=0.02)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(20, 12)
        self.conv = nn.Conv1d(12, 24, 3, padding=1)
        self.wide = nn.Linear(24, 40)
        self.tall = nn.Linear(40, 24)
        self.few = nn.Linear(24, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.conv(self.table(ids).transpose(1, 2)).transpose(1, 2)
        return self.few(self.tall(self.wide(x).relu()))


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        ids = torch.randint(0, 20, (4, 6), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (net(ids) - 1).square().mean().backward()
        optimizer.step()


def made(net: nn.Module, cfg: OptimConfig = CFG) -> AdamWEMA:
    """With the rates that training sets before its first step."""
    optimizer = make_optimizer(net, cfg)
    for group in optimizer.param_groups:
        group["lr"] = group["lr_scale"] * learning_rate(cfg, cfg.warmup_steps, 0.0)
    return optimizer


def test_matrices_move_as_torchs_muon_moves_them_and_all_else_as_adamw_does():
    net, theirs = Net(), Net()
    matrices = [theirs.conv.weight.flatten(1), theirs.wide.weight, theirs.tall.weight]
    matrices = [nn.Parameter(weight.detach()) for weight in matrices]  # a convolution's shares its memory
    muon = torch.optim.Muon(matrices, lr=0.02, weight_decay=0.1, momentum=0.95)
    own = [theirs.conv.weight, theirs.wide.weight, theirs.tall.weight]
    tables = [theirs.table.weight, theirs.conv.bias, theirs.wide.bias, theirs.tall.bias, theirs.few.bias]
    adamw = torch.optim.AdamW(
        [{"params": [theirs.few.weight], "weight_decay": 0.1}, {"params": tables, "weight_decay": 0.0}], lr=0.01
    )
    optimizer = made(net)
    for step in range(6):
        train(net, optimizer, range(step, step + 1))
        ids = torch.randint(0, 20, (4, 6), generator=torch.Generator().manual_seed(step))
        theirs.zero_grad()
        (theirs(ids) - 1).square().mean().backward()
        for matrix, p in zip(matrices, own, strict=True):
            matrix.grad = p.grad.flatten(1)
        muon.step()
        adamw.step()
        for name, p in net.named_parameters():
            assert_close(p, theirs.get_parameter(name), atol=2e-3, rtol=0, msg=lambda m, name=name: f"{name}: {m}")
    assert (net.wide.weight - Net().wide.weight).abs().mean() > 0.005


def test_singular_values_become_about_one_and_directions_stay():
    matrices = torch.randn(3, 16, 40, generator=torch.manual_seed(0))
    for given in (matrices, matrices.mT):
        found = orthogonal(given)
        found = found.float()
        values = torch.linalg.svdvals(found)
        assert found.shape == given.shape
        assert 0.6 < values.min() < values.max() < 1.3
        u, _, v = torch.linalg.svd(given, full_matrices=False)
        along = torch.einsum("nij,nik,nkj->nj", u, found, v.mT)
        assert_close(along, values.flip(-1).sort(-1).values.mean(-1, keepdim=True).expand_as(along), atol=0.35, rtol=0)


def test_ranks_share_the_work_and_move_alike(tmp_path: Path):
    """Three matrices over four ranks, of which one has nothing to do."""
    alone = Net()
    train(alone, made(alone), range(5))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4", __file__, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for rank in range(4):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert all(torch.equal(found[name], p) for name, p in alone.state_dict().items()), rank


def test_each_matrix_is_one_ranks_and_the_loads_are_even():
    matrices = [torch.empty(rows, 16) for rows in (16, 16, 16, 8, 8, 8, 8)]
    assert _shares(matrices, 1) == [[0, 1, 2, 3, 4, 5, 6]]
    shares = _shares(matrices, 2)
    assert sorted(i for share in shares for i in share) == list(range(7))
    loads = [sum(matrices[i].numel() * min(matrices[i].shape) for i in share) for share in shares]
    assert loads == [16 * 16 * 16 * 2] * 2


def test_what_muon_trains():
    net = Net()
    group = next(group for group in make_optimizer(net, CFG).param_groups if group["muon"])
    assert {id(p) for p in group["params"]} == {id(net.conv.weight), id(net.wide.weight), id(net.tall.weight)}
    assert group["lr_scale"] == pytest.approx(2)
    assert not any(group["muon"] for group in make_optimizer(net, OptimConfig()).param_groups)
    assert not make_optimizer(net, CFG).param_groups[0]["muon"], "whose rate is logged"
    clip = CLIP(CLIPConfig(image_size=16, vision_width=32, vision_heads=2, text_width=32, text_heads=2))
    names = {id(p): name for name, p in clip.named_parameters()}
    muon = next(group for group in make_optimizer(clip, CFG).param_groups if group["muon"])
    assert not [name for p in muon["params"] if "positional_embedding" in (name := names[id(p)])]
    assert is_hidden_matrix(clip.model.positional_embedding), "a table, although it has the shape of a matrix"
    assert not is_hidden_matrix(torch.zeros(64))
    assert not is_hidden_matrix(torch.zeros(64, 3))
    assert is_hidden_matrix(torch.zeros(64, 3, 3, 3))


def test_the_average_follows_and_a_weight_without_a_gradient_stays():
    net = Net()
    optimizer = made(net)
    train(net, optimizer, range(3))
    before = net.wide.weight.detach().clone()
    with optimizer.ema_weights():
        assert not torch.equal(net.wide.weight, before)
    assert torch.equal(net.wide.weight, before)
    optimizer.zero_grad()
    optimizer.step()
    assert torch.equal(net.wide.weight, before)


def test_a_loaded_state_goes_on_bit_for_bit():
    net = Net()
    optimizer = made(net)
    train(net, optimizer, range(3))
    file = io.BytesIO()
    torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(net, optimizer, range(3, 6))
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = copy.deepcopy(Net())
    again.load_state_dict(saved["net"])
    resumed = make_optimizer(again, CFG)
    resumed.load_state_dict(saved["optimizer"])
    train(again, resumed, range(3, 6))
    for ours, theirs in zip(net.parameters(), again.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(optimizer.state.values(), resumed.state.values(), strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(torch.as_tensor(ours[key]), torch.as_tensor(theirs[key])) for key in ours)


def test_a_negative_rate_is_refused():
    with pytest.raises(ConfigError, match="0 leaves all weights to AdamW"):
        OptimConfig(muon_lr=-0.1)


if __name__ == "__main__":  # one rank of several
    dist.init_process_group("gloo")
    net = Net()
    train(net, made(net), range(5))
    torch.save(net.state_dict(), Path(sys.argv[1]) / f"{dist.get_rank()}.pt")
    dist.destroy_process_group()
