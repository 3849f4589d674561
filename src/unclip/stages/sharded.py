"""``trainer.strategy=fsdp2``: each rank holds a share of weights, gradients, moments and averages; blocks are gathered for use.

Artifacts are the same files as those of other strategies, gathered tensor by tensor. A run may go on with another number of ranks,
or with another strategy.
"""

import io
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial, wraps
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pytorch_lightning.core.optimizer import LightningOptimizer
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from unclip.config import Precision
from unclip.errors import ConfigError
from unclip.nets.transformer import TransformerBlock
from unclip.nets.unet import ContextAttention, ResnetBlock
from unclip.optim import batch_norms_of
from unclip.stages.parts import Parts, joined, opened, read_last, split, unused_folder, write_part

# It speaks of outputs that are changed in place, which no net here does.
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")

# What a stage calls of its model, and of a block beside forward: there the weights must be whole.
MODEL_METHODS = ("losses", "features", "encode_image", "encode_text", "sample", "measures")
BLOCK_METHODS = ("keys_values", "context_keys_values")


def shard(model: nn.Module, mesh: DeviceMesh, precision: Precision) -> None:
    """Shard ``model`` over ``mesh`` in place: one unit for each block, one for all other weights.

    With bf16, blocks are gathered and computed in bfloat16 and their gradients summed in float32; the other unit stays in
    float32 (under autocast). Scalars (CLIP's temperature) stay whole on each rank, see :func:`average_scalars`.
    Raises :class:`ConfigError` for batch norms, whose statistics would differ from rank to rank.
    """
    from open_clip.transformer import ResidualAttentionBlock

    if batch_norms_of(model):
        raise ConfigError("trainer.strategy=fsdp2 with batch norms (CLIP's RN models): take trainer.strategy=ddp")
    policy = MixedPrecisionPolicy()
    if precision is Precision.bf16:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for module in list(model.modules()):
        if isinstance(module, (TransformerBlock, ResnetBlock, ContextAttention, ResidualAttentionBlock)):
            fully_shard(module, mesh=mesh, mp_policy=policy)
            for name in BLOCK_METHODS:
                if hasattr(module, name):
                    register_fsdp_forward_method(module, name)
    scalars = {p for p in model.parameters() if p.ndim == 0}
    # resharded after each forward: gathered weights that outlive it would hide that the averaged ones are swapped in
    fully_shard(model, mesh=mesh, reshard_after_forward=True, ignored_params=scalars)
    _through_forward(model)


