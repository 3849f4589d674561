"""The nets whose features pictures are compared by: EfficientNet-Lite0, the CLIP at hand, DINOv2 and Inception."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from unclip import artifact
from unclip.errors import ConfigError
from unclip.evaluation.features import PictureFeatures

DINOV2 = {384: "small", 768: "base", 1024: "large", 1536: "giant"}  # widths and names
DINOV2_SIDE, IMAGENET_MEAN, IMAGENET_STD = 224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
WHERE = {
    "dinov2": "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth (or vits14, vitb14, vitg14)",
    "inception": "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
}


class Extractor(Protocol):
    """uint8 pictures (B, 3, S, S) to features (B, ``width``) float32 on the CPU; ``hash`` tells its weights from others."""

    name: str
    width: int
    hash: str

    def __call__(self, pictures: Tensor) -> Tensor: ...


class ClipFeatures:
    """The raw z_i of a CLIP run or artifact, and z_t of captions."""

    name = "clip"

    def __init__(self, folder: str, device: torch.device) -> None:
        clip, manifest = artifact.load(folder, kind="clip")
        self.clip: Any = clip.to(device)
        self.device, self.hash, self.width = device, manifest.hash, manifest.interface["embed_dim"]

    @torch.no_grad()
    def __call__(self, pictures: Tensor) -> Tensor:
        return self.clip.encode_image(pictures.to(self.device)).float().cpu()

    @torch.no_grad()
    def texts(self, captions: list[str]) -> Tensor:
        """z_t (B, D)."""
        tokens = self.clip.tokenize(captions)
        longest = int(tokens.argmax(dim=1).max()) + 1
        return self.clip.encode_text(tokens[:, :longest].to(self.device))[0].float().cpu()


class Dinov2Features:
    """The class token of DINOv2 at 224 px (Stein et al. 2023), from a weights file of its authors or of timm.

    The file's width says which of the four sizes it is. ConfigError for a missing file or one of something else.
    """

    name = "dinov2"

    def __init__(self, path: str, device: torch.device) -> None:
        import timm
        from timm.models.vision_transformer import checkpoint_filter_fn

        state, self.hash = _read_weights(self.name, path)
        self.width = state["cls_token"].shape[-1] if "cls_token" in state else 0
        if self.width not in DINOV2:
            raise ConfigError(f"dinov2={path} does not hold a DINOv2; fetch {WHERE[self.name]}")
        registers = "_reg4" if {"register_tokens", "reg_token"} & state.keys() else ""
        name = f"vit_{DINOV2[self.width]}_patch14{registers}_dinov2"
        self.net: Any = timm.create_model(name, pretrained=False, num_classes=0, img_size=DINOV2_SIDE)
        try:
            self.net.load_state_dict(checkpoint_filter_fn(state, self.net))
        except (RuntimeError, KeyError) as error:
            raise ConfigError(f"dinov2={path} does not fit timm's {name}: {str(error)[:200]}") from error
        self.net.eval().requires_grad_(False).to(device)
        self.device = device
        self.mean, self.std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))

    @torch.no_grad()
    def __call__(self, pictures: Tensor) -> Tensor:
        x = pictures.to(self.device).float() / 255
        x = F.interpolate(x, (DINOV2_SIDE, DINOV2_SIDE), mode="bicubic", align_corners=False, antialias=True)
        return self.net((x.clamp(0, 1) - self.mean) / self.std).float().cpu()


class InceptionFeatures:
    """The 2048 features of the Inception-v3 that FID is defined by, with its own resizing, in torch-fidelity's form."""

    name, width = "inception", 2048

    def __init__(self, path: str, device: torch.device) -> None:
        _, self.hash = _read_weights(self.name, path)  # refuses what is more than tensors before it is read below
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError:
            raise ConfigError("inception features need the extra eval: pip install 'unclip[eval]'") from None
        try:
            net = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=path)
        except RuntimeError as error:
            raise ConfigError(
                f"inception={path} does not hold FID's Inception ({str(error)[:200]}); fetch {WHERE[self.name]}"
            ) from error
        self.net, self.device = net.to(device), device

    @torch.no_grad()
    def __call__(self, pictures: Tensor) -> Tensor:
        return self.net(pictures.to(self.device))[0].float().cpu()


def _read_weights(name: str, path: str) -> tuple[dict[str, Tensor], str]:
    """The tensors of a local file and its SHA-256; ConfigError that says where to get one."""
    if not path or not Path(path).is_file():
        lacking = f"there is no file {name}={path}" if path else f"{name}=FILE is not set"
        raise ConfigError(f"features holds {name}, but {lacking}: fetch {WHERE[name]} and give {name}=FILE")
    try:
        state = load_file(path) if path.endswith(".safetensors") else torch.load(path, "cpu", weights_only=True)
    except Exception as error:  # torch, pickle, zip and safetensors each raise their own
        raise ConfigError(f"{name}={path} cannot be read as weights ({error}); fetch {WHERE[name]}") from error
    with Path(path).open("rb") as file:
        return state, hashlib.file_digest(file, "sha256").hexdigest()


def open_extractor(name: str, weights: str | None, device: torch.device) -> Extractor:
    """``weights``: the file of DINOv2 or Inception, the folder of CLIP."""
    kinds: dict[str, Callable[[], Extractor]] = {
        "lite0": lambda: PictureFeatures(device),
        "clip": lambda: ClipFeatures(weights or "", device),
        "dinov2": lambda: Dinov2Features(weights or "", device),
        "inception": lambda: InceptionFeatures(weights or "", device),
    }
    return kinds[name]()
