"""One side of scripts/bench/decoder.py in a process of its own: JSON lines in on stdin, JSON lines out on stdout.

    python decoder_worker.py SIDE          SIDE: unclip or dalle2_pytorch

Requests, each with one answer: {"do": "build", "shape": …}, {"do": "train_step", "steps": n}, {"do": "sampling_step", "steps": n},
{"do": "gemm"} and {"do": "memory"}. A worker that waits for a request uses no processor time. Runs in the environment of its
side, so it imports nothing but torch until it knows which one that is.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from peer_worker import Training, now, resident_megabytes, serve
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

EMBED_DIM, TEXT_WIDTH, CAPTION = 512, 512, 77  # with four tokens of z_i the context has 81
GEMM = 2048
GUIDANCE = 3.0


class Pictures:
    """Random pictures, embeddings and caption states of full length, the same on all sides."""

    def __init__(self, rows: int, size: int, device: torch.device) -> None:
        random = torch.Generator().manual_seed(0)
        self.image = torch.randint(0, 256, (rows, 3, size, size), dtype=torch.uint8, generator=random).to(device)
        self.image_emb = torch.randn(rows, EMBED_DIM, generator=random).to(device)
        self.text_seq = torch.randn(rows, CAPTION, TEXT_WIDTH, generator=random).to(device)
        tokens = torch.randint(1, 900, (rows, CAPTION), generator=random)
        tokens[:, -1] = 999
        self.tokens = tokens.to(device)


class Unclip:
    """Our decoder with the paper's losses: eps and a learned variance."""

    def build(self, shape: dict[str, Any]) -> nn.Module:
        from unclip.models.decoder import Decoder, DecoderConfig
        from unclip.models.interface import Interface
        from unclip.nets.conditioned import ConditioningConfig, DecoderText
        from unclip.nets.unet import UNetConfig

        net = UNetConfig(
            channels=[shape["width"] * k for k in shape["multiples"]],
            num_blocks=2,
            attention_levels=[1, 2, 3],
            head_dim=shape["head_dim"],
        )
        conditioning = ConditioningConfig(text=DecoderText.clip_states, context_dim=TEXT_WIDTH)
        interface = Interface(embed_dim=EMBED_DIM, text_width=TEXT_WIDTH, context_length=CAPTION, vocab_size=1000)
        self.model = Decoder(DecoderConfig(image_size=shape["size"], net=net, conditioning=conditioning), interface)
        return self.model

    def loss(self, inputs: Pictures, step: int) -> Tensor:
        from unclip.data.batch import Batch
        from unclip.diffusion.noise import Noise

        rows = list(range(len(inputs.image)))
        batch = Batch(
            position=rows,
            image=inputs.image,
            image_emb=inputs.image_emb,
            text_seq=inputs.text_seq,
            tokens=inputs.tokens,
        )
        terms = self.model.losses(batch, Noise.at(step, rows, inputs.image.device))
        return torch.stack(list(terms.values())).sum()

    def sample(self, inputs: Pictures, steps: int) -> Tensor:
        from unclip.diffusion.guidance import Guidance
        from unclip.diffusion.noise import Noise
        from unclip.diffusion.samplers import Sampler, SamplerConfig
        from unclip.models.sampling import DiffusionSampling
        from unclip.nets.layers import Cond

        how = DiffusionSampling(SamplerConfig(Sampler.ddim, steps), Guidance(GUIDANCE))
        cond = Cond(image_emb=inputs.image_emb, text_seq=inputs.text_seq, tokens=inputs.tokens)
        return self.model.sample(cond, how, Noise(range(len(inputs.image)), inputs.image.device))


class Dalle2Pytorch:
    """Decoder with one Unet: the widest that is not larger than ours, then a context as wide as equal parameters need."""

    def build(self, shape: dict[str, Any]) -> nn.Module:
        wanted, group = shape["parameters"], 8  # of its group norms
        widths = range(group, 3 * shape["width"], group)
        width = max(width for width in widths if self._parameters(shape, width, width) <= wanted)
        least, more = (self._parameters(shape, width, width + extra) for extra in (0, group))
        context = width + group * round((wanted - least) / (more - least))
        if context == EMBED_DIM:  # where it takes z_i as it is for its tokens
            context -= group
        self.model = self._decoder(shape, width, context)
        self.chosen = {"width": width, "context_width": context}
        return self.model

    def _parameters(self, shape: dict[str, Any], width: int, context: int) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in self._unet(shape, width, context).parameters())

    def _unet(self, shape: dict[str, Any], width: int, context: int) -> Any:
        from dalle2_pytorch import Unet

        return Unet(
            dim=width,
            dim_mults=tuple(shape["multiples"]),
            image_embed_dim=EMBED_DIM,
            text_embed_dim=TEXT_WIDTH,
            cond_dim=context,
            cond_on_image_embeds=True,
            cond_on_text_encodings=True,
            max_text_len=CAPTION,
            self_attn=(False, True, True, True),
            attn_dim_head=shape["head_dim"],
            attn_heads=8,
            num_resnet_blocks=2,
            channels_out=6,
        )

    def _decoder(self, shape: dict[str, Any], width: int, context: int) -> Any:
        from dalle2_pytorch import Decoder
        from dalle2_pytorch.dalle2_pytorch import BaseClipAdapter

        class NoClip(BaseClipAdapter):
            """Embeddings are handed over; the decoder only asks for sizes."""

            dim_latent, image_size, image_channels, max_text_len = EMBED_DIM, shape["size"], 3, CAPTION

        return Decoder(
            unet=self._unet(shape, width, context),
            clip=NoClip(nn.Identity()),
            image_sizes=(shape["size"],),
            timesteps=1000,
            image_cond_drop_prob=0.1,
            text_cond_drop_prob=0.5,
            learned_variance=True,
        )

    def loss(self, inputs: Pictures, step: int) -> Tensor:
        image = inputs.image.float() / 255
        return self.model(image, image_embed=inputs.image_emb, text_encodings=inputs.text_seq, unet_number=1)

    @torch.no_grad()
    def sample(self, inputs: Pictures, steps: int) -> Tensor:
        self.model.sample_timesteps = (steps,)
        return self.model.sample(
            image_embed=inputs.image_emb, text_encodings=inputs.text_seq, cond_scale=GUIDANCE, stop_at_unet_number=1
        )


