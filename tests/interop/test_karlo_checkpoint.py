"""Karlo's own checkpoints, Kandinsky's prior, and what `unclip inspect` says of files."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from tests_support import Canary
from tiny_karlo import D, image_encoder, prior, schedulers, text_encoder, tokenizer
from torch.testing import assert_close
from typer.testing import CliRunner

from unclip import artifact
from unclip.cli.app import app
from unclip.config import to_plain
from unclip.errors import ArtifactError, ConfigError
from unclip.interop.karlo import import_karlo
from unclip.models.clip import CLIP, CLIPConfig
from unclip.nets.layers import Cond, Keep

HEADS, HEAD, CONTEXT, STATES = 2, 64, 96, 32
RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
          "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}  # fmt: skip


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP with token states as wide as its embeddings, which read 77 tokens."""
    torch.manual_seed(0)
    small = {"image_size": 16, "vision_width": 32, "vision_layers": 1, "vision_heads": 2}
    small |= {"text_width": STATES, "text_layers": 1, "text_heads": 2, "context_length": 77}
    model = CLIP(CLIPConfig(embed_dim=STATES, **small))
    run = tmp_path_factory.mktemp("clip") / "clip"
    artifact.save(run, model, artifact.Manifest("clip", "clip", to_plain(model.cfg), to_plain(model.interface())))
    return run


def joined(parts: list[torch.Tensor]) -> torch.Tensor:
    """Rows of several matrices head by head, as one: head 0 of each, then head 1 of each ..."""
    heads = [part.unflatten(0, (-1, HEAD)) for part in parts]
    return torch.cat([head for row in zip(*heads, strict=True) for head in row])


def matrices(
    state: dict[str, torch.Tensor], ours: list[str], theirs: str, width_one: bool = True
) -> dict[str, torch.Tensor]:
    weight = joined([state[f"{name}.weight"] for name in ours])
    bias = joined([state[f"{name}.bias"] for name in ours])
    return {f"{theirs}.weight": weight[..., None] if width_one else weight, f"{theirs}.bias": bias}


def layer(state: dict[str, torch.Tensor], ours: str, theirs: str) -> dict[str, torch.Tensor]:
    return {f"{theirs}.{k}": state[f"{ours}.{k}"] for k in ("weight", "bias") if f"{ours}.{k}" in state}


def resnet(state: dict[str, torch.Tensor], ours: str, theirs: str) -> dict[str, torch.Tensor]:
    found = {}
    for name, its in RESNET.items():
        found |= layer(state, f"{ours}.{name}", f"{theirs}.{its}")
    return found


def attention(state: dict[str, torch.Tensor], ours: str, theirs: str) -> dict[str, torch.Tensor]:
    found = layer(state, f"{ours}.group_norm", f"{theirs}.norm") | layer(
        state, f"{ours}.to_out.0", f"{theirs}.proj_out"
    )
    found[f"{theirs}.proj_out.weight"] = found[f"{theirs}.proj_out.weight"][..., None]
    found |= matrices(state, [f"{ours}.{name}" for name in ("to_q", "to_k", "to_v")], f"{theirs}.qkv")
    return found | matrices(state, [f"{ours}.{name}" for name in ("add_k_proj", "add_v_proj")], f"{theirs}.encoder_kv")


def guided_diffusion(state: dict[str, torch.Tensor], attends: bool) -> dict[str, torch.Tensor]:
    """Two levels of one block each, under guided-diffusion's names, written out one by one; attention on the second."""
    found = layer(state, "conv_in", "input_blocks.0.0") | layer(state, "conv_norm_out", "out.0")
    found |= layer(state, "conv_out", "out.2") | layer(state, "time_embedding.linear_1", "time_embed.0")
    found |= layer(state, "time_embedding.linear_2", "time_embed.2")
    for ours, theirs in {
        "down_blocks.0.resnets.0": "input_blocks.1.0", "down_blocks.0.downsamplers.0": "input_blocks.2.0",
        "down_blocks.1.resnets.0": "input_blocks.3.0", "mid_block.resnets.0": "middle_block.0",
        "mid_block.resnets.1": "middle_block.2" if attends else "middle_block.1",
        "up_blocks.0.resnets.0": "output_blocks.0.0", "up_blocks.0.resnets.1": "output_blocks.1.0",
        "up_blocks.0.upsamplers.0": "output_blocks.1.2" if attends else "output_blocks.1.1",
        "up_blocks.1.resnets.0": "output_blocks.2.0", "up_blocks.1.resnets.1": "output_blocks.3.0",
    }.items():  # fmt: skip
        found |= resnet(state, ours, theirs)
    if attends:
        for ours, theirs in {
            "down_blocks.1.attentions.0": "input_blocks.3.1", "mid_block.attentions.0": "middle_block.1",
            "up_blocks.0.attentions.0": "output_blocks.0.1", "up_blocks.0.attentions.1": "output_blocks.1.1",
        }.items():  # fmt: skip
            found |= attention(state, ours, theirs)
    return found


