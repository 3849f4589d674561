"""Nets with random weights, and their gradients beside those of diffusers."""

import torch
from torch import nn


def randomise(module: nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            else:
                parameter.normal_(std=0.1).add_(1.0 if "norm" in name and name.endswith("weight") else 0.0)


def assert_same_gradients(net: nn.Module, reference: nn.Module) -> None:
    wanted = {name: parameter.grad for name, parameter in reference.named_parameters()}
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        theirs = wanted[name if name in wanted else name.removeprefix("unet.")]  # our net holds diffusers' as ``unet``
        scale = theirs.abs().max()
        assert scale > 0, name
        assert (parameter.grad - theirs).abs().max() / scale < 1e-4, name
