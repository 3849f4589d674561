"""What the latent (z_i, x_T) of pictures is good for: variations, interpolations, text differences (paper §3)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unclip.batches import Batches, Meter
from unclip.chain import Chain
from unclip.diffusion.guidance import Guidance
from unclip.diffusion.noise import Noise
from unclip.diffusion.samplers import Sampler, SamplerConfig
from unclip.errors import ConfigError
from unclip.jobs import Job, Sampling
from unclip.models.pictures import middle, resize, to_range, to_uint8
from unclip.models.sampling import DiffusionSampling
from unclip.nets.layers import Cond

INVERTIBLE = DiffusionSampling(SamplerConfig(Sampler.ddim, num_steps=50), Guidance(1.0))
DEFAULT_THETAS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)


def slerp(start: Tensor, end: Tensor, share: float) -> Tensor:
    """Spherical interpolation of vectors (..., D) (Shoemake 1985); 0 is exactly ``start``, 1 exactly ``end``.

    Vectors of one length keep it on the way; (almost) parallel ones are interpolated linearly.
    """
    cosine = F.cosine_similarity(start, end, dim=-1).clamp(-1, 1)
    angle = cosine.acos()[..., None]
    sine = angle.sin()
    near = sine < 1e-4
    safe = torch.where(near, torch.ones_like(sine), sine)
    first = torch.where(near, torch.full_like(sine, 1 - share), ((1 - share) * angle).sin() / safe)
    second = torch.where(near, torch.full_like(sine, share), (share * angle).sin() / safe)
    if share in (0, 1):
        return start.clone() if share == 0 else end.clone()
    return first * start + second * end


def text_difference(text_emb: Tensor, base_emb: Tensor | None) -> Tensor:
    """z_d = norm(z_t - z_t0) (..., D) of unit-norm embeddings, or norm(z_t) without a base (paper §3.3).

    Raises :class:`ConfigError` where the two captions are the same to CLIP.
    """
    difference = F.normalize(text_emb, dim=-1)
    if base_emb is not None:
        difference = difference - F.normalize(base_emb, dim=-1)
    if bool((difference.norm(dim=-1) < 1e-4).any()):
        raise ConfigError("the caption and the base caption are the same to CLIP; give two that differ")
    return F.normalize(difference, dim=-1)


def toward_text(image_emb: Tensor, difference: Tensor, theta: float) -> Tensor:
    """slerp(z_i, z_d, theta) (..., D), at the length of z_i (paper §3.3)."""
    return slerp(image_emb, difference * image_emb.norm(dim=-1, keepdim=True), theta)


@dataclass
class Latents:
    """Raw z_i (B, D) and, where they were asked for, x_T (B, 3, h, w) of pictures."""

    image_emb: Tensor
    x_T: Tensor | None = None

    @classmethod
    def cat(cls, parts: Sequence["Latents"]) -> "Latents":
        """One after another; all have x_T or none."""
        noises = [part.x_T for part in parts if part.x_T is not None]
        return cls(torch.cat([part.image_emb for part in parts]), torch.cat(noises) if noises else None)


def check_pictures(pictures: Tensor) -> Tensor:
    """uint8 (B, 3, H, W), or ConfigError."""
    if pictures.dtype != torch.uint8 or pictures.ndim != 4 or pictures.shape[1] != 3:
        raise ConfigError(f"pictures must be uint8 (B, 3, H, W), not {pictures.dtype} {tuple(pictures.shape)}")
    if not len(pictures):
        raise ConfigError("there are no pictures; give at least one")
    return pictures


def check_captions(captions: Sequence[str]) -> list[str]:
    """Captions without the spaces around them, none of them empty, or ConfigError."""
    if isinstance(captions, str):
        raise ConfigError(f"captions must be a list of texts, such as [{captions!r}]")
    found = [caption.strip() for caption in captions]
    if not found:
        raise ConfigError('give at least one caption, for example "a red cube"')
    if "" in found:
        raise ConfigError(f"caption {found.index('') + 1} of {len(found)} is empty; say what the picture shows")
    return found


def check_num(num: int) -> int:
    """A number of pictures, or ConfigError."""
    if num < 1:
        raise ConfigError(f"{num} pictures are asked for; ask for at least one")
    return num


def check_share(name: str, share: float) -> float:
    """A number in [0, 1], or ConfigError."""
    if not 0 <= share <= 1:
        raise ConfigError(f"{name} is {share}; it must lie in [0, 1] (the paper's edits take 0.25 to 0.5)")
    return share


def need_image(chain: Chain) -> None:
    """ConfigError for a decoder that does not see z_i."""
    if not chain.sees_z_i:
        raise ConfigError(
            f"{chain.folders['decoder']} is a decoder without z_i (model.conditioning.image=false): it only draws captions"
        )


def need_text(chain: Chain) -> None:
    """ConfigError for a decoder that reads no captions."""
    if not chain.configs["decoder"].conditioning.reads_text:
        raise ConfigError(
            f"{chain.folders['decoder']} is a decoder without a caption path (model.conditioning.text=none): leave out the captions"
        )


def invertible(chain: Chain, how: Sampling | None, eta: float = 0.0) -> Sampling:
    """``how`` resolved, its decoder's sampler being DDIM: by default 50 steps without guidance.

    Raises :class:`ConfigError` for another sampler, for eta outside [0, 1], and for a decoder that does not see z_i.
    """
    need_image(chain)
    full = chain.resolved(how, decoder=INVERTIBLE)
    assert full.decoder is not None
    name = full.decoder.sampler.name
    if name is not Sampler.ddim:
        raise ConfigError(
            f"finding a picture's x_T takes the sampler ddim, which can be run backwards, not {name.name}"
        )
    if not 0 <= eta <= 1:
        raise ConfigError(f"eta is {eta}; it must lie in [0, 1]: 0 reconstructs the picture, 1 varies it most")
    if full.refinements < 1:
        raise ConfigError(f"refinements is {full.refinements}; each step backwards needs at least one evaluation")
    if full.decoder.sampler.eta not in (None, eta):
        raise ConfigError(
            f"the decoder's sampler has eta {full.decoder.sampler.eta}; leave it out: `vary` takes its own, and "
            "reconstructions, interpolations and edits are drawn with 0"
        )
    temperature = full.decoder.sampler.temperature if eta else 1.0
    sampler = SamplerConfig(Sampler.ddim, full.decoder.sampler.num_steps, eta or None, temperature)
    full.decoder = DiffusionSampling(sampler, full.decoder.guidance)
    return full


def find_latents(
    chain: Chain, pictures: Tensor, captions: Sequence[str] | None, how: Sampling, batches: Batches, *, invert: bool
) -> Latents:
    """z_i and x_T of uint8 pictures (B, 3, H, W); the decoder reads ``captions`` while it is run backwards."""
    z_i = torch.cat(
        batches.each("clip of pictures", len(pictures), 0, lambda rows, _: chain.embed_image(pictures[rows]).cpu())
    )
    if not invert:
        return Latents(z_i)
    cond = Cond(num_rows=len(pictures)) if captions is None else chain.embed_texts(captions, batches)
    cond.image_emb = z_i.to(chain.device)
    x_T = batches.each(
        "inversion",
        len(pictures),
        chain.num_steps("inversion", how),
        lambda rows, on_step: chain.invert(pictures[rows], cond.rows(rows), how, on_step).cpu(),
    )
    return Latents(z_i, torch.cat(x_T))


def caption_latents(
    chain: Chain, captions: Sequence[str], seed: int, how: Sampling, batches: Batches, *, noisy: bool
) -> Latents:
    """The prior's z_i of captions and, where ``noisy``, the decoder's x_T of their seeds ``seed``, ``seed`` + 1, ..."""
    jobs = [Job(seed + i) for i in range(len(captions))]
    z_i = torch.cat(chain.draw_z_i(jobs, chain.embed_texts(captions, batches), None, how, batches)).cpu()
    noise = Noise([job.seed for job in jobs]).branch("decoder")
    return Latents(z_i, noise.normal((3, *chain.base_size(how)), "x_T") if noisy else None)


def latents_of_ends(
    chain: Chain,
    pictures: Tensor | None,
    captions: Sequence[str],
    seed: int,
    how: Sampling,
    batches: Batches,
    *,
    noisy: bool,
) -> Latents:
    """Of pictures, then of captions: what an interpolation goes through, with x_T where ``noisy``."""
    parts = []
    if pictures is not None:
        parts.append(find_latents(chain, pictures, None, how, batches, invert=noisy))
    if captions:
        parts.append(caption_latents(chain, captions, seed, how, batches, noisy=noisy))
    if len(parts) == 2 and not chain.configs["prior"].is_raw:  # slerp would lean toward the longer ones
        pictures_norm = parts[0].image_emb.norm(dim=1).mean()
        parts[1] = replace(parts[1], image_emb=F.normalize(parts[1].image_emb, dim=1) * pictures_norm)
    return Latents.cat(parts)


def variation_jobs(latents: Latents, captions: Sequence[str] | None, num: int, seed: int, eta: float) -> list[Job]:
    """``num`` jobs for each picture, with seeds ``seed``, ``seed`` + 1, ..."""
    assert latents.x_T is not None
    return [
        Job(
            seed + j,
            None if captions is None else captions[i],
            image_emb=latents.image_emb[i],
            x_T=latents.x_T[i],
            title=f"picture {i + 1}, variation {j + 1}",
            words={"operation": "vary", "picture": i, "eta": eta},
        )
        for i in range(len(latents.image_emb))
        for j in range(num)
    ]


def interpolation_jobs(latents: Latents, frames: int, seed: int) -> list[Job]:
    """From each picture to the next ``frames`` jobs, with both ends, which neighbouring stretches share."""
    jobs = []
    for i in range(len(latents.image_emb) - 1):
        for j in range(0 if i == 0 else 1, frames):
            share = j / (frames - 1)
            x_T = None
            if latents.x_T is not None:
                flat = latents.x_T.flatten(1)
                x_T = slerp(flat[i], flat[i + 1], share).view(latents.x_T.shape[1:])
            z_i = slerp(latents.image_emb[i], latents.image_emb[i + 1], share)
            words: dict[str, Any] = {"operation": "interpolate", "from": i, "share": share}
            jobs.append(Job(seed, image_emb=z_i, x_T=x_T, title=f"{i + 1} + {share:.2f}", words=words))
    return jobs


def edit_jobs(
    latents: Latents, differences: Tensor, captions: Sequence[str], thetas: Sequence[float], seed: int
) -> list[Job]:
    """For each picture, with its z_d of ``differences`` (B, D) and its caption, a job for each theta, all with its own x_T."""
    assert latents.x_T is not None
    return [
        Job(
            seed,
            image_emb=toward_text(latents.image_emb[i], differences[i].cpu(), theta),
            x_T=latents.x_T[i],
            title=f"{caption} (θ = {theta:g})",
            words={"operation": "edit", "caption": caption, "theta": theta},
        )
        for i, caption in enumerate(captions)
        for theta in thetas
    ]


def inpainting_jobs(
    picture: Tensor, mask: Tensor, z_i: Tensor | None, caption: str | None, num: int, seed: int, size: tuple[int, int]
) -> list[Job]:
    """``num`` jobs that repaint ``picture`` (3, H, W) where ``mask`` (H, W) is True, finished at ``size``."""
    known = to_uint8(resize(to_range(middle(picture, size))[None], size))[0]
    inner = middle(mask, size)
    mask = F.adaptive_max_pool2d(inner[None].float(), size)[0] > 0
    return [
        Job(
            seed + j,
            caption,
            image_emb=z_i,
            known=known,
            mask=mask,
            title=caption or f"inpainting {j + 1}",
            words={"operation": "inpaint"},
        )
        for j in range(num)
    ]


def batches_for(size: int, meter: Meter) -> Batches:
    if size < 1:
        raise ConfigError(f"batch_size is {size}; it must be at least 1")
    return Batches(size, meter)
