"""CLIP's training step: losses, parts of a batch, sharpness-aware minimisation, frozen towers, on one rank and on two."""

import copy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from models.ddp_gradients import MODES, SMALL, make_batch, make_clip
from torch import nn
from torch.testing import assert_close

from unclip.config import OptimConfig, TrainerConfig
from unclip.errors import ConfigError
from unclip.models.clip import CLIP, CLIPConfig, interpolate
from unclip.models.contrastive import Contrast, sigmoid_loss
from unclip.optim import make_optimizer
from unclip.stages.clip import ClipStage


def stage_of(clip: CLIP, accumulate: int, rho: float) -> ClipStage:
    """A stage outside of a trainer, on one device."""
    stage = ClipStage(clip, TrainerConfig(batch_size=8, accumulate=accumulate), OptimConfig(sam_rho=rho), seed=0)
    stage._trainer = SimpleNamespace(strategy=None, global_step=0, global_rank=0)  # type: ignore[assignment]
    stage.manual_backward = lambda loss: loss.backward()  # type: ignore[method-assign]
    return stage


def gradients(clip: CLIP, accumulate: int, rho: float = 0.0) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    clip.zero_grad(set_to_none=True)
    terms = stage_of(clip, accumulate, rho)._gradients(make_batch(clip))
    return terms["contrastive"], {k: p.grad.clone() for k, p in clip.named_parameters() if p.grad is not None}


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], tolerance: float = 1e-5) -> None:
    for name, value in wanted.items():
        if value.any():
            assert_close(found[name], value, rtol=tolerance, atol=tolerance * value.abs().max().item(), msg=name)


def test_sigmoid_loss_by_hand() -> None:
    same = F.normalize(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), dim=1)
    found = sigmoid_loss(same, same, torch.tensor(3.0), torch.tensor(-1.0))
    pair, other = torch.tensor(2.0), torch.tensor(-1.0)  # the logits of a pair and of two strangers
    assert_close(found, -F.logsigmoid(pair) - F.logsigmoid(-other))


@pytest.mark.parametrize("accumulate", [2, 3, 8])
@pytest.mark.parametrize("contrast", list(Contrast))
def test_a_batch_in_parts_has_the_whole_batchs_loss_and_gradients(contrast: Contrast, accumulate: int) -> None:
    clip = make_clip()
    clip.cfg.contrast = contrast
    loss, wanted = gradients(clip, 1)
    cached_loss, found = gradients(clip, accumulate)
    assert_close(cached_loss, loss, rtol=1e-6, atol=1e-6)
    assert set(found) == set(wanted)
    assert_same(found, wanted)
    assert wanted["model.logit_scale"].abs() > 1e-4


def test_parts_under_autocast_have_gradients() -> None:
    clip = make_clip()
    with torch.autocast("cpu", torch.bfloat16):
        _, found = gradients(clip, 2)
    assert all(found[name].any() for name in ("model.visual.conv1.weight", "model.token_embedding.weight"))


def test_sam_takes_the_gradient_uphill_and_leaves_the_weights() -> None:
    clip = make_clip()
    before = copy.deepcopy(clip.state_dict())
    _, flat = gradients(clip, 1)
    _, found = gradients(clip, 1, rho=0.1)
    assert all(torch.equal(value, before[name]) for name, value in clip.state_dict().items())
    norm = torch.nn.utils.get_total_norm(list(flat.values()))
    with torch.no_grad():
        for name, p in clip.named_parameters():
            p.add_(0.1 * flat[name] / norm) if name in flat else None
    _, wanted = gradients(clip, 1)
    assert_same(found, wanted)
    with pytest.raises(AssertionError):
        assert_same(found, flat)