def model_flops(model: nn.Module, work: Callable[[], object]) -> int:
    """FLOPs of convolutions, linear layers and attention in ``work()``, a loss of ``model``, and of its gradients.

    A layer costs as much again for the gradient of its weights, and of its input where that needs one; attention twice its own
    two products, each of its four gradients being one.
    """
    from unclip.nets.unet import ContextAttention

    total = 0

    def count(module: nn.Module, given: tuple[Any, ...], out: Tensor) -> None:
        nonlocal total
        x = given[0]
        if isinstance(module, nn.Conv2d):
            own = 2 * out.numel() * module.in_channels // module.groups * module.kernel_size[0] * module.kernel_size[1]
            total += own * (3 if x.requires_grad else 2)
        elif isinstance(module, nn.Linear):
            total += 2 * out.numel() * module.in_features * (3 if x.requires_grad else 2)
        elif isinstance(module, ContextAttention):
            picture = x.shape[2] * x.shape[3]
            seen = picture + (0 if given[1] is None else given[1][0].shape[2])
            total += 3 * 4 * x.shape[0] * x.shape[1] * picture * seen

    kinds = (nn.Conv2d, nn.Linear, ContextAttention)
    hooks = [module.register_forward_hook(count) for module in model.modules() if isinstance(module, kinds)]
    try:
        work()
    finally:
        for hook in hooks:
            hook.remove()
    return total


class Worker:
    """A side and what it was built with; answers requests."""

    def __init__(self, side: Unclip | Dalle2Pytorch) -> None:
        self.side = side
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.training: Training | None = None

    def build(self, shape: dict[str, Any]) -> dict[str, Any]:
        """Parameters, and the GFLOP of forward and backward a picture: as torch counts them; ours also by our formula."""
        torch.manual_seed(0)
        torch.set_num_threads(shape["threads"])
        self.model = self.side.build(shape).to(self.device)
        if self.device.type == "cuda":
            self.model = self.model.to(memory_format=torch.channels_last)
        self.batch = shape["batch"]
        self.inputs = Pictures(shape["batch"], shape["size"], self.device)
        two = Pictures(2, shape["size"], self.device)
        with FlopCounterMode(display=False) as counter, nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
            self.side.loss(two, 0).backward()
        self.model.zero_grad(set_to_none=True)
        found = {
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "gflop": counter.get_total_flops() / 2e9,
        }
        if isinstance(self.side, Dalle2Pytorch):
            return {**found, **self.side.chosen}
        return {**found, "model_gflop": model_flops(self.model, lambda: self.side.loss(two, 0)) / 2e9}

    def train_step(self, steps: int) -> dict[str, Any]:
        """Seconds of one step: forward, backward, clipping, fused AdamW, EMA; the mean of ``steps``."""
        self.model.train()
        self.training = self.training or Training(self.model)
        before = now(self.device)
        for step in range(steps):
            with torch.autocast(self.device.type, torch.bfloat16):
                loss = self.side.loss(self.inputs, step)
            self.training.step(loss)
        return {"seconds": (now(self.device) - before) / steps, "loss": loss.item()}

    def sampling_step(self, steps: int) -> dict[str, Any]:
        """Seconds of one guided step for the whole batch."""
        self.model.eval()
        before = now(self.device)
        with torch.autocast(self.device.type, torch.bfloat16):
            drawn = self.side.sample(self.inputs, steps)
        assert len(drawn) == self.batch, drawn.shape
        return {"seconds": (now(self.device) - before) / steps, "finite": bool(drawn.isfinite().all())}

    def gemm(self) -> dict[str, float]:
        """FLOP/s of a bfloat16 matrix product; the best of five."""
        left, right = (torch.randn(GEMM, GEMM, device=self.device).bfloat16() for _ in range(2))
        left @ right
        times = []
        for _ in range(5):
            before = now(self.device)
            left @ right
            times.append(now(self.device) - before)
        return {"flops": 2 * GEMM**3 / min(times)}

    def memory(self) -> dict[str, float]:
        """The process's largest resident size so far, in MB."""
        return {"megabytes": resident_megabytes()}


def main() -> None:
    sides = {"unclip": Unclip, "dalle2_pytorch": Dalle2Pytorch}
    worker = Worker(sides[sys.argv[1]]())
    names = ("build", "train_step", "sampling_step", "gemm", "memory")
    serve({name: getattr(worker, name) for name in names})


if __name__ == "__main__":
    main()