def nets() -> dict[str, Any]:
    """diffusers' nets in Karlo's form: heads of 64, groups of 32."""
    from diffusers import PriorTransformer, UNet2DConditionModel, UNet2DModel
    from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel

    torch.manual_seed(0)
    shared = {"layers_per_block": 1, "block_out_channels": (64, 128)}
    decoder = UNet2DConditionModel(
        sample_size=64, in_channels=3, out_channels=6, attention_head_dim=64, cross_attention_dim=CONTEXT,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn", class_embed_type="identity", resnet_time_scale_shift="scale_shift",
        **shared,
    )  # fmt: skip

    def upsampler() -> Any:
        return UNet2DModel(
            sample_size=256, in_channels=6, out_channels=3, add_attention=False,
            down_block_types=("ResnetDownsampleBlock2D",) * 2, up_block_types=("ResnetUpsampleBlock2D",) * 2, **shared,
        )  # fmt: skip

    prior = PriorTransformer(num_attention_heads=HEADS, attention_head_dim=HEAD, num_layers=2, embedding_dim=STATES)
    proj = UnCLIPTextProjModel(clip_embeddings_dim=STATES, time_embed_dim=256, cross_attention_dim=CONTEXT)
    found = {"prior": prior, "decoder": decoder, "text_proj": proj, "first": upsampler(), "last": upsampler()}
    with torch.no_grad():
        for name in ("positional_embedding", "prd_embedding", "clip_mean"):
            prior.get_parameter(name).normal_(std=0.3)
        prior.clip_std.uniform_(0.5, 1)
        proj.learned_classifier_free_guidance_embeddings.normal_()
    return found


class Callback:
    """Something that a training loop leaves in its checkpoint."""


def write_checkpoints(folder: Path, theirs: dict[str, Any]) -> None:
    state = {name: net.state_dict() for name, net in theirs.items()}
    prior = state["prior"]
    own = {
        "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2", "proj_in": "clip_img_proj",
        "embedding_proj": "text_emb_proj", "encoder_hidden_states_proj": "text_enc_proj", "norm_out": "final_ln",
        "proj_to_clip_embeddings": "out_proj",
    }  # fmt: skip
    found = {"positional_embedding": prior["positional_embedding"], "prd_emb": prior["prd_embedding"]}
    for ours, name in own.items():
        found |= layer(prior, ours, name)
    for i in range(2):
        block, its = f"transformer_blocks.{i}", f"transformer.resblocks.{i}"
        for ours, name in {"norm1": "ln_1", "norm3": "ln_2", "attn1.to_out.0": "attn.c_proj", "ff.net.0.proj": "mlp.c_fc",
                           "ff.net.2": "mlp.c_proj"}.items():  # fmt: skip
            found |= layer(prior, f"{block}.{ours}", f"{its}.{name}")
        names = [f"{block}.attn1.{name}" for name in ("to_q", "to_k", "to_v")]
        found |= matrices(prior, names, f"{its}.attn.c_qkv", width_one=False)
    rest = {"callbacks": {"keep": Callback()}, "global_step": 7}
    torch.save({"state_dict": below("model.", found), **rest}, folder / "prior-ckpt-step=01000000-of-01000000.ckpt")
    torch.save((prior["clip_mean"][0], prior["clip_std"][0]), folder / "ViT-L-14_stats.th")

    proj = state["text_proj"]
    found = guided_diffusion(state["decoder"], attends=True)
    found["cf_param"] = proj["learned_classifier_free_guidance_embeddings"]
    for ours, name in {
        "encoder_hidden_states_proj": "text_seq_proj.0", "text_encoder_hidden_states_norm": "text_seq_proj.1",
        "clip_extra_context_tokens_proj": "clip_tok_proj", "embedding_proj": "text_feat_proj",
        "clip_image_embeddings_project_to_time_embeddings": "clip_emb",
    }.items():  # fmt: skip
        found |= layer(proj, ours, name)
    torch.save({"state_dict": below("model.", found), **rest}, folder / "decoder-ckpt-step=01000000-of-01000000.ckpt")
    found = below("model_first_steps.", guided_diffusion(state["first"], attends=False))
    found |= below("model_last_step.", guided_diffusion(state["last"], attends=False))
    torch.save({"state_dict": found}, folder / "improved-sr-ckpt-step=1.2M.ckpt")


