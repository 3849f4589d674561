import pickle
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tests_support import Canary
from torch.testing import assert_close

from unclip.config import OptimConfig, typed
from unclip.data.batch import Batch
from unclip.errors import ArtifactError, ConfigError
from unclip.models.clip import CLIP, CLIPConfig, Tokenizer, interpolate
from unclip.models.contrastive import Contrast, contrastive_loss
from unclip.models.interface import Interface
from unclip.optim import make_optimizer

SMALL = {
    "embed_dim": 24,
    "image_size": 16,
    "vision_width": 32,
    "vision_layers": 2,
    "vision_heads": 2,
    "text_width": 32,
    "text_layers": 2,
    "text_heads": 2,
    "context_length": 16,
}
RESNET: dict[str, object] = {"image_size": 32, "vision_width": 4, "vision_blocks": [1, 1, 1, 1]}
CAPTIONS = ["a red cube left of a blue ball", "", "two cones"]


@pytest.fixture(scope="module")
def clip() -> CLIP:
    torch.manual_seed(0)
    return CLIP(CLIPConfig(**SMALL)).eval()


@pytest.fixture(scope="module")
def plain(clip: CLIP) -> open_clip.CLIP:
    """open_clip's own model, with its own attention, and the same weights."""
    vision = {"image_size": 16, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16}
    text = {"context_length": 16, "width": 32, "layers": 2, "heads": 2}
    model = open_clip.CLIP(embed_dim=24, vision_cfg=vision, text_cfg=text).eval()
    model.load_state_dict(clip.model.state_dict(), strict=True)
    return model


@torch.no_grad()
def test_embeddings_are_open_clips(clip: CLIP, plain: open_clip.CLIP) -> None:
    image = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))
    assert_close(clip.encode_image(image), plain.encode_image((image / 255 - mean) / std), atol=1e-5, rtol=1e-5)
    tokens = clip.tokenize(CAPTIONS)
    text_emb, text_seq = clip.encode_text(tokens)
    assert_close(text_emb, plain.encode_text(tokens), atol=1e-5, rtol=1e-5)
    assert text_seq.shape == (3, 16, 32)


def test_a_resnet_is_open_clips() -> None:
    torch.manual_seed(0)
    small = {"embed_dim": 24, "image_size": 32, "vision_width": 4, "text_width": 32, "text_layers": 1, "text_heads": 2}
    clip = CLIP(CLIPConfig(**small, vision_blocks=[1, 2, 1, 1]))  # type: ignore[arg-type]
    vision = {"image_size": 32, "width": 4, "layers": [1, 2, 1, 1], "head_width": 64}
    plain = open_clip.CLIP(
        embed_dim=24, vision_cfg=vision, text_cfg={"width": 32, "layers": 1, "heads": 2, "context_length": 32}
    )
    image = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
    batch = Batch(key=[""] * 8, caption=[""] * 8, image=image, tokens=clip.tokenize([str(i) for i in range(8)]))
    for _ in range(3):
        clip.losses(batch)["contrastive"].backward()
    gradients = [p.grad for p in clip.model.visual.parameters()]
    assert all(g is not None and g.isfinite().all() for g in gradients)
    plain.load_state_dict(clip.model.state_dict(), strict=True)
    assert plain.visual.bn1.running_mean.abs().min() > 0  # of the three batches
    x = (image / 255 - clip.mean) / clip.std
    with torch.no_grad():
        z_i = clip.eval().encode_image(image)
        assert_close(z_i, plain.eval().encode_image(x), atol=1e-5, rtol=1e-5)
        assert_close(clip.encode_image(image[:2]), z_i[:2], atol=1e-5, rtol=1e-5)  # no statistics of the batch
    assert z_i.shape == (8, 24)


@torch.no_grad()
def test_cut_captions_give_the_same(clip: CLIP) -> None:
    tokens = clip.tokenize(CAPTIONS)
    length = int(tokens.argmax(1).max()) + 1
    assert length < 16
    text_emb, text_seq = clip.encode_text(tokens)
    cut_emb, cut_seq = clip.encode_text(tokens[:, :length])
    assert_close(cut_emb, text_emb, atol=1e-6, rtol=1e-5)
    assert_close(cut_seq, text_seq[:, :length], atol=1e-6, rtol=1e-5)