def test_sam_leaves_batch_norms_statistics_to_the_first_pass() -> None:
    torch.manual_seed(0)
    resnet = {"image_size": 32, "vision_width": 4, "vision_blocks": [1, 1, 1, 1]}
    text = {"text_width": 16, "text_layers": 1, "text_heads": 2, "context_length": 8}
    clip = CLIP(CLIPConfig(embed_dim=12, **resnet, **text)).train()  # type: ignore[arg-type]
    other = copy.deepcopy(clip)
    gradients(clip, 1, rho=0.1)
    gradients(other, 1)
    norms = [(a, b) for a, b in zip(clip.modules(), other.modules(), strict=True) if isinstance(a, nn.BatchNorm2d)]
    assert len(norms) > 10
    assert all(a.running_mean.any() for a, _ in norms), "they have moved"
    assert all(torch.equal(a.running_mean, b.running_mean) for a, b in norms)
    assert all(torch.equal(a.running_var, b.running_var) for a, b in norms)
    assert {a.momentum for a, _ in norms} == {0.1}


def test_two_ranks_agree_with_one_device(tmp_path: Path) -> None:
    script = Path(__file__).with_name("ddp_gradients.py")
    done = subprocess.run([sys.executable, script, tmp_path], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "out.pt")
    for mode, (contrast, _, rho) in MODES.items():
        clip = make_clip()
        clip.cfg.contrast = contrast
        loss, wanted = sam_per_rank(clip, rho) if rho else gradients(clip, 1)
        assert_close(found[mode][0], loss, rtol=1e-5, atol=1e-5, msg=mode)
        assert_same(found[mode][1], wanted, tolerance=1e-4 if rho else 1e-5)  # the climb multiplies rounding errors


def sam_per_rank(clip: CLIP, rho: float) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """By the definition: each of two copies climbs by its own half's gradient, then both see the pairs of both."""
    copies = [clip, copy.deepcopy(clip)]
    first = both_losses(copies)
    with torch.no_grad():
        for one in copies:
            weights = [p for p in one.parameters() if p.grad is not None]
            norm = torch.nn.utils.get_total_norm([p.grad for p in weights if p.grad is not None])
            for p in weights:
                p.add_(rho * p.grad / norm)
    both_losses(copies)
    named = [dict(one.named_parameters()) for one in copies]
    pairs = {name: [one[name].grad for one in named] for name in named[0]}
    return first, {name: (a + b) / 2 for name, (a, b) in pairs.items() if a is not None and b is not None}


def both_losses(copies: list[CLIP]) -> torch.Tensor:
    """Fill the gradients of the sum of both ranks' losses; each rank has its own weights and temperature."""
    halves = make_batch(copies[0]).split(2)
    for one in copies:
        one.zero_grad(set_to_none=True)
    features = [one.features(half) for one, half in zip(copies, halves, strict=True)]
    images, texts = (torch.cat(column) for column in zip(*features, strict=True))
    rows = [slice(0, len(halves[0])), slice(len(halves[0]), None)]
    losses = torch.stack(
        [one.contrast(images, texts, mine)["contrastive"] for one, mine in zip(copies, rows, strict=True)]
    )
    losses.sum().backward()
    return losses.mean().detach()


def trained(**settings: object) -> set[str]:
    return {name for name, p in CLIP(CLIPConfig(**(SMALL | settings))).named_parameters() if p.requires_grad}  # type: ignore[arg-type]


def test_frozen_towers_and_unlocked_groups() -> None:
    everything = trained()
    image = {name for name in everything if name.startswith("model.visual.")}
    scalars = {"model.logit_scale"}
    assert trained(freeze_image=True) == everything - image
    assert trained(freeze_text=True) == image | scalars
    assert trained(freeze_image=True, unlocked_image_groups=1) == everything - image | {"model.visual.proj"}
    two = trained(freeze_image=True, unlocked_image_groups=2)
    assert "model.visual.transformer.resblocks.0.mlp.c_fc.weight" in two
    assert "model.visual.conv1.weight" not in two
    assert "model.text_projection" in trained(freeze_text=True, unlocked_text_groups=1)
    with pytest.raises(ConfigError, match=r"unlocked_text_groups needs model\.freeze_text=true"):
        CLIPConfig(unlocked_text_groups=1)


