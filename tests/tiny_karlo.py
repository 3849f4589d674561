"""Tiny pipelines of diffusers with random weights, built and saved offline as its users have them."""

import gzip
import json
import os
from pathlib import Path
from typing import Any

import torch

os.environ["HF_HUB_OFFLINE"] = "1"
D, CONTEXT, WIDTH = 32, 48, 32  # of z_i, of the decoder's context tokens, of the U-Nets' first level
DECODER_SIZE, FULL_SIZE = 16, 32


def tokenizer(pad: str = "<|endoftext|>") -> Any:
    from open_clip.tokenizer import bytes_to_unicode, default_bpe
    from transformers import CLIPTokenizer

    with gzip.open(default_bpe()) as file:
        merges = file.read().decode("utf-8").split("\n")[1 : 49152 - 256 - 2 + 1]
    letters = list(bytes_to_unicode().values())
    tokens = letters + [letter + "</w>" for letter in letters] + ["".join(merge.split()) for merge in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=[tuple(merge.split()) for merge in merges],
        pad_token=pad,
        model_max_length=77,
    )


def schedulers() -> dict[str, Any]:
    from diffusers import UnCLIPScheduler

    return {
        "prior_scheduler": UnCLIPScheduler(
            variance_type="fixed_small_log", prediction_type="sample", clip_sample_range=5.0
        ),
        "decoder_scheduler": UnCLIPScheduler(variance_type="learned_range", prediction_type="epsilon"),
        "super_res_scheduler": UnCLIPScheduler(variance_type="fixed_small_log", prediction_type="epsilon"),
    }


def text_encoder(eos: int = 49407) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            hidden_size=D, projection_dim=D, intermediate_size=4 * D, num_attention_heads=4, num_hidden_layers=2,
            hidden_act="quick_gelu", eos_token_id=eos,
        )
    )  # fmt: skip


def image_encoder() -> Any:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    return CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=D, projection_dim=D, intermediate_size=4 * D, num_hidden_layers=2, num_attention_heads=4,
            image_size=32, patch_size=8,
        )
    )  # fmt: skip


def prior(**other: Any) -> Any:
    from diffusers import PriorTransformer

    found = PriorTransformer(num_attention_heads=2, attention_head_dim=16, num_layers=2, embedding_dim=D, **other)
    with torch.no_grad():
        found.clip_mean.normal_(std=0.3)
        found.clip_std.uniform_(0.3, 0.6)
        found.positional_embedding.normal_(std=0.3)
        found.prd_embedding.normal_(std=0.3)
    return found


def components() -> dict[str, Any]:
    """All parts of both pipelines."""
    from diffusers import UNet2DConditionModel, UNet2DModel
    from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel
    from transformers import CLIPImageProcessor

    torch.manual_seed(0)
    decoder = UNet2DConditionModel(
        sample_size=DECODER_SIZE, in_channels=3, out_channels=6, layers_per_block=1, norm_num_groups=16,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn", block_out_channels=(WIDTH, 2 * WIDTH),
        cross_attention_dim=CONTEXT, attention_head_dim=8, resnet_time_scale_shift="scale_shift",
        class_embed_type="identity",
    )  # fmt: skip

    def upsampler() -> Any:
        return UNet2DModel(
            sample_size=FULL_SIZE, in_channels=6, out_channels=3, layers_per_block=1, add_attention=False,
            down_block_types=("ResnetDownsampleBlock2D",) * 2, up_block_types=("ResnetUpsampleBlock2D",) * 2,
            block_out_channels=(WIDTH, 2 * WIDTH),
        )  # fmt: skip

    text_proj = UnCLIPTextProjModel(clip_embeddings_dim=D, time_embed_dim=4 * WIDTH, cross_attention_dim=CONTEXT)
    with torch.no_grad():
        text_proj.learned_classifier_free_guidance_embeddings.normal_()
    return {
        "prior": prior(),
        "decoder": decoder,
        "text_proj": text_proj,
        "text_encoder": text_encoder(),
        "image_encoder": image_encoder(),
        "super_res_first": upsampler(),
        "super_res_last": upsampler(),
        "tokenizer": tokenizer(),
        "feature_extractor": CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        **schedulers(),
    }


def text_to_image(parts: dict[str, Any]) -> Any:
    from diffusers import UnCLIPPipeline

    pipeline = UnCLIPPipeline(**{k: v for k, v in parts.items() if k not in ("image_encoder", "feature_extractor")})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def variation(parts: dict[str, Any]) -> Any:
    from diffusers import UnCLIPImageVariationPipeline

    return UnCLIPImageVariationPipeline(**{k: v for k, v in parts.items() if not k.startswith("prior")})


def as_in_2022(folder: Path) -> None:
    """A saved folder in the form of 2022: .bin weights with a stray table, short configs, old tokenizer files."""
    from safetensors.torch import load_file

    for path in [*folder.rglob("*.safetensors")]:
        state = load_file(path)
        stem = "pytorch_model" if path.stem == "model" else path.stem
        if "text_model" in "".join(state):
            state["text_model.embeddings.position_ids"] = torch.arange(77)[None]
        torch.save(state, path.with_name(f"{stem}.bin"))
        path.unlink()
    config = folder / "prior" / "config.json"
    kept = json.loads(config.read_text())
    for name in ("time_embed_act_fn", "norm_in_type", "embedding_proj_norm_type", "encoder_hid_proj_type", "added_emb_type",
                 "time_embed_dim", "embedding_proj_dim", "clip_embed_dim"):  # fmt: skip
        del kept[name]
    config.write_text(json.dumps(kept))
    text = json.loads((folder / "text_encoder" / "config.json").read_text())
    (folder / "text_encoder" / "config.json").write_text(json.dumps({**text, "eos_token_id": 2}))
    index = json.loads((folder / "model_index.json").read_text())
    index["text_proj"] = ["unclip", "UnCLIPTextProjModel"]
    (folder / "model_index.json").write_text(json.dumps({**index, "_diffusers_version": "0.11.0.dev0"}))
    vocabulary = json.loads((folder / "tokenizer" / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps(vocabulary["vocab"]))
    merges = [" ".join(merge) if isinstance(merge, list) else merge for merge in vocabulary["merges"]]
    (folder / "tokenizer" / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    (folder / "tokenizer" / "tokenizer.json").unlink()