def below(prefix: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {prefix + name: value for name, value in state.items()}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder, theirs = tmp_path_factory.mktemp("original"), nets()
    write_checkpoints(folder, theirs)
    return folder, theirs


def test_karlos_checkpoints_are_diffusers_nets(checkpoints: tuple[Path, dict[str, Any]], clip: Path, tmp_path: Path):
    folder, theirs = checkpoints
    import_karlo(folder, tmp_path / "runs", clip=clip)
    stages = {kind: artifact.read_weights(tmp_path / "runs" / kind) for kind in ("prior", "decoder", "upsampler")}
    places = {"prior": ("prior", "net."), "decoder": ("decoder", "net.unet."), "text_proj": ("decoder", "net.text_proj."),
              "first": ("upsampler", "net.unet."), "last": ("upsampler", "last_net.unet.")}  # fmt: skip
    for part, (kind, prefix) in places.items():
        for name, value in theirs[part].state_dict().items():
            own = name if name in ("clip_mean", "clip_std") else prefix + name
            assert torch.equal(stages[kind][own], value), name
    decoder = artifact.load(tmp_path / "runs" / "decoder")[0]
    assert (decoder.cfg.image_size, decoder.cfg.net.channels, decoder.cfg.net.attention_levels) == (64, [64, 128], [1])
    assert artifact.load(tmp_path / "runs" / "prior")[0].cfg.diffusion.clip_range == 10.0
    assert artifact.read_manifest(tmp_path / "runs" / "clip").hash == artifact.read_manifest(clip).hash
    assert decoder.interface.clip == artifact.read_manifest(clip).hash


def test_queries_keys_and_values_stand_head_by_head():
    """guided-diffusion's attention, computed from its one matrix by its definition, is ours from what is read of it."""
    from unclip.interop.karlo_checkpoint import _rows_of

    torch.manual_seed(0)
    width, length = 2 * HEAD, 5
    weight, x = torch.randn(3 * width, width, 1) / width**0.5, torch.randn(1, width, length)
    qkv = torch.nn.functional.conv1d(x, weight).reshape(2, 3 * HEAD, length)  # heads first, then q, k, v
    q, k, v = qkv.split(HEAD, dim=1)
    wanted = torch.einsum("hts,hcs->hct", (torch.einsum("hct,hcs->hts", q, k) / HEAD**0.5).softmax(-1), v)
    parts = [x[0].T @ _rows_of(weight, 3, number).T for number in range(3)]
    q, k, v = (part.unflatten(-1, (2, HEAD)).transpose(0, 1) for part in parts)
    found = torch.nn.functional.scaled_dot_product_attention(q[None], k[None], v[None])[0]
    assert_close(found.transpose(1, 2), wanted, atol=1e-5, rtol=1e-5)


def test_incomplete_checkpoints_are_told(checkpoints: tuple[Path, dict[str, Any]], clip: Path, tmp_path: Path):
    folder, _ = checkpoints
    with pytest.raises(ConfigError, match="brings no CLIP: add --clip RUN"):
        import_karlo(folder, tmp_path / "runs")
    alone = tmp_path / "alone"
    alone.mkdir()
    for file in folder.glob("prior*"):
        os.link(file, alone / file.name)
    with pytest.raises(ArtifactError, match=r"needs the statistics of z_i beside it"):
        import_karlo(alone, tmp_path / "runs", clip=clip)
    torch.save({"state_dict": {"layer.weight": torch.zeros(2)}}, alone / "other.ckpt")
    with pytest.raises(ArtifactError, match=r"other\.ckpt is no checkpoint of Karlo"):
        import_karlo(alone, tmp_path / "runs", clip=clip)


def test_kandinskys_prior(tmp_path: Path):
    torch.manual_seed(0)
    theirs, text = prior(), text_encoder()
    parts = {"prior": theirs, "text_encoder": text, "image_encoder": image_encoder(), "tokenizer": tokenizer(),
             "scheduler": schedulers()["prior_scheduler"]}  # fmt: skip
    from diffusers import KandinskyV22PriorPipeline
    from transformers import CLIPImageProcessor

    KandinskyV22PriorPipeline(**parts, image_processor=CLIPImageProcessor()).save_pretrained(tmp_path / "kandinsky")
    import_karlo(tmp_path / "kandinsky", tmp_path / "runs")
    assert {p.name for p in (tmp_path / "runs").iterdir()} == {"clip", "prior"}
    ours = artifact.load(tmp_path / "runs" / "prior", kind="prior")[0]
    cond = Cond(
        text_emb=torch.randn(2, D),
        text_seq=torch.randn(2, 77, D),
        text_mask=torch.arange(77) < torch.tensor([[5], [9]]),
    )
    x_t, timestep = torch.randn(2, D), torch.tensor([3, 700])
    given = {"proj_embedding": cond.text_emb, "encoder_hidden_states": cond.text_seq, "attention_mask": cond.text_mask}
    with torch.no_grad():
        wanted = theirs(x_t, timestep, **given).predicted_image_embedding
        assert_close(ours.net(x_t, timestep, ours.net.prepare(cond, Keep())), wanted, atol=1e-5, rtol=0)

    import_karlo(tmp_path / "kandinsky" / "prior", tmp_path / "alone", clip=tmp_path / "runs" / "clip")
    both = [artifact.read_manifest(tmp_path / place / "prior").hash for place in ("runs", "alone")]
    assert both[0] == both[1]


def dalle2(canary: Path) -> dict[str, Any]:
    """The layout of dalle2-pytorch's trainer: a state, a pickled version, an optimiser's state, and an object with a program."""
    from packaging.version import Version

    net = {f"net.causal_transformer.layers.{i}.0.to_q.weight": torch.zeros(8, 8) for i in range(3)}
    model = {**net, "net.learned_query": torch.zeros(8), "noise_scheduler.betas": torch.zeros(1000)}
    model |= {"clip.clip.visual.conv1.weight": torch.zeros(4, 3, 2, 2)}

    return {
        "model": model, "version": Version("1.15.4"), "step": 12_000, "scheduler": Canary(canary),
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(8, 8)}}, "param_groups": [{"lr": 1e-4}]},
    }  # fmt: skip