def test_lower_layers_learn_slower() -> None:
    clip = CLIP(CLIPConfig(**(SMALL | {"vision_layers": 2})))  # type: ignore[arg-type]
    optimizer = make_optimizer(clip, OptimConfig(layer_decay=0.5))
    scale = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    found = {name.removeprefix("model."): scale[id(p)] for name, p in clip.named_parameters()}
    assert (
        found["visual.proj"] == found["visual.ln_post.weight"] == found["text_projection"] == found["logit_scale"] == 1
    )
    assert found["visual.transformer.resblocks.1.attn.in_proj_weight"] == 0.5
    assert found["visual.transformer.resblocks.0.attn.in_proj_weight"] == 0.25
    assert found["visual.conv1.weight"] == found["visual.positional_embedding"] == 0.125
    assert found["transformer.resblocks.0.ln_1.weight"] == 0.5
    assert found["token_embedding.weight"] == 0.25
    with pytest.raises(ConfigError, match="layer_decay is for fine-tuning CLIP"):
        make_optimizer(torch.nn.Linear(2, 2), OptimConfig(layer_decay=0.5))


def test_adapters_learn_at_the_rate_of_their_layer() -> None:
    pytest.importorskip("peft")
    clip = CLIP(CLIPConfig(**(SMALL | {"vision_layers": 2}), lora_rank=2))  # type: ignore[arg-type]
    optimizer = make_optimizer(clip, OptimConfig(layer_decay=0.5))
    scale = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    found = {name.removeprefix("model."): scale[id(p)] for name, p in clip.named_parameters() if p.requires_grad}
    assert found.pop("logit_scale") == 1
    blocks = {"visual.transformer.resblocks.1.": 0.5, "visual.transformer.resblocks.0.": 0.25}
    blocks["transformer.resblocks.0."] = 0.5
    wanted = {name: rate for name in found for start, rate in blocks.items() if name.startswith(start)}
    assert found == wanted
    assert len(set(wanted.values())) == 2


def test_checkpointed_gradients_are_the_same() -> None:
    plain = make_clip()
    wanted = gradients(plain, 1)[1]
    plain.model.set_grad_checkpointing(True)
    assert_same(gradients(plain, 1)[1], wanted)
    assert CLIP(CLIPConfig(**SMALL, gradient_checkpointing=True)).model.transformer.grad_checkpointing  # type: ignore[arg-type]


def test_lora_starts_from_the_weights_trains_few_and_merges() -> None:
    pytest.importorskip("peft")
    plain = make_clip()
    batch, names = make_batch(plain), set(plain.state_dict())
    clip = CLIP(CLIPConfig(**SMALL, contrast=Contrast.sigmoid, lora_rank=2))  # type: ignore[arg-type]
    clip._set_lora(0)
    clip.load_state_dict(plain.state_dict())
    clip._set_lora(2)
    assert_close(clip.features(batch), plain.features(batch))
    trained = {name for name, p in clip.named_parameters() if p.requires_grad}
    assert {name for name in trained if "lora_" not in name} == {"model.logit_scale", "model.logit_bias"}
    for tower in ("visual.", ""):
        for layer in ("attn", "attn.base_layer.out_proj", "mlp.c_fc", "mlp.c_proj"):
            assert f"model.{tower}transformer.resblocks.0.{layer}.lora_A.default.weight" in trained
    for name, p in clip.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    adapted = clip.features(batch)
    assert (adapted[0] - plain.features(batch)[0]).abs().max() > 0.01
    clip.finish()
    assert set(clip.state_dict()) == names
    assert clip.cfg.lora_rank == 0
    assert_close(clip.features(batch), adapted, atol=1e-5, rtol=1e-4)
    with pytest.raises(ConfigError, match=r"leave out model\.freeze_"):
        CLIPConfig(lora_rank=2, freeze_text=True)


def test_wise_ft_lies_between() -> None:
    start, tuned = make_clip(), make_clip()
    with torch.no_grad():
        for p in tuned.parameters():
            p.add_(1.0)
    wanted = {name: value + 0.25 for name, value in start.state_dict().items()}
    interpolate(start, tuned, 0.25)
    assert all(torch.allclose(tuned.state_dict()[name], value) for name, value in wanted.items())
    other = CLIP(CLIPConfig(**(SMALL | {"embed_dim": 6})))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="different architectures"):
        interpolate(other, tuned, 0.5)
