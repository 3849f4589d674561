"""One side of scripts/bench/prior.py in a process of its own: JSON lines in on stdin, JSON lines out on stdout.

    python peer_worker.py SIDE          SIDE: unclip, diffusers or dalle2_pytorch

Requests, each with one answer: {"do": "build", "shape": …}, {"do": "train_step", "lengths": …, "steps": n, "draws": K},
{"do": "sample", "lengths": …, "how": …} and {"do": "memory"}. A worker that waits for a request uses no processor time.
Runs in the environment of its side, so it imports nothing but torch until it knows which one that is.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

CONTEXT = 77
LEARNING_RATE, BETAS, WEIGHT_DECAY, CLIP, EMA = 1.1e-4, (0.9, 0.96), 0.06, 0.5, 0.999


class Unclip:
    """Captions as long as the longest of the batch; the prefix is shared by noise draws, candidates and steps."""

    def build(self, shape: dict[str, int]) -> nn.Module:
        from unclip.models.diffusion_prior import DiffusionPrior, DiffusionPriorConfig
        from unclip.models.interface import Interface
        from unclip.nets.transformer import PriorNetConfig

        width = shape["width"]
        net = PriorNetConfig(width=width, depth=shape["depth"], num_heads=shape["heads"])
        interface = Interface(embed_dim=width, text_width=width, context_length=CONTEXT, vocab_size=1000)
        self.model = DiffusionPrior(DiffusionPriorConfig(net=net), interface)
        self.several = DiffusionPrior(DiffusionPriorConfig(net=net, num_draws=shape["draws"]), interface)
        self.several.net = self.model.net
        return self.model

    def inputs(self, captions: "Captions") -> Any:
        from unclip.data.batch import Batch

        longest = max(captions.lengths)
        position = list(range(len(captions.lengths)))
        return Batch(
            position=position,
            image_emb=captions.image_emb,
            text_emb=captions.text_emb,
            text_seq=captions.states[:, :longest],
            tokens=captions.tokens[:, :longest],
        )

    def loss(self, inputs: Any, step: int, draws: int) -> Tensor:
        from unclip.diffusion.noise import Noise

        noise = Noise.at(step, inputs.position, inputs.image_emb.device)
        model = self.model if draws == 1 else self.several
        return torch.stack(list(model.losses(inputs, noise).values())).sum()

    def sample(self, inputs: Any, how: dict[str, Any]) -> Tensor:
        from unclip.diffusion.guidance import Guidance
        from unclip.diffusion.noise import Noise
        from unclip.diffusion.samplers import Sampler, SamplerConfig
        from unclip.models.sampling import PriorSampling

        sampler = SamplerConfig(name=Sampler.ancestral, num_steps=how["steps"])
        sampling = PriorSampling(sampler, Guidance(how["guidance"]), num_candidates=how["candidates"])
        noise = Noise(inputs.position, inputs.image_emb.device)
        return self.model.sample(self.model.cond(inputs), sampling, noise)


class Diffusers:
    """PriorTransformer and UnCLIPScheduler, called as diffusers' own unCLIP pipelines call them."""

    def build(self, shape: dict[str, int]) -> nn.Module:
        from diffusers import PriorTransformer, UnCLIPScheduler

        self.model = PriorTransformer(
            num_attention_heads=shape["heads"],
            attention_head_dim=shape["width"] // shape["heads"],
            num_layers=shape["depth"],
            embedding_dim=shape["width"],
            num_embeddings=CONTEXT,
        )
        self.scheduler = UnCLIPScheduler(
            variance_type="fixed_small_log", prediction_type="sample", num_train_timesteps=1000, clip_sample_range=5.0
        )
        return self.model

    def inputs(self, captions: "Captions") -> "Captions":
        return captions

    def loss(self, inputs: "Captions", step: int, draws: int) -> Tensor:
        target = nn.functional.normalize(inputs.image_emb, dim=-1) * inputs.image_emb.shape[-1] ** 0.5
        timestep = torch.randint(0, 1000, (len(target),), device=target.device)
        noisy = self.scheduler.add_noise(target, torch.randn_like(target), timestep)
        kept = torch.rand(len(target), 1, device=target.device) >= 0.1
        output = self.model(
            noisy,
            timestep=timestep,
            proj_embedding=inputs.text_emb * kept,
            encoder_hidden_states=inputs.states,
            attention_mask=inputs.mask & kept,
        ).predicted_image_embedding
        return nn.functional.mse_loss(output.float(), target)

    @torch.no_grad()
    def sample(self, inputs: "Captions", how: dict[str, Any]) -> Tensor:
        repeated = inputs.repeat(how["candidates"])
        zeros = torch.zeros_like
        text_emb = torch.cat([zeros(repeated.text_emb), repeated.text_emb])
        states = torch.cat([zeros(repeated.states), repeated.states])
        mask = torch.cat([zeros(repeated.mask), repeated.mask])
        z = torch.randn_like(repeated.text_emb)
        self.scheduler.set_timesteps(how["steps"])
        steps = self.scheduler.timesteps
        for i, t in enumerate(steps):
            output = self.model(
                torch.cat([z, z]),
                timestep=t,
                proj_embedding=text_emb,
                encoder_hidden_states=states,
                attention_mask=mask,
            ).predicted_image_embedding
            null, cond = output.float().chunk(2)
            guided = null + how["guidance"] * (cond - null)
            following = None if i + 1 == len(steps) else steps[i + 1]
            z = self.scheduler.step(guided, timestep=t, sample=z, prev_timestep=following).prev_sample
        return inputs.closest(z, how["candidates"])


