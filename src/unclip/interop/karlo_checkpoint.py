"""Karlo's own checkpoints: which of our weights each of theirs is.

They are Lightning's .ckpt files; prior and decoder lie below ``model.``, the upsampler's two nets below ``model_first_steps.``
and ``model_last_step.``. The nets are guided-diffusion's, whose queries, keys and values are one matrix, head by head. Sizes
follow from the shapes; heads of 64 and groups of 32 are Karlo's, as are the sides of the pictures.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import Tensor

from unclip.errors import ArtifactError, ConfigError
from unclip.interop.foreign import Foreign, Stage
from unclip.interop.karlo_config import decoder_config, prior_config, scheduler_json, unet_json, upsampler_config
from unclip.interop.weight_files import Source, described
from unclip.models.diffusion_prior import DiffusionPriorConfig
from unclip.nets.unet import UNetConfig

HEAD, GROUPS = 64, 32
LOW_SIZE, SIZE = 64, 256
CLAMP = 10.0  # of the prior's x0, in Karlo's own code; diffusers has 5
RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
OUTSIDE = {
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2", "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
}  # fmt: skip
TEXT_PROJ = {
    "encoder_hidden_states_proj": "text_seq_proj.0", "text_encoder_hidden_states_norm": "text_seq_proj.1",
    "clip_extra_context_tokens_proj": "clip_tok_proj", "embedding_proj": "text_feat_proj",
    "clip_image_embeddings_project_to_time_embeddings": "clip_emb",
}  # fmt: skip
PRIOR = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2", "proj_in": "clip_img_proj",
    "embedding_proj": "text_emb_proj", "encoder_hidden_states_proj": "text_enc_proj", "norm_out": "final_ln",
    "proj_to_clip_embeddings": "out_proj",
}  # fmt: skip
PRIOR_BLOCK = {"norm1": "ln_1", "norm3": "ln_2", "attn1.to_out.0": "attn.c_proj", "ff.net.0.proj": "mlp.c_fc",
               "ff.net.2": "mlp.c_proj"}  # fmt: skip
QKV = ("to_q", "to_k", "to_v")


def read_checkpoints(folder: Path) -> Foreign:
    """The stages of a folder with Karlo's .ckpt files and, for the prior, the statistics *stats.th.

    Raises ArtifactError for files that are not Karlo's or not complete; no code in them is run.
    """
    stages = []
    for file in sorted(folder.glob("*.ckpt")):
        found = {name.removeprefix("state_dict."): source for name, source in described(file).items()}
        if "model.prd_emb" in found:
            stages.append(_prior(_below(found, "model.", file), file))
        elif any(name.startswith("model_first_steps.") for name in found):
            stages.append(_upsampler(found, file))
        elif "model.cf_param" in found:
            stages.append(_decoder(_below(found, "model.", file), file))
        else:
            raise ArtifactError(
                f"{file} is no checkpoint of Karlo: it has neither its prior, its decoder nor its upsampler"
            )
    kinds = [stage.kind for stage in stages]
    if twice := [kind for kind in kinds if kinds.count(kind) > 1]:
        raise ConfigError(f"{folder} holds several checkpoints of the {twice[0]}; leave the one to import there")
    return Foreign("Karlo's checkpoints", stages)


class _Theirs:
    """Tensors of one net by their names, which are taken one after another; those that are left are unknown."""

    def __init__(self, found: Mapping[str, Source], file: Path) -> None:
        self.found, self.file = dict(found), file
        self.left = {*found}

    def __contains__(self, name: str) -> bool:
        return name in self.found

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self.found:
            raise ArtifactError(f"{self.file}: {name} is missing; the file is not complete, or not Karlo's")
        return self.found[name].shape

    def take(self, name: str) -> Source:
        self.shape(name)
        self.left.discard(name)
        return self.found[name]

    def layer(self, ours: str, theirs: str) -> Iterator[tuple[str, Source]]:
        """A layer with a weight and, if it has one, a bias. Convolutions of width 1 become matrices."""
        for kind in ("weight", "bias"):
            if f"{theirs}.{kind}" in self or kind == "weight":
                source = self.take(f"{theirs}.{kind}")
                yield f"{ours}.{kind}", _flat(source) if len(source.shape) == 3 else source

    def split(self, ours: tuple[str, ...], theirs: str) -> Iterator[tuple[str, Source]]:
        """A matrix whose rows are, for each head, those of ``ours`` one after another."""
        for kind in ("weight", "bias"):
            source = self.take(f"{theirs}.{kind}")
            rows = source.shape[0] // len(ours)
            shape = (rows, *source.shape[1:2])
            for number, name in enumerate(ours):
                part = partial(_rows_of, parts=len(ours), number=number)
                yield f"{name}.{kind}", replace(source, shape=shape, change=part)

    def check(self) -> None:
        if self.left:
            raise ArtifactError(
                f"{self.file}: {min(self.left)} is unknown ({len(self.left)} such); the net is not one of Karlo's"
            )


def _rows_of(value: Tensor, parts: int, number: int) -> Tensor:
    """(heads·parts·64, C, 1) or (heads·parts·64,) to the rows of one part, (heads·64, C) or (heads·64,)."""
    value = value[..., 0] if value.ndim == 3 else value
    return value.unflatten(0, (-1, parts, HEAD))[:, number].flatten(0, 1).contiguous()


def _flat(source: Source) -> Source:
    return replace(source, shape=source.shape[:2], change=lambda value: value[..., 0])


def _prior(theirs: _Theirs, file: Path) -> Stage:
    width, embed_dim = theirs.shape("clip_img_proj.weight")
    length = theirs.shape("positional_embedding")[-2] - 4
    depth = 1 + max(int(name.split(".")[2]) for name in theirs.found if name.startswith("transformer.resblocks."))
    config = {
        "_class_name": "PriorTransformer", "num_attention_heads": width // HEAD, "attention_head_dim": HEAD,
        "num_layers": depth, "embedding_dim": embed_dim, "num_embeddings": length,
    }  # fmt: skip
    cfg: DiffusionPriorConfig = prior_config(config, scheduler_json("sample", "fixed_small_log", CLAMP), str(file))
    sources: dict[str, Source] = {}
    for ours, name in PRIOR.items():
        sources |= theirs.layer(ours, name)
    for ours, name in (("positional_embedding", "positional_embedding"), ("prd_embedding", "prd_emb")):
        sources[ours] = replace(
            theirs.take(name), shape=(1, *theirs.shape(name)[-2:]), change=lambda v: v.view(1, *v.shape[-2:])
        )
    for block in range(depth):
        mine, its = f"transformer_blocks.{block}", f"transformer.resblocks.{block}"
        for ours, name in PRIOR_BLOCK.items():
            sources |= theirs.layer(f"{mine}.{ours}", f"{its}.{name}")
        sources |= theirs.split(tuple(f"{mine}.attn1.{name}" for name in QKV), f"{its}.attn.c_qkv")
    theirs.left -= {"clip_mean", "clip_std"}
    theirs.check()
    sources = {f"net.{name}": source for name, source in sources.items()}
    return Stage("prior", cfg, sources | _statistics(file), str(file), (embed_dim, length), "net.")


def _statistics(file: Path) -> dict[str, Source]:
    """Mean and standard deviation of z_i, from the file beside the prior."""
    beside = sorted(file.parent.glob("*stats.th"))
    if len(beside) != 1:
        raise ArtifactError(
            f"{file} needs the statistics of z_i beside it, ViT-L-14_stats.th; {len(beside)} such files are there"
        )
    found = list(described(beside[0]).values())
    if len(found) != 2 or len({source.shape for source in found}) != 1:
        raise ArtifactError(f"{beside[0]} does not hold a mean and a standard deviation")
    shape = (1, found[0].shape[-1])
    mean, std = (replace(source, shape=shape, change=lambda value: value.view(1, -1)) for source in found)
    return {"clip_mean": mean, "clip_std": std}


def _decoder(theirs: _Theirs, file: Path) -> Stage:
    net = unet_of(theirs)
    context_dim, embed_dim = theirs.shape("text_seq_proj.0.weight")
    tokens = theirs.shape("clip_tok_proj.weight")[0] // context_dim
    proj = {
        "_class_name": "UnCLIPTextProjModel", "clip_extra_context_tokens": tokens, "clip_embeddings_dim": embed_dim,
        "time_embed_dim": net.time_dim, "cross_attention_dim": context_dim,
    }  # fmt: skip
    config = unet_json(net, LOW_SIZE, theirs.shape("out.2.weight")[0], context_dim)
    cfg, _ = decoder_config(config, proj, scheduler_json("epsilon", "learned_range", 1.0))
    sources = {f"net.unet.{name}": source for name, source in unet_sources(theirs, net)}
    for ours, name in TEXT_PROJ.items():
        sources |= theirs.layer(f"net.text_proj.{ours}", name)
    null = "net.text_proj.learned_classifier_free_guidance_embeddings"
    sources[null] = replace(theirs.take("cf_param"), shape=(embed_dim,), change=lambda value: value.view(-1))
    theirs.check()
    return Stage("decoder", cfg, sources, str(file), (embed_dim, 0), "net.text_proj.")


def _upsampler(found: Mapping[str, Source], file: Path) -> Stage:
    sources: dict[str, Source] = {}
    nets = []
    for ours, prefix in (("net", "model_first_steps."), ("last_net", "model_last_step.")):
        theirs = _below(found, prefix, file)
        nets.append(unet_of(theirs))
        sources |= {f"{ours}.unet.{name}": source for name, source in unet_sources(theirs, nets[-1])}
        theirs.check()
    if nets[0] != nets[1]:
        raise ArtifactError(f"{file}: its two nets are of different shapes")
    config = unet_json(nets[0], SIZE, 3, None)
    cfg = upsampler_config(config, scheduler_json("epsilon", "fixed_small_log", 1.0), LOW_SIZE, str(file))
    return Stage("upsampler", cfg, sources, str(file))


def _below(found: Mapping[str, Source], prefix: str, file: Path) -> _Theirs:
    return _Theirs({n.removeprefix(prefix): source for n, source in found.items() if n.startswith(prefix)}, file)


def unet_of(theirs: _Theirs) -> UNetConfig:
    """The shape of an U-Net. Only its upsampling blocks tell how many levels it has."""
    blocks = 1 + max((int(n.split(".")[1]) for n in theirs.found if n.startswith("output_blocks.")), default=-1)
    ups = [o for o in range(blocks) if any(f"output_blocks.{o}.{n}.in_layers.0.weight" in theirs for n in (1, 2))]
    levels = len(ups) + 1
    if blocks % levels or blocks // levels < 2:
        raise ArtifactError(f"{theirs.file}: {blocks} output blocks on {levels} levels are not those of Karlo's U-Nets")
    num_blocks = blocks // levels - 1
    firsts = [1 + level * (num_blocks + 1) for level in range(levels)]
    channels = [theirs.shape(f"input_blocks.{first}.0.out_layers.3.weight")[0] for first in firsts]
    attending = [level for level, first in enumerate(firsts) if f"input_blocks.{first}.1.qkv.weight" in theirs]
    scale_shift = theirs.shape("input_blocks.1.0.emb_layers.1.weight")[0] == 2 * channels[0]
    return UNetConfig(channels, num_blocks, attending, HEAD, 0.0, GROUPS, scale_shift)


def unet_sources(theirs: _Theirs, net: UNetConfig) -> Iterator[tuple[str, Source]]:
    """Each weight of our U-Net (diffusers' names), from guided-diffusion's."""
    for ours, name in OUTSIDE.items():
        yield from theirs.layer(ours, name)
    levels, number = len(net.channels), 1
    for level in range(levels):
        for block in range(net.num_blocks):
            yield from _pair(
                theirs, f"down_blocks.{level}", block, f"input_blocks.{number}", level in net.attention_levels
            )
            number += 1
        if level < levels - 1:
            yield from _resnet(theirs, f"down_blocks.{level}.downsamplers.0", f"input_blocks.{number}.0")
            number += 1
    yield from _resnet(theirs, "mid_block.resnets.0", "middle_block.0")
    if net.attention_levels:
        yield from _attention(theirs, "mid_block.attentions.0", "middle_block.1")
    yield from _resnet(theirs, "mid_block.resnets.1", f"middle_block.{2 if net.attention_levels else 1}")
    number = 0
    for up, level in enumerate(reversed(range(levels))):
        attends = level in net.attention_levels
        for block in range(net.num_blocks + 1):
            yield from _pair(theirs, f"up_blocks.{up}", block, f"output_blocks.{number}", attends)
            number += 1
        if level > 0:
            place = f"output_blocks.{number - 1}.{2 if attends else 1}"
            yield from _resnet(theirs, f"up_blocks.{up}.upsamplers.0", place)


def _pair(theirs: _Theirs, level: str, block: int, place: str, attends: bool) -> Iterator[tuple[str, Source]]:
    yield from _resnet(theirs, f"{level}.resnets.{block}", f"{place}.0")
    if attends:
        yield from _attention(theirs, f"{level}.attentions.{block}", f"{place}.1")


def _resnet(theirs: _Theirs, ours: str, place: str) -> Iterator[tuple[str, Source]]:
    for name, its in RESNET.items():
        if name != "conv_shortcut" or f"{place}.{its}.weight" in theirs:
            yield from theirs.layer(f"{ours}.{name}", f"{place}.{its}")


def _attention(theirs: _Theirs, ours: str, place: str) -> Iterator[tuple[str, Source]]:
    yield from theirs.layer(f"{ours}.group_norm", f"{place}.norm")
    yield from theirs.split(tuple(f"{ours}.{name}" for name in QKV), f"{place}.qkv")
    yield from theirs.split((f"{ours}.add_k_proj", f"{ours}.add_v_proj"), f"{place}.encoder_kv")
    yield from theirs.layer(f"{ours}.to_out.0", f"{place}.proj_out")