def test_tokens_are_clips_and_long_captions_keep_their_end() -> None:
    tokenizer = pickle.loads(pickle.dumps(Tokenizer(8)))
    tokens = tokenizer(["a photo of a cat", "cat " * 50])
    assert tokens[0].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407, 0]
    assert tokens[1].tolist() == [49406, *[2368] * 6, 49407]


@torch.no_grad()
def test_other_sizes_are_resized_and_cropped(clip: CLIP) -> None:
    flat = torch.full((1, 3, 16, 16), 90, dtype=torch.uint8)
    wide = torch.zeros((1, 3, 40, 80), dtype=torch.uint8)
    wide[..., 10:70] = 90
    assert_close(clip.encode_image(wide), clip.encode_image(flat), atol=1e-5, rtol=1e-5)


def test_contrastive_loss_of_known_logits() -> None:
    same = torch.eye(4)
    expected = -torch.log(torch.exp(torch.tensor(2.0)) / (torch.exp(torch.tensor(2.0)) + 3))
    assert_close(contrastive_loss(same, same, torch.tensor(2.0)), expected)
    one = torch.ones(8, 4) / 2
    assert_close(contrastive_loss(one, one, torch.tensor(50.0)), torch.tensor(8.0).log())
    images, texts = F.normalize(torch.randn(2, 6, 5), dim=-1)
    both = contrastive_loss(images, texts, torch.tensor(3.0))
    assert_close(both, contrastive_loss(texts, images, torch.tensor(3.0)))


