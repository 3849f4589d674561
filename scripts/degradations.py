"""Draw docs/degradations.png: what an upsampler's low-resolution pictures go through, each step alone and all together.

python scripts/degradations.py docs/degradations.png
"""

import math
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from unclip.data.degrade import STRENGTHS, as_jpeg, blurred, degraded, gaussian_kernel, noised, shrunk
from unclip.data.shapes import draw_scene, render
from unclip.diffusion.noise import Noise
from unclip.evaluation.sheet import draw_gallery, save_picture
from unclip.models.pictures import Bsr, blur

SIZE, LOW = 256, 64
LIGHT, FULL = STRENGTHS[Bsr.light], STRENGTHS[Bsr.full]


def main(out: Path) -> None:
    scene = draw_scene(np.random.default_rng(5), objects=(3, 3), signs=1.0, held_out=False)
    target = torch.from_numpy(render(scene, SIZE).copy()).permute(2, 0, 1).float() / 255
    low = shrunk(target, LOW, 1.0, 0.0, 0.0, 0.0)
    noise = Noise([0])
    shown = [
        ("the target's 256 pixels as 64", low),
        ("Gaussian blur, 3x3, deviation 0.6", blur(low[None] * 2 - 1, 0.6)[0] / 2 + 0.5),
        (
            "noise of deviation 0.2 in [-1, 1], whose level the net is told",
            low + 0.1 * noise.normal((3, LOW, LOW), "n")[0],
        ),
        (
            "BSR: round blur of 2.8 target pixels",
            shrunk(blurred(target, gaussian_kernel(21, 2.8, 2.8, 0)), LOW, 1, 0, 0, 0),
        ),
        (
            "BSR: oblong blur of 8 and 1",
            shrunk(blurred(target, gaussian_kernel(21, 8.0, 1.0, math.pi / 6)), LOW, 1.0, 0.0, 0.0, 0.0),
        ),
        ("BSR: bicubic without antialiasing", shrunk(target, LOW, 1.0, 0.0, 0.0, 0.9)),
        ("BSR: a detour over 40 pixels", shrunk(target, LOW, 0.0, 8 / 224, 0.5, 0.9)),
        ("BSR: noise of 25 levels in each channel", noised(low, FULL, noise, 1.0, 0.9)),
        ("BSR: grey noise of 25 levels", noised(low, FULL, noise, 1.0, 0.5)),
        ("BSR: JPEG of quality 30", as_jpeg(low, FULL, 0.0)),
        *((f"bsr=light, sample {k}", degraded(target, LOW, LIGHT, Noise([k])) / 255) for k in range(2)),
        *((f"bsr=full, sample {k}", degraded(target, LOW, FULL, Noise([k])) / 255) for k in range(4)),
    ]
    page = draw_gallery([(name, pixels(picture)) for name, picture in shown], per_row=8)
    save_picture(page.quantize(128), out)


def pixels(picture: Tensor) -> np.ndarray:
    return (picture.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
