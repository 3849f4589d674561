"""CLIP through open_clip: pictures to z_i, captions to z_t and token states.

Source: Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision".
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unclip.data.batch import Batch
from unclip.diffusion.noise import Noise
from unclip.errors import ArtifactError, ConfigError
from unclip.models.clip_lora import add_lora, merge_lora
from unclip.models.clip_sources import Architecture, foreign_description, is_foreign, load_weights, named_architecture
from unclip.models.contrastive import ALL, Contrast, contrastive_loss, of_all_ranks, sigmoid_loss
from unclip.models.interface import Interface, ModelConfig

MAX_LOGIT_SCALE = 100.0  # Radford et al. 2021, section 2.5
RESNET_STRIDE, RESNET_HEAD_WIDTH = 32, 64  # of RN50


@dataclass
class CLIPConfig(ModelConfig):
    """Either a model of open_clip (``name``) or the small one below.

    ``name``: one of open_clip's registry (ViT-B-32), or hf-hub:OWNER/MODEL or local-dir:FOLDER, which bring their weights.
    ``description`` is what such a place says of it, kept so that an artifact needs the place no more; leave it empty.
    ``pretrained``: a tag of open_clip (openai, laion2b_s34b_b79k …), or a local .pt or .safetensors file; "" trains a
    model of the registry from scratch. ``quick_gelu`` null takes what the architecture or the pretrained weights ask
    for. With a ``name``, the fields from ``embed_dim`` on do not apply and must keep their defaults.

    ``contrast``: the loss. ``freeze_image`` and ``freeze_text`` train the other tower only (LiT; Zhai et al. 2022), but for
    the last ``unlocked_image_groups`` or ``unlocked_text_groups``: the projection, the last block with its norm, then
    one block each, at last the input embeddings. ``lora_rank`` > 0 trains low-rank additions to the blocks' matrices (and the
    temperature) instead of the weights; the artifact holds the sum. ``gradient_checkpointing`` computes activations twice
    to hold fewer. ``text_only``: without the picture tower, which an imported text-to-image pipeline lacks.

    ``vision_blocks``: in place of a vision transformer CLIP's ResNet with attention pooling (Radford et al. 2021, sec. 2.4), so
    many blocks in each of its four stages ([3, 4, 6, 3] is RN50's) and ``vision_width`` channels to begin with; ``patch_size``,
    ``vision_layers`` and ``vision_heads`` do not apply then and must keep their defaults.
    """

    name: str = ""
    description: str = ""
    pretrained: str = ""
    quick_gelu: bool | None = None
    contrast: Contrast = Contrast.softmax
    freeze_image: bool = False
    freeze_text: bool = False
    unlocked_image_groups: int = 0
    unlocked_text_groups: int = 0
    lora_rank: int = 0
    gradient_checkpointing: bool = False
    text_only: bool = False
    embed_dim: int = 256
    image_size: int = 32
    patch_size: int = 8
    vision_width: int = 192
    vision_layers: int = 4
    vision_heads: int = 3
    vision_blocks: list[int] | None = None
    text_width: int = 192
    text_layers: int = 3
    text_heads: int = 3
    context_length: int = 32

    def __post_init__(self) -> None:
        for tower in ("image", "text"):
            if getattr(self, f"unlocked_{tower}_groups") and not getattr(self, f"freeze_{tower}"):
                raise ConfigError(f"model.unlocked_{tower}_groups needs model.freeze_{tower}=true: else all is trained")
        if self.lora_rank and (self.freeze_image or self.freeze_text):
            raise ConfigError("model.lora_rank freezes all weights and adapts both towers: leave out model.freeze_*")
        if self.name:
            names = list(CLIPConfig.__dataclass_fields__)
            self._refuse_changed(names[names.index("embed_dim") :], f"model.name={self.name}")
        else:
            self._check_small()

    def _refuse_changed(self, names: Sequence[str], why: str) -> None:
        """Settings that have no effect must keep their defaults."""
        changed = [key for key in names if getattr(self, key) != CLIPConfig.__dataclass_fields__[key].default]
        if changed:
            raise ConfigError(f"model.{changed[0]} has no effect with {why}; remove one of them")

    def _check_small(self) -> None:
        if self.text_width % self.text_heads:
            raise ConfigError(
                f"model.text_width={self.text_width} is not a multiple of its text_heads={self.text_heads}"
            )
        if self.vision_blocks is not None:
            self._refuse_changed(("patch_size", "vision_layers", "vision_heads"), "model.vision_blocks")
            if len(self.vision_blocks) != 4 or min(self.vision_blocks) < 1:
                raise ConfigError(
                    f"model.vision_blocks={self.vision_blocks}: give the blocks of four stages, as [1,1,1,1]"
                )
            if self.image_size < 1 or self.vision_width < 1 or self.image_size % RESNET_STRIDE or self.vision_width % 2:
                raise ConfigError(
                    f"a ResNet (model.vision_blocks) reads pictures whose side is a multiple of {RESNET_STRIDE} and has an even "
                    f"vision_width, not {self.image_size} and {self.vision_width}"
                )
        elif self.image_size % self.patch_size:
            raise ConfigError(f"model.image_size={self.image_size} is not a multiple of patch_size={self.patch_size}")
        elif self.vision_width % self.vision_heads:
            raise ConfigError(
                f"model.vision_width={self.vision_width} is not a multiple of its vision_heads={self.vision_heads}"
            )

    @property
    def columns(self) -> tuple[str, ...]:
        return ("image", "tokens")

    def architecture(self) -> Architecture:
        """What open_clip builds."""
        found = (
            named_architecture(self.name, self.pretrained, self.description, self.quick_gelu)
            if self.name
            else Architecture(_small(self))
        )
        if self.contrast is Contrast.sigmoid:
            found.arguments |= {"init_logit_scale": math.log(10), "init_logit_bias": -10.0}  # SigLIP, section 3.1
        return found


class CLIP(nn.Module):
    """open_clip's model: uint8 pictures in, raw (not unit-norm) embeddings out, captions cut to their length."""

    mean: Tensor
    std: Tensor

    def __init__(self, cfg: CLIPConfig, interface: Interface | None = None) -> None:
        super().__init__()
        import open_clip
        from open_clip.transformer import ResidualAttentionBlock

        if is_foreign(cfg.name) and not cfg.description:
            cfg = replace(cfg, description=foreign_description(cfg.name))
        self.cfg = cfg
        architecture = cfg.architecture()
        self.model: Any = open_clip.CLIP(**architecture.arguments)
        for module in list(self.model.modules()):
            if isinstance(module, ResidualAttentionBlock) and isinstance(module.attn, nn.MultiheadAttention):
                module.add_module("attn", Attention(module.attn))
        self._check_tower()
        if cfg.freeze_image:
            self.model.lock_image_tower(cfg.unlocked_image_groups, freeze_bn_stats=True)
        if cfg.freeze_text:
            self.model.lock_text_tower(cfg.unlocked_text_groups)
        self.model.set_grad_checkpointing(cfg.gradient_checkpointing)
        self.adapters: Any = None
        self._set_lora(cfg.lora_rank)
        self.tokenizer = Tokenizer(self.model.context_length)
        size = self.model.visual.image_size
        self.image_size: int = size if isinstance(size, int) else size[0]
        if cfg.text_only:
            self.model.visual = None
        self.register_buffer("mean", torch.tensor(architecture.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(architecture.std).view(1, 3, 1, 1), persistent=False)
        own = self.interface()
        if interface is not None and interface.embed_dim and replace(interface, clip="") != own:
            raise ArtifactError(f"the configuration builds a CLIP with {own}, but {interface} is asked for")

    def _check_tower(self) -> None:
        """Refuse what open_clip's towers other than transformers cannot do."""
        if self.cfg.lora_rank and not self._blocks(self.model.visual):
            raise ConfigError(
                "model.lora_rank adapts the matrices of transformers, which this CLIP's picture tower is not: set it to 0, and "
                "perhaps model.freeze_image=true"
            )
        if self.cfg.unlocked_image_groups and hasattr(self.model.visual, "attnpool"):
            raise ConfigError("a ResNet is frozen as a whole: set model.unlocked_image_groups=0, or freeze_image=false")

    def interface(self) -> Interface:
        """Widths for the later stages; ``clip`` is empty, the artifact's hash fills it."""
        return Interface(
            embed_dim=self.model.text_projection.shape[1],
            text_width=self.model.token_embedding.embedding_dim,
            context_length=self.model.context_length,
            vocab_size=self.model.vocab_size,
        )

    def fit(self, embeddings: None = None) -> None:
        """Load the pretrained weights, if any. A CLIP that is rebuilt from an artifact does not come here."""
        if self.cfg.pretrained or is_foreign(self.cfg.name):
            self._set_lora(0)
            load_weights(self.model, self.cfg.name, self.cfg.pretrained)
            self._set_lora(self.cfg.lora_rank)

    def finish(self) -> None:
        """After training: a CLIP with adapters becomes one without."""
        self._set_lora(0)
        self.cfg = replace(self.cfg, lora_rank=0)

    def _set_lora(self, rank: int) -> None:
        """Merge the adapters that are there, if any; add new ones if ``rank`` is not 0."""
        if self.adapters is not None:
            self.model = merge_lora(self.adapters[0])
        self.adapters = (add_lora(self.model, rank),) if rank else None  # in a tuple: not a module of this one

    def tokenize(self, captions: list[str]) -> Tensor:
        """(B, context_length) int64 token ids, see :class:`Tokenizer`."""
        return self.tokenizer(captions)

    def encode_image(self, image: Tensor) -> Tensor:
        """Raw z_i (B, D) of uint8 pictures (B, 3, H, W).

        Pictures of another size than CLIP's are resized (bicubic, antialiased) and centre-cropped.
        """
        if self.model.visual is None:
            raise ArtifactError(
                "this CLIP was imported without its picture tower, so it encodes captions only: import again with "
                "--image-encoder FOLDER, of the same CLIP"
            )
        x = image.float() / 255
        if image.shape[-2:] != (self.image_size, self.image_size):
            x = _resize(x, self.image_size)
        return self.model.visual((x - self.mean) / self.std)

    def encode_text(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Raw z_t (B, D) and the token states after ln_final (B, L, W) of token ids (B, L ≤ context_length).

        The tower is causal, so cutting the padding after the longest caption changes neither.
        """
        net, L = self.model, tokens.shape[1]
        x = net.token_embedding(tokens) + net.positional_embedding[:L]
        x = net.transformer(x, attn_mask=net.attn_mask[:L, :L])
        text_seq = net.ln_final(x)
        end = tokens.argmax(dim=1)  # the end-of-text token has the largest id
        pooled = text_seq[torch.arange(tokens.shape[0], device=tokens.device), end]
        return pooled @ net.text_projection, text_seq

    def losses(self, batch: Batch, noise: Noise | None = None) -> dict[str, Tensor]:
        """The contrastive loss of this rank's pairs over the global batch; CLIP draws no noise."""
        (image_emb, text_emb), mine = of_all_ranks(*self.features(batch))
        return self.contrast(image_emb, text_emb, mine)

    def features(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Unit z_i and z_t (B, D), float32."""
        if batch.image is None or batch.tokens is None:
            raise ValueError("CLIP needs a batch with pictures and tokens")
        image_emb = F.normalize(self.encode_image(batch.image).float(), dim=-1)
        return image_emb, F.normalize(self.encode_text(batch.tokens)[0].float(), dim=-1)

    def contrast(self, image_emb: Tensor, text_emb: Tensor, mine: slice = ALL) -> dict[str, Tensor]:
        """The loss of unit embeddings (B, D) of pairs, of those in ``mine`` among all."""
        with torch.no_grad():
            self.model.logit_scale.clamp_(0, math.log(MAX_LOGIT_SCALE))
        scale = self.model.logit_scale.exp()
        if self.cfg.contrast is Contrast.sigmoid:
            return {"contrastive": sigmoid_loss(image_emb, text_emb, scale, self.model.logit_bias, mine)}
        return {"contrastive": contrastive_loss(image_emb, text_emb, scale, mine)}

    def logit_parameters(self) -> list[nn.Parameter]:
        """What the loss holds beside the embeddings: temperature and, for SigLIP, bias."""
        sigmoid = self.cfg.contrast is Contrast.sigmoid
        return [self.model.logit_scale, *([self.model.logit_bias] if sigmoid else [])]

    def learning_rate_scales(self, decay: float) -> dict[str, float]:
        """By parameter name, decay^(layers above it): the input embeddings of a tower learn slowest (Clark et al. 2020)."""
        if not self._blocks(self.model.visual):
            raise ConfigError(
                "optim.layer_decay grades the layers of transformers, which this CLIP's picture tower is not: set it to 1"
            )
        depths = {"visual.": len(self._blocks(self.model.visual)), "": len(self._blocks(self.model))}
        return {
            name: decay ** _layers_above(name.removeprefix("model."), depths) for name, _ in self.named_parameters()
        }

    @staticmethod
    def _blocks(tower: Any) -> Any:
        return tower.transformer.resblocks if hasattr(tower, "transformer") else []


def _layers_above(name: str, depths: dict[str, int]) -> int:
    """How many blocks of its tower stand between a parameter of open_clip's model and the loss; 0 for the head."""
    tower = "visual." if name.startswith("visual.") else ""
    name = name.removeprefix("visual.")
    if name.startswith("transformer.resblocks."):
        return depths[tower] - int(name.split(".")[2])
    if name.startswith(("ln_post", "proj", "ln_final", "text_projection", "logit_")):
        return 0
    return depths[tower] + 1


@torch.no_grad()
def interpolate(start: nn.Module, tuned: nn.Module, share: float) -> None:
    """Make ``tuned`` (1 - share) * start + share * tuned, weight by weight (WiSE-FT; Wortsman et al. 2022).

    Raises :class:`ConfigError` where the two are not of one architecture, and for batch norms, whose statistics a mixture lacks.
    """
    counts = "num_batches_tracked"  # which a frozen batch norm lacks
    ours, theirs = (
        {name: value for name, value in model.state_dict().items() if not name.endswith(counts)}
        for model in (start, tuned)
    )
    if {k: v.shape for k, v in ours.items()} != {k: v.shape for k, v in theirs.items()}:
        raise ConfigError(
            "the two CLIPs are of different architectures; WiSE-FT mixes a CLIP with its own fine-tuned form"
        )
    if any(name.endswith("running_var") and not torch.equal(value, ours[name]) for name, value in theirs.items()):
        raise ConfigError(
            "WiSE-FT of trained batch norms (a CLIP's ResNet): nobody knows their statistics for the mixed weights. Fine-tune with "
            "model.freeze_image=true to mix the captions' towers"
        )
    for name, value in theirs.items():
        value.copy_(torch.lerp(ours[name].float(), value.float(), share))


class Attention(nn.Module):
    """Self-attention with the weights and names of open_clip's ``nn.MultiheadAttention``.

    On a CPU it multiplies matrices itself: torch's fused kernel takes 2 to 6 times as long there, forward and backward
    in bfloat16, for the short sequences of CLIP.
    """

    def __init__(self, source: nn.MultiheadAttention) -> None:
        super().__init__()
        self.num_heads = source.num_heads
        self.in_proj_weight, self.in_proj_bias = source.in_proj_weight, source.in_proj_bias
        self.out_proj = source.out_proj

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool = False, attn_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """``query`` (B, L, W), which is also ``key`` and ``value``; ``attn_mask`` (L, L) is added to the logits."""
        B, L, W = query.shape
        qkv = F.linear(query, self.in_proj_weight, self.in_proj_bias)
        q, k, v = qkv.view(B, L, 3, self.num_heads, W // self.num_heads).permute(2, 0, 3, 1, 4)
        if query.device.type == "cpu":
            logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
            weights = (logits if attn_mask is None else logits + attn_mask).softmax(dim=-1)
            mixed = weights.to(v.dtype) @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, None if attn_mask is None else attn_mask.to(q.dtype))
        return self.out_proj(mixed.transpose(1, 2).reshape(B, L, W)), None


class Tokenizer:
    """Captions to ids of CLIP's BPE vocabulary, as int64 (B, context_length): start, words, end, zeros.

    A caption that is too long loses its last words, not its end token. Small and picklable, for data workers.
    """

    def __init__(self, context_length: int) -> None:
        self.context_length = context_length
        self._bpe: Any = None

    def __call__(self, captions: list[str]) -> Tensor:
        return self._vocabulary()(captions)

    def length(self, caption: str) -> int:
        """Tokens of the whole caption, with start and end; those beyond ``context_length`` are cut."""
        return len(self._vocabulary().encode(caption)) + 2

    def _vocabulary(self) -> Any:
        if self._bpe is None:
            from open_clip import SimpleTokenizer

            self._bpe = SimpleTokenizer(context_length=self.context_length)
        return self._bpe

    def __getstate__(self) -> dict[str, Any]:
        return {"context_length": self.context_length, "_bpe": None}


def _small(config: CLIPConfig) -> dict[str, Any]:
    blocks, heads = config.vision_blocks, config.vision_heads
    return {
        "embed_dim": config.embed_dim,
        "quick_gelu": bool(config.quick_gelu),
        "vision_cfg": {
            "image_size": config.image_size,
            "patch_size": config.patch_size,
            "width": config.vision_width,
            "layers": config.vision_layers if blocks is None else blocks,
            "head_width": config.vision_width // heads if blocks is None else RESNET_HEAD_WIDTH,
        },
        "text_cfg": {
            "context_length": config.context_length,
            "width": config.text_width,
            "layers": config.text_layers,
            "heads": config.text_heads,
        },
    }


def _resize(image: Tensor, size: int) -> Tensor:
    """Shorter side to ``size`` and the central square, values in [0, 1]; like CLIP's own preprocessing."""
    height, width = image.shape[-2:]
    side = min(height, width)
    shape = [round(height * size / side), round(width * size / side)]
    if side != size:
        image = F.interpolate(image, shape, mode="bicubic", align_corners=False, antialias=True).clamp(0, 1)
    top, left = (shape[0] - size) // 2, (shape[1] - size) // 2
    return image[..., top : top + size, left : left + size]