def test_training_learns_pairs_and_bounds_the_scale() -> None:
    torch.manual_seed(0)
    clip = CLIP(CLIPConfig(**SMALL))
    colours = torch.randint(0, 256, (8, 3, 1, 1), dtype=torch.uint8)
    tokens = clip.tokenize([f"number {i}" for i in range(8)])[:, :6]
    batch = Batch(position=list(range(8)), image=colours.expand(8, 3, 16, 16), tokens=tokens)
    with torch.no_grad():
        clip.model.logit_scale.fill_(9.0)
    clip.losses(batch)
    assert_close(clip.model.logit_scale.exp().item(), 100.0)
    with torch.no_grad():
        clip.model.logit_scale.fill_(2.6)
    optimizer = torch.optim.AdamW(clip.parameters(), 1e-3)
    for _ in range(40):
        loss = clip.losses(batch)["contrastive"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.3 < torch.tensor(8.0).log()
    assert all(p.grad is not None for p in clip.parameters())


def test_interface_and_its_check(clip: CLIP) -> None:
    assert clip.interface() == Interface(24, 32, 16, 49408, "")
    CLIP(CLIPConfig(**SMALL), Interface(24, 32, 16, 49408, "hash"))
    with pytest.raises(ArtifactError, match="embed_dim=25"):
        CLIP(CLIPConfig(**SMALL), Interface(25, 32, 16, 49408))


@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_local_weights_load_strictly(clip: CLIP, tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"weights.{kind}"
    state = {name: value.contiguous() for name, value in clip.model.state_dict().items()}
    torch.save({"state_dict": state}, path) if kind == "pt" else save_file(state, path)
    other = CLIP(CLIPConfig(**SMALL, pretrained=str(path)))
    other.fit()
    assert all(torch.equal(other.model.state_dict()[name], value) for name, value in state.items())
    del state["ln_final.weight"]
    torch.save(state, path) if kind == "pt" else save_file(state, path)
    with pytest.raises(ArtifactError, match="ln_final"):
        other.fit()


def test_weights_of_the_softmax_begin_at_siglips_scale_and_bias(clip: CLIP, tmp_path: Path) -> None:
    path = tmp_path / "softmax.safetensors"
    save_file({name: value.contiguous() for name, value in clip.model.state_dict().items()}, path)
    other = CLIP(CLIPConfig(**SMALL, contrast=Contrast.sigmoid, pretrained=str(path)))
    other.fit()
    assert torch.equal(other.model.text_projection, clip.model.text_projection)
    assert other.model.logit_scale.exp().item() == pytest.approx(10)
    assert other.model.logit_bias.item() == -10
    with torch.no_grad():
        other.model.logit_scale.fill_(3.0)
        other.model.logit_bias.fill_(-7.0)
    save_file({name: value.contiguous() for name, value in other.model.state_dict().items()}, path)
    other.fit()
    assert (other.model.logit_scale.item(), other.model.logit_bias.item()) == (3.0, -7.0), "SigLIP's own are kept"


def test_pickled_code_does_not_run(tmp_path: Path) -> None:
    path, canary = tmp_path / "weights.pt", Canary(tmp_path / "canary")
    torch.save({"state_dict": canary}, path)
    torch.load(path, weights_only=False)
    canary.path.rmdir()  # it was there: the file does run code where it may
    with pytest.raises(ArtifactError, match=r"weights\.pt"):
        CLIP(CLIPConfig(**SMALL, pretrained=str(path))).fit()
    assert not canary.path.exists()


def quick(config: CLIPConfig) -> bool:
    return bool(config.architecture().arguments.get("quick_gelu"))


def test_openai_weights_get_quick_gelu() -> None:
    assert quick(CLIPConfig(name="ViT-B-32", pretrained="openai"))
    assert not quick(CLIPConfig(name="ViT-B-32", pretrained="laion2b_s34b_b79k"))
    assert quick(CLIPConfig(name="ViT-B-32-quickgelu", pretrained="laion400m_e32"))
    assert not quick(CLIPConfig(name="ViT-B-32", pretrained="openai", quick_gelu=False))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "ViT-B-33"}, "not in open_clip"),
        ({"name": "ViT-B-16-SigLIP"}, "another text tower"),
        ({"name": "ViT-B-32", "patch_size": 16}, "patch_size has no effect"),
        ({"image_size": 33}, "not a multiple"),
        ({"text_width": 100}, "text_width=100 is not a multiple of its text_heads=3"),
        ({"vision_width": 100}, "vision_width=100 is not a multiple of its vision_heads=3"),
        ({"vision_blocks": [1, 1]}, "blocks of four stages"),
        ({"vision_blocks": [1, 1, 0, 1]}, "blocks of four stages"),
        ({"vision_blocks": [1, 1, 1, 1], "image_size": 48}, "a multiple of 32"),
        ({"vision_blocks": [1, 1, 1, 1], "vision_width": 15, "image_size": 64}, "an even vision_width"),
        ({"pretrained": "openai"}, "neither a file nor a tag"),
        ({**RESNET, "patch_size": 4}, "model.patch_size has no effect with model.vision_blocks"),
        ({**RESNET, "vision_heads": 0}, "model.vision_heads has no effect with model.vision_blocks"),
        ({**RESNET, "vision_width": 0}, "an even vision_width"),
        ({**RESNET, "image_size": 0}, "a multiple of 32"),
        ({**RESNET, "lora_rank": 2}, "adapts the matrices of transformers"),
        ({**RESNET, "freeze_image": True, "unlocked_image_groups": 1}, "a ResNet is frozen as a whole"),
    ],
)
def test_wrong_settings_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CLIP(CLIPConfig(**{**change})).fit()  # type: ignore[arg-type]


def test_batch_norms_and_what_does_not_go_with_them() -> None:
    clip = CLIP(CLIPConfig(**RESNET))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="grades the layers of transformers"):
        make_optimizer(clip, OptimConfig(layer_decay=0.8))
    with pytest.raises(ConfigError, match="leave it empty"):
        make_optimizer(clip, OptimConfig(ema_profiles=[0.1]))
    other = CLIP(CLIPConfig(**RESNET, freeze_image=True))  # type: ignore[arg-type]
    before = clip.model.text_projection.detach().clone()
    interpolate(clip, other, 0.0)  # the statistics are those of no step, alike
    assert torch.equal(other.model.text_projection, before)
    clip.model.visual.bn1.running_var.mul_(2)
    with pytest.raises(ConfigError, match="nobody knows their statistics"):
        interpolate(clip, other, 0.5)


@pytest.mark.parametrize("zero", ["text_heads", "vision_heads", "patch_size"])
def test_a_zero_is_refused_in_words(zero: str) -> None:
    from omegaconf import OmegaConf

    with pytest.raises(ConfigError, match=f"one of these must not be 0: .*{zero}"):
        typed(OmegaConf.create({zero: 0}), CLIPConfig)