class Dalle2Pytorch:
    """DiffusionPrior with DiffusionPriorNetwork; a CLIP adapter hands over the stored states instead of running CLIP."""

    def build(self, shape: dict[str, int]) -> nn.Module:
        width, depth = shape["width"], shape["depth"]
        full = sum(p.numel() for p in self._model(shape, 4 * width).parameters())
        # SwiGLU: three matrices of this many columns a layer; in multiples of 64 (or less, for tiny nets)
        unit = min(64, width // 4)
        hidden = 4 * width - (full - shape["parameters"]) / (3 * depth * width)
        self.hidden = round(hidden / unit) * unit
        self.model = self._model(shape, self.hidden)
        return self.model

    def _model(self, shape: dict[str, int], hidden: int) -> Any:
        from dalle2_pytorch import DiffusionPrior, DiffusionPriorNetwork
        from dalle2_pytorch.dalle2_pytorch import BaseClipAdapter

        class StoredClip(BaseClipAdapter):
            """ "Text" is a row number of the captions at hand."""

            captions: Captions
            dim_latent, image_size, image_channels, max_text_len = shape["width"], 224, 3, CONTEXT

            def embed_text(self, text: Tensor) -> tuple[Tensor, Tensor]:
                rows = text[:, 0]
                return self.captions.unit_text[rows], self.captions.states[rows]

        width = shape["width"]
        net = DiffusionPriorNetwork(
            dim=width,
            depth=shape["depth"],
            heads=shape["heads"],
            dim_head=width // shape["heads"],
            ff_mult=hidden / width,
            max_text_len=CONTEXT,
        )
        self.clip = StoredClip(nn.Identity())
        return DiffusionPrior(net, clip=self.clip, timesteps=1000, cond_drop_prob=0.1)

    def inputs(self, captions: "Captions") -> "Captions":
        self.clip.captions = captions
        return captions

    def loss(self, inputs: "Captions", step: int, draws: int) -> Tensor:
        image_emb = nn.functional.normalize(inputs.image_emb, dim=-1)  # the model scales this tensor in place
        return self.model(text_embed=inputs.unit_text, image_embed=image_emb, text_encodings=inputs.states)

    def sample(self, inputs: "Captions", how: dict[str, Any]) -> Tensor:
        rows = torch.arange(len(inputs.lengths), device=inputs.states.device)[:, None]
        # asked for n steps it evaluates n - 1, so that the work is the same with one more
        return self.model.sample(
            rows, num_samples_per_batch=how["candidates"], cond_scale=how["guidance"], timesteps=how["steps"] + 1
        )


class Captions:
    """B made-up captions with their z_i, padded to 77 positions with zeros; the same on every side."""

    def __init__(self, lengths: list[int], width: int, device: torch.device) -> None:
        random = torch.Generator().manual_seed(0)
        rows, self.lengths = len(lengths), lengths
        mask = torch.arange(CONTEXT) < torch.tensor(lengths)[:, None]
        states = torch.randn(rows, CONTEXT, width, generator=random)
        tokens = torch.randint(1, 900, (rows, CONTEXT), generator=random)
        tokens[torch.arange(rows), torch.tensor(lengths) - 1] = 999  # end of text: the largest id
        self.mask, self.states, self.tokens = (x.to(device) for x in (mask, states * mask[..., None], tokens * mask))
        self.image_emb = torch.randn(rows, width, generator=random).to(device)
        self.text_emb = torch.randn(rows, width, generator=random).to(device)

    @property
    def unit_text(self) -> Tensor:
        return nn.functional.normalize(self.text_emb, dim=-1)

    def repeat(self, count: int) -> "Captions":
        repeated = object.__new__(Captions)
        repeated.lengths = [n for n in self.lengths for _ in range(count)]
        for name in ("mask", "states", "tokens", "image_emb", "text_emb"):
            setattr(repeated, name, vars(self)[name].repeat_interleave(count, dim=0))
        return repeated

    def closest(self, drawn: Tensor, candidates: int) -> Tensor:
        """Of B · candidates rows, one for each caption: the closest to z_t."""
        drawn = nn.functional.normalize(drawn, dim=-1).view(-1, candidates, drawn.shape[-1])
        best = torch.einsum("bkd,bd->bk", drawn, self.unit_text).argmax(1)
        return drawn[torch.arange(len(drawn), device=drawn.device), best]


class Training:
    """The rest of a training step, the same on all sides: clipping, fused AdamW and an average of the weights."""

    def __init__(self, model: nn.Module) -> None:
        self.weights = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.weights, lr=LEARNING_RATE, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True
        )
        self.average = [p.detach().clone() for p in self.weights]

    def step(self, loss: Tensor) -> None:
        loss.backward()
        nn.utils.clip_grad_norm_(self.weights, CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(self.average, self.weights, 1 - EMA)


class Worker:
    """A side and what it was built with; answers requests."""

    def __init__(self, side: Unclip | Diffusers | Dalle2Pytorch) -> None:
        self.side = side
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.training: Training | None = None

    def build(self, shape: dict[str, int]) -> dict[str, Any]:
        torch.manual_seed(0)
        torch.set_num_threads(shape["threads"])
        self.width = shape["width"]
        self.model = self.side.build(shape).to(self.device)
        # diffusers makes parameters of two statistics, which belong to no side's work
        counted = [p.numel() for name, p in self.model.named_parameters() if name not in ("clip_mean", "clip_std")]
        hidden = self.side.hidden if isinstance(self.side, Dalle2Pytorch) else 4 * self.width
        return {"parameters": sum(counted), "feed_forward": hidden}

    def train_step(self, lengths: list[int], steps: int, draws: int = 1) -> dict[str, Any]:
        """Seconds of one step, the mean of ``steps``. Several draws a caption: ours only."""
        self.model.train()
        if self.training is None:
            self.training = Training(self.model)
        inputs = self.side.inputs(Captions(lengths, self.width, self.device))
        before = self.now()
        for step in range(steps):
            with torch.autocast(self.device.type, torch.bfloat16):
                loss = self.side.loss(inputs, step, draws)
            self.training.step(loss)
        return {"seconds": (self.now() - before) / steps, "loss": loss.item()}

    def sample(self, lengths: list[int], how: dict[str, Any]) -> dict[str, Any]:
        """Seconds for all the captions together, and whether the outcome holds numbers only."""
        self.model.eval()
        inputs = self.side.inputs(Captions(lengths, self.width, self.device))
        before = self.now()
        with torch.autocast(self.device.type, torch.bfloat16):
            drawn = self.side.sample(inputs, how)
        seconds = self.now() - before
        assert drawn.shape == (len(lengths), self.width), drawn.shape
        return {"seconds": seconds, "finite": bool(drawn.isfinite().all())}

    def memory(self) -> dict[str, float]:
        """MB: on a GPU the most that was allocated since the last time, else the process's largest resident size so far."""
        if self.device.type == "cuda":
            most = torch.cuda.max_memory_allocated() / 2**20
            torch.cuda.reset_peak_memory_stats()
            return {"megabytes": most}
        return {"megabytes": resident_megabytes()}

    def now(self) -> float:
        return now(self.device)


def now(device: torch.device) -> float:
    """Seconds, once the device's queued work is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def resident_megabytes() -> float:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024


def serve(requests: dict[str, Callable[..., dict[str, Any]]]) -> None:
    """Answer JSON lines until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the libraries print must not come between the answers
    for line in sys.stdin:
        request = json.loads(line)
        answer = requests[request.pop("do")](**request)
        print(json.dumps(answer), file=answers, flush=True)


def main() -> None:
    sides = {"unclip": Unclip, "diffusers": Diffusers, "dalle2_pytorch": Dalle2Pytorch}
    worker = Worker(sides[sys.argv[1]]())
    requests = {
        "build": worker.build,
        "train_step": worker.train_step,
        "sample": worker.sample,
        "memory": worker.memory,
    }
    serve(requests)


if __name__ == "__main__":
    main()
