"""Nets with random weights, and their outputs and gradients beside those of diffusers."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn
from torch.testing import assert_close

from unclip.nets.layers import Cond

Run = Callable[[torch.dtype], tuple[torch.Tensor, torch.Tensor]]


def randomise(module: nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            else:
                parameter.normal_(std=0.1).add_(1.0 if "norm" in name and name.endswith("weight") else 0.0)


def cast(cond: Cond, dtype: torch.dtype) -> Cond:
    """The conditions with their embeddings and states in ``dtype``."""
    fields = {name: value for name, value in vars(cond).items() if isinstance(value, torch.Tensor)}
    return replace(cond, **{name: value.to(dtype) for name, value in fields.items() if value.is_floating_point()})


def assert_equal_nets(net: nn.Module, reference: nn.Module, run: Run) -> None:
    """Outputs to 1e-5 in float32; outputs and gradients to 1e-9 in float64, where rounding hides nothing.

    ``run`` gives both nets' outputs for inputs in the given precision, which is also the nets' own.
    """
    out, wanted = run(torch.float32)
    assert wanted.std() > 0.1
    assert_close(out, wanted, atol=1e-5, rtol=1e-5)
    for side in (net, reference):
        side.double()
    out, wanted = run(torch.float64)
    assert_close(out, wanted, atol=1e-9, rtol=1e-9)
    target = torch.randn_like(out)
    (out * target).mean().backward()
    (wanted * target).mean().backward()
    theirs = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
    scale = max(float(grad.abs().max()) for grad in theirs.values())
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        grad = theirs[name if name in theirs else name.removeprefix("unet.")]  # our net holds diffusers' as ``unet``
        # some are zero but for rounding: a key's bias shifts all scores of a query alike, a norm of single channels its bias
        largest = max(float(grad.abs().max()), 1e-3 * scale)
        assert (parameter.grad - grad).abs().max() < 1e-9 * largest, name