def test_a_checkpoint_of_dalle2_pytorch_is_described_and_not_run(tmp_path: Path):
    file, canary = tmp_path / "latest.pth", tmp_path / "sung"
    torch.save(dalle2(canary), file)
    said = CliRunner().invoke(app, ["inspect", str(file)], env={"COLUMNS": "200"}).stdout
    assert not canary.exists()
    for part in (
        "a diffusion prior of dalle2-pytorch (depth 3, width 8, 1000 timesteps) with a CLIP inside, which cannot be imported",
        "No code in it was run", "step: 12000", "version: 1.15.4", "Left out, since they are no tensors: posix.mkdir",
    ):  # fmt: skip
        assert part in said, said
    rows = {
        line.split("│")[1].strip(): line.split("│")[3].strip() for line in said.splitlines() if line.count("│") == 5
    }
    assert rows["model.net"] == "200"
    assert rows["model.clip"] == "48"
    assert rows["optimizer"] == "64"


@pytest.mark.parametrize(
    ("state", "what"),
    [
        (
            {"unets.0.init_conv.weight": torch.zeros(2), "unets.1.a": torch.zeros(2)},
            "a decoder of dalle2-pytorch with 2 unets",
        ),
        ({"model.prd_emb": torch.zeros(2)}, "a prior of Karlo's own"),
        ({"visual.proj": torch.zeros(2), "logit_scale": torch.zeros(())}, "a CLIP, which `unclip import clip"),
        ({"weight": torch.zeros(2)}, "a file of weights that is not known here"),
    ],
)
def test_other_files_are_described(tmp_path: Path, state: dict[str, torch.Tensor], what: str):
    from safetensors.torch import save_file

    from unclip.interop.checkpoints import describe

    torch.save(state, tmp_path / "file.pt")
    save_file(state, tmp_path / "file.safetensors")
    for name in ("file.pt", "file.safetensors"):
        assert describe(tmp_path / name).what.startswith(what)


def test_files_that_are_no_checkpoints_are_refused(tmp_path: Path):
    from unclip.interop.checkpoints import describe

    (tmp_path / "text.pt").write_text("hello")
    torch.jit.script(torch.nn.Linear(1, 1)).save(str(tmp_path / "program.pt"))
    torch.save({"step": 1}, tmp_path / "empty.pt")
    for name, message in (
        ("text", "is not a checkpoint of torch"), ("program", "it holds a program"), ("empty", "holds no tensors"),
    ):  # fmt: skip
        with pytest.raises(ArtifactError, match=message):
            describe(tmp_path / f"{name}.pt")
