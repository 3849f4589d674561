"""The decoder's benchmark at its smallest, and the FLOPs that it counts. No test reads a time."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

BENCH = Path(__file__).resolve().parents[1] / "scripts" / "bench"
PEER = BENCH.parents[1] / ".venv-peer" / "bin" / "python"


def module(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    spec = importlib.util.spec_from_file_location(f"bench_{name}", BENCH / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, loaded)
    spec.loader.exec_module(loaded)
    return loaded


def test_smoke_prints_every_ratio_at_equal_parameters():
    command = [sys.executable, str(BENCH / "decoder.py"), "--smoke"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout.splitlines()[-1])
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
