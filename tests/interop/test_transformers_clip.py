"""CLIP's towers are transformers' to rounding, both ways."""

import json
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from unclip.errors import ArtifactError, ConfigError
from unclip.interop import transformers_clip as towers
from unclip.models.clip import CLIP, CLIPConfig

SMALL = CLIPConfig(
    embed_dim=48,
    image_size=32,
    patch_size=8,
    vision_width=64,
    vision_layers=2,
    vision_heads=2,
    text_width=64,
    text_layers=2,
    text_heads=4,
    context_length=20,
)


def clip_of(cfg: CLIPConfig) -> CLIP:
    torch.manual_seed(0)
    clip = CLIP(cfg)
    with torch.no_grad():
        for parameter in clip.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return clip.eval()


def described(**vision: Any) -> CLIPConfig:
    """A model as a folder or the hub describes it, with options that the small one has not."""
    given = {
        "embed_dim": 32,
        "quick_gelu": True,
        "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 64, "layers": 1, "head_width": 16, **vision},
        "text_cfg": {"context_length": 12, "width": 32, "heads": 4, "layers": 3, "mlp_ratio": 3.0},
    }
    return CLIPConfig(name="local-dir:gone", description=json.dumps({"model_cfg": given}))


CONFIGS = {
    "small": SMALL,
    "small, QuickGELU": CLIPConfig(**{**vars(SMALL), "quick_gelu": True}),
    "described": described(mlp_ratio=2.0, patch_dropout=0.5),
}


def theirs(clip: CLIP) -> tuple[Any, Any]:
    transformers = pytest.importorskip("transformers")
    state = clip.model.state_dict()
    text = transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**towers.text_config(clip.cfg)))
    vision = transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**towers.vision_config(clip.cfg)))
    text.load_state_dict(towers.to_transformers(state, towers.TEXT), strict=True)
    vision.load_state_dict(towers.to_transformers(state, towers.VISION), strict=True)
    return text.eval(), vision.eval()


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_outputs_are_those_of_transformers(name: str):
    clip = clip_of(CONFIGS[name])
    text, vision = theirs(clip)
    tokens = clip.tokenize(["a red cube!", "two cones on top of one another and a sphere", ""])
    z_t, states = clip.encode_text(tokens)
    found = text(tokens)
    assert z_t.std() > 0.1
    assert_close(found.text_embeds, z_t, atol=1e-5, rtol=0)
    assert_close(found.last_hidden_state, states, atol=1e-5, rtol=0)
    image = torch.randint(256, (3, 3, clip.image_size, clip.image_size), dtype=torch.uint8)
    z_i = clip.encode_image(image)
    assert z_i.std() > 0.1
    found = vision((image / 255 - clip.mean) / clip.std).image_embeds
    assert_close(found, z_i, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", CONFIGS)
def test_back_again_all_is_equal_to_the_bit(name: str):
    clip = clip_of(CONFIGS[name])
    text, vision = theirs(clip)
    found = towers.from_transformers(text.state_dict(), towers.TEXT)
    found |= towers.from_transformers(vision.state_dict(), towers.VISION)
    wanted = clip.model.state_dict()
    assert {*wanted} - {*found} == {"logit_scale"}
    for key, value in found.items():
        assert torch.equal(value, wanted[key]), key
    again = towers.open_clip_config(towers.text_config(clip.cfg), towers.vision_config(clip.cfg))
    rebuilt = CLIP(CLIPConfig(name="local-dir:gone", description=json.dumps({"model_cfg": again})))
    rebuilt.model.load_state_dict(found | {"logit_scale": torch.tensor(towers.LOGIT_SCALE)}, strict=True)
    tokens = clip.tokenize(["a red cube"])
    assert torch.equal(rebuilt.eval().encode_text(tokens)[0], clip.encode_text(tokens)[0])


def test_a_stray_position_ids_is_no_weight():
    clip = clip_of(SMALL)
    state = towers.to_transformers(clip.model.state_dict(), towers.TEXT)
    state["text_model.embeddings.position_ids"] = torch.arange(20)[None]
    assert "token_embedding.weight" in towers.from_transformers(state, towers.TEXT)


def test_defaults_are_those_of_transformers():
    transformers = pytest.importorskip("transformers")
    for defaults, cls in (
        (towers.TEXT_DEFAULTS, transformers.CLIPTextConfig),
        (towers.VISION_DEFAULTS, transformers.CLIPVisionConfig),
    ):
        assert {name: getattr(cls(), name) for name in defaults} == defaults


def test_what_is_no_tower_is_refused():
    state = towers.to_transformers(clip_of(SMALL).model.state_dict(), towers.TEXT)
    with pytest.raises(ArtifactError, match=r"class_embedding is missing: this is not the vision tower of a CLIP"):
        towers.from_transformers(state, towers.VISION)
    with pytest.raises(ArtifactError, match=r"the text encoder holds lm_head\.weight \(1 in all\), which CLIP's text"):
        towers.from_transformers({**state, "lm_head.weight": torch.zeros(1)}, towers.TEXT)
    del state["text_model.encoder.layers.1.mlp.fc2.bias"]
    with pytest.raises(ArtifactError, match=r"layers\.1\.mlp\.fc2\.bias is missing: this is not the text tower"):
        towers.from_transformers(state, towers.TEXT)


@pytest.mark.parametrize(
    ("vision", "message"),
    [
        (
            {"ls_init_value": 0.1},
            r"cannot express vision_cfg\.ls_init_value=0\.1 of this CLIP; it knows OpenAI's plain",
        ),
        ({"pool_type": "avg"}, r"cannot express vision_cfg\.pool_type=avg"),
        ({"layers": [1, 1, 1, 1]}, r"cannot express vision_cfg\.layers=\[1, 1, 1, 1\]"),
        ({"image_size": [16, 24]}, r"reads squares, not \(16, 24\) pixels"),
    ],
)
def test_other_towers_are_refused(vision: dict[str, Any], message: str):
    clip = CLIP(described(**vision))
    with pytest.raises(ConfigError, match=message):
        towers.vision_config(clip.cfg)


@pytest.mark.parametrize(
    ("text", "vision", "message"),
    [
        ({"hidden_act": "relu"}, {}, r"the text encoder has hidden_act=relu .* take another encoder"),
        ({"layer_norm_eps": 1e-6}, {}, r"layer_norm_eps=1e-06"),
        ({"projection_dim": 8}, {"projection_dim": 9}, r"projection_dim \(8, 9\): they are not of one CLIP"),
        ({"hidden_act": "gelu"}, {}, r"differ in hidden_act \(gelu, quick_gelu\)"),
    ],
)
def test_other_configurations_are_refused(text: dict[str, Any], vision: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        towers.open_clip_config(text, vision)
