"""One of two gloo ranks: the contrastive loss of its half of a batch. usage: two_ranks.py RANK FOLDER"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

from unclip.models.contrastive import contrastive_loss

rank, folder = int(sys.argv[1]), Path(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
torch.manual_seed(0)
images, texts = (F.normalize(torch.randn(6, 4), dim=1) for _ in range(2))
weight = torch.eye(4, requires_grad=True)
mine = slice(rank * 3, rank * 3 + 3)
loss = contrastive_loss(images[mine] @ weight, texts[mine], torch.tensor(5.0))
loss.backward()
assert weight.grad is not None
dist.all_reduce(weight.grad)
if rank == 0:
    torch.save((loss.detach(), weight.grad / 2), folder / "out.pt")
dist.destroy_process_group()
