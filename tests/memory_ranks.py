"""What each of several ranks takes for a training step, by the allocator's events. usage: torchrun … memory_ranks.py CASE…

Rank 0 writes one JSON object: the bytes at the peak, by strategy and case.
"""

import gc
import json
import sys

import torch
import torch.distributed as dist
from test_plan import SMALL, peak_of
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

from unclip.config import Precision
from unclip.models import build
from unclip.optim import make_optimizer
from unclip.plan import Losses, example, train_step
from unclip.stages.sharded import shard


def peak(strategy: str, case: str) -> int:
    cfg, interface, optim, rows = SMALL[case]
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    gc.collect()  # what is freed within the profile, but was made before it, would be missing
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        torch.manual_seed(0)
        model = build(cfg, interface).train()
        if strategy == "fsdp2":
            shard(model, mesh, Precision.bf16)
        # without its first broadcast, whose copy of all weights is freed whenever a thread comes to it
        losses = DistributedDataParallel(Losses(model), init_sync=False) if strategy == "ddp" else Losses(model)
        optimizer = make_optimizer(model, optim)
        batch = example(model, interface, rows)
        for _ in range(2):
            train_step(losses, optimizer, batch, Precision.bf16)
    return peak_of(seen)


def least(strategy: str, case: str) -> int:
    """The least of both ranks and three tries: gloo's threads free what they have sent when they come to it."""
    peaks = torch.tensor([peak(strategy, case) for _ in range(3)])
    dist.all_reduce(peaks, dist.ReduceOp.MIN)
    return int(peaks.min())


if __name__ == "__main__":
    dist.init_process_group("gloo")
    found = {strategy: {case: least(strategy, case) for case in sys.argv[1:]} for strategy in ("ddp", "fsdp2")}
    if dist.get_rank() == 0:
        print(json.dumps(found))
    dist.destroy_process_group()