def _through_forward(model: nn.Module) -> None:
    """Let MODEL_METHODS run inside of ``forward``, where FSDP2 gathers the weights; one that calls another enters once."""
    inside = False

    def forward(method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        nonlocal inside
        inside = True
        try:
            with _whole(model) if method.__name__ == "sample" else nullcontext():
                return method(*args, **kwargs)
        finally:
            inside = False

    def entering(method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def entered(*args: Any, **kwargs: Any) -> Any:
            return method(*args, **kwargs) if inside else model(method, args, kwargs)

        return entered

    model.forward = forward
    for name in MODEL_METHODS:
        if hasattr(model, name):
            setattr(model, name, entering(getattr(model, name)))


@contextmanager
def _whole(model: nn.Module) -> Iterator[None]:
    """All weights gathered at once: sampling reads them at every step, and of blocks in other ways than by their forward."""
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.reshard()
            unit.set_reshard_after_forward(True, recurse=False)


def average_scalars(model: nn.Module) -> None:
    """Average the gradients of what is not sharded over the ranks, as FSDP2 does those of the rest."""
    for p in model.parameters():
        if p.grad is not None and not isinstance(p, DTensor):
            dist.all_reduce(p.grad)
            p.grad /= dist.get_world_size()


def gathered(values: Mapping[Any, Any]) -> dict[Any, Any]:
    """On rank 0 ``values`` with whole tensors on the CPU, gathered one by one; {} on the other ranks, which call it too."""
    found: dict[Any, Any] = {}
    for name, value in values.items():
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        if not dist.is_initialized() or dist.get_rank() == 0:
            found[name] = whole.detach().cpu() if isinstance(whole, Tensor) else whole
    return found


class Sharded(ModelParallelStrategy):
    """FSDP2 over all ranks. Lightning's own would take the devices of a node for tensor parallelism.

    Lightning numbers the optimiser's state by the order of the model's weights, torch by that of the parameter groups; a file of
    another strategy, read the other way, would mix up the moments. Checkpoints are in parts, see ``parts.py``.
    """

    def __init__(self, num_ranks: int, full: bool) -> None:
        super().__init__(data_parallel_size=num_ranks, tensor_parallel_size=1, save_distributed_checkpoint=False)
        self.full = full

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.model is not None
        return self.model.state_dict()

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        optimizer = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        state = optimizer.state_dict()
        return {"state": dict(sorted(state["state"].items())), "param_groups": state["param_groups"]}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """All ranks write their parts; then rank 0 the file that names them."""
        path = Path(self.broadcast(filepath))
        name = self.broadcast(unused_folder(path.parent, checkpoint["global_step"]) if self.is_global_zero else "")
        (path.parent / name).mkdir(exist_ok=True)
        rest, tensors = split(checkpoint)
        try:
            write_part(path.parent / name, tensors, self.global_rank, self.world_size, self.full)
        except OSError:
            shutil.rmtree(path.parent / name, ignore_errors=True)
            raise
        self.barrier()
        parts = {"folder": name, "count": 1 if self.full else self.world_size}
        if self.is_global_zero:
            content = io.BytesIO()
            torch.save({**rest, "parts": parts}, content)
            path.write_bytes(content.getvalue())

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Each rank reads its share into model and optimisers; returns the rest."""
        path = Path(self.broadcast(checkpoint_path))
        checkpoint = read_last(path)
        if "parts" not in checkpoint:  # one file of another strategy, mapped into memory
            self._take(checkpoint, _share)
            return checkpoint
        with opened(path, checkpoint) as parts:
            checkpoint = joined(checkpoint, {name: name for name in parts.holders})  # type: ignore[misc]
            self._take(checkpoint, partial(_read_share, parts))
        return checkpoint

    def _take(self, checkpoint: dict[str, Any], share: Callable[[Any, Any], Any]) -> None:
        """Load what ``share`` makes of each entry for the weight that it belongs to."""
        assert self.model is not None
        own = self.model.state_dict()
        weights = {name: share(value, own.get(name)) for name, value in checkpoint.pop("state_dict").items()}
        self.model.load_state_dict(weights, strict=True)
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            owners = [p for group in optimizer.param_groups for p in group["params"]]
            state = {
                number: {name: share(value, owners[number]) for name, value in values.items()}
                for number, values in saved["state"].items()
            }
            optimizer.load_state_dict({"state": state, "param_groups": saved["param_groups"]})


def _read_share(parts: Parts, name: str, like: Any) -> Tensor:
    """This rank's rows of a tensor in ``parts`` that belongs to the weight ``like``; anything else whole."""
    if not isinstance(like, DTensor) or parts.shape(name) != tuple(like.shape):
        return parts.whole(name)
    rows = -(-like.shape[0] // like.device_mesh.size())  # as torch.chunk and FSDP2 divide
    first = min(rows * like.device_mesh.get_local_rank(), like.shape[0])
    mine = parts.rows(name, first, min(first + rows, like.shape[0])).to(like.device)
    return DTensor.from_local(
        mine, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def _share(whole: Any, like: Any) -> Any:
    """This rank's share of a tensor that belongs to the weight ``like``, laid out as that is; anything else as it is."""
    if not isinstance(like, DTensor) or not isinstance(whole, Tensor) or whole.shape != like.shape:
        return whole
    mine = distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
    return mine.clone()
