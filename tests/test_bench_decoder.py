"""The decoder's benchmark at its smallest, and the FLOPs that it counts. No test reads a time."""

import pytest
import torch
from bench_scripts import PEER, module, smoke
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode


def test_smoke_prints_every_ratio_at_equal_parameters():
    _, said = smoke("decoder")
    wanted = {"gemm_peak_share"}
    built = said["settings"]["built"]
    assert built["unclip"]["gflop"] > 0
    if PEER.exists():
        wanted |= {"train_step_vs_dalle2_pytorch", "sampling_step_vs_dalle2_pytorch"}
        assert built["dalle2_pytorch"]["parameters"] == pytest.approx(built["unclip"]["parameters"], rel=0.03)
        assert built["dalle2_pytorch"]["gflop"] > 0
    assert {key for key, value in said.items() if key != "settings" and isinstance(value, dict)} == wanted
    for ratio in wanted:
        assert 0 < said[ratio]["min"] <= said[ratio]["median"] <= said[ratio]["max"]


def test_sides_of_unequal_size_are_not_compared(monkeypatch: pytest.MonkeyPatch):
    bench = module("decoder", monkeypatch)

    class Fake:
        def __init__(self, parameters: int) -> None:
            self.parameters = parameters

        def ask(self, what: str, shape: dict) -> dict:
            return {"parameters": self.parameters, "gflop": 1.0}

    assert bench.build({"unclip": Fake(1000), "peer": Fake(1030)}, bench.SIZES["smoke"])["peer"]["parameters"] == 1030
    with pytest.raises(SystemExit, match="parameters differ by more than 3%"):
        bench.build({"unclip": Fake(1000), "peer": Fake(1031)}, bench.SIZES["smoke"])


def test_our_flops_are_those_that_torch_counts(monkeypatch: pytest.MonkeyPatch):
    worker = module("decoder_worker", monkeypatch)
    side = worker.Unclip()
    shape = {"width": 32, "multiples": [1, 2, 2, 2], "head_dim": 32, "size": 16}
    torch.manual_seed(0)
    model = side.build(shape)
    inputs = worker.Pictures(2, 16, torch.device("cpu"))
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        side.loss(inputs, 0).backward()
    found = worker.model_flops(model, lambda: side.loss(inputs, 0))
    assert found == pytest.approx(counter.get_total_flops(), rel=0.005)
    attention = [m for m in model.modules() if type(m).__name__ == "ContextAttention"]
    assert len(attention) == 16


def test_the_pinned_net(monkeypatch: pytest.MonkeyPatch):
    bench, worker = module("decoder", monkeypatch), module("decoder_worker", monkeypatch)
    sizes = bench.SIZES["stated"]
    assert (sizes["width"], sizes["multiples"], sizes["size"], sizes["batch"]) == (64, [1, 2, 3, 4], 64, 16)
    with FakeTensorMode():  # no weights are drawn
        model = worker.Unclip().build({**sizes})
    assert [64 // 2**level for level in model.cfg.net.attention_levels] == [32, 16, 8]
    context = model.cfg.conditioning.num_image_tokens + worker.CAPTION
    assert (context, model.cfg.net.num_blocks, model.cfg.net.head_dim) == (81, 2, 64)
